"""Batches hold every example once, with little padding and in few shapes."""

import itertools

import numpy as np
import pytest

from modjax.evaluation import batching


def cost(lengths, padded):
    return sum(min(p for p in padded if p >= n) for n in lengths)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_padded_lengths_are_the_cheapest_there_are(most):
    lengths = np.random.RandomState(most).randint(1, 61, 40)
    found = batching.choose_lengths(lengths, limit=60, most=most)
    assert len(found) <= most and list(found) == sorted(set(found))
    assert all(p % 8 == 0 or p == 60 for p in found)
    grid = [8, 16, 24, 32, 40, 48, 56, 60]
    choices = (c for k in range(1, most + 1) for c in itertools.combinations(grid, k))
    best = min(cost(lengths, c) for c in choices if c[-1] >= lengths.max())
    assert cost(lengths, found) == best


def test_padded_lengths_do_not_exceed_the_limit_and_fit_empty_inputs():
    assert batching.choose_lengths(np.array([3, 30]), limit=30, most=2) == (8, 30)
    assert batching.choose_lengths(np.array([0, 0]), limit=30, most=4) == (8,)
    with pytest.raises(ValueError, match="most=0"):
        batching.choose_lengths(np.array([3]), limit=30, most=0)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_batches_hold_every_example_once_and_all_but_the_last_are_full(size):
    rng = np.random.RandomState(size)
    inputs, outputs = rng.randint(1, 33, 50), rng.randint(1, 20, 50)
    batches = batching.plan(inputs, outputs, size, (8, 16, 32))
    assert sorted(np.concatenate([i for i, _ in batches])) == list(range(50))
    assert [len(i) for i, _ in batches[:-1]] == [size] * (len(batches) - 1)
    assert all(inputs[i].max() <= length for i, length in batches)


def test_examples_of_similar_output_length_stand_together():
    inputs, outputs = np.array([5, 5, 5, 5]), np.array([9, 1, 8, 2])
    batches = batching.plan(inputs, outputs, 2, (8,))
    assert [sorted(i) for i, _ in batches] == [[1, 3], [0, 2]]
