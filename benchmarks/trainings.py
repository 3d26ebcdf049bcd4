"""What the studies' commands share: trainings and evaluations by gin files, and the arguments of a sitting."""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import cells, inside, study
from modjax import checkpoints


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a study share.

    Attributes:
      output: bases, checkpoints and logs.
      smoke: a few steps and examples, to see that all works.
      bind: gin bindings of every training.
    """

    output: pathlib.Path
    smoke: bool = False
    bind: tuple[str, ...] = ()

    def base(self, name: str) -> str:
        """The folder of a base's weights."""
        return str(self.output / "bases" / name)

    def has_base(self, name: str) -> bool:
        """Whether it is there."""
        return pathlib.Path(self.base(name), "config.json").exists()


def train(
    files: Sequence[str], macros: Mapping[str, Any], bindings: Sequence[str], settings: Settings
) -> study.Found:
    """Trains; gives `steps`, parameters `trained` and `training_seconds`.

    Where it has them also `norms` and `routing`, see `benchmarks.inside`.

    Args:
      files: gin files.
      macros: gin macros and parameters of the run, MODEL_DIR among them.
      bindings: of the method.
      settings: the study's.
    """
    import gin
    import jax

    import train as training

    short = ["TRAIN_STEPS = 4", "WARMUP = 1"] if settings.smoke else []
    cells.configure("train", files, [*bound(macros), *bindings, *settings.bind, *short])
    start = time.monotonic()
    state = gin.get_configurable(training.train)(operative_config=gin.operative_config_str)
    found: study.Found = {
        "steps": int(state.step),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.trained)),
        "training_seconds": round(time.monotonic() - start, 1),
    }
    method = checkpoints.read_metadata(macros["MODEL_DIR"])["method"]
    if method != "full":
        seen = {"norms": inside.norms(state.trained, method)}
        seen["routing"] = inside.routing(state.trained, method)
        found |= {name: value for name, value in seen.items() if value}
    return found


def score(
    files: Sequence[str],
    macros: Mapping[str, Any],
    settings: Settings,
    split: str,
    number: int,
    bindings: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of an evaluation, see `modjax.evaluation.results`.

    Args:
      files: gin files.
      macros: of the evaluation, among them CHECKPOINT_PATH, MIXTURE_OR_TASK_NAME and EVAL_OUTPUT_DIR.
      settings: the study's.
      split: of the datasets.
      number: how many examples of each dataset are taken.
      bindings: of the method.
    """
    import gin

    import eval as evaluation

    number = 2 if settings.smoke else number
    own = bound({**macros, "SPLIT": split, "eval.evaluate.max_examples": number})
    cells.configure("eval", files, [*own, *bindings])
    return gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)


def row(
    method: str,
    dataset: str,
    setting: str,
    value: float,
    n: int,
    seed: int,
    point: str,
    metric: str = "exact_match",
) -> dict[str, Any]:
    """A row of results.json, see `modjax.evaluation.results`, of a dataset as "parse ta".

    `point` says of which part of the study it is.
    """
    task, language = dataset.split()
    return {
        "method": method,
        "task": task,
        "language": language,
        "setting": setting,
        "metric": metric,
        "value": value,
        "n": n,
        "seed": seed,
        "point": point,
    }


def bound(macros: Mapping[str, Any]) -> list[str]:
    """Values as gin bindings."""
    return [f"{name} = {value!r}" for name, value in macros.items()]


def parser(text: str, seed: int, output: str) -> argparse.ArgumentParser:
    """The arguments that the studies share.

    Args:
      text: the module's, whose first line says what it does.
      seed: the one that is taken if none is given.
      output: the folder, likewise.
    """
    made = argparse.ArgumentParser(description=text.split("\n")[0])
    made.add_argument("--seeds", nargs="+", type=int, default=[seed])
    made.add_argument(
        "--output", default=output, type=pathlib.Path, help="bases, checkpoints, logs"
    )
    made.add_argument(
        "--store", type=pathlib.Path, help="what is done; by default the study's cells.jsonl"
    )
    made.add_argument("--parallel", type=int, default=2, help="processes at once (default: 2)")
    made.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no cell after this"
    )
    made.add_argument("--bind", nargs="*", default=[], help="gin bindings of training")
    made.add_argument("--smoke", action="store_true", help="a few steps, to see that all works")
    return made


def sit(
    args: argparse.Namespace,
    study_folder: pathlib.Path,
    make_plan: Callable[[study.Store, Settings], Any],
    do: Callable[..., study.Found],
    rows: Callable[[Any], list[dict[str, Any]]],
) -> int:
    """A sitting of a study: does its open cells, keeps what they give, and writes results.json; the exit status.

    Args:
      args: of `parser`.
      study_folder: where its cells.jsonl is.
      make_plan: gives what has `open()`, the cells that can be begun.
      do: does a cell, called with it and the settings, in another process.
      rows: of results.json, from the plan.
    """
    folder = args.output / "smoke" / study_folder.name if args.smoke else study_folder
    file = args.store or folder / "cells.jsonl"
    store, start = study.Store(file), time.monotonic()
    settings = Settings(args.output.resolve(), args.smoke, tuple(args.bind))
    plan = make_plan(store, settings)

    def keep(_: Any, found: study.Found) -> None:
        store.add(found)
        minutes = (time.monotonic() - start) / 60
        print(f"{found['name']}: {found['seconds']:.0f} s, {minutes:.1f} minutes", flush=True)

    job = functools.partial(do, settings=settings)
    until = start + 60 * args.minutes
    done = study.work(plan.open, job, keep, args.parallel, settings.output / "compiled", until)
    target = study.write_rows(rows(plan), file)
    print(f"{'all cells are done' if done else 'time was up'}; wrote {target}")
    return 0
