"""Bottlenecks: the formula, summed and averaged, and where in a layer's block they stand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax import adapters
from modjax.adapters import Adapted, Bottleneck, Features, Mix, Mixture, Rule, Single, Skills
from modjax.models import EncoderDecoderModel

HOULSBY = ".*/(attention|self_attention|encoder_decoder_attention)/out|.*/mlp/wo"
PFEIFFER = ".*/mlp/wo"
SEGMENTS = np.array([[1, 1, 2, 2], [1, 1, 1, 1]])
FEATURES = np.array([[[1, 2], [2, 0]], [[2, 3], [0, 0]]])
TASKS = np.array([[3, 0], [1, 0]])
PACKED = Mix(
    features=jnp.asarray(FEATURES),
    tasks=jnp.asarray(TASKS),
    segments={"tokens": jnp.asarray(SEGMENTS)},
)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"gelu": gelu, "relu": lambda x: np.maximum(x, 0)}


def bank(rng, sizes, features):
    """Random parameters, and each module's own (down, down_bias, up, up_bias)."""
    total, count = sum(sizes), len(sizes)
    shapes = dict(down=(features, total), down_bias=(total,), up=(total, features))
    shapes["up_bias"] = (count, features)
    leaves = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    stops = np.cumsum(sizes)
    own = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    each = [
        (leaves["down"][:, s], leaves["down_bias"][s], leaves["up"][s], leaves["up_bias"][m])
        for m, s in enumerate(own)
    ]
    return leaves, each


def apply(mixture, space, rng, leaves):
    """(the dense layer's own output, the adapted one)."""
    adapted = Adapted(nn.Dense(5), (Rule("", mixture),), space)
    x = rng.normal(size=(2, 4, 6)).astype(np.float32)
    kernel, bias = rng.normal(size=(6, 5)), rng.normal(size=5)
    params = {"kernel": kernel, "bias": bias, "m": leaves}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return x @ kernel + bias, adapted.apply({"params": params}, x, mix=PACKED)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_token_gets_the_sum_of_its_own_features_bottlenecks_of_several_sizes(activation, space):
    module = Bottleneck({"task": 3, "language": 2, "language=yo": 1}, activation)
    rng = np.random.default_rng(0)
    leaves, each = bank(rng, (3, 3, 2, 2, 1), 5)
    y, found = apply(Mixture("m", module, Features()), space, rng, leaves)
    act = ACTIVATIONS[activation]
    for row in range(2):
        for token in range(4):
            task, language = FEATURES[row, SEGMENTS[row, token] - 1]
            active = [m for m, i in ((task - 1, task), (language + 1, language)) if i > 0]
            h, expected = y[row, token], y[row, token].copy()
            for down, down_bias, up, up_bias in (each[m] for m in active):
                expected += act(h @ down + down_bias) @ up + up_bias
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share_up", [False, True])
def test_a_token_goes_through_the_average_of_its_tasks_bottlenecks(share_up, space):
    rng = np.random.default_rng(0)
    leaves, each = bank(rng, (2, 2, 2), 5)
    if share_up:
        leaves["up"], leaves["up_bias"] = leaves["up"][:2], leaves["up_bias"][:1]
    logits = rng.normal(size=(3, 1, 3))
    module = Bottleneck(2, share_up=share_up)
    y, found = apply(Mixture("m", module, Skills(3)), space, rng, leaves | {"logits": logits})
    for row in range(2):
        for token in range(4):
            task = TASKS[row, SEGMENTS[row, token] - 1]
            m = 1 / (1 + np.exp(-logits[task - 1, 0])) if task else np.ones(3)
            w = m / m.sum()
            parts = [sum(w[i] * each[i][part] for i in range(3)) for part in range(4)]
            if share_up:
                parts[2:] = leaves["up"], leaves["up_bias"][0]
            down, down_bias, up, up_bias = parts
            h = y[row, token]
            expected = h + gelu(h @ down + down_bias) @ up + up_bias
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-4)


def test_houlsbys_and_pfeiffers_bottlenecks_stand_before_dropout_residual_and_norm(
    make_t5, batch, scatter
):
    """Held open by its bias, a relu bottleneck is linear, and equals `kernel (1 + down up)` in the layer itself."""
    network = make_t5(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.3)
    mixture = Mixture("m", Bottleneck(2, "relu"), Single())
    adapted = EncoderDecoderModel(Adapted(network, (Rule(HOULSBY, mixture),)))
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
    params = jax.jit(adapted.init)(key, batch)["params"]
    fresh, base = adapters.split(params, adapted.module)
    flat = flatten_dict(scatter(fresh), sep="/")
    inside = dict(flatten_dict(base, sep="/"))
    layers = {path.removesuffix("/m/down") for path in flat if path.endswith("/down")}
    assert len(layers) == 5 and sum(Rule(PFEIFFER, mixture).matches(p) for p in layers) == 2
    for layer in layers:
        down, up = (flat[f"{layer}/m/{leaf}"] for leaf in ("down", "up"))
        flat[f"{layer}/m/down_bias"] = jnp.full(2, 8.0)
        flat[f"{layer}/m/up_bias"] = -8.0 * up.sum(0, keepdims=True)
        inside[f"{layer}/kernel"] = inside[f"{layer}/kernel"] @ (jnp.eye(16) + down @ up)
    inside = unflatten_dict(inside, sep="/")
    opened = adapters.join(base, unflatten_dict(flat, sep="/"))
    for key in ((), (jax.random.key(1),)):
        expected = EncoderDecoderModel(network).logits(inside, batch, *key)
        found = adapted.logits(opened, batch, *key)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert np.abs(expected - EncoderDecoderModel(network).logits(base, batch, *key)).max() > 0.1


def test_impossible_settings_are_refused(space):
    with pytest.raises(ValueError, match="Bottleneck.size must be an integer of at least 1, got 0"):
        Bottleneck(0)
    with pytest.raises(ValueError, match="activation: unknown 'gleu'. Did you mean 'gelu'"):
        Bottleneck(activation="gleu")
    with pytest.raises(ValueError, match="Bottleneck.share_up is for modules that are averaged"):
        Mixture("m", Bottleneck(share_up=True), Features()).modules(space)
    with pytest.raises(ValueError, match=r"averaged need one size, got \[2, 3\]"):
        Mixture("m", Bottleneck({"skill": 2, "skill=1": 3}), Skills(3)).modules(space)
    adapted = Adapted(nn.Dense(4), (Rule("", Mixture("m", Bottleneck(2), Skills(3, 2))),), space)
    mix = Mix(tasks=jnp.ones((2, 1), jnp.int32))
    with pytest.raises(ValueError, match="a bottleneck has no 2 heads"):
        adapted.init(jax.random.key(0), jnp.ones((2, 3, 4)), mix=mix)
