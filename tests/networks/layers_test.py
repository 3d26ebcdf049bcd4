"""The parts of a layer by themselves; the networks' tests try them together."""

import flax
import jax
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
