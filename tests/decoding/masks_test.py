"""Top-k and top-p keep the tokens that a plain reading of their definition keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.decoding import masks

LOGITS = np.random.RandomState(0).normal(size=(4, 9)).astype(np.float32) * 2


def _likeliest_reaching(row: np.ndarray, p: float) -> set[int]:
    probabilities = np.exp(row) / np.exp(row).sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-row):
        kept.add(int(token))
        mass += probabilities[token]
        if mass >= p:
            break
    return kept


def _kept(masked) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(masked)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_topk_keeps_the_k_largest(k, dynamic):
    masked = jax.jit(masks.keep_topk)(LOGITS, k) if dynamic else masks.keep_topk(LOGITS, k)
    assert _kept(masked) == [set(np.argsort(-row)[:k].tolist()) for row in LOGITS]
    np.testing.assert_array_equal(masked[np.isfinite(masked)], LOGITS[np.isfinite(masked)])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.95])
def test_topp_keeps_the_fewest_that_reach_p(p, dynamic):
    masked = jax.jit(masks.keep_topp)(LOGITS, p) if dynamic else masks.keep_topp(LOGITS, p)
    assert _kept(masked) == [_likeliest_reaching(row, p) for row in LOGITS]


@pytest.mark.parametrize("mask", [masks.keep_topk, masks.keep_topp])
@pytest.mark.parametrize("dynamic", [False, True])
def test_zero_keeps_everything(mask, dynamic):
    masked = jax.jit(mask)(LOGITS, 0) if dynamic else mask(LOGITS, 0)
    np.testing.assert_array_equal(masked, LOGITS)


def test_topp_of_one_keeps_everything_although_sums_round():
    np.testing.assert_array_equal(masks.keep_topp(jnp.asarray(LOGITS), 1.0), LOGITS)


def test_ties_stay_together():
    logits = jnp.log(jnp.array([[0.125, 0.25, 0.25, 0.25, 0.125]]))
    assert _kept(masks.keep_topk(logits, 2)) == [{1, 2, 3}]
    assert _kept(masks.keep_topp(logits, 0.4)) == [{1, 2, 3}]


def test_impossible_tokens_stay_impossible():
    logits = jnp.array([[0.0, -jnp.inf, -1.0]])
    assert _kept(masks.keep_topk(logits, 3)) == [{0, 2}]
    assert _kept(masks.keep_topp(logits, 1.0)) == [{0, 2}]
