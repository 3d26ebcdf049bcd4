"""Encoders: as the formulas say, whatever the padding, the packing, the stacking and the recomputation."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax import adapters, hub, optimizers
from modjax.adapters import LowRank, Mix, Mixture, Rule
from modjax.networks import encoder

VARIANTS = {
    "bert": dict(head="pooled", num_outputs=3),
    "roberta": dict(
        token_offset=1,
        position_offset=2,
        type_vocab_size=1,
        norm_epsilon=1e-2,
        pooler=False,
        head="dense",
        num_outputs=1,
    ),
    "base": dict(),
    "gated": dict(mlp_activations=("gelu", "linear")),
}
TOKENS = np.array([[5, 9, 2, 7, 1, 3], [4, 8, 6, 0, 0, 0], [1, 2, 0, 0, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
REAL = TOKENS > 0


def make(variant: str, **options) -> encoder.Transformer:
    sizes = dict(vocab_size=20, emb_dim=12, num_heads=2, head_dim=4, mlp_dim=10, num_layers=2)
    config = sizes | dict(max_positions=10) | VARIANTS[variant] | options
    return encoder.Transformer(encoder.EncoderConfig(**config))


@functools.cache
def params_of(variant: str) -> dict:
    """Parameters of the unrolled network, none of which is 0 or 1 throughout."""
    shapes = jax.eval_shape(make(variant).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        spread = leaf.shape[0] ** -0.5 if path.endswith("kernel") else 0.3
        flat[path] = (rng.normal(size=leaf.shape) * spread).astype(np.float32)
        if path.endswith("scale"):
            flat[path] += 1.0
    return unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "enable_dropout"))
def apply(network, params, *args, method="__call__", enable_dropout=False, rngs=None, **kwargs):
    return network.apply(
        {"params": params},
        *args,
        method=method,
        enable_dropout=enable_dropout,
        rngs=rngs,
        **kwargs,
    )


def types_of(variant):
    return TYPES if variant == "bert" else None


# The network once more, one example and one formula at a time.


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def affine(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def attention(p, x, num_heads):
    query, key, value = (affine(p[name], x) for name in ("query", "key", "value"))
    size = query.shape[1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * size, (h + 1) * size)
        weights = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    return affine(p["out"], np.concatenate(heads, -1))


def reference(config, params, tokens, types):
    """Hidden states `[L, D]` and the head's outputs of one example without padding, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    at, epsilon = params["encoder"], config.norm_epsilon
    x = params["token_embedder"]["embedding"][[t - config.token_offset for t in tokens]]
    x = x + at["position_embedder"]["embedding"][config.position_offset :][: len(tokens)]
    x = x + at["type_embedder"]["embedding"][types]
    x = norm(at["embedding_norm"], x, epsilon)
    for i in range(config.num_layers):
        layer = at[f"layers_{i}"]
        x = norm(
            layer["attention_norm"],
            x + attention(layer["attention"], x, config.num_heads),
            epsilon,
        )
        mlp = layer["mlp"]
        if "wi" in mlp:
            hidden = gelu(affine(mlp["wi"], x))
        else:
            hidden = gelu_tanh(affine(mlp["wi_0"], x)) * affine(mlp["wi_1"], x)
        x = norm(layer["mlp_norm"], x + affine(mlp["wo"], hidden), epsilon)
    if config.head == "pooled":
        return x, affine(
            params["classifier"]["logits_dense"], np.tanh(affine(params["pooler"], x[0]))
        )
    if config.head == "dense":
        dense = np.tanh(affine(params["classifier"]["dense"], x[0]))
        return x, affine(params["classifier"]["logits_dense"], dense)
    return x, x


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_outputs_are_those_of_the_formulas(variant):
    network, params, types = make(variant), params_of(variant), types_of(variant)
    hidden = apply(network, params, TOKENS, types, method="encode")
    outputs = apply(network, params, TOKENS, types)
    for row, length in enumerate(REAL.sum(1)):
        row_types = TYPES[row, :length] * (types is not None)
        expected, answer = reference(network.config, params, TOKENS[row, :length], row_types)
        np.testing.assert_allclose(hidden[row, :length], expected, atol=1e-5)
        found = outputs[row] if network.config.num_outputs else outputs[row, :length]
        np.testing.assert_allclose(found, answer, atol=1e-5)


@pytest.mark.parametrize("variant", ["bert", "roberta"])
def test_the_length_of_the_padding_changes_nothing(variant):
    network, params, types = make(variant), params_of(variant), types_of(variant)
    wider = [None if x is None else np.pad(x, ((0, 0), (0, 2))) for x in (TOKENS, types)]
    for method in ("encode", "__call__"):
        short = apply(network, params, TOKENS, types, method=method)
        long = apply(network, params, *wider, method=method)
        if short.ndim == 3:
            short, long = short[REAL], long[:, : TOKENS.shape[1]][REAL]
        np.testing.assert_allclose(short, long, atol=1e-5)


def test_packed_rows_equal_unpacked_ones():
    network, params = make("base"), params_of("base")
    alone = apply(network, params, TOKENS, TYPES, method="encode")
    row = np.concatenate([TOKENS[0], TOKENS[1, :3], [0]])[None]
    types = np.concatenate([TYPES[0], TYPES[1, :3], [0]])[None]
    segments = np.array([[1] * 6 + [2] * 3 + [0]])
    positions = np.array([[*range(6), *range(3), 0]])
    packed = apply(network, params, row, types, segments, positions, method="encode")
    np.testing.assert_allclose(packed[0, :6], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 6:9], alone[1, :3], atol=1e-5)


def test_scanned_rematerialised_layers_equal_unrolled_ones_in_value_and_gradient():
    variant = "bert"
    params = params_of(variant)

    def loss(network, p):
        return jnp.mean(jnp.square(network.apply({"params": p}, TOKENS, TYPES)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, gradient = grad(make(variant), params)
    others = {
        "full": (make(variant, remat_policy="full"), params, gradient),
        "scanned": (
            make(variant, scan_layers=True, remat_policy="minimal"),
            hub.stack_layers(params),
            hub.stack_layers(gradient),
        ),
    }
    for network, own, expected in others.values():
        value_2, gradient_2 = grad(network, own)
        np.testing.assert_allclose(value, value_2, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
            expected,
            gradient_2,
        )


@pytest.mark.parametrize("variant", ["bert", "roberta"])
def test_bfloat16_activations_keep_float32_parameters_and_outputs_and_stay_close(variant):
    network = make(variant, dtype="bfloat16")
    made = jax.eval_shape(network.init, jax.random.key(0), TOKENS)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    params = params_of(variant)
    outputs = apply(network, params, TOKENS)
    exact = apply(make(variant), params, TOKENS)
    assert apply(network, params, TOKENS, method="encode").dtype == jnp.bfloat16
    assert outputs.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(outputs - exact))) < 0.05 * float(jnp.max(jnp.abs(exact)))


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_draws_only_when_asked(scan):
    network = make("roberta", dropout_rate=0.5, scan_layers=scan)
    params = params_of("roberta")
    params = hub.stack_layers(params) if scan else params
    calm = apply(network, params, TOKENS)
    drawn = [
        apply(network, params, TOKENS, enable_dropout=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0], calm)


@pytest.mark.parametrize("variant, in_head", [("base", 0), ("bert", 1), ("roberta", 2)])
def test_dropout_falls_element_by_element_where_bert_has_it(variant, in_head, monkeypatch):
    shapes = []
    draw = jax.random.bernoulli

    def bernoulli(key, p, shape):
        shapes.append((float(p), tuple(shape)))
        return draw(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    make(variant, dropout_rate=0.25).apply(
        {"params": params_of(variant)},
        TOKENS,
        enable_dropout=True,
        rngs={"dropout": jax.random.key(0)},
    )
    # After the embeddings; in each layer on attention weights and on the outputs of both blocks; in the head.
    layer = [(3, 2, 6, 6), (3, 6, 12), (3, 6, 12)]
    assert shapes == [(0.75, s) for s in [(3, 6, 12), *layer, *layer, *[(3, 12)] * in_head]]


@pytest.mark.parametrize("scan", [False, True])
def test_names_shapes_and_axes_are_those_of_the_field(scan):
    network = make("roberta", num_layers=1, scan_layers=scan, pooler=True)
    variables = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    axes = flatten_dict(variables["params_axes"], sep="/")
    found = {
        path: (leaf.shape, tuple(axes[f"{path}_axes"].names))
        for path, leaf in flatten_dict(variables["params"], sep="/").items()
    }
    layer = {
        **{
            f"attention/{name}/{leaf}": value
            for name in ("query", "key", "value")
            for leaf, value in (
                ("kernel", ((12, 8), ("embed", "joined_kv"))),
                ("bias", ((8,), ("joined_kv",))),
            )
        },
        "attention/out/kernel": ((8, 12), ("joined_kv", "embed")),
        "attention/out/bias": ((12,), ("embed",)),
        "mlp/wi/kernel": ((12, 10), ("embed", "mlp")),
        "mlp/wi/bias": ((10,), ("mlp",)),
        "mlp/wo/kernel": ((10, 12), ("mlp", "embed")),
        "mlp/wo/bias": ((12,), ("embed",)),
        **{
            f"{name}/{leaf}": ((12,), ("embed",))
            for name in ("attention_norm", "mlp_norm")
            for leaf in ("scale", "bias")
        },
    }
    if scan:
        layer = {k: ((1, *shape), ("layers", *names)) for k, (shape, names) in layer.items()}
    at = "encoder/layers" if scan else "encoder/layers_0"
    assert found == {
        "token_embedder/embedding": ((20, 12), ("vocab", "embed")),
        "encoder/position_embedder/embedding": ((10, 12), ("vocab", "embed")),
        "encoder/type_embedder/embedding": ((1, 12), ("vocab", "embed")),
        "encoder/embedding_norm/scale": ((12,), ("embed",)),
        "encoder/embedding_norm/bias": ((12,), ("embed",)),
        **{f"{at}/{name}": value for name, value in layer.items()},
        "pooler/kernel": ((12, 12), ("embed", "mlp")),
        "pooler/bias": ((12,), ("mlp",)),
        "classifier/dense/kernel": ((12, 12), ("embed", "mlp")),
        "classifier/dense/bias": ((12,), ("mlp",)),
        "classifier/logits_dense/kernel": ((12, 1), ("embed", "vocab")),
        "classifier/logits_dense/bias": ((1,), ("vocab",)),
    }


@pytest.mark.parametrize("variant", ["bert", "roberta"])
def test_the_head_is_what_optimizers_take_for_one(variant):
    paths = flatten_dict(params_of(variant), sep="/")
    heads = {path for path in paths if re.fullmatch(optimizers.HEAD, path)}
    assert heads == {path for path in paths if path.startswith("classifier/")}


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_find_their_layers_and_start_without_effect(scan):
    network = make("bert", scan_layers=scan)
    layers = r"encoder/layers(_\d)?/(attention/(query|value)|mlp/wo)"
    adapted = adapters.Adapted(network, (Rule(layers, Mixture("lora", LowRank(rank=2))),))
    made = jax.jit(adapted.init)(jax.random.key(0), TOKENS, mix=Mix())["params"]
    own = {path for path in flatten_dict(made, sep="/") if "/lora/" in path}
    assert {path.split("/lora/")[0] for path in own} == {
        f"encoder/{layer}/{part}"
        for layer in (["layers"] if scan else ["layers_0", "layers_1"])
        for part in ("attention/query", "attention/value", "mlp/wo")
    }
    base = params_of("bert")
    base = flatten_dict(hub.stack_layers(base) if scan else base, sep="/")
    lora = {path: leaf for path, leaf in flatten_dict(made, sep="/").items() if path in own}

    @jax.jit
    def run(lora):
        params = unflatten_dict({**base, **lora}, sep="/")
        return adapted.apply({"params": params}, TOKENS, mix=Mix())

    plain = apply(network, unflatten_dict(base, sep="/"), TOKENS)
    np.testing.assert_allclose(run(lora), plain, atol=1e-6)
    assert not np.allclose(run({k: v + 0.1 for k, v in lora.items()}), plain, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_come_back_from_json(variant):
    config = make(variant).config
    text = json.dumps(dataclasses.asdict(config))
    assert encoder.EncoderConfig(**json.loads(text)) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remat_policy="minimum"), "remat_policy: .*Did you mean 'minimal'"),
        (dict(mlp_activations=("gelu_exac",)), "mlp_activations: .*Did you mean 'gelu_exact'"),
        (dict(mlp_activations=()), "mlp_activations must name at least one"),
        (dict(head="poole", num_outputs=2), "head: .*Did you mean 'pooled'"),
        (dict(head="pooled"), "num_outputs is 0 with head='pooled'"),
        (dict(num_outputs=2), "num_outputs is 2 with head='none'"),
        (dict(head="pooled", num_outputs=2, pooler=False), "needs pooler=True"),
        (dict(token_offset=2), "token_offset must be 0 or 1"),
        (dict(position_offset=10), "position_offset must be in"),
        (dict(type_vocab_size=0), "type_vocab_size must be at least 1"),
        (dict(head="pooled", num_outputs="2"), "num_outputs must be an integer, got '2'"),
        (dict(num_layers="2"), "num_layers must be an integer, got '2'"),
        (dict(dropout_rate=1.0), "dropout_rate"),
        (dict(dropout_rate="0.1"), "dropout_rate must be in .*, got '0.1'"),
        (dict(dtype="bf16"), "dtype must be one of .'float32', 'bfloat16'., got 'bf16'"),
        (dict(dtype="float16"), "dtype must be one of .* got 'float16'"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("base", **options)


def test_inputs_that_cannot_be_meant_are_refused():
    network, params = make("bert", position_offset=2), params_of("bert")
    variables = {"params": params}
    with pytest.raises(ValueError, match="9 tokens are too long: .* 8 positions"):
        network.apply(variables, np.ones((1, 9), np.int32))
    segments = np.ones_like(TOKENS)
    with pytest.raises(ValueError, match="Packed rows need encoder_positions"):
        network.apply(variables, TOKENS, None, segments, method="encode")
    with pytest.raises(ValueError, match="leave the segment ids out"):
        network.apply(variables, TOKENS, None, segments, np.zeros_like(TOKENS))
