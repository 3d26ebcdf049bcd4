"""The parts of a layer by themselves; the networks' tests try them together."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.networks import layers


@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_buckets_are_exact_when_near_logarithmic_when_far(bidirectional):
    table = layers.position_buckets(bidirectional, 32, 128)
    past = table[128::-1]  # distances 0, 1, 2, ... into the past
    exact = 8 if bidirectional else 16
    assert past[:exact].tolist() == list(range(exact))
    expected = [
        min(
            exact + int(np.floor(np.log2(d / exact) / np.log2(128 / exact) * exact + 1e-9)),
            2 * exact - 1,
        )
        for d in range(exact, 129)
    ]
    assert past[exact:].tolist() == expected
    future = table[129:]
    assert (future == (16 + past[1:] if bidirectional else 0)).all()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (layers.Dense(3, ("embed", "mlp")), np.ones((2, 5), np.float32)),
        (layers.RMSNorm(), np.ones((2, 5), np.float32)),
    ],
)
def test_a_parameter_of_another_shape_is_refused_and_named(layer, x):
    params = layer.init(jax.random.key(0), np.ones((2, 4), np.float32))
    name = "kernel" if isinstance(layer, layers.Dense) else "scale"
    with pytest.raises(flax.errors.ScopeParamShapeError, match=f'parameter "{name}"'):
        layer.apply(params, x)


def test_one_and_a_scale_in_bfloat16_are_added_in_float32():
    """Gemma's, of which many checkpoints are in bfloat16; not jitted, for XLA may leave the rounding out."""
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    scale = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, 64), jnp.bfloat16)
    norm = layers.RMSNorm(offset=1.0)
    found = norm.apply({"params": {"scale": scale}}, x)
    rms = np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, x / rms * (1 + np.asarray(scale, np.float32)), rtol=1e-5)
