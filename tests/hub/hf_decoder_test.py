"""Hugging Face folders of decoders, without torch or transformers: names, settings of both generations, refusals."""

import math

import numpy as np
import pytest

from modjax import hub
from modjax.hub.layers import flatten
from modjax.networks.decoder import DecoderConfig

WIDTH, HEADS, GROUPS, HEAD_DIM, MLP, VOCAB, LAYERS = 6, 3, 1, 4, 10, 11, 3


def random(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def llama_tensors(prefix="model.", *, head=True, bias=(), norms=(), layers=LAYERS) -> dict:
    """Weights by Llama's names, `[out, in]`; `bias` names projections that have one."""
    inner, keys = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    shapes = {f"{prefix}embed_tokens.weight": (VOCAB, WIDTH), f"{prefix}norm.weight": (WIDTH,)}
    if head:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for i in range(layers):
        block = f"{prefix}layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (inner, WIDTH),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, inner),
            "mlp.gate_proj": (MLP, WIDTH),
            "mlp.up_proj": (MLP, WIDTH),
            "mlp.down_proj": (WIDTH, MLP),
        }.items():
            shapes[f"{block}.{name}.weight"] = shape
            if name.split(".")[1][0] in bias:
                shapes[f"{block}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm", *norms):
            size = HEAD_DIM if name.startswith("self_attn") else WIDTH
            shapes[f"{block}.{name}.weight"] = (size,)
    return random(shapes)


QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def llama_config(model_type="llama", **changes) -> dict:
    config = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.0",
    }
    return config | changes


def gpt2_tensors(prefix="") -> dict:
    """Weights by GPT-2's names, `[in, out]`, with the buffers that its published files hold."""
    shapes = {f"{prefix}wte.weight": (VOCAB, WIDTH), f"{prefix}wpe.weight": (9, WIDTH)}
    shapes |= {f"{prefix}ln_f.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    for i in range(2):
        block = f"{prefix}h.{i}"
        for name, shape in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
            "ln_1": (WIDTH,),
            "ln_2": (WIDTH,),
        }.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[-1:]}
        shapes |= {f"{block}.attn.bias": (1, 1, 9, 9), f"{block}.attn.masked_bias": ()}
    return random(shapes)


def gpt2_config(**changes) -> dict:
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": 3, "n_layer": 2, "n_positions": 9}
    return {"model_type": "gpt2", **sizes, **changes}


@pytest.fixture
def settings(hf):
    """The fields for a config.json beside weights that fit it."""

    def read(model_type="llama", **changes):
        gemma = model_type in ("gemma2", "gemma3_text")
        norms = (GEMMA_NORMS if gemma else ()) + (
            QK_NORMS if model_type in ("qwen3", "gemma3_text") else ()
        )
        tensors = llama_tensors(bias="qkv" if model_type == "qwen2" else "", norms=norms)
        return hub.load_config(hf.write(tensors, llama_config(model_type, **changes)))

    return read


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_each_weight_of_a_llama_lands_where_its_name_says(hf, prefix):
    tensors = llama_tensors(prefix, bias="qkvogud")
    buffer = {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    config = llama_config(attention_bias=True, mlp_bias=True)
    overrides, params = hub.load_base(hf.write(tensors | buffer, config))
    DecoderConfig(**overrides)
    ours = flatten(params)
    expected = {
        "token_embedder/embedding": tensors[f"{prefix}embed_tokens.weight"],
        "decoder/decoder_norm/scale": tensors[f"{prefix}norm.weight"],
        "decoder/logits_dense/kernel": tensors["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        layer, block = f"decoder/layers_{i}", f"{prefix}layers.{i}"
        for name, theirs in {
            "self_attention/query": "self_attn.q_proj",
            "self_attention/key": "self_attn.k_proj",
            "self_attention/value": "self_attn.v_proj",
            "self_attention/out": "self_attn.o_proj",
            "mlp/wi_0": "mlp.gate_proj",
            "mlp/wi_1": "mlp.up_proj",
            "mlp/wo": "mlp.down_proj",
        }.items():
            expected[f"{layer}/{name}/kernel"] = tensors[f"{block}.{theirs}.weight"].T
            expected[f"{layer}/{name}/bias"] = tensors[f"{block}.{theirs}.bias"]
        for name, theirs in {
            "pre_self_attention": "input_layernorm",
            "pre_mlp": "post_attention_layernorm",
        }.items():
            expected[f"{layer}/{name}_layer_norm/scale"] = tensors[f"{block}.{theirs}.weight"]
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_gemma_has_norms_behind_its_blocks_and_on_its_heads(hf):
    tensors = llama_tensors(head=False, norms=GEMMA_NORMS + QK_NORMS)
    config = llama_config("gemma3_text", tie_word_embeddings=True)
    _, params = hub.load_base(hf.write(tensors, config), scan_layers=True)
    layers = params["decoder"]["layers"]
    for ours, theirs in {
        "pre_self_attention_layer_norm": "input_layernorm",
        "post_self_attention_layer_norm": "post_attention_layernorm",
        "pre_mlp_layer_norm": "pre_feedforward_layernorm",
        "post_mlp_layer_norm": "post_feedforward_layernorm",
    }.items():
        weight = tensors[f"model.layers.1.{theirs}.weight"]
        np.testing.assert_array_equal(layers[ours]["scale"][1], weight)
    for name in ("query", "key"):
        weight = tensors[f"model.layers.2.self_attn.{name[0]}_norm.weight"]
        np.testing.assert_array_equal(layers["self_attention"][f"{name}_norm"]["scale"][2], weight)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_gpt2_holds_query_key_and_value_in_one_tensor(hf, prefix):
    tensors = gpt2_tensors(prefix)
    overrides, params = hub.load_base(hf.write(tensors, gpt2_config()))
    config = DecoderConfig(**overrides)
    assert (config.mlp_dim, config.max_positions, config.token_offset) == (4 * WIDTH, 9, 1)
    ours = flatten(params)
    attention = "decoder/layers_1/self_attention"
    for i, name in enumerate(("query", "key", "value")):
        part = slice(i * WIDTH, (i + 1) * WIDTH)
        for ending, theirs in (("kernel", "weight"), ("bias", "bias")):
            expected = tensors[f"{prefix}h.1.attn.c_attn.{theirs}"][..., part]
            np.testing.assert_array_equal(ours[f"{attention}/{name}/{ending}"], expected)
    for name, theirs in {
        f"{attention}/out/kernel": "h.1.attn.c_proj.weight",
        f"{attention}/out/bias": "h.1.attn.c_proj.bias",
        "decoder/layers_1/mlp/wi/kernel": "h.1.mlp.c_fc.weight",
        "decoder/layers_1/mlp/wo/bias": "h.1.mlp.c_proj.bias",
        "decoder/layers_0/pre_self_attention_layer_norm/bias": "h.0.ln_1.bias",
        "decoder/layers_0/pre_mlp_layer_norm/scale": "h.0.ln_2.weight",
        "decoder/decoder_norm/scale": "ln_f.weight",
        "decoder/position_embedder/embedding": "wpe.weight",
    }.items():
        np.testing.assert_array_equal(ours[name], tensors[prefix + theirs], err_msg=name)


def test_the_output_layer_is_tied_where_the_files_hold_none_or_a_copy(hf):
    tensors = llama_tensors()
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    bare = llama_tensors(head=False)
    tied = llama_config(tie_word_embeddings=True)
    assert hub.load_config(hf.write(copy, tied, "copy"))["logits_via_embedding"]
    assert hub.load_config(hf.write(bare, tied, "bare"))["logits_via_embedding"]
    assert not hub.load_config(hf.write(tensors, tied, "own"))["logits_via_embedding"]
    with pytest.raises(hub.HubError, match=r"not tied .* hold no lm_head.weight"):
        hub.load_config(hf.write(bare, llama_config(), "lacking"))


@pytest.mark.parametrize(
    "model_type, changes, expected",
    [
        ("llama", {}, dict(norm_offset=0.0, post_norms=False, qk_norm=False, qkv_bias=False)),
        ("llama", dict(pad_token_id=0), dict(token_offset=0)),
        ("llama", dict(pad_token_id=5), dict(token_offset=1)),
        ("qwen2", {}, dict(qkv_bias=True, out_bias=False)),
        ("qwen3", {}, dict(qk_norm=True, qkv_bias=False)),
        (
            "gemma2",
            dict(final_logit_softcapping=None, query_pre_attn_scalar=16),
            dict(
                token_offset=0,
                norm_offset=1.0,
                post_norms=True,
                attention_softcap=50.0,
                logits_softcap=None,
                query_scale=0.25,
                embedding_scale=math.sqrt(WIDTH),
                mlp_activations=("gelu", "linear"),
            ),
        ),
        ("gemma3_text", {}, dict(attention_softcap=None, logits_softcap=None, query_scale=1 / 16)),
    ],
)
def test_what_the_families_differ_in(settings, model_type, changes, expected):
    fields = settings(model_type, **changes)
    assert {name: fields[name] for name in expected} == expected
    DecoderConfig(**fields)


@pytest.mark.parametrize(
    "model_type, changes, windows",
    [
        ("llama", dict(sliding_window=5), (0,)),  # its class does not read it
        ("mistral", dict(sliding_window=5), (5, 5, 5)),
        ("mistral", dict(sliding_window=None), (0,)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("qwen2", dict(sliding_window=5, use_sliding_window=False), (0,)),
        ("qwen2", dict(sliding_window=5, use_sliding_window=True, max_window_layers=2), (0, 0, 5)),
        ("qwen3", dict(sliding_window=5, use_sliding_window=True), (0,)),  # from layer 28 on
        ("gemma2", dict(sliding_window=5), (5, 0, 5)),
        ("gemma3_text", dict(sliding_window=5, sliding_window_pattern=3), (5, 5, 0)),
        ("gemma3_text", dict(sliding_window=5), (5, 5, 5)),  # every sixth layer sees all
        (
            "gemma3_text",
            dict(
                sliding_window=5,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            ),
            (0, 5, 0),
        ),
    ],
)
def test_which_layers_have_a_window(settings, model_type, changes, windows):
    assert settings(model_type, **changes)["windows"] == windows


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (dict(rope_theta=50.0), dict(rope_type="default", rope_theta=50.0), dict(theta=50.0)),
        ({}, dict(rope_type="default"), dict(theta=10_000.0, kind="default")),
        (
            dict(rope_theta=50.0, rope_scaling=dict(type="linear", factor=2.0)),
            dict(rope_type="linear", factor=2.0, rope_theta=50.0),
            dict(theta=50.0, kind="linear", factor=2.0),
        ),
        (
            dict(rope_scaling=dict(LLAMA3, rope_type="llama3")),
            dict(LLAMA3, rope_type="llama3"),
            # What was trained is max_position_embeddings unless said otherwise.
            dict(kind="llama3", factor=8.0, original_length=64, high_freq_factor=4.0),
        ),
        (
            dict(rope_theta=50.0, rope_scaling=dict(YARN, type="yarn")),
            dict(YARN, rope_type="yarn", rope_theta=50.0),
            dict(
                kind="yarn",
                factor=4.0,
                original_length=16,
                beta_fast=32.0,
                attention_factor=0.1 * math.log(4.0) + 1.0,
            ),
        ),
        (
            dict(rope_scaling=dict(YARN, type="yarn", attention_factor=1.5, beta_fast=20)),
            dict(YARN, rope_type="yarn", attention_factor=1.5, beta_fast=20),
            dict(beta_fast=20.0, attention_factor=1.5),
        ),
        (
            dict(
                rope_scaling=dict(YARN, type="yarn", mscale=2.0, mscale_all_dim=1.0, truncate=False)
            ),
            dict(YARN, rope_type="yarn", mscale=2.0, mscale_all_dim=1.0, truncate=False),
            dict(
                truncate=False,
                attention_factor=(0.2 * math.log(4.0) + 1.0) / (0.1 * math.log(4.0) + 1.0),
            ),
        ),
    ],
)
def test_rope_settings_of_transformers_4_and_5_mean_the_same(hf, old, new, expected):
    tensors = llama_tensors()
    fields = hub.load_config(hf.write(tensors, llama_config(**old), "old"))
    again = hub.load_config(hf.write(tensors, llama_config(rope_parameters=new), "new"))
    assert fields["rope"] == again["rope"] and fields["local_rope"] is None
    assert {name: fields["rope"][name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, theta, local, factor",
    [
        ({}, 1e6, 1e4, 1.0),
        (dict(rope_theta=500.0, rope_local_base_freq=50.0), 500.0, 50.0, 1.0),
        (dict(rope_scaling=dict(rope_type="linear", factor=8.0)), 1e6, 1e4, 8.0),
        (
            dict(
                rope_parameters=dict(
                    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=500.0),
                    sliding_attention=dict(rope_type="default", rope_theta=50.0),
                )
            ),
            500.0,
            50.0,
            8.0,
        ),
    ],
)
def test_layers_of_a_gemma3_with_a_window_have_a_rope_of_their_own(
    settings, changes, theta, local, factor
):
    fields = settings("gemma3_text", **changes)
    assert (fields["rope"]["theta"], fields["rope"]["factor"]) == (theta, factor)
    assert (fields["local_rope"]["theta"], fields["local_rope"]["kind"]) == (local, "default")


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("llama", dict(hidden_act="geluu"), "hidden_act 'geluu' .* Did you mean 'gelu'"),
        ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type 'dynamic'"),
        ("llama", dict(rope_parameters=dict(rope_type="longrope")), "rope_type 'longrope'"),
        ("llama", dict(rope_scaling=dict(type="linear")), "'linear' needs factor"),
        (
            "llama",
            dict(rope_scaling=dict(type="llama3", factor=2.0)),
            "needs high_freq_factor, low",
        ),
        ("llama", dict(rope_parameters=dict(mrope_section=[1, 1])), "not computed here: mrope_sec"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is not 1"),
        ("llama", dict(rope_parameters=dict(full_attention={})), "one set for all layers"),
        ("gemma3_text", dict(rope_parameters=dict(rope_theta=1.0)), "one set for each kind"),
        ("gemma3_text", dict(attn_logit_softcapping=5.0), "attn_logit_softcapping is 5.0"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        ("llama", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("mistral", dict(layer_types=["full_attention"] * 3), "all layers of a mistral"),
        ("qwen2", dict(layer_types=["sliding_attention"] * 3), "sliding_window is None"),
        ("gemma2", dict(layer_types=["chunked_attention"] * 3), "among them chunked_attention"),
        ("gemma2", dict(layer_types=["full_attention"] * 2), "has 2 entries"),
        ("llama", dict(vocab_size=12), "vocab_size 12, model.embed_tokens.weight has 11 rows"),
        ("llama", dict(num_attention_heads=4, head_dim=None), "does not divide into 4 heads"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(settings, model_type, changes, message):
    with pytest.raises(hub.HubError, match=message):
        settings(model_type, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (dict(add_cross_attention=True), "add_cross_attention is True"),
        (dict(activation_function="tanh"), "activation_function 'tanh'"),
        (dict(n_embd=5), "does not divide into 3 heads"),
        (
            dict(n_positions=8),
            r"position_embedder/embedding .* is \[9, 6\], the network has \[8, 6\]",
        ),
    ],
)
def test_what_is_not_computed_of_a_gpt2_is_refused_by_name(hf, changes, message):
    with pytest.raises(hub.HubError, match=message):
        hub.load_config(hf.write(gpt2_tensors(), gpt2_config(**changes)))


def test_a_field_or_tensor_that_is_missing_or_has_no_place_is_named(hf):
    tensors = llama_tensors()
    config = llama_config()
    del config["intermediate_size"]
    with pytest.raises(hub.HubError, match="no field 'intermediate_size'"):
        hub.load_config(hf.write(tensors, config, "field"))
    extra = tensors | {"score.weight": np.ones((2, WIDTH), np.float32)}
    with pytest.raises(hub.HubError, match="no place in this network: score.weight"):
        hub.load_config(hf.write(extra, llama_config(), "extra"))
    biased = llama_tensors(bias="q")
    with pytest.raises(hub.HubError, match=r"layers\.0\.self_attn\.q_proj\.bias"):
        hub.load_config(hf.write(biased, llama_config(), "biased"))
    less = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(hub.HubError, match=r"layers_1/mlp/wi_1/kernel"):
        hub.load_config(hf.write(less, llama_config(), "less"))
    twice = tensors | {"norm.weight": tensors["model.norm.weight"]}
    with pytest.raises(hub.HubError, match="holds norm.weight twice"):
        hub.load_config(hf.write(twice, llama_config(), "twice"))
    none = {k: v for k, v in tensors.items() if "embed" not in k}
    with pytest.raises(hub.HubError, match="no token embedding"):
        hub.load_config(hf.write(none, llama_config(), "none"))
    wide = gpt2_tensors()
    wide["h.0.attn.c_attn.weight"] = np.ones((WIDTH, 3 * WIDTH + 1), np.float32)
    with pytest.raises(hub.HubError, match="side by side would be 18 wide"):
        hub.load_config(hf.write(wide, gpt2_config(), "wide"))


def test_rows_beyond_the_vocabulary_are_kept_and_said(hf):
    folder = hf.write(llama_tensors(), llama_config(vocab_size=9))
    with pytest.warns(UserWarning, match="the last 2 are kept as padding"):
        assert hub.load_config(folder)["vocab_size"] == VOCAB


def test_a_gemma3_for_images_is_refused_with_the_way_to_its_text_model(hf):
    folder = hf.write(llama_tensors(), {"model_type": "gemma3", "text_config": {}})
    with pytest.raises(hub.HubError, match=r"Gemma3ForCausalLM\(model.config.text_config\)"):
        hub.load_config(folder)
