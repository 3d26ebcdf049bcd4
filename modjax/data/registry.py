"""Tasks and mixtures: SeqIO's, and beside them what SeqIO has no place for.

SeqIO keeps the data of a task. We keep its features (`{"task": "parse", "language": "sw"}`) and the
names of its metrics, in a registry of our own keyed by the task's name. Every example of a task
carries one number, the task's key, through mixing, shuffling and packing (`modjax.data.carry`); the
feature converter looks the features up by it (`modjax.data.converters`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import seqio
import tensorflow as tf

from modjax.data import carry
from modjax.data.sources import ExamplesSource
from modjax.errors import nearest
from modjax.features import FeatureSpace, Value, as_values

Names = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Entry:
    metadata: dict[str, Value] | None
    metric_names: tuple[str, ...]
    choices: tuple[str, ...] | str | None
    arguments: dict[str, Any]  # as `add_task` was given them, but for the source


# Names of modules beside those of features, see `modjax.adapters.Features`, and of what `modjax.adapters.compose` and
# `merge` take beside features.
_RESERVED = {"dataset": "the dataset's own name", "shared": "what all examples have in common"}
_RESERVED["pair"] = "of the setting 'unseen_pair', as 'unseen_<feature>' is that of a new value"
_RESERVED |= dict.fromkeys(
    ("adapted", "adapters", "base", "dequantize", "name"),
    "an argument of adapters.compose and merge, which take features by name",
)

# Datasets and their features, see `trained_by`.
Trained = Mapping[str, Mapping[str, Sequence[str]] | None]

_ENTRIES: dict[str, _Entry] = {}
_ORIGINS: dict[str, str] = {}  # of copies with fewer examples: whose


def add_task(
    name: str,
    source: seqio.DataSourceInterface,
    preprocessors: Sequence[Callable[..., tf.data.Dataset]],
    output_features: Mapping[str, seqio.Feature],
    *,
    metadata: Mapping[str, Value] | None = None,
    metric_names: Sequence[str] = ("exact_match",),
    choices: Sequence[str] | str | None = None,
    postprocess_fn: Callable[..., Any] | None = None,
    empty_targets: Literal["error", "allow"] = "error",
    **kwargs: Any,
) -> seqio.Task:
    """Registers a task with SeqIO, and its features and metrics beside it.

    Args:
      name: letters, digits and `. : _ #`, as SeqIO wants.
      source: where the raw examples come from.
      preprocessors: SeqIO preprocessors that end in tokens, `append_eos` among them.
      output_features: SeqIO features, as a rule "inputs" and "targets".
      metadata: the dataset's features: a value, several (multi-hot) or None each. Needed by methods
        that route by features.
      metric_names: what evaluation computes for this task, one of `modjax.evaluation.metrics.METRICS` at least.
      choices: the possible answers, or the name of an example's field that lists them: a model that
        writes then takes the most probable one instead (rank classification).
      postprocess_fn: SeqIO's, `fn(text, example=..., is_target=...)`; the example is as in SeqIO, tokens as arrays and
        text as bytes. It makes text of a prediction, and text or a list of texts of a target.
      empty_targets: whether an example whose targets hold nothing but the end of sequence is an
        error when it is read (a ValueError out of the iterator, naming the task) or a lesson.
      **kwargs: for `seqio.TaskRegistry.add`, as `shuffle_buffer_size`; or `metric_fns`, of SeqIO's
        own evaluator, instead of those of `metric_names`.

    Returns:
      The SeqIO task.

    Raises:
      ValueError: the name is taken or unfit, the metadata is malformed, or a metric does not exist.
    """
    arguments = {
        "preprocessors": preprocessors,
        "output_features": output_features,
        "metadata": metadata,
        "metric_names": metric_names,
        "choices": choices,
        "postprocess_fn": postprocess_fn,
        "empty_targets": empty_targets,
        **kwargs,
    }
    where = f"task {name!r}"
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(f"{where} is already registered; a name stands for one task or mixture.")
    for other in seqio.TaskRegistry.names():
        if carry.key_of(other) == carry.key_of(name):
            raise ValueError(f"{where} has the key of task {other!r} by chance; rename one.")
    if empty_targets not in ("error", "allow"):
        raise ValueError(f"{where}: empty_targets is 'error' or 'allow', not {empty_targets!r}.")
    if not metric_names:
        raise ValueError(f"{where}: metric_names is empty; name one at least, as 'exact_match'.")
    entry = _Entry(
        metadata=_checked_metadata(metadata, where),
        metric_names=as_values(metric_names, f"{where}, metric_names"),
        choices=choices if choices is None or isinstance(choices, str) else tuple(choices),
        arguments=arguments,
    )
    carry_key = carry.carry_key(name, allow_empty=empty_targets == "allow")
    if isinstance(source, ExamplesSource):
        kwargs.setdefault("shuffle_buffer_size", None)  # it shuffles by itself, and better
    # Made in any case, so that an unknown metric is found before anything is trained.
    metric_fns = [_metric_fn(metric, entry, where) for metric in entry.metric_names]
    kwargs.setdefault("metric_fns", metric_fns)
    task = seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*carry.with_measure(preprocessors), carry_key],
        output_features={**output_features, carry.DATASET_KEY: carry.KEY_FEATURE},
        postprocess_fn=postprocess_fn,
        **kwargs,
    )
    _ENTRIES[name] = entry
    return task


def add_copy(task_name: str, name: str, source: seqio.DataSourceInterface) -> seqio.Task:
    """Registers a task that is another one but for its source: the same dataset, to models and results."""
    task = add_task(name, source, **_entry(task_name).arguments)
    _ORIGINS[name] = task_name
    return task


def add_mixture_copy(mixture: str, name: str, copies: Mapping[str, str]) -> seqio.Mixture:
    """Registers a mixture of copies of another mixture's tasks, `{task: its copy}`, at their rates."""
    original = seqio.MixtureRegistry.get(mixture)
    rates = [(copies[task.name], original.get_rate(task)) for task in seqio.get_subtasks(original)]
    copy = add_mixture(name, rates)
    _ORIGINS[name] = mixture
    return copy


def origin_of(name: str) -> str:
    """The task or mixture that one is a copy of, or itself: the name that outlives this process."""
    return _ORIGINS.get(name, name)


def add_mixture(
    name: str,
    tasks: Sequence[str | tuple[str, Any]],
    default_rate: float | Callable[..., float] = 1.0,
    **kwargs: Any,
) -> seqio.Mixture:
    """Registers a SeqIO mixture of tasks or mixtures: names, or pairs of a name and a rate.

    Raises:
      ValueError: the name is taken, a part of it does not exist, or there is no part.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(
            f"mixture {name!r} is already registered; a name stands for one task or mixture."
        )
    parts = [part if isinstance(part, str) else part[0] for part in tasks]
    if not parts:
        raise ValueError(f"mixture {name!r} has no tasks.")
    for part in parts:
        _get(part, f"mixture {name!r}: ")
        if parts.count(part) > 1:
            raise ValueError(f"mixture {name!r} names {part!r} twice; give it one higher rate.")
    return seqio.MixtureRegistry.add(name, list(tasks), default_rate=default_rate, **kwargs)


def remove(name: str) -> None:
    """Forgets a task or a mixture; nothing happens if there is none of that name."""
    seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove(name)
    _ENTRIES.pop(name, None)
    _ORIGINS.pop(name, None)


def tasks_of(mixture_or_task: Names) -> list[str]:
    """The tasks of a mixture (or of several), sorted by name as SeqIO mixes them."""
    names = [mixture_or_task] if isinstance(mixture_or_task, str) else mixture_or_task
    found = {t.name for n in names for t in seqio.get_subtasks(_get(n))}
    return sorted(found)


def has_metadata(task_name: str) -> bool:
    """Whether the task was registered with features."""
    return _entry(task_name).metadata is not None


def metadata_of(task_name: str) -> dict[str, Value]:
    """A task's features. Raises ValueError for an unknown task, or one without metadata."""
    metadata = _entry(task_name).metadata
    if metadata is None:
        raise ValueError(
            f"task {task_name!r} has no metadata, so its features are not known; register it with "
            'modjax.data.registry.add_task(..., metadata={"task": ..., "language": ...}).'
        )
    return dict(metadata)


def metric_names_of(task_name: str) -> tuple[str, ...]:
    """The names of the metrics that evaluation computes for a task."""
    return _entry(task_name).metric_names


def choices_of(task_name: str) -> tuple[str, ...] | str | None:
    """A task's possible answers, the field of its examples that lists them, or None; see `add_task`."""
    return _entry(task_name).choices


def check_has(task_name: str, splits: Sequence[str], metric: str | None = None) -> None:
    """Raises ValueError where a task lacks a split, or the metric if one is given; it is named."""
    known = metric_names_of(task_name)
    if metric is not None and metric not in known:
        raise ValueError(f"task {task_name!r} has no metric {metric!r}.{nearest(metric, known)}")
    there = seqio.TaskRegistry.get(task_name).splits
    for split in splits:
        if split not in there:
            raise ValueError(f"task {task_name!r} has no split {split!r}.{nearest(split, there)}")


def feature_space(
    mixture_or_task: Names, features: Sequence[str] | None = None, looked_up: bool = True
) -> FeatureSpace:
    """The features and datasets of the tasks of a mixture.

    Args:
      mixture_or_task: one name or several.
      features: which of the features, in this order; all of them, in the order of the first task's
        metadata, if None.
      looked_up: whether a router looks features up. If none does, and `features` is None, the space
        of tasks of which some have no metadata has no features, only datasets.

    Raises:
      ValueError: a task has no metadata or lacks a feature, or two have different features.
    """
    features = None if features is None else as_values(features, "features")
    tasks, rows = tasks_of(mixture_or_task), {}
    if features is None and not looked_up and not all(map(has_metadata, tasks)):
        return FeatureSpace((), tuple(dict.fromkeys(map(origin_of, tasks))))
    for name in tasks:
        row = metadata_of(name)
        for feature in features or ():
            if feature not in row:
                raise ValueError(
                    f"task {name!r} has no feature {feature!r}.{nearest(feature, row)}"
                )
        kept = {f: row[f] for f in features} if features is not None else row
        rows[origin_of(name)] = kept
    return FeatureSpace.from_metadata(rows)


def trained_by(mixture_or_task: str) -> dict[str, dict[str, list[str]] | None]:
    """What a run trains, JSON-able: `{dataset: {feature: its values}}`, None for a dataset without features.

    Those are the tasks with a split "train" and a rate above 0, by names that outlive this process.
    """
    whole = _get(mixture_or_task)
    found: dict[str, dict[str, list[str]] | None] = {}
    for name in tasks_of(mixture_or_task):
        task = seqio.TaskRegistry.get(name)
        rate = whole.get_rate(task) if isinstance(whole, seqio.Mixture) else 1
        if "train" in task.splits and rate > 0:
            found[origin_of(name)] = _features_of(name)
    return found


def also_trained(earlier: Trained, now: Trained, where: str) -> dict[str, Any]:
    """What was trained before and what is trained now.

    Raises:
      ValueError: a dataset has other features now; `where` says where it had the earlier ones.
    """
    for name in earlier.keys() & now.keys():
        _check_same_features(name, earlier[name], now[name], where)
    return {**earlier, **now}


def _features_of(task_name: str) -> dict[str, list[str]] | None:
    if not has_metadata(task_name):
        return None
    return {f: list(as_values(v, f)) for f, v in metadata_of(task_name).items()}


def _check_same_features(name: str, earlier: Any, now: Any, where: str) -> None:
    if earlier is None or now is None:
        return
    for feature in earlier.keys() & now.keys():
        if set(earlier[feature]) != set(now[feature]):
            raise ValueError(
                f"task {name!r}: its {feature} is {now[feature]} here, and was {earlier[feature]} in {where}: its "
                "modules would be others. Give it back its metadata, or register the new one under another name."
            )


def with_room(space: FeatureSpace, mixture_or_task: Names) -> FeatureSpace:
    """A space in which an example may have as many of its values at once as a task of a mixture has.

    Modules and ids stay the same: a batch has more columns for a feature, and no parameter depends on them.
    """
    room = dict.fromkeys(space.names, 1)
    for task in filter(has_metadata, tasks_of(mixture_or_task)):
        row = metadata_of(task)
        for name in space.names:
            values = as_values(row.get(name), f"feature {name!r} of {task!r}")
            known = set(values) & set(space.values(name))
            room[name] = max(room[name], len(known))
    return space.extend(slots=room)


def seen_settings(trained: Names | Trained, eval_mixture: Names) -> dict[str, str]:
    """How each evaluated task relates to what was trained.

    Args:
      trained: a mixture, or several, or what `trained_by` gave.
      eval_mixture: what is evaluated.

    Returns:
      For each task of `eval_mixture`: "seen" if its combination of features was trained;
      "unseen_pair" if only its values were, in other combinations; "unseen_<feature>", as
      "unseen_language", if a value of that feature was never trained (the first such feature). Tasks
      without features are "seen" if they were trained themselves, else "unseen_task".

    Raises:
      ValueError: two tasks have different features, or one has not those that it was trained with.
    """
    if not isinstance(trained, Mapping):
        trained = {origin_of(task): _features_of(task) for task in tasks_of(trained)}
    evaluated = tasks_of(eval_mixture)
    known = {name: row for name, row in trained.items() if row is not None}
    if len(known) < len(trained) or not all(map(has_metadata, evaluated)):
        return {t: "seen" if origin_of(t) in trained else "unseen_task" for t in evaluated}
    for task in evaluated:
        name = origin_of(task)
        _check_same_features(name, known.get(name), _features_of(task), "training")
    # Refuses rows that cannot be compared. An earlier run's datasets may have had more features than a later one's.
    names = {frozenset(metadata_of(task)) for task in evaluated}
    alike = {name: row for name, row in known.items() if frozenset(row) in names} or known
    FeatureSpace.from_metadata({**alike, **{t: metadata_of(t) for t in evaluated}})
    combinations, values = set(), set()
    for features in known.values():
        row = _value_sets(features)
        combinations.add(frozenset(row.items()))
        values |= {(f, v) for f, vs in row.items() for v in vs}
    settings = {}
    for task in evaluated:
        row = _value_sets(metadata_of(task))
        new = [f for f, vs in row.items() if any((f, v) not in values for v in vs)]
        seen = "seen" if frozenset(row.items()) in combinations else "unseen_pair"
        settings[task] = f"unseen_{new[0]}" if new else seen
    return settings


def _value_sets(row: Mapping[str, Value]) -> dict[str, frozenset[str]]:
    return {f: frozenset(as_values(v, f)) for f, v in row.items()}


def _get(name: str, where: str = "") -> seqio.Task | seqio.Mixture:
    mixtures, tasks = seqio.MixtureRegistry.names(), seqio.TaskRegistry.names()
    if name not in mixtures and name not in tasks:
        raise ValueError(
            f"{where}no task or mixture {name!r} is registered; is its module imported?"
            f"{nearest(str(name), [*mixtures, *tasks])}"
        )
    return seqio.get_mixture_or_task(name)


def _entry(task_name: str) -> _Entry:
    if task_name not in seqio.TaskRegistry.names():
        raise ValueError(
            f"no task {task_name!r} is registered.{nearest(task_name, seqio.TaskRegistry.names())}"
        )
    if task_name not in _ENTRIES:
        raise ValueError(
            f"task {task_name!r} has no metadata: it was registered with SeqIO alone; "
            "register it with modjax.data.registry.add_task."
        )
    return _ENTRIES[task_name]


def _metric_fn(name: str, entry: _Entry, where: str) -> Callable[..., dict[str, float]]:
    """A metric of ours as SeqIO's own evaluator, and T5X's, calls it."""
    from modjax.evaluation import metrics  # it lies above the data

    metric = metrics.get(name, where)

    def metric_fn(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        language = (entry.metadata or {}).get("language")
        score = metric(
            targets, predictions, language=language if isinstance(language, str) else None
        )
        return {name: score.value}

    metric_fn.__name__ = name
    return metric_fn


def _checked_metadata(metadata: Mapping[str, Value] | None, where: str) -> dict[str, Value] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping) or not metadata:
        raise ValueError(
            f"{where}: metadata maps names of features to values, "
            f'as {{"task": "parse", "language": "sw"}}, and is not {metadata!r}.'
        )
    as_values(list(metadata), f"{where}, names in metadata")
    for feature, value in metadata.items():
        if feature in _RESERVED:
            raise ValueError(
                f"{where}: a feature cannot be called {feature!r}, which is {_RESERVED[feature]}; "
                "rename it in the metadata."
            )
        if "=" in feature or "," in feature:
            raise ValueError(
                f"{where}: the name of feature {feature!r} has a '=' or a ',', so that it could not be "
                "written as NAME=VALUE,...; rename it in the metadata."
            )
        as_values(value, f"{where}, feature {feature!r}")
    return {f: v if v is None or isinstance(v, str) else tuple(v) for f, v in metadata.items()}
