"""Predicting many examples: batches of similar lengths through a compiled function, in order."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from modjax import memo, partitioning
from modjax.evaluation import batching

Batch = dict[str, np.ndarray]
# Takes a batch [B, ...], the same in every process, gives the tokens [B, L] of all rows to each.
PredictFn = Callable[[Batch], Any]

# What a batch's cost goes by: the first of these names that a batch has.
INPUTS = ("encoder_input_tokens", "decoder_prompt_tokens")
OUTPUTS = ("decoder_answer_tokens", "decoder_target_tokens", "labels", "values")
IN_FLIGHT = 2


def predictor(
    model: Any,
    params: Any,
    mesh: Mesh | None = None,
    *,
    seed: int = 0,
    rules: partitioning.Rules = partitioning.RULES,
    **options: Any,
) -> PredictFn:
    """A model's `predict_batch`, compiled once per shape.

    Args:
      model: see `modjax.models`.
      params: of base and adapters, on the devices of the mesh if there is one.
      mesh: over which batches are divided; None for one device.
      seed: of sampling; every batch draws anew.
      rules: of the mesh, see `partitioning.Partitioner`.
      **options: for `predict_batch`, as `decoder="beam"`, `num_decodes=4`.
    """
    step = _step(model, "predict_batch", mesh, rules, tuple(options.items()))
    calls = 0

    def predict(batch: Batch) -> jax.Array:
        nonlocal calls
        rng = jax.random.fold_in(jax.random.key(seed), calls)
        calls += 1
        if mesh is None:
            return step(params, batch, rng)
        return step(params, partitioning.place_whole_batch(batch, mesh), rng)

    return predict


@memo.keep(4)
def _step(
    model: Any,
    method: str,
    mesh: Mesh | None,
    rules: partitioning.Rules,
    options: tuple[tuple[str, Any], ...] = (),
) -> Any:
    """A model's method, compiled; kept, so that the next checkpoint of the same model finds what is compiled."""

    def compute(*args: Any) -> jax.Array:
        with partitioning.in_force(mesh, rules):
            return getattr(model, method)(*args, **dict(options))

    # Every process gets the answers of all rows, so that nothing has to be gathered afterwards.
    out = None if mesh is None else partitioning.replicated(mesh)
    return jax.jit(compute, out_shardings=out)


def scorer(
    model: Any,
    params: Any,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.RULES,
) -> PredictFn:
    """A model's `score_batch`, compiled once per shape; arguments as in `predictor`."""
    step = _step(model, "score_batch", mesh, rules)

    def score(batch: Batch) -> jax.Array:
        return step(params, batch if mesh is None else partitioning.place_whole_batch(batch, mesh))

    return score


def run_all(
    function: PredictFn,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """What `function` gives for each example, batches of one shape in the examples' order; see `predict_all`."""
    count = len(next(iter(arrays.values())))
    batches = [(np.arange(count)[at : at + batch_size], None) for at in range(0, count, batch_size)]
    return _run(function, arrays, batches, (), batch_size, progress)


def predict_all(
    predict_fn: PredictFn,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    padded_lengths: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The predicted tokens of each example, in the examples' order.

    Args:
      predict_fn: called with batches.
      arrays: model features by name, `[N, ...]`.
      batch_size: rows of the whole job's batch.
      padded_lengths: how many input lengths are compiled for.
      progress: told after each batch how many examples are done, of how many.
    """
    texts, targets = (next(n for n in names if n in arrays) for names in (INPUTS, OUTPUTS))
    inputs = token_counts(arrays[texts])
    lengths = batching.choose_lengths(inputs, arrays[texts].shape[1], padded_lengths)
    batches = batching.plan(inputs, token_counts(arrays[targets]), batch_size, lengths)
    cut = ("encoder_token_types", texts)
    return _run(predict_fn, arrays, batches, cut, batch_size, progress)


def _run(
    function: PredictFn,
    arrays: Mapping[str, np.ndarray],
    batches: Sequence[tuple[np.ndarray, int | None]],
    cut: Sequence[str],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[np.ndarray]:
    """What `function` gives for each example of batches (indices, length of the arrays named in `cut`)."""
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * sum(len(indices) for indices, _ in batches)
    flying: collections.deque[tuple[np.ndarray, Any]] = collections.deque()
    done = 0

    def land() -> None:
        nonlocal done
        indices, out = flying.popleft()
        for i, row in zip(indices, np.asarray(out), strict=False):
            found[i] = row
        done += len(indices)
        if progress is not None:
            progress(done, len(found))

    for indices, length in batches:
        # A batch that is not full repeats an example: empty rows would be decoded to the end.
        filled = np.resize(indices, batch_size)
        batch = {name: values[filled] for name, values in arrays.items()}
        batch |= {name: batch[name][:, :length] for name in cut if name in batch}
        flying.append((indices, function(batch)))
        if len(flying) > IN_FLIGHT:
            land()
    while flying:
        land()
    return found


def token_counts(tokens: np.ndarray) -> np.ndarray:
    """The number of tokens before the padding, `[N]`."""
    there = tokens > 0
    return np.where(there.any(1), tokens.shape[1] - np.argmax(there[:, ::-1], axis=1), 0)
