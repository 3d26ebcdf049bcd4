"""Evaluation of a model on the datasets of a mixture: predictions, metrics, rows of results.

`read` the examples once, then `evaluate` as many models on them as there are. In a job of several
processes all of them read all examples, the devices of each predict their rows of every batch, all
learn every prediction, and process 0 writes.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# SeqIO by way of modjax.data, which keeps tensorflow quiet.
from modjax.data import converters, pipeline, registry, seqio
from modjax.errors import nearest
from modjax.evaluation import metrics, predict, results
from modjax.evaluation.results import Row
from modjax.features import FeatureSpace, Unknown, as_values

# (arrays, texts, batch size, progress) -> an answer to each example.
ChooseFn = Callable[..., list[str]]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of some datasets, tokenised and as text.

    Attributes:
      datasets: the SeqIO tasks.
      arrays: model features by name, `[N, ...]`, not packed.
      texts: the examples.
      space: gave the ids in `arrays["features"]` and `arrays["tasks"]`.
    """

    datasets: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    texts: Sequence[pipeline.Example]
    space: FeatureSpace | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
      rows: of results.json.
      predictions: by dataset, for each example `index`, `input`, `target`, `prediction`, `metrics`
        (name -> its own value, 0 to 100), and `too_long` where it was cut.
      trimmed: by dataset, how many examples had inputs or targets over the limit.
    """

    rows: list[Row]
    predictions: dict[str, list[dict[str, Any]]]
    trimmed: dict[str, int]


def read(
    mixture: str | Sequence[str],
    split: str,
    space: FeatureSpace | None,
    *,
    task_feature_lengths: Mapping[str, int],
    converter: Any = converters.EncDecFeatureConverter,
    unknown: Unknown = "none",
    max_examples: int | None = None,
    use_cached: bool = False,
) -> Examples:
    """Reads a split of every task of a mixture.

    Setting up a task's input takes longer than reading a few hundred examples, so what was read in
    the last two calls is kept: a process that evaluates several models reads each split once.

    Args:
      mixture: a mixture or task, or several.
      split: of each task.
      space: of the model, so that ids are those that it was trained with.
      task_feature_lengths: `{"inputs": L, "targets": L}`; longer inputs are cut, and predictions
        have at most as many tokens as targets.
      converter: of the model, its `converter`.
      unknown: what becomes of a value that the space lacks, such as a language never trained:
        "none" (it contributes nothing) or "error".
      max_examples: of each task, the first so many; all if None.
      use_cached: read SeqIO's offline caches.

    Raises:
      ValueError: as `pipeline.eval_batches`.
    """
    return _read(
        tuple(seqio.TaskRegistry.get(name) for name in registry.tasks_of(mixture)),
        split,
        space,
        tuple(sorted(task_feature_lengths.items())),
        converter,
        unknown,
        max_examples,
        use_cached,
    )


@functools.lru_cache(maxsize=2)
def _read(
    tasks: tuple[seqio.Task, ...],
    split: str,
    space: FeatureSpace | None,
    lengths: tuple[tuple[str, int], ...],
    converter: Any,
    unknown: Unknown,
    max_examples: int | None,
    use_cached: bool,
) -> Examples:
    parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    texts: list[pipeline.Example] = []
    batches = pipeline.eval_batches_of(
        [task.name for task in tasks],
        split,
        space,
        task_feature_lengths=dict(lengths),
        batch_size=256,
        converter=converter,
        unknown=unknown,
        use_cached=use_cached,
        max_examples=max_examples,
    )
    for batch, examples in batches:
        valid = batch.pop("valid")
        for feature, values in batch.items():
            parts[feature].append(values[valid])
        texts += examples
    # Task by task, whichever were read together.
    place = {task.name: number for number, task in enumerate(tasks)}
    order = sorted(range(len(texts)), key=lambda i: place[texts[i].task])
    texts = [texts[i] for i in order]
    arrays = {feature: np.concatenate(values)[order] for feature, values in parts.items()}
    for values in arrays.values():
        values.flags.writeable = False  # they are shared
    return Examples(tuple(task.name for task in tasks), arrays, texts, space)


def evaluate(
    predict_fn: predict.PredictFn,
    examples: Examples,
    settings: Mapping[str, str],
    *,
    method: str,
    seed: int,
    batch_size: int,
    switch_off: Mapping[str, Sequence[str]] | None = None,
    padded_lengths: int = 2,
    choose_fn: ChooseFn | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predicts all examples and scores each dataset by its metrics.

    A row's task and language are those of the dataset's metadata. Where two datasets have the same
    ones, their rows carry the datasets' own names as task.

    Args:
      predict_fn: see `predict.predictor`.
      examples: of `read`.
      settings: dataset -> setting, see `registry.seen_settings`.
      method, seed: of the run that is evaluated, for the rows.
      batch_size: rows of the whole job's batch.
      switch_off: setting -> features whose ids are set to none there, as
        `{"unseen_pair": ("language",)}`.
      padded_lengths: how many input lengths are compiled for.
      choose_fn: answers the examples of datasets with choices, see `choices.choose`; they are
        written like others if None.
      progress: told after each batch how many examples are done, of how many.

    Raises:
      ValueError: a dataset has no setting; a setting or feature to switch off does not exist.
    """
    for name in examples.datasets:
        if name not in settings:
            raise ValueError(f"There is no setting for dataset {name!r}.{nearest(name, settings)}")
    arrays = _switched_off(examples, settings, switch_off or {})
    by_dataset: dict[str, list[int]] = {name: [] for name in examples.datasets}
    for i, text in enumerate(examples.texts):
        by_dataset[text.task].append(i)
    answers: dict[int, str] = {}

    def answer(datasets: Sequence[str], how: Callable[..., list[str]]) -> None:
        rows = sorted(i for name in datasets for i in by_dataset[name])
        if rows:
            part = {name: values[rows] for name, values in arrays.items()}
            answers.update(zip(rows, how(part, [examples.texts[i] for i in rows]), strict=True))

    def write(part: Mapping[str, np.ndarray], texts: Sequence[pipeline.Example]) -> list[str]:
        tokens = predict.predict_all(predict_fn, part, batch_size, padded_lengths, progress)
        return _decoded(texts, tokens)

    chosen = [name for name in by_dataset if choose_fn and registry.choices_of(name)]
    if choose_fn:
        pick = functools.partial(choose_fn, batch_size=batch_size, progress=progress)
        answer(chosen, pick)
    answer([name for name in by_dataset if name not in chosen], write)
    names = _names(examples.datasets)
    found = Evaluation([], {}, {})
    for dataset, indices in by_dataset.items():
        task, language = names[dataset]
        texts = [examples.texts[i] for i in indices]
        targets, predictions = _texts(dataset, texts, [answers[i] for i in indices])
        scores = {
            metric: metrics.get(metric)(targets, predictions, language=language)
            for metric in registry.metric_names_of(dataset)
        }
        found.rows.extend(
            {
                "method": method,
                "task": task,
                "language": language,
                "setting": settings[dataset],
                "metric": metric,
                "value": round(score.value, 4),
                "n": score.n,
                "seed": seed,
            }
            for metric, score in scores.items()
        )
        found.predictions[dataset] = [
            {
                "index": text.index,
                "input": text["inputs_pretokenized"],
                "target": targets[i],
                "prediction": predictions[i],
                "metrics": {m: round(score.per_example[i], 4) for m, score in scores.items()},
                **({"too_long": text.too_long} if text.too_long else {}),
            }
            for i, text in enumerate(texts)
        ]
        found.trimmed[dataset] = sum(bool(text.too_long) for text in texts)
    return found


def write(directory: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Writes `results.json` and `predictions/<dataset>.jsonl`; in process 0 only."""
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(directory)
    for dataset, predictions in evaluation.predictions.items():
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
        results.write_text(folder / "predictions" / f"{dataset}.jsonl", "".join(lines))
    # Last, so that results never stand there without the predictions behind them.
    results.write(folder / "results.json", evaluation.rows)


def _switched_off(
    examples: Examples, settings: Mapping[str, str], switch_off: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    arrays = dict(examples.arrays)
    space = examples.space or FeatureSpace(())
    for setting, features in switch_off.items():
        known = sorted({*results.SETTINGS, *settings.values()})
        if setting not in known:
            raise ValueError(f"switch_off: unknown setting {setting!r}.{nearest(setting, known)}")
        features = as_values(features, f"switch_off[{setting!r}]")
        for feature in features:
            if feature not in space.names:
                raise ValueError(
                    f"switch_off: unknown feature {feature!r}.{nearest(feature, space.names)}"
                )
        there = np.array([settings[text.task] == setting for text in examples.texts])
        columns = np.array([name in features for name in space.slot_features])
        arrays["features"] = np.where(
            there[:, None, None] & columns[None, None, :], 0, arrays["features"]
        )
    return arrays


def _names(datasets: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(task, language) of each dataset, for its rows; no two are the same."""
    names = {}
    for dataset in datasets:
        metadata = registry.metadata_of(dataset) if registry.has_metadata(dataset) else {}
        parts = (metadata.get("task") or dataset, metadata.get("language") or "none")
        names[dataset] = tuple(p if isinstance(p, str) else "+".join(p) for p in parts)
    counts = collections.Counter(names.values())
    return {
        dataset: (task if counts[task, language] == 1 else dataset, language)
        for dataset, (task, language) in names.items()
    }


def _decoded(texts: Sequence[pipeline.Example], tokens: Sequence[np.ndarray]) -> list[str]:
    """Predicted tokens as text, up to the end mark."""
    features = {text.task: seqio.TaskRegistry.get(text.task).output_features for text in texts}
    return [
        features[text.task]["targets"].vocabulary.decode(row.tolist())
        for text, row in zip(texts, tokens, strict=True)
    ]


def _texts(
    dataset: str, texts: Sequence[pipeline.Example], answers: Sequence[str]
) -> tuple[list[Any], list[str]]:
    """Targets and predictions as the task's postprocessing leaves them."""
    task = seqio.TaskRegistry.get(dataset)
    targets, predictions = [], []
    for text, decoded in zip(texts, answers, strict=True):
        pair = (
            task.postprocess_fn(text["targets_pretokenized"], example=text.raw, is_target=True),
            task.postprocess_fn(decoded, example=text.raw, is_target=False),
        )
        for what, value in zip(("target", "prediction"), pair, strict=True):
            several = what == "target" and isinstance(value, list | tuple)
            if not all(isinstance(v, str) for v in (value if several else [value])):
                raise ValueError(
                    f"task {dataset!r}: postprocess_fn made {value!r} of a {what}; it must be text"
                    f"{', or a list of texts' if what == 'target' else ''}."
                )
        targets.append(pair[0])
        predictions.append(pair[1])
    return targets, predictions
