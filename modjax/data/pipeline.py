"""Batches: of a mixture for training (mixed, shuffled, packed, resumable), of a task to evaluate.

Legend: `B` rows of a batch that a process reads, `L` length, `S` segments of a row, `F` columns
of features. A batch is a dictionary of int32 arrays `[B, L]` under T5X's names, with
`features [B, S, F]` and `tasks [B, S]`.
"""

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import seqio
import tensorflow as tf

from modjax.data import mixing, registry
from modjax.data.carry import DATASET_KEY, FLAG_BITS, INPUTS_TOO_LONG, TARGETS_TOO_LONG, map_plainly
from modjax.data.checks import (
    check_batch_size,
    check_lengths,
    check_option,
    check_splits,
    plain,
)
from modjax.data.converters import (
    Carrying,
    EncDecFeatureConverter,
    KeyTable,
    default_max_segments,
    encode,
)
from modjax.data.iterator import Batch, TrainIterator
from modjax.features import FeatureSpace, Unknown


class Example(dict[str, Any]):
    """What a task's preprocessors left in an example but tokens, text as str, by the names that they gave it.

    `inputs_pretokenized` and `targets_pretokenized` are there in any case.

    Attributes:
      task: whose it is.
      index: its place in the split.
      too_long: those of "inputs" and "targets" that were trimmed.
      raw: all of it as SeqIO gives it to a `postprocess_fn`: tokens, and text as bytes.
    """

    def __init__(
        self,
        task: str,
        index: int,
        too_long: Sequence[str],
        raw: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.task, self.index, self.too_long, self.raw = task, index, too_long, dict(raw or {})


def train_iterator(
    mixture: str,
    split: str,
    space: FeatureSpace | None,
    *,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    converter: type[Carrying] = EncDecFeatureConverter,
    pack: bool = True,
    max_segments: int | None = None,
    data_shards: int = 1,
    shares: Sequence[Sequence[int]] | None = None,
    process: int = 0,
    shuffle: bool = True,
    use_cached: bool = False,
    on_too_long: Literal["count", "error"] = "count",
    num_epochs: int | None = None,
) -> TrainIterator:
    """An iterator over a mixture's training batches; the same arguments give the same batches.

    Tasks are mixed by SeqIO's rates. Which rows a process reads decides nothing about them, see
    `modjax.data.iterator`.

    Args:
      mixture: a mixture or task.
      split: which split of each task.
      space: gives the ids of features and datasets; None for methods that need neither (F is 0).
      task_feature_lengths: `{"inputs": L, "targets": L}`; longer examples are trimmed, see below.
      batch_size: rows of the whole job's batch.
      seed: of shuffling, mixing and random preprocessors.
      converter: of the model, its `converter`.
      pack: several examples in a row, told apart by segment ids.
      max_segments: S when packing, see `converters.default_max_segments`.
      data_shards: streams that the examples are divided into. Those of one are best mixed, but each
        process then reads all examples; with more, it reads those of its streams.
      shares: for each process of the job the rows that it reads, ascending, see
        `partitioning.shares`; by default one process reads all.
      process: which of them this is.
      shuffle: whether to; examples come in order otherwise.
      use_cached: read SeqIO's offline caches.
      on_too_long: trim an example over the limit and count it in `stats`, or raise.
      num_epochs: how often each task is read; None for ever. At the end the last batch is filled
        up with rows of padding, and a mixture ends with its first exhausted task, as in SeqIO.

    Raises:
      ValueError: batch size and data shards do not fit; a length or an option is invalid; a task
        has no such split or too few examples in it; a task's features are not in the space.
    """
    check_batch_size(batch_size, data_shards)
    if num_epochs is not None and data_shards > 1:
        raise ValueError(
            f"num_epochs={num_epochs} needs data_shards=1, not {data_shards}: streams end apart."
        )
    shares = [range(batch_size)] if shares is None else shares
    check_option("on_too_long", on_too_long, ("count", "error"))
    lengths = check_lengths(task_feature_lengths)
    tasks = registry.tasks_of(mixture)
    table = KeyTable(tasks, space if space is not None else FeatureSpace(()))
    settings = {
        "mixture": mixture,
        "tasks": tasks,
        "split": split,
        "task_feature_lengths": lengths,
        "batch_size": batch_size,
        "seed": seed,
        "pack": pack,
        "max_segments": (max_segments or default_max_segments(lengths)) if pack else 1,
        "shuffle": shuffle,
        "use_cached": use_cached,
        "num_epochs": num_epochs,
        "data_shards": data_shards,
    }
    check_splits(tasks, split, data_shards, use_cached)
    # The key step and the packer have trimmed: checking each example again takes a fifth longer.
    convert = converter(pack, max_segments=max_segments, apply_length_check=False)

    def make_dataset(stream: int) -> tf.data.Dataset:
        order: dict[str, Any] = {"shuffle": shuffle, "seed": seed, "num_epochs": num_epochs}
        order["shard_info"] = seqio.ShardInfo(index=stream, num_shards=data_shards)
        ds = None if use_cached else mixing.joint(mixture, lengths, split, **order)
        if ds is None:
            ds = seqio.get_mixture_or_task(mixture).get_dataset(
                lengths,
                split=split,
                use_cached=use_cached,
                trim_output_features=False,  # the step that adds the key has trimmed
                # It would freeze the order of the first epoch and put whole datasets into checkpoints.
                try_in_mem_cache=False,
                **order,
            )
            ds = _only(ds, lengths)
        ds = convert(ds, lengths)
        ds = ds.batch(batch_size // data_shards, drop_remainder=num_epochs is None)
        return ds.prefetch(4).with_options(_options())

    return TrainIterator(
        make_dataset, table, settings, shares=shares, process=process, on_too_long=on_too_long
    )


def eval_batches(
    task: str,
    split: str,
    space: FeatureSpace | None,
    *,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    converter: type[Carrying] = EncDecFeatureConverter,
    unknown: Unknown = "none",
    rows: Sequence[int] | None = None,
    use_cached: bool = False,
    on_too_long: Literal["count", "error"] = "count",
    max_examples: int | None = None,
) -> Iterator[tuple[Batch, list[Example]]]:
    """Every example of a task's split once, in order, not packed.

    In a job of several processes each gets its rows of the same batches, equally many batches for
    all, so that they can be computed together.

    Args:
      task: a task; go over `registry.tasks_of` for a mixture.
      split: its split.
      space: gives the ids; None for methods that need no features (F is 0).
      task_feature_lengths: as for `train_iterator`.
      batch_size: rows of the whole job's batch.
      converter: of the model, its `converter`.
      unknown: what becomes of a value or dataset that the space lacks: "none", id 0, or "error".
      rows: those of each batch that this process reads, ascending; all by default.
      use_cached: read SeqIO's offline caches.
      on_too_long: trim an example over the limit and say so in it, or raise.
      max_examples: only the first so many.

    Yields:
      A batch of B rows with `valid`, bool `[B]`, false for the rows of zeros that fill up the last
      one, S = 1; and for each valid row its `Example`.

    Raises:
      ValueError: as `train_iterator`; text that is not UTF-8 (task and index are named).
    """
    check_batch_size(batch_size)
    rows = range(batch_size) if rows is None else rows
    check_option("on_too_long", on_too_long, ("count", "error"))
    lengths = check_lengths(task_feature_lengths)
    if registry.tasks_of(task) != [task]:
        raise ValueError(f"{task!r} is a mixture; evaluate its tasks: {registry.tasks_of(task)}.")
    table = KeyTable([task], space if space is not None else FeatureSpace(()), unknown)
    check_splits([task], split, use_cached=use_cached)
    ds = seqio.TaskRegistry.get(task).get_dataset(
        lengths, split=split, use_cached=use_cached, shuffle=False, seed=0, try_in_mem_cache=False
    )
    if max_examples is not None:
        ds = ds.take(max_examples)
    pairs = converter(pack=False).keeping(ds, lengths).with_options(_options()).prefetch(batch_size)
    return _eval_batches(pairs, table, lengths, batch_size, rows, on_too_long)


def eval_batches_of(
    tasks: Sequence[str],
    split: str,
    space: FeatureSpace | None,
    *,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    converter: type[Carrying] = EncDecFeatureConverter,
    unknown: Unknown = "none",
    use_cached: bool = False,
    max_examples: int | None = None,
) -> Iterator[tuple[Batch, list[Example]]]:
    """`eval_batches` of several tasks; a batch may hold examples of several, and tasks come in any order.

    Tasks of text in memory with the same preprocessors are read by one pipeline (`modjax.data.mixing`).

    Args, yields and raises: as `eval_batches`; `max_examples` is of each task.
    """
    check_batch_size(batch_size)
    lengths = check_lengths(task_feature_lengths)
    space = space if space is not None else FeatureSpace(())
    for task in tasks:  # the first one that is wrong is named
        encode(task, space, unknown)
        check_splits([task], split, use_cached=use_cached)
    for group in [[t] for t in tasks] if use_cached else mixing.groups(tasks, lengths, split):
        if len(group) == 1:
            yield from eval_batches(
                group[0],
                split,
                space,
                task_feature_lengths=lengths,
                batch_size=batch_size,
                converter=converter,
                unknown=unknown,
                use_cached=use_cached,
                max_examples=max_examples,
            )
            continue
        table = KeyTable(group, space, unknown)
        ds = mixing.in_order(group, lengths, split, max_examples)
        pairs = converter(pack=False).keeping(ds, lengths).with_options(_options())
        every = range(batch_size)
        yield from _eval_batches(
            pairs.prefetch(batch_size), table, lengths, batch_size, every, "count"
        )


def _eval_batches(pairs, table, lengths, batch_size, rows, on_too_long):
    examples = _numbered(_readable(pairs), table)
    # All processes go over all examples, so that all know where the last batch is.
    while chunk := list(itertools.islice(examples, batch_size)):
        mine = [chunk[row] for row in rows if row < len(chunk)]
        _, (like, _) = chunk[0]
        batch = {k: np.zeros((len(rows), *v.shape), v.dtype) for k, v in like.items()}
        for i, (_, (model_features, _)) in enumerate(mine):
            for k, v in model_features.items():
                batch[k][i] = v
        found = table.rows(batch.pop(DATASET_KEY))
        batch |= {"features": table.features[found], "tasks": table.tasks[found]}
        batch["valid"] = np.arange(len(rows)) < len(mine)
        readable = [_example(name, index, ex) for (name, index), (_, ex) in mine]
        if on_too_long == "error":
            for ex in readable:
                for kind in ex.too_long:
                    raise ValueError(
                        f"task {ex.task!r}, example {ex.index}: {kind} over the limit of "
                        f"{lengths[kind]} tokens; raise task_feature_lengths, or allow trimming."
                    )
        yield batch, readable


def _numbered(pairs: Iterator[Any], table: KeyTable) -> Iterator[tuple[tuple[str, int], Any]]:
    """((task, index in its split), pair) of each pair."""
    counts: dict[str, int] = collections.Counter()
    for pair in pairs:
        name = table.names[int(table.rows(pair[1][DATASET_KEY])[0]) - 1]
        yield (name, counts[name]), pair
        counts[name] += 1


def _readable(ds: tf.data.Dataset) -> Iterator[Any]:
    iterator = ds.as_numpy_iterator()
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as e:
            raise ValueError(plain(e)) from e


def _example(task: str, index: int, ex: Mapping[str, Any]) -> Example:
    flags = int(ex[DATASET_KEY][0]) & ((1 << FLAG_BITS) - 1)
    kinds = (("inputs", INPUTS_TOO_LONG), ("targets", TARGETS_TOO_LONG))
    raw = {name: value for name, value in ex.items() if name != DATASET_KEY}
    out = Example(task, index, [kind for kind, flag in kinds if flags & flag], raw)
    features = seqio.TaskRegistry.get(task).output_features
    for name, value in ex.items():
        if name not in features:
            try:
                out[name] = _plain_value(value)
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"task {task!r}, example {index}: {name} is not valid UTF-8: {e}."
                ) from e
    for name in ("inputs", "targets"):
        if f"{name}_pretokenized" not in out:
            values = np.ravel(ex[name])
            if not np.issubdtype(values.dtype, np.floating):  # a number may be 0, a token is not
                values = values[values != 0]
            out[f"{name}_pretokenized"] = features[name].vocabulary.decode(values.tolist())
    return out


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list | tuple):
        return [_plain_value(v) for v in value]
    if hasattr(value, "to_list"):  # ragged
        return _plain_value(value.to_list())
    return _plain_value(value.tolist()) if hasattr(value, "tolist") else value


def packed_and_not(
    mixture: str,
    split: str,
    space: FeatureSpace | None,
    *,
    task_feature_lengths: Mapping[str, int],
    num_examples: int,
    converter: type[Carrying] = EncDecFeatureConverter,
    max_segments: int | None = None,
    seed: int = 0,
) -> tuple[Batch, Batch, np.ndarray]:
    """The same examples packed and not packed, to compare what a model does with both.

    Returns:
      The packed batch, as many rows as it takes; the other, one row for each example; and int32
      `[num_examples, 2]`: the packed row of each example, and its segment id there, from 1.

    Raises:
      ValueError: as `train_iterator`, or the split has fewer examples.
    """
    lengths = check_lengths(task_feature_lengths)
    tasks = registry.tasks_of(mixture)
    table = KeyTable(tasks, space if space is not None else FeatureSpace(()))
    check_splits(tasks, split)
    ds = seqio.get_mixture_or_task(mixture).get_dataset(
        lengths, split=split, shuffle=False, seed=seed, num_epochs=None
    )
    ds = _only(ds, lengths).take(num_examples)
    batches = []
    for pack in (True, False):
        convert = converter(pack, max_segments=max_segments)
        rows = list(convert(ds, lengths).as_numpy_iterator())
        batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        carried = batch.pop(DATASET_KEY)
        found = table.rows(carried)
        batches.append({**batch, "features": table.features[found], "tasks": table.tasks[found]})
        if pack:
            # The packer keeps the order of the examples.
            where = np.argwhere(carried != 0).astype(np.int32) + [0, 1]
    return batches[0], batches[1], where.astype(np.int32)


def _only(ds: tf.data.Dataset, lengths: Mapping[str, int]) -> tf.data.Dataset:
    """Without what SeqIO would drop with a warning when packing."""
    names = (*lengths, DATASET_KEY)
    if set(ds.element_spec) == set(names):
        return ds
    return map_plainly(ds, lambda ex: {k: ex[k] for k in names})


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_optimization.map_fusion = True
    # Tuning costs a sixth of the time and brings nothing here; examples are so small that threads
    # inside an operation cost more than they bring.
    options.autotune.enabled = False
    options.threading.max_intra_op_parallelism = 1
    # A position that leaves out what it cannot store (as a Python generator's) would be wrong.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.FAIL
    return options
