"""Evaluates a checkpoint on the datasets of a mixture: predictions, results.json and a report.

    python eval.py --gin_file=bases/t5_small.gin --gin_file=methods/flix.gin \\
        --gin_file=runs/eval.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'my_eval_mixture'" --gin.MIXTURE_OR_TASK_MODULE="'my.tasks'" \\
        --gin.TASK_FEATURE_LENGTHS="{'inputs': 128, 'targets': 64}" \\
        --gin.BASE="'weights/t5_small'" --gin.CHECKPOINT_PATH="'runs/first'" \\
        --gin.EVAL_OUTPUT_DIR="'runs/first/eval'"

Results of other runs join the report by COMPARE_WITH, their EVAL_OUTPUT_DIR or a list of several.
"""

import datetime
import functools
import importlib
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from modjax import checkpoints, errors, initialize, launch, models, partitioning
from modjax.features import FeatureSpace

RUN = "run.json"


def evaluate(
    model: Any,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    eval_output_dir: str,
    base: str | None,
    checkpoint_path: str | None,
    *,
    method: str = "",
    split: str = "test",
    mixture_or_task_module: str | Sequence[str] | None = None,
    train_mixture: str | Mapping[str, Any] | None = None,
    seed: int | None = None,
    random_seed: int = 0,
    base_dtype: str | None = None,
    max_examples: int | None = None,
    switch_off: Mapping[str, Sequence[str]] | None = None,
    unknown: str = "none",
    choice_scores: str = "sum",
    use_cached_tasks: bool = False,
    compare_with: str | Sequence[str] = (),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),  # noqa: B008
    write_report: bool = True,
    operative_config: Callable[[], str] = str,
) -> list[dict[str, Any]]:
    """Predicts, scores, writes, and returns the rows of results.json.

    Args:
      model: of the checkpoint's method; how it decodes is part of it.
      mixture_or_task_name: what is evaluated.
      task_feature_lengths: {"inputs": L, "targets": L} in tokens; predictions have at most as many
        tokens as targets.
      batch_size: rows of a batch.
      eval_output_dir: gets predictions/DATASET.jsonl, results.json, run.json, report.md and .html.
      base: the folder of the base's weights; None if the checkpoint holds everything.
      checkpoint_path: a checkpoint, or a MODEL_DIR, whose latest one is taken; None to evaluate
        the base itself.
      method: the name of the results, that of the checkpoint if empty.
      split: which split of each task.
      train_mixture: decides which datasets were seen: a mixture, or what `registry.trained_by` gives. If None, all that
        the checkpoint was trained on, and the one that it started from; none if "".
      seed: of the trained run, for the results; the checkpoint's own if None.
      random_seed: of sampling.
      base_dtype: precision that the frozen base is kept in: "float32", "bfloat16" or "int8"; None
        for that of its files. Any serves, whichever the run was trained with.
      max_examples: of each dataset, the first so many; all if None.
      switch_off: setting -> features that are none there, as {"unseen_pair": ("language",)}.
      unknown: a value that the checkpoint's feature space lacks is "none" or an "error". Of those
        that the checkpoint would route by, "none" tells; one that was trained, by the dataset's
        setting, is an error in any case.
      choice_scores: how the answers of datasets with choices are compared: by their log probability
        ("sum"), or by that per token ("mean").
      compare_with: a folder of an earlier evaluation, or several, whose results join the report.
      partitioner: how the devices are used; any serves, whichever the run was trained with.

    Raises:
      CheckpointError: damaged, or of another method or base.
      ValueError: names, lengths or batch sizes that do not fit.
    """
    from modjax import hub
    from modjax.data import checks, registry, vocabularies
    from modjax.evaluation import choices, predict, report, results, runner

    errors.check_integer("evaluate.random_seed", random_seed, least=0)
    if base == initialize.RANDOM:
        raise launch.ConfigError(
            "BASE = 'random' is for training alone: what was drawn is not kept. Make a base first "
            "(methods/full.gin with EXPORT_DIR), train on that folder, and evaluate with it."
        )
    first = jax.process_index() == 0
    config = operative_config()
    launch.import_tasks(mixture_or_task_module)
    mesh = partitioner.mesh()
    partitioning.check_batch(batch_size, mesh)
    errors.check_bool("evaluate.use_cached_tasks", use_cached_tasks)
    if max_examples is not None:
        errors.check_integer("evaluate.max_examples", max_examples)
    checkpoints.check_writable(eval_output_dir)
    compare_with = [compare_with] if isinstance(compare_with, str) else compare_with
    for earlier in compare_with:
        for name in ("results.json", RUN):
            if not (pathlib.Path(earlier) / name).exists():
                raise launch.ConfigError(
                    f"COMPARE_WITH: there is no {name} in {earlier!r}; give the EVAL_OUTPUT_DIR of an "
                    "earlier evaluation, or a list of several"
                )
    tasks = registry.tasks_of(mixture_or_task_name)
    tokenizer = vocabularies.of_base(base)
    for task in tasks:
        checks.check_vocabularies(task, model, tokenizer)

    # The model as it was trained, with the names of its own feature space.
    scan = bool(getattr(getattr(model.network, "config", None), "scan_layers", False))
    weights = hub.load_base(base, scan_layers=scan)[1] if base else None
    if checkpoint_path is None:
        if model.adapted is not None or weights is None:
            raise launch.ConfigError(
                "CHECKPOINT_PATH is not set, so the base itself is evaluated: "
                "use methods/full.gin and set BASE."
            )
        space, params = FeatureSpace((), tuple(tasks)), initialize.to_dtype(weights, base_dtype)
        metadata: dict[str, Any] = {"name": "base", "seed": 0, "mixture": None}
        step = 0
    else:
        checkpoint_path = str(checkpoints.locate(checkpoint_path))  # a training may go on beside
        model, params, metadata, step = initialize.restore(
            model, checkpoint_path, weights, base_dtype
        )
        space = registry.with_room(FeatureSpace.from_json(metadata["space"]), tasks)
        model = model.with_space(space)
    del weights  # which the parameters may be a smaller copy of
    params = initialize.place(model, params, mesh, partitioner)

    trained_on = train_mixture
    if train_mixture is None:
        trained_on = metadata.get("trained_on", metadata["mixture"])
    if not trained_on:
        settings = dict.fromkeys(tasks, "unseen_task")
    else:
        settings = registry.seen_settings(trained_on, mixture_or_task_name)
    looked_up = () if model.adapted is None else model.adapted.routes_by
    unknown_values = checks.unknown_to(space, settings, looked_up)
    if first:
        print("".join(f"{sentence}\n" for sentence in unknown_values), end="")
    if not model.looks_up_features and not all(map(registry.has_metadata, tasks)):
        space = FeatureSpace((), space.datasets)  # no feature is looked up, so that none is needed
    examples = runner.read(
        mixture_or_task_name,
        split,
        space,
        task_feature_lengths=task_feature_lengths,
        converter=model.converter,
        unknown=unknown,
        max_examples=max_examples,
        use_cached=use_cached_tasks,
    )
    checks.check_ids(examples.arrays, getattr(model.network, "config", None), space)
    choose = None
    if not isinstance(model, models.EncoderModel):
        scorer = predict.scorer(model, params, mesh, partitioner.all_rules)
        choose = functools.partial(choices.choose, model, scorer, summary=choice_scores)
    found = runner.evaluate(
        predict.predictor(model, params, mesh, seed=random_seed, rules=partitioner.all_rules),
        examples,
        settings,
        method=method or metadata["name"] or "unnamed",
        seed=metadata.get("seed", 0) if seed is None else seed,
        batch_size=batch_size,
        switch_off=switch_off,
        choose_fn=choose,
    )
    if not first:
        return found.rows

    # Files last, each whole or not at all, and the results last of all.
    folder = pathlib.Path(eval_output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trimmed = {name: count for name, count in found.trimmed.items() if count}
    run = {
        "checkpoint": checkpoint_path,
        "step": step,
        "method": found.rows[0]["method"],
        "seed": found.rows[0]["seed"],
        "mixture": mixture_or_task_name,
        "split": split,
        "switched off": {k: list(v) for k, v in (switch_off or {}).items()},
        "unknown to the checkpoint": unknown_values,
        "examples over the length limit": trimmed,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "command": shlex.join(sys.argv),
    }
    results.write_text(folder / RUN, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    results.write_text(folder / "config.gin", config)
    runner.write(folder, found)
    if trimmed:
        print(f"cut to the length limit: {trimmed}; raise TASK_FEATURE_LENGTHS to keep them whole")
    if write_report:
        rows = compare([*compare_with, eval_output_dir], eval_output_dir)
        print(report.table(rows))
        print(f"wrote {folder / 'results.json'} and {folder / 'report.html'}")
    return found.rows


def compare(
    evaluations: Sequence[str], directory: str, title: str = "Evaluation", **facts: Any
) -> list[dict[str, Any]]:
    """Writes one report of several evaluations, methods side by side, with their learning curves.

    Args:
      evaluations: folders that `evaluate` wrote.
      directory: gets report.md and report.html.
      title: of the report.
      **facts: what else the report says about the runs.

    Returns:
      The rows of all evaluations.
    """
    from modjax.evaluation import curves, report, results

    rows, lines = {}, []
    runs = []
    for name in evaluations:
        folder = pathlib.Path(name)
        rows[name] = results.read(folder / "results.json")
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        runs.append(run)
        if run["checkpoint"]:
            # A checkpoint may have been copied without its logs.
            log = pathlib.Path(run["checkpoint"]).parent / "train" / "metrics.jsonl"
            if log.exists():
                lines.append(curves.read(log, run["method"], run["seed"]))
    merged = results.merge(rows)
    common = {
        key: runs[0][key]
        for key in ("machine", "date", "mixture", "split", "step")
        if all(run[key] == runs[0][key] for run in runs)
    }
    seeds = sorted({row["seed"] for row in merged})
    commands = sorted({run["command"] for run in runs})
    facts = {**common, "seeds": seeds, "commands": commands, **facts}
    report.write_report(directory, merged, lines, facts, title=title)
    return merged


def main(argv: Sequence[str]) -> int:
    """Runs `evaluate` as flags and gin files say; returns the exit status."""
    return launch.run(
        argv, "Evaluates a checkpoint; see gin_configs/runs/eval.gin.", "eval", evaluate
    )


if __name__ == "__main__":
    # The gin files bind eval.evaluate: the module of that name, not this script's __main__.
    sys.exit(importlib.import_module("eval").main(sys.argv[1:]))
