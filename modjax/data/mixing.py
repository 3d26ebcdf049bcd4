"""Tasks that are alike as one pipeline: rows go by their numbers, and are read and preprocessed once for all.

SeqIO preprocesses every task by itself, and TensorFlow translates each step of each task: a sixth of a second for a
dataset, before the first batch. Where tasks of text in memory go through the same steps, and these turn one example
into one, mixing or chaining the numbers first gives the same examples in the same order.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.data import carry
from modjax.data.sources import ExamplesSource

# Steps without draws that give one example for each.
_STEPS = (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
    seqio.preprocessors.append_eos_after_trim,
    carry.measure,
)
_TASK = "number_of_task"


def joint(
    mixture: str,
    lengths: Mapping[str, int],
    split: str,
    *,
    shuffle: bool,
    seed: int | None,
    shard_info: seqio.ShardInfo,
    num_epochs: int | None,
) -> tf.data.Dataset | None:
    """What `seqio.Mixture.get_dataset` gives, without features that are not in `lengths` and with the dataset key.

    None where tasks are not alike, or it is no mixture. Arguments are SeqIO's.
    """
    provider = seqio.get_mixture_or_task(mixture)
    mix = getattr(provider, "_sample_fn", None)  # how a mixture mixes is not public
    if type(provider) is not seqio.Mixture or mix is None:
        return None
    tasks = [task for task in provider.tasks if split in task.splits]
    if not _alike(tasks, lengths, split, shuffle):
        return None
    for task in provider.tasks:
        if split not in task.splits:
            logging.warning("Task %s has no %r split, skipping.", task.name, split)
    sizes = [task.source.num_input_examples(split) for task in tasks]
    starts = np.cumsum([0, *sizes])
    streams = []
    for size, start in zip(sizes, starts, strict=False):
        ds = tf.data.Dataset.range(start, start + size)
        if shuffle:
            ds = ds.shuffle(size, seed=seed)
        # After the shuffle, as `ExamplesSource` does.
        ds = ds.shard(shard_info.num_shards, shard_info.index)
        streams.append(ds if num_epochs == 1 else ds.repeat(num_epochs))
    rates = [provider.get_rate(task) for task in tasks]
    chosen = seed if seed is not None or shuffle else 42
    mixed = mix(streams, rates, chosen)

    ds = _preprocessed(mixed, tasks, lengths, lengths, split)
    return carry.map_plainly(ds, lambda ex: {k: ex[k] for k in (*lengths, carry.DATASET_KEY)})


def groups(tasks: Sequence[str], lengths: Mapping[str, int], split: str) -> list[list[str]]:
    """The tasks' names, those together that `in_order` can read as one; a task that has no like is alone."""
    found: list[list[seqio.Task]] = []
    for task in map(seqio.TaskRegistry.get, tasks):
        for group in found:
            if _alike([group[0], task], lengths, split) and _columns(group[0], split) == _columns(
                task, split
            ):
                group.append(task)
                break
        else:
            found.append([task])
    return [[task.name for task in group] for group in found]


def in_order(
    names: Sequence[str], lengths: Mapping[str, int], split: str, number: int | None = None
) -> tf.data.Dataset:
    """The examples of a group of `groups`, task by task, as `seqio.Task.get_dataset` gives those of each, unshuffled.

    Args:
      names: of the tasks.
      lengths: SeqIO's.
      split: of each.
      number: of each, the first so many; all if None.
    """
    tasks = [seqio.TaskRegistry.get(name) for name in names]
    sizes = [task.source.num_input_examples(split) for task in tasks]
    starts = np.cumsum([0, *sizes])
    wanted = [
        np.arange(start, start + min(size, size if number is None else number))
        for size, start in zip(sizes, starts, strict=False)
    ]
    ds = tf.data.Dataset.from_tensor_slices(np.concatenate(wanted))
    return _preprocessed(ds, tasks, lengths, tasks[0].source.columns(split), split)


@tf.autograph.experimental.do_not_convert  # in what it maps: `_STEPS` have no control flow over tensors
def _preprocessed(
    numbers: tf.data.Dataset,
    tasks: Sequence[seqio.Task],
    lengths: Mapping[str, int],
    names: Iterable[str],
    split: str,
) -> tf.data.Dataset:
    """The examples behind numbers of rows, counted through the tasks, with the columns `names` and the dataset key."""
    columns = {
        name: tf.constant(np.concatenate([task.source.columns(split)[name] for task in tasks]))
        for name in names
    }
    sizes = [task.source.num_input_examples(split) for task in tasks]
    owner = tf.constant(np.repeat(np.arange(len(tasks)), sizes), tf.int32)
    ds = carry.map_plainly(
        numbers,
        lambda i: {_TASK: owner[i], **{name: column[i] for name, column in columns.items()}},
    )
    *steps, last = tasks[0].preprocessors
    features = tasks[0].output_features
    cached = any(map(_is_place_of_cache, steps))
    for step in steps:
        if _is_place_of_cache(step):
            cached = False
            continue
        # What stands before an offline cache knows no lengths.
        known = None if cached else lengths
        step = seqio.utils.add_kwargs_to_transform(
            step, sequence_length=known, output_features=features
        )
        ds = step(ds)
    keys = tf.constant([carry.key_of(task.name) << carry.FLAG_BITS for task in tasks], tf.int32)
    of_task = tf.constant([task.name for task in tasks])

    def add(ex: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        ex = dict(ex)
        number = ex.pop(_TASK)
        return carry.carried(ex, keys[number], of_task[number], last.allow_empty, lengths, features)

    return carry.map_plainly(ds, add)


def _columns(task: seqio.Task, split: str) -> dict[str, Any]:
    """What the examples of a split are made of; of a task's own where they cannot be laid end to end."""
    columns = task.source.columns(split)
    if not all(isinstance(column, np.ndarray) for column in columns.values()):
        return {"": task.name}
    return {name: (column.dtype, column.shape[1:]) for name, column in columns.items()}


def _alike(
    tasks: Sequence[seqio.Task], lengths: Mapping[str, int], split: str, shuffle: bool = False
) -> bool:
    """Whether all are text in memory, with the same features and known steps."""
    kinds = {_steps(task) for task in tasks}
    if len(kinds) != 1 or None in kinds:
        return False
    features = tasks[0].output_features
    if set(features) != {*lengths, carry.DATASET_KEY}:
        return False
    for task in tasks:
        columns = task.source.columns(split)
        if (
            task.output_features != features
            or (shuffle and task.shuffle_buffer_size is not None)
            or any(name not in columns or columns[name].dtype != object for name in lengths)
        ):
            return False
    return all(features[name].dtype == tf.int32 and features[name].rank == 1 for name in lengths)


def _steps(task: seqio.Task) -> tuple[Callable | str | bool, ...] | None:
    """What the preprocessors do, so that it can be compared; None if it is not known."""
    if type(task) is not seqio.Task or type(task.source) is not ExamplesSource:
        return None
    *steps, last = task.preprocessors
    if not hasattr(last, "allow_empty") or task.requires_caching:
        return None
    found: list[Callable | str | bool] = [last.allow_empty]
    for step in steps:
        if not _is_place_of_cache(step) and not any(step is known for known in _STEPS):
            return None
        found.append("cache" if _is_place_of_cache(step) else step)
    return tuple(found)


def _is_place_of_cache(step: Callable) -> bool:
    return isinstance(step, seqio.CacheDatasetPlaceholder)
