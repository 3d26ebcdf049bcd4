"""Predicting many examples: batches of similar lengths through a compiled function, in order."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from modjax import partitioning
from modjax.evaluation import batching

Batch = dict[str, np.ndarray]
# Takes this process's rows of a batch [B / processes, ...], gives the tokens [B, L] of all rows.
PredictFn = Callable[[Batch], Any]

INPUTS = "encoder_input_tokens"
OUTPUTS = "decoder_target_tokens"
IN_FLIGHT = 2


def predictor(
    model: Any, params: Any, mesh: Mesh | None = None, *, seed: int = 0, **options: Any
) -> PredictFn:
    """A model's `predict_batch`, compiled once per shape.

    Args:
      model: see `modjax.models`.
      params: of base and adapters, on the devices of the mesh if there is one.
      mesh: over which batches are divided; None for one device.
      seed: of sampling; every batch draws anew.
      **options: for `predict_batch`, as `decoder="beam"`, `num_decodes=4`.
    """
    # Every process gets the tokens of all rows, so that nothing has to be gathered afterwards.
    out = None if mesh is None else partitioning.replicated(mesh)
    step = jax.jit(
        lambda params, batch, rng: model.predict_batch(params, batch, rng, **options),
        out_shardings=out,
    )
    calls = 0

    def predict(batch: Batch) -> jax.Array:
        nonlocal calls
        rng = jax.random.fold_in(jax.random.key(seed), calls)
        calls += 1
        if mesh is None:
            return step(params, batch, rng)
        return step(params, partitioning.place_batch(batch, mesh), rng)

    return predict


def predict_all(
    predict_fn: PredictFn,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    padded_lengths: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The predicted tokens of each example, in the examples' order.

    Args:
      predict_fn: called with batches of this process's rows.
      arrays: model features by name, `[N, ...]`.
      batch_size: rows of the whole job's batch.
      padded_lengths: how many input lengths are compiled for.
      progress: told after each batch how many examples are done, of how many.

    Raises:
      ValueError: batch size and processes do not fit.
    """
    count, process = jax.process_count(), jax.process_index()
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"The batch of {batch_size} does not divide over {count} processes.")
    rows = batch_size // count
    inputs = token_counts(arrays[INPUTS])
    lengths = batching.choose_lengths(inputs, arrays[INPUTS].shape[1], padded_lengths)
    batches = batching.plan(inputs, token_counts(arrays[OUTPUTS]), batch_size, lengths)
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * len(inputs)
    flying: collections.deque[tuple[np.ndarray, Any]] = collections.deque()
    done = 0

    def land() -> None:
        nonlocal done
        indices, out = flying.popleft()
        for i, row in zip(indices, np.asarray(out), strict=False):
            tokens[i] = row
        done += len(indices)
        if progress is not None:
            progress(done, len(tokens))

    for indices, length in batches:
        # A batch that is not full repeats an example: empty rows would be decoded to the end.
        filled = np.resize(indices, batch_size)[process * rows :][:rows]
        batch = {name: values[filled] for name, values in arrays.items()}
        batch[INPUTS] = batch[INPUTS][:, :length]
        flying.append((indices, predict_fn(batch)))
        if len(flying) > IN_FLIGHT:
            land()
    while flying:
        land()
    return tokens


def token_counts(tokens: np.ndarray) -> np.ndarray:
    """The number of tokens before the padding, `[N]`."""
    there = tokens > 0
    return np.where(there.any(1), tokens.shape[1] - np.argmax(there[:, ::-1], axis=1), 0)
