"""Our decoder-only networks with transformers' weights compute what transformers computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.networks import decoder  # noqa: E402

VARIANTS = (
    "gpt2",
    "gpt2_separate",
    "llama",
    "llama_biased",
    "llama_linear",
    "llama3",
    "llama_yarn",
    "llama_yarn_bounds",
    "mistral",
    "qwen2",
    "qwen2_unbounded",
    "qwen3",
    "gemma2",
    "gemma3",
)
RECIPE = ("AutoModelForImageTextToText", "Gemma3ForCausalLM")
SMALL_GEMMA = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=7,
    eos_token_id=1,
)
LENGTHS, WIDTH = np.array([50, 9, 23]), 50


def padded(left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids of transformers and where they are no padding, `[3, 50]`."""
    ids = np.random.default_rng(3).integers(2, 67, (3, WIDTH))
    there = np.arange(WIDTH)[None] < LENGTHS[:, None]
    if left:
        ids = np.stack([np.roll(row, -n) for row, n in zip(ids, LENGTHS, strict=True)])
        there = there[:, ::-1]
    return ids, there


def theirs(model, ids, there) -> np.ndarray:
    positions = np.maximum(np.cumsum(there, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(there.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    return out.logits.numpy()


def equal(ours, logits, there, what):
    difference = np.abs(np.asarray(ours) - logits)[there].max()
    print(f"{what}: {difference:.1e} of {np.abs(logits[there]).max():.1f}")
    assert logits[there].std() > 0.1
    assert difference < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_under_padding_on_either_side(hf_decoder, variant):
    model, folder = hf_decoder(variant)
    fields, params = hub.load_base(folder)
    config = decoder.DecoderConfig(**fields)

    ids, there = padded(left=False)
    tokens = jnp.where(there, ids + config.token_offset, 0)
    network = decoder.Transformer(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    )
    ours = jax.jit(network.apply)({"params": params}, tokens)
    equal(ours, theirs(model, ids, there), there, f"{variant}, right")

    ids, there = padded(left=True)
    tokens = jnp.where(there, ids + config.token_offset, 0)
    network = decoder.Transformer(decoder.DecoderConfig(**{**fields, "scan_layers": True}))
    ours = jax.jit(network.apply)(
        {"params": hub.stack_layers(params)},
        tokens,
        decoder_segment_ids=there.astype(np.int32),
        decoder_positions=np.maximum(np.cumsum(there, axis=1) - 1, 0),
    )
    equal(ours, theirs(model, ids, there), there, f"{variant}, left, scanned")


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_of_unequal_prompts_equals_transformers(hf_decoder, variant):
    model, folder = hf_decoder(variant)
    fields, params = hub.load_base(folder)
    scan = variant in ("gpt2", "qwen2", "gemma3")
    config = decoder.DecoderConfig(**{**fields, "scan_layers": scan})
    network = decoder.Transformer(config)
    params = hub.stack_layers(params) if scan else params
    prompts, steps = np.array([12, 0, 5]), 12
    ids = np.random.default_rng(4).integers(2, 67, (3, WIDTH))
    logits = theirs(model, ids, np.ones_like(ids))
    tokens = ids + config.token_offset

    @jax.jit
    def prefill(tokens, lengths):
        return network.apply(
            {"params": params},
            tokens,
            decode=True,
            max_decode_length=steps,
            prompt_lengths=lengths,
            mutable=["cache"],
        )

    @jax.jit
    def step(cache, tokens):
        return network.apply({"params": params, **cache}, tokens, decode=True, mutable=["cache"])

    there = np.arange(12)[None] < prompts[:, None]
    ours, cache = prefill(jnp.where(there, tokens[:, :12], 0), prompts)
    equal(ours, logits[:, :12], there, f"{variant}, prompts")
    rows, differences = np.arange(3), []
    for t in range(steps):
        ours, cache = step(cache, tokens[rows, prompts + t][:, None])
        differences.append(np.abs(np.asarray(ours)[:, 0] - logits[rows, prompts + t]).max())
    print(f"{variant}, steps: {max(differences):.1e}")
    assert max(differences) < 2e-5


@pytest.mark.parametrize("variant", ["gpt2", "llama3"])
def test_a_model_saved_without_its_tied_output_layer_is_the_same_base(
    hf_decoder, tmp_path, variant
):
    model, folder = hf_decoder(variant)
    model.base_model.save_pretrained(tmp_path)
    fields, params = hub.load_base(tmp_path)
    expected_fields, expected = hub.load_base(folder)
    assert fields == expected_fields
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_recipe_for_a_gemma3_for_images_works_as_printed(tmp_path):
    import transformers

    text = dict(transformers.Gemma3TextConfig().to_dict(), **SMALL_GEMMA)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(image_size=16, patch_size=8)
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    model.save_pretrained(tmp_path / "images")
    with pytest.raises(hub.HubError, match="for images and text") as error:
        hub.load_base(tmp_path / "images")
    names = {name: getattr(transformers, name) for name in RECIPE}
    recipe = str(error.value).split("transformers: ")[1]
    exec(recipe, names | {"SRC": tmp_path / "images", "DST": tmp_path / "text"})

    fields, params = hub.load_base(tmp_path / "text")
    ids, there = padded(left=False)
    with torch.no_grad():
        mask = torch.tensor(there.astype(np.int64))
        expected = model(input_ids=torch.tensor(ids), attention_mask=mask).logits.numpy()
    network = decoder.Transformer(decoder.DecoderConfig(**fields))
    ours = network.apply({"params": params}, jnp.where(there, ids, 0))
    equal(ours, expected, there, "text model")
