"""The largest of many values in two steps are those that one step finds."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from modjax.decoding import largest


@pytest.mark.parametrize("size", [5, 128, 1000, 4096])
@pytest.mark.parametrize("levels", [3, 100, 10**6])  # few: most values have equals
def test_values_and_columns_are_those_of_a_whole_search(size, levels):
    x = np.random.default_rng(size).integers(-levels, 1, (6, size)).astype(np.float32)
    x[1] = -np.inf
    x[2, 3:] = -np.inf
    x[3, -1] = 1.0
    for k in (1, 4, 5):
        values, columns = largest.top_k(jnp.asarray(x), k)
        expected, places = lax.top_k(x, k)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(columns, places)
    np.testing.assert_array_equal(largest.row_max(jnp.asarray(x))[:, 0], x.max(axis=1))


def test_what_a_score_makes_equal_is_taken_in_order():
    x = np.random.default_rng(0).permutation(2000).astype(np.float32)[None]

    def score(x):
        return jnp.floor(x / 500)

    values, columns = largest.top_k(jnp.asarray(x), 7, score)
    expected, places = lax.top_k(score(x), 7)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(columns, places)
