"""A SeqIO data source for examples that are in memory: lists, or functions that make them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.data.carry import map_plainly
from modjax.errors import nearest

Examples = Sequence[Mapping[str, Any]]


class ExamplesSource(seqio.DataSource):
    """Examples from Python, shuffled as a whole anew each epoch, and shared out over processes.

    A task of it needs no shuffle buffer (`shuffle_buffer_size=None`): it starts sooner, and what is
    saved of its position are numbers instead of examples.

    Args:
      splits: for each split its examples, dictionaries with the same keys (text, arrays of one
        shape, or lists of any lengths), or a function without arguments that returns them, called
        when first needed.

    Raises:
      ValueError: examples without the name of a split; or when a split is read that does not exist,
        is empty, or has examples with other keys than the first one.
    """

    def __init__(self, splits: Mapping[str, Examples | Callable[[], Examples]]):
        if not isinstance(splits, Mapping):
            raise ValueError(
                f"ExamplesSource takes {{split: examples}}, as {{'train': [...]}}, not {splits!r:.80}"
            )
        super().__init__(splits=splits, performs_internal_shuffling=True)
        self._sources = dict(splits)
        self._columns: dict[str, dict[str, Any]] = {}

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        return int(next(iter(self.columns(split).values())).shape[0])

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """The examples of one split, or of one shard of it, in an order given by the seed."""
        del unused
        columns = {
            k: v if isinstance(v, tf.RaggedTensor) else tf.constant(v)
            for k, v in self.columns(split).items()
        }
        number = self.num_input_examples(split)
        ds = tf.data.Dataset.range(number)
        if shuffle:
            ds = ds.shuffle(number, seed=seed)
        if shard_info is not None:
            # After the shuffle, which all processes share, so that their parts are disjoint.
            ds = ds.shard(shard_info.num_shards, shard_info.index)
        return map_plainly(ds, lambda i: {k: v[i] for k, v in columns.items()})

    def columns(self, split: str) -> dict[str, Any]:
        """A split's examples by key: an array of all values, or a ragged tensor. Not to be written to."""
        if split not in self._sources:
            raise ValueError(f"No split {split!r}.{nearest(split, self._sources)}")
        if split not in self._columns:
            source = self._sources[split]
            rows = list(source() if callable(source) else source)
            if not rows:
                raise ValueError(f"Split {split!r} is empty.")
            for i, row in enumerate(rows):
                if set(row) != set(rows[0]):
                    raise ValueError(
                        f"Split {split!r}, example {i} has the keys {sorted(row)}, "
                        f"not {sorted(rows[0])} as the first one."
                    )
            self._columns[split] = {k: _column([row[k] for row in rows]) for k in rows[0]}
        return self._columns[split]


def _column(values: Sequence[Any]) -> np.ndarray | tf.RaggedTensor:
    if isinstance(values[0], str | bytes):
        return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=object)
    if isinstance(values[0], list | tuple | np.ndarray) and len({np.shape(v) for v in values}) > 1:
        lengths = [len(v) for v in values]
        return tf.RaggedTensor.from_row_lengths(np.concatenate(values), lengths)
    return np.asarray(values)
