"""What is checked of an input before its first batch, so that it fails at once and by name."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.data import registry, vocabularies
from modjax.data.carry import DATASET_KEY, keeps_every_example
from modjax.errors import nearest
from modjax.features import FeatureSpace, as_values


def check_lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """The lengths of "inputs" and "targets". Raises ValueError for others, or if not positive."""
    lengths = {k: v for k, v in task_feature_lengths.items() if k != DATASET_KEY}
    if set(lengths) != {"inputs", "targets"} or any(
        isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in lengths.values()
    ):
        raise ValueError(
            'task_feature_lengths must give positive whole numbers for "inputs" and "targets", '
            f"not {dict(task_feature_lengths)}."
        )
    return lengths


def check_vocabularies(task: str, model: Any, base: seqio.Vocabulary | None = None) -> None:
    """Checks that a task's tokens are those of a model's base.

    Args:
      task: a name.
      model: see `modjax.models`.
      base: the vocabulary of the base's own tokenizer, where it is known.

    Raises:
      ValueError: another numbering, more tokens than the base has, other tokens, or another end of a text; the task is
        named.
    """
    where = f"task {task!r}"
    config = getattr(model.network, "config", None)
    features = seqio.TaskRegistry.get(task).output_features
    vocabularies.check_fits(features["inputs"].vocabulary, config, where)
    vocabularies.check_same(features["inputs"].vocabulary, base, where)
    targets = features["targets"].vocabulary
    eos = getattr(model, "eos_id", None)
    if eos is None:
        number = features["targets"].dtype == tf.float32
        if number != (model.num_outputs == 1):
            kind = "numbers" if number else "labels"
            raise ValueError(
                f"{where} has {kind} as targets, and the network {model.num_outputs} output(s): "
                "NUM_OUTPUTS is 1 for numbers, else the number of classes."
            )
        if model.num_outputs > 1 and targets.vocab_size - 1 > model.num_outputs:
            raise ValueError(
                f"{where} has {targets.vocab_size - 1} labels, the network {model.num_outputs} "
                "outputs. Its output features are those of modjax.data.classification.features?"
            )
        return
    vocabularies.check_fits(targets, config, where)
    vocabularies.check_same(targets, base, where)
    if targets.eos_id is not None and targets.eos_id != eos:
        raise ValueError(
            f"{where} ends its targets with token {targets.eos_id}, the model decodes up to token "
            f"{eos}: set the model's eos_id."
        )
    if "encoder" not in model.STREAMS and features["inputs"].add_eos:
        warnings.warn(
            f"{where} ends its inputs with eos, so that a decoder-only model reads its targets "
            "behind the end of a text: register the inputs with "
            "seqio.Feature(vocabulary, add_eos=False), unless the base was trained so.",
            stacklevel=2,
        )


def check_ids(
    batch: Mapping[str, np.ndarray], network_config: Any, space: FeatureSpace | None
) -> None:
    """Checks that a batch's tokens have rows in the network's embedding; others would be NaN, and a loss that is.

    A task whose vocabulary fits (`check_vocabularies`) may still make others, in its preprocessors or its cache.

    Args:
      batch: host arrays; those named `*_tokens` are looked at, of others nothing is known.
      network_config: as in `vocabularies.check_fits`.
      space: names the datasets behind the batch's `tasks`, if there is one.

    Raises:
      ValueError: names the array, the token, and the datasets of its row.
    """
    rows = getattr(network_config, "vocab_size", None)
    if rows is None:
        return
    last = rows - 1 + getattr(network_config, "token_offset", 0)
    for name, tokens in batch.items():
        if not name.endswith("_tokens") or not tokens.size:
            continue
        if tokens.min() < 0 or tokens.max() > last:
            row, column = np.argwhere((tokens < 0) | (tokens > last))[0]
            names = space.datasets if space is not None else ()
            ids = batch["tasks"][row] if "tasks" in batch else ()
            found = [names[i - 1] for i in ids if 0 < i <= len(names)]
            where = f" in a row of {', '.join(dict.fromkeys(found))}" if found else ""
            raise ValueError(
                f"{name} holds token {tokens[row, column]}{where}, and the base has embeddings for tokens 0 to {last}: "
                "a preprocessor makes, or a cache of the task holds, tokens that its vocabulary does not have."
            )


def unknown_to(
    space: FeatureSpace, settings: Mapping[str, str], looked_up: Sequence[str]
) -> list[str]:
    """What a checkpoint has learned nothing for, of the features by which it routes the evaluated datasets.

    Tasks may have changed since it was trained; what is registered now cannot tell.

    Args:
      space: the checkpoint's.
      settings: dataset -> setting, see `registry.seen_settings`.
      looked_up: the features, and "dataset", that it routes by.

    Returns:
      A sentence for each value, or name of a dataset, that the space lacks.

    Raises:
      ValueError: it lacks a value that was trained, as the dataset's setting has it.
    """
    found = []
    learned_nothing = "the checkpoint, which has learned nothing for it"
    for task, setting in settings.items():
        where = f"task {task!r}"
        row = registry.metadata_of(task) if registry.has_metadata(task) else {}
        for name in (n for n in space.names if n in looked_up and row):
            known = space.values(name)
            lacking = [
                (f"{where}: {name} {v!r} is unknown to {learned_nothing}", nearest(v, known))
                for v in as_values(row.get(name), where)
                if v not in known
            ]
            if name not in row:
                text = f"{where} has no feature {name!r}, by which the checkpoint routes"
                lacking.append((text, nearest(name, row)))
            for sentence, hint in lacking:
                if setting in ("seen", "unseen_pair"):
                    raise ValueError(
                        f"{sentence}; yet by the tasks registered now it is {setting!r}. "
                        f"Have they changed since training?{hint}"
                    )
                found.append(sentence)
        if "dataset" in looked_up and registry.origin_of(task) not in space.datasets:
            found.append(f"{where} is unknown to {learned_nothing}")
    return found


def check_splits(
    tasks: list[str], split: str, data_shards: int = 1, use_cached: bool = False
) -> None:
    """Checks that the tasks that have the split have an example in it for each data shard.

    SeqIO leaves the tasks without the split out of a mixture. A task whose examples are all
    dropped by its preprocessors would be searched for ever; so those are run for one example,
    unless they are known to drop none, because to build them all takes long in a large mixture.

    Raises:
      ValueError: no task has the split, or one has no example in it, or none for each data shard.
    """
    found = [t for t in tasks if split in seqio.TaskRegistry.get(t).splits]
    if not found:
        known = {s for t in tasks for s in seqio.TaskRegistry.get(t).splits}
        raise ValueError(f"No task of {tasks} has a split {split!r}.{nearest(split, known)}")
    for name in found:
        task = seqio.TaskRegistry.get(name)
        if use_cached and task.supports_caching:
            continue  # seqio reads a cache instead, and says if it is not there
        try:
            number = task.source.num_input_examples(split)
            if number is None:
                ds = task.source.get_dataset(split=split, shuffle=False)
                number = sum(1 for _ in ds.take(data_shards))
            dropped = number and _may_drop(task) and not _has_any(task, split)
        except (ValueError, OSError) as e:
            raise ValueError(f"task {name!r}, split {split!r}: {e}") from e
        except tf.errors.OpError as e:
            raise ValueError(f"task {name!r}, split {split!r}: {plain(e)}") from e
        if number == 0:
            raise ValueError(f"task {name!r}: split {split!r} is empty.")
        if dropped:
            raise ValueError(
                f"task {name!r}: split {split!r} is empty: its preprocessors drop every example."
            )
        if number < data_shards:
            raise ValueError(
                f"task {name!r}: split {split!r} has {number} example(s), "
                f"too few for data_shards={data_shards}."
            )


def _may_drop(task: seqio.Task) -> bool:
    steps = [s.func if isinstance(s, functools.partial) else s for s in task.preprocessors]
    return any(not keeps_every_example(s) for s in steps)


def _has_any(task: seqio.Task, split: str) -> bool:
    ds = task.get_dataset(None, split=split, shuffle=False, seed=0, try_in_mem_cache=False)
    return any(True for _ in ds.take(1))


def check_batch_size(batch_size: int, data_shards: int = 1) -> None:
    """Raises ValueError if a batch cannot be made of as many streams."""
    if data_shards < 1 or batch_size < 1 or batch_size % data_shards:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the number of streams that "
            f"make it, data_shards={data_shards}."
        )


def check_option(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError, with the nearest known value, unless `value` is a known one."""
    if value not in known:
        raise ValueError(f"{name}={value!r}.{nearest(str(value), known)}")


def plain(error: tf.errors.OpError) -> str:
    """The sentence in a tensorflow error that a person can use."""
    text = error.message
    if "assertion failed: " in text:
        text = text.split("assertion failed: ")[1].split("\n")[0]
        text = text.replace("] [", " ").strip("[]").replace("\\'", "'")
    return text
