"""The number by which an example says which task it is of, all the way into a packed batch.

SeqIO packs numbers and nothing else, and takes 0 for padding. So an example carries its task's key:
a hash of the name, the same in every process and in a resumed run, times 4, plus two flags that say
that its inputs or its targets were longer than the limit.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from modjax.errors import nearest

DATASET_KEY = "dataset_key"
INPUTS_TOO_LONG, TARGETS_TOO_LONG = 1, 2
FLAG_BITS = 2
KEY_FEATURE = seqio.Feature(
    seqio.PassThroughVocabulary(size=2**31 - 1), add_eos=False, dtype=tf.int32
)

FLAGS = "too_long_flags"  # written by who cuts an example before it is measured here

PROBLEM = "problem"  # what is wrong with an example, by who finds it where its task is not known

# Preprocessors that give one example for each that they take.
_KEEPING = (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
    seqio.preprocessors.append_eos_after_trim,
    seqio.preprocessors.rekey,
)


def key_of(task_name: str) -> int:
    """The number >= 1, below 2**29, that the examples of a task carry."""
    return zlib.crc32(task_name.encode()) % (2**29 - 1) + 1


def keeps_every_example(preprocessor: Any) -> bool:
    """Whether a preprocessor is known to drop no example, or says so by this attribute."""
    return (
        any(preprocessor is known for known in _KEEPING)
        or isinstance(preprocessor, seqio.CacheDatasetPlaceholder)
        or getattr(preprocessor, "keeps_every_example", False)
    )


def map_plainly(dataset: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """`dataset.map`, in parallel, for a function without Python control flow over tensors.

    Translating such a function is a large part of the time it takes to build a mixture.
    """
    plainly = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(plainly, num_parallel_calls=tf.data.AUTOTUNE)


def with_measure(preprocessors: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """Measures examples before a preprocessor that trims them, or nobody would know."""
    steps: list[Callable[..., Any]] = []
    for step in preprocessors:
        function = step.func if isinstance(step, functools.partial) else step
        if function is seqio.preprocessors.append_eos_after_trim:
            steps.append(measure)
        steps.append(step)
    return steps


def _too_long(
    ex: Mapping[str, tf.Tensor], limits: Mapping[str, int] | None, extra: Mapping[str, int]
) -> tf.Tensor:
    flags = tf.constant(0, tf.int32)
    for name, flag in (("inputs", INPUTS_TOO_LONG), ("targets", TARGETS_TOO_LONG)):
        limit = (limits or {}).get(name)
        if name in ex and limit is not None:
            flags += flag * tf.cast(tf.size(ex[name]) + extra.get(name, 0) > limit, tf.int32)
    return flags


def measure(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None = None,
    output_features: Mapping[str, seqio.Feature] | None = None,
) -> tf.data.Dataset:
    """A preprocessor: marks what will be longer than its limit, the end mark included, before it is trimmed."""
    extra = {n: int(f.add_eos) for n, f in (output_features or {}).items()}
    return map_plainly(dataset, lambda ex: {**ex, FLAGS: _too_long(ex, sequence_length, extra)})


measure.keeps_every_example = True  # type: ignore[attr-defined]


def carry_key(name: str, allow_empty: bool) -> Callable[..., tf.data.Dataset]:
    """The last preprocessor of every task: gives its examples their key, and refuses bad ones.

    It also trims, as SeqIO would right after it: a step less to build and to run for each task.
    """
    key = key_of(name) << FLAG_BITS

    def carry_step(
        dataset: tf.data.Dataset,
        sequence_length: Mapping[str, int] | None = None,
        output_features: Mapping[str, seqio.Feature] | None = None,
    ) -> tf.data.Dataset:
        fields = dataset.element_spec
        for feature in output_features or {}:
            if feature not in fields and feature != DATASET_KEY:
                raise ValueError(
                    f"task {name!r}: its examples have no {feature!r} behind its preprocessors."
                    f"{nearest(feature, fields)}"
                )

        def add(ex: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return carried(ex, key, name, allow_empty, sequence_length, output_features)

        return map_plainly(dataset, add)

    carry_step.keeps_every_example = True  # type: ignore[attr-defined]
    carry_step.allow_empty = allow_empty  # type: ignore[attr-defined]
    return carry_step


def carried(
    ex: Mapping[str, tf.Tensor],
    key: int | tf.Tensor,
    name: str | tf.Tensor,
    allow_empty: bool,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature] | None,
) -> dict[str, tf.Tensor]:
    """An example with its key, trimmed; reading it is an error that names its task if it is a bad one.

    Args:
      ex: tokenised.
      key: of the task, with room for the flags.
      name: the task's.
      allow_empty: whether targets may hold nothing but the end mark.
      sequence_length, output_features: SeqIO's.
    """
    ex = dict(ex)
    flags = tf.bitwise.bitwise_or(
        ex.pop(FLAGS, tf.constant(0, tf.int32)), _too_long(ex, sequence_length, {})
    )
    told = ex.pop(PROBLEM, tf.constant(""))
    problem = tf.where(told == "", _problem(ex, output_features or {}, allow_empty), told)
    text = ex.get("inputs_pretokenized", ex.get("inputs", ""))
    where = tf.strings.join(["task '", name, "': an example"])
    ok = tf.debugging.Assert(tf.equal(problem, ""), [where, problem, "It begins:", text])
    with tf.control_dependencies([ok]):
        ex[DATASET_KEY] = tf.reshape(key + flags, [1])
    for kind in ("inputs", "targets"):
        limit = (sequence_length or {}).get(kind)
        if kind in ex and limit is not None:
            ex[kind] = ex[kind][:limit]
    return ex


def _problem(
    ex: Mapping[str, tf.Tensor], features: Mapping[str, seqio.Feature], allow_empty: bool
) -> tf.Tensor:
    """What is wrong with a tokenised example, or "". Such examples would be packed wrongly."""
    problem = tf.constant("")
    for name in ("inputs", "targets"):
        if name not in ex or ex[name].dtype != tf.int32:
            continue
        tokens = ex[name]
        eos = features[name].vocabulary.eos_id if name in features else None
        if name == "inputs" or allow_empty or eos is None:
            empty = tf.equal(tf.size(tokens), 0)
        else:
            empty = tf.reduce_all(tf.equal(tokens, eos))
        padding = tf.reduce_any(tf.equal(tokens, 0))
        problem = tf.where(padding, f"has the padding id 0 among its {name}.", problem)
        problem = tf.where(empty, f"has empty {name}.", problem)
    return problem
