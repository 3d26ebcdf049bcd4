"""Feature converters: SeqIO's, which pad, pack and shift, and with them each example's features.

Every example carries its task's key (see `modjax.data.carry`). SeqIO packs a declared feature by
concatenation, so after packing the keys of a row stand in the order of its segments, and what
they stand for is looked up. Legend: `B` batch, `L` length, `S` segments of a row (1 when not
packed), `F` columns of features. Segment `s` (from 1, 0 is padding) has row `s - 1`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.data import registry
from modjax.data.carry import DATASET_KEY, FLAG_BITS, key_of, map_plainly
from modjax.features import FeatureSpace, Unknown

Spec = seqio.FeatureConverter.FeatureSpec


def default_max_segments(task_feature_lengths: Mapping[str, int]) -> int:
    """S for packed rows: one per 8 positions of the shorter stream, at least 8, at most 64.

    A row never gets more segments than S; the packer opens the next row instead. So a small S costs
    padding and nothing else (`TrainIterator.stats` counts the rows that are full of segments).
    """
    return min(64, max(8, min(task_feature_lengths[k] for k in ("inputs", "targets")) // 8))


class KeyTable:
    """What the keys of some tasks stand for in a feature space.

    Attributes:
      names: the tasks, in the order of their keys.
      keys: int32 `[N]`, ascending.
      features: int32 `[N + 1, F]`; row 0, all zero, is for padding.
      tasks: int32 `[N + 1]`, dataset ids.
      problems: for each row why it cannot be used, or "".

    Raises:
      ValueError: if `strict`, the first of the problems: a task without metadata where the space
        has features, or with a feature, value or name that the space lacks.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        space: FeatureSpace,
        unknown: Unknown = "error",
        strict: bool = True,
    ):
        self.names = sorted(tasks, key=key_of)
        self.keys = np.array([key_of(n) for n in self.names], np.int32)
        self.features = np.zeros((len(self.names) + 1, space.num_slots), np.int32)
        self.tasks = np.zeros(len(self.names) + 1, np.int32)
        self.problems = [""]
        for i, name in enumerate(self.names, 1):
            try:
                self.features[i], self.tasks[i] = encode(name, space, unknown)
                self.problems.append("")
            except ValueError as e:
                if strict:
                    raise
                self.problems.append(str(e))

    def rows(self, carried: np.ndarray) -> np.ndarray:
        """Row numbers of what examples carried (keys with flags, 0 for padding), any shape."""
        keys = carried >> FLAG_BITS
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1) + 1
        rows = np.where(keys == 0, 0, rows)
        if np.any(np.where(rows > 0, self.keys[rows - 1], 0) != keys):
            raise ValueError("An example carries the key of a task that is not in the mixture.")
        return rows


def encode(task: str, space: FeatureSpace, unknown: Unknown = "error") -> tuple[np.ndarray, int]:
    """A task's features, int32 `[F]`, and its dataset id, in a space.

    Features of the task that the space does not have are left out; with a space that has none,
    a task needs no metadata.

    Raises:
      ValueError: the space has features and the task has no metadata, or `unknown` is "error" and
        the task lacks a feature of the space, or the space a value of the task, or its name.
    """
    # Asked in any case: a task that SeqIO alone knows gives its examples no key.
    metadata = registry.metadata_of(task) if registry.has_metadata(task) or space.names else {}
    row = {n: metadata[n] for n in space.names if n in metadata}
    features = space.encode(row, unknown=unknown, where=f"task {task!r}")
    return features, space.dataset_id(
        registry.origin_of(task), unknown if space.datasets else "none"
    )


class EncDecFeatureConverter(seqio.EncDecFeatureConverter):
    """SeqIO's converter for encoder-decoders, with `features [S, F]` and `tasks [S]` in each row.

    It takes the arguments of its base class and passes where T5X wants a `FEATURE_CONVERTER_CLS`
    once it is bound to a space: `EncDecFeatureConverter.bind(space)(pack=True)`.

    Args:
      space: gives the ids. Without one, the rows keep the keys, int32 `dataset_key [S]`, to be
        looked up by whoever reads them: rows that are buffered and saved then stay right when the
        space grows.
      max_segments: S when packing; by default from the lengths, see `default_max_segments`.
      unknown: what becomes of values and datasets that the space lacks, see `FeatureSpace.encode`.
      tasks: the tasks whose examples may come, checked at once. By default every registered one,
        checked when an example comes.
    """

    TASK_FEATURES = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        DATASET_KEY: Spec(dtype=tf.int32),
    }
    # What the base class checks; it refuses a rank of 2 when packing, so the look-up comes after.
    MODEL_FEATURES = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        DATASET_KEY: Spec(dtype=tf.int32),
    }

    def __init__(
        self,
        pack: bool = True,
        *,
        space: FeatureSpace | None = None,
        max_segments: int | None = None,
        unknown: Unknown = "error",
        tasks: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(pack=pack, **kwargs)
        if max_segments is not None and max_segments < 1:
            raise ValueError(f"max_segments must be at least 1, not {max_segments}.")
        self._space, self._unknown, self._tasks = space, unknown, tasks
        self._max_segments = max_segments

    @classmethod
    def bind(cls, space: FeatureSpace, **settings: Any) -> type["EncDecFeatureConverter"]:
        """A converter class with the space and other settings fixed."""
        init = functools.partialmethod(cls.__init__, space=space, **settings)
        return type(cls.__name__, (cls,), {"__init__": init, "__doc__": cls.__doc__})

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Converts. Lengths are those of "inputs" and "targets"; S is not the caller's to give."""
        ds = super().__call__(ds, self._lengths(task_feature_lengths))
        if self._space is None:
            return ds
        tasks = self._tasks or list(seqio.TaskRegistry.names())
        table = KeyTable(tasks, self._space, self._unknown, strict=self._tasks is not None)
        return map_plainly(ds, functools.partial(_look_up, table))

    def keeping(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Pairs of an example's model features and all its task features, unpacked."""
        if self.pack or self._space is not None:
            raise ValueError("Only a converter with pack=False and space=None keeps examples.")
        lengths = self._lengths(task_feature_lengths)

        def pair(ex):
            trimmed = {k: ex[k][:length] for k, length in lengths.items()}
            padded = {k: tf.pad(v, [[0, lengths[k] - tf.size(v)]]) for k, v in trimmed.items()}
            return self._convert_example(padded), ex

        return map_plainly(ds, pair)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = dict(super().get_model_feature_lengths(task_feature_lengths))
        return {**lengths, DATASET_KEY: task_feature_lengths[DATASET_KEY]}

    def _lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        segments = self._max_segments or default_max_segments(task_feature_lengths)
        return {**task_feature_lengths, DATASET_KEY: segments if self.pack else 1}

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**super()._convert_example(features), DATASET_KEY: features[DATASET_KEY]}


def _look_up(table: KeyTable, ex: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    ex = dict(ex)
    keys = tf.bitwise.right_shift(ex.pop(DATASET_KEY), FLAG_BITS)
    # Between the sorted keys 0 and `table.keys`, so that padding finds row 0.
    known = tf.constant(np.concatenate([[0], table.keys]), tf.int32)
    rows = tf.searchsorted(known, keys, side="right") - 1
    problem = tf.strings.reduce_join(tf.unique(tf.gather(tf.constant(table.problems), rows))[0])
    unheard = tf.reduce_any(tf.not_equal(tf.gather(known, rows), keys))
    problem = tf.where(unheard, "An example comes from a task that is not registered.", problem)
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(problem, ""), [problem])]):
        ex["features"] = tf.gather(tf.constant(table.features), rows)
    ex["tasks"] = tf.gather(tf.constant(table.tasks), rows)
    return ex
