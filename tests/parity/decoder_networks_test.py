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
