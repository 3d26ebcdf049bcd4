"""IA3's factors: the formula for outputs and inputs, summed over features and averaged with heads."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.adapters import Adapted, Features, Mix, Mixture, Rule, Scale, Single, Skills

SEGMENTS = np.array([[1, 1, 2, 2], [1, 1, 1, 0]])
FEATURES = np.array([[[1, 2], [2, 0]], [[2, 3], [0, 0]]])
TASKS = np.array([[3, 0], [1, 0]])
PACKED = Mix(
    features=jnp.asarray(FEATURES),
    tasks=jnp.asarray(TASKS),
    segments={"tokens": jnp.asarray(SEGMENTS)},
)
WIDTHS = {"input": 6, "output": 4}


def apply(router, side, space, scale, mix=PACKED, **leaves):
    """(x, kernel, bias, output): a dense layer of 6 by 4 with this bank."""
    rng = np.random.default_rng(1)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 6), (6, 4), (4,)))
    adapted = Adapted(nn.Dense(4), (Rule("", Mixture("m", Scale(side), router)),), space)
    params = {"kernel": kernel, "bias": bias, "m": {"scale": scale, **leaves}}
    return x, kernel, bias, adapted.apply({"params": params}, x, mix=mix)


def scaled(x, kernel, bias, factor, side):
    return (x * factor) @ kernel + bias if side == "input" else (x @ kernel + bias) * factor


@pytest.mark.parametrize("side", ["input", "output"])
def test_one_factor_scales_the_output_bias_included_or_the_input(side):
    scale = np.random.default_rng(0).normal(size=(1, WIDTHS[side])).astype(np.float32)
    x, kernel, bias, found = apply(Single(), side, None, scale)
    np.testing.assert_allclose(found, scaled(x, kernel, bias, scale[0], side), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_a_tokens_features_change_adds_up_and_without_any_nothing_changes(side, space):
    scale = np.random.default_rng(0).normal(size=(5, WIDTHS[side])).astype(np.float32)
    x, kernel, bias, found = apply(Features(), side, space, scale)
    for row in range(2):
        for token in range(4):
            segment = SEGMENTS[row, token]
            task, language = FEATURES[row, segment - 1] if segment else (0, 0)
            active = [m for m, i in ((task - 1, task), (language + 1, language)) if i > 0]
            factor = 1 + sum((scale[m] - 1 for m in active), np.zeros(WIDTHS[side]))
            expected = scaled(x[row, token], kernel, bias, factor, side)
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("side", ["input", "output"])
def test_an_average_weighs_each_heads_block_by_the_tokens_task(side, heads, space):
    rng = np.random.default_rng(0)
    width = WIDTHS[side]
    scale = rng.normal(size=(3, width)).astype(np.float32)
    logits = rng.normal(size=(3, heads, 3)).astype(np.float32)
    x, kernel, bias, found = apply(Skills(3, heads), side, space, scale, logits=logits)
    for row in range(2):
        for token in range(4):
            if SEGMENTS[row, token] == 0:
                continue
            task = TASKS[row, SEGMENTS[row, token] - 1]
            m = 1 / (1 + np.exp(-logits[task - 1])) if task else np.ones((heads, 3))
            w = m / m.sum(-1, keepdims=True)
            factor = np.empty(width)
            for head in range(heads):
                block = slice(head * width // heads, (head + 1) * width // heads)
                factor[block] = w[head] @ scale[:, block]
            expected = scaled(x[row, token], kernel, bias, factor, side)
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_side_and_heads_that_do_not_divide_it_are_refused(space):
    with pytest.raises(ValueError, match="Scale.acts_on: unknown 'outputs'. Did you mean 'output'"):
        Scale("outputs")
    scale, logits = np.ones((3, 4), np.float32), np.zeros((3, 3, 3), np.float32)
    with pytest.raises(ValueError, match="has widths 4, which 3 heads do not divide"):
        apply(Skills(3, heads=3), "output", space, scale, logits=logits)
    with pytest.raises(ValueError, match="Scale.learning_rate must be positive or 0, got -1"):
        Scale(learning_rate=-1)
