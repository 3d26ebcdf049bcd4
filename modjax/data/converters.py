"""Feature converters: SeqIO's, which pad, pack and shift, and with them each example's features.

Every example carries its task's key (see `modjax.data.carry`). SeqIO packs a declared feature by
concatenation, so after packing the keys of a row stand in the order of its segments, and what
they stand for is looked up. There is one for each kind of model.

Legend: `B` batch, `L` length, `S` segments of a row (1 when not packed), `F` columns of features.
Segment `s` (from 1, 0 is padding) has row `s - 1`.
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


class Carrying(seqio.FeatureConverter):
    """What our converters add to SeqIO's: `features [S, F]` and `tasks [S]` in each row.

    They take the arguments of their base class and pass where T5X wants a `FEATURE_CONVERTER_CLS`
    once they are bound to a space: `EncDecFeatureConverter.bind(space)(pack=True)`.

    Args:
      space: gives the ids. Without one, the rows keep the keys, int32 `dataset_key [S]`, to be
        looked up by whoever reads them: rows that are buffered and saved then stay right when the
        space grows.
      max_segments: S when packing; by default from the lengths, see `default_max_segments`.
      unknown: what becomes of values and datasets that the space lacks, see `FeatureSpace.encode`.
      tasks: the tasks whose examples may come, checked at once. By default every registered one,
        checked when an example comes.
    """

    PLAIN: type[seqio.FeatureConverter]  # SeqIO's own, for models that need no features

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
    def bind(cls, space: FeatureSpace, **settings: Any) -> type["Carrying"]:
        """A converter class with the space and other settings fixed."""
        return _with_settings(cls, space=space, **settings)

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
            return self._convert_alone({k: ex[k][:n] for k, n in lengths.items()}, lengths), ex

        return map_plainly(ds, pair)

    def _convert_alone(
        self, ex: Mapping[str, tf.Tensor], lengths: Mapping[str, int]
    ) -> dict[str, tf.Tensor]:
        """The model features of one example that is no longer than `lengths`."""
        return self._convert_example({k: _padded(v, lengths[k]) for k, v in ex.items()})

    def _lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        segments = self._max_segments or default_max_segments(task_feature_lengths)
        return {**task_feature_lengths, DATASET_KEY: segments if self.pack else 1}


class EncDecFeatureConverter(Carrying, seqio.EncDecFeatureConverter):
    """SeqIO's converter for encoder-decoders, with what `Carrying` adds."""

    PLAIN = seqio.EncDecFeatureConverter
    TASK_FEATURES = {**PLAIN.TASK_FEATURES, DATASET_KEY: Spec(dtype=tf.int32)}
    # What the base class checks; it refuses a rank of 2 when packing, so the look-up comes after.
    MODEL_FEATURES = {**PLAIN.MODEL_FEATURES, DATASET_KEY: Spec(dtype=tf.int32)}

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = dict(super().get_model_feature_lengths(task_feature_lengths))
        return {**lengths, DATASET_KEY: task_feature_lengths[DATASET_KEY]}

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**super()._convert_example(features), DATASET_KEY: features[DATASET_KEY]}


class DecoderOnlyFeatureConverter(Carrying, seqio.PrefixLMFeatureConverter):
    """SeqIO's converter for `inputs + targets` as one sequence, with what `Carrying` adds.

    A row's length is the sum of both limits. Rows for evaluation also hold the two parts alone:
    `decoder_prompt_tokens [inputs + 1]`, behind the first token, and `decoder_answer_tokens
    [targets]`.
    """

    PLAIN = seqio.PrefixLMFeatureConverter
    TASK_FEATURES = {**PLAIN.TASK_FEATURES, DATASET_KEY: Spec(dtype=tf.int32)}
    MODEL_FEATURES = {**PLAIN.MODEL_FEATURES, DATASET_KEY: Spec(dtype=tf.int32)}

    @classmethod
    @functools.cache
    def starting_with(cls, token: int) -> type["DecoderOnlyFeatureConverter"]:
        """The class for models whose sequences begin with this token."""
        bound = _with_settings(cls, bos_id=token)
        bound.PLAIN = _with_settings(cls.PLAIN, bos_id=token)
        return bound

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        texts = {k: v for k, v in task_feature_lengths.items() if k != DATASET_KEY}
        lengths = dict(super().get_model_feature_lengths(texts))
        return {**lengths, DATASET_KEY: task_feature_lengths[DATASET_KEY]}

    def _concat_task_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> dict[str, int]:
        texts = {k: v for k, v in task_feature_lengths.items() if k != DATASET_KEY}
        lengths = dict(super()._concat_task_feature_lengths(texts))
        return {**lengths, DATASET_KEY: task_feature_lengths[DATASET_KEY]}

    def _concat_and_add_masks(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        joined = dict(super()._concat_and_add_masks(features))
        return {**joined, DATASET_KEY: features[DATASET_KEY]}

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**super()._convert_example(features), DATASET_KEY: features[DATASET_KEY]}

    def _convert_alone(
        self, ex: Mapping[str, tf.Tensor], lengths: Mapping[str, int]
    ) -> dict[str, tf.Tensor]:
        joined = self._concat_and_add_masks(ex)
        limits = self._concat_task_feature_lengths(lengths)
        found = self._convert_example({k: _padded(v, limits[k]) for k, v in joined.items()})
        prompt = tf.concat([tf.fill([1], self.bos_id), ex["inputs"]], 0)
        return {
            **found,
            "decoder_prompt_tokens": _padded(prompt, lengths["inputs"] + 1),
            "decoder_answer_tokens": _padded(ex["targets"], lengths["targets"]),
        }


class ClassificationFeatureConverter(Carrying):
    """For encoders with classes: one target, counted from 1 (see `modjax.models.EncoderModel`).

    Token types are 1 behind the first separator, 0 before it and where there is none.
    """

    TASK_FEATURES = {
        "inputs": Spec(dtype=tf.int32),
        "targets": Spec(dtype=tf.int32),
        DATASET_KEY: Spec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        "encoder_input_tokens": Spec(dtype=tf.int32),
        "encoder_token_types": Spec(dtype=tf.int32),
        "labels": Spec(dtype=tf.int32),
        DATASET_KEY: Spec(dtype=tf.int32),
    }
    PACKING_FEATURE_DTYPES = None
    TARGET = "labels"

    def __init__(self, pack: bool = False, *, separator: int | None = None, **kwargs: Any):
        if pack:
            raise ValueError("An encoder's examples have a row each: set pack = False.")
        super().__init__(pack=False, **kwargs)
        self._separator = separator

    @classmethod
    @functools.cache
    def ending_with(cls, separator: int | None) -> type["ClassificationFeatureConverter"]:
        """The class for models whose texts end with this token."""
        bound = _with_settings(cls, separator=separator)
        bound.PLAIN = bound
        return bound

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        if task_feature_lengths["targets"] != 1:
            raise ValueError(
                f"An encoder gives one label or value: set the length of targets to 1, not "
                f"{task_feature_lengths['targets']}."
            )
        names = ("encoder_input_tokens", "encoder_token_types")
        lengths = dict.fromkeys(names, task_feature_lengths["inputs"])
        return {**lengths, self.TARGET: 1, DATASET_KEY: 1}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        return map_plainly(self._pack_or_pad(ds, task_feature_lengths), self._convert_example)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = features["inputs"]
        types = tf.zeros_like(tokens)
        if self._separator is not None:
            ends = tf.cast(tf.equal(tokens, self._separator), tokens.dtype)
            behind = tf.minimum(tf.cumsum(ends, exclusive=True), 1)
            types = behind * tf.cast(tokens > 0, tokens.dtype)
        return {
            "encoder_input_tokens": tokens,
            "encoder_token_types": types,
            self.TARGET: features["targets"],
            DATASET_KEY: features[DATASET_KEY],
        }


class RegressionFeatureConverter(ClassificationFeatureConverter):
    """For encoders with one output: one target, float32."""

    TASK_FEATURES = {
        **ClassificationFeatureConverter.TASK_FEATURES,
        "targets": Spec(dtype=tf.float32),
    }
    MODEL_FEATURES = {
        "encoder_input_tokens": Spec(dtype=tf.int32),
        "encoder_token_types": Spec(dtype=tf.int32),
        "values": Spec(dtype=tf.float32),
        DATASET_KEY: Spec(dtype=tf.int32),
    }
    TARGET = "values"


def _with_settings(cls: type[Any], **settings: Any) -> type[Any]:
    init = functools.partialmethod(cls.__init__, **settings)
    return type(cls.__name__, (cls,), {"__init__": init, "__doc__": cls.__doc__})


def _padded(values: tf.Tensor, length: int) -> tf.Tensor:
    return tf.pad(values, [[0, length - tf.size(values)]])


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
