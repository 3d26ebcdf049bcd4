"""Which examples are predicted together: batches of similar lengths, in few shapes.

Datasets are mixed, because a batch may hold any of them. A batch costs its padded input length, and
as many decoding steps as its longest output; each shape costs a compilation.
"""

from collections.abc import Sequence

import numpy as np


def choose_lengths(lengths: np.ndarray, limit: int, most: int, step: int = 8) -> tuple[int, ...]:
    """At most `most` padded lengths, ascending, with the least padding for these examples.

    Args:
      lengths: int `[N]`, of the examples, none above `limit`.
      limit: the longest padded length there may be.
      most: how many lengths.
      step: padded lengths are multiples of it, or the limit.
    """
    if most < 1:
        raise ValueError(f"At least one padded length is needed, got most={most}.")
    rounded = np.minimum(-(-np.maximum(lengths, 1) // step) * step, limit)
    candidates, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: (cost, lengths) for the examples up to candidate j, with one more length per round.
    best: list[tuple[int, tuple[int, ...]]]
    best = [(int(total[j + 1] * c), (int(c),)) for j, c in enumerate(candidates)]
    for _ in range(min(most, len(candidates)) - 1):
        best = [
            min(
                [best[j]]
                + [
                    (best[i][0] + int((total[j + 1] - total[i + 1]) * c), (*best[i][1], int(c)))
                    for i in range(j)
                ]
            )
            for j, c in enumerate(candidates)
        ]
    return best[-1][1]


def plan(
    input_lengths: np.ndarray,
    output_lengths: np.ndarray,
    batch_size: int,
    padded_lengths: Sequence[int],
) -> list[tuple[np.ndarray, int]]:
    """Batches that together hold every example once.

    Within a padded length, examples of similar output length stand together; what does not fill a
    batch moves up to the next padded length. So there are as few batches as possible, all full but
    the last. Output lengths decide about time only, never about a prediction.

    Args:
      input_lengths, output_lengths: int `[N]`.
      batch_size: rows of a batch.
      padded_lengths: ascending, the last one no shorter than any input.

    Returns:
      (indices of examples, padded length) for each batch.
    """
    bucket = np.searchsorted(np.asarray(padded_lengths), input_lengths)
    batches = []
    rest = np.zeros(0, np.int64)
    for i, length in enumerate(padded_lengths):
        pool = np.concatenate([rest, np.flatnonzero(bucket == i)])
        pool = pool[np.argsort(output_lengths[pool], kind="stable")]
        full = len(pool) - len(pool) % batch_size
        batches += [(pool[at : at + batch_size], length) for at in range(0, full, batch_size)]
        rest = pool[full:]
    if len(rest):
        batches.append((rest, padded_lengths[-1]))
    return batches
