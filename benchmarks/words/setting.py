"""The generated benchmark in words: the bases, trainings and scores that studies are made of.

A base is a T5 of 0.87 million parameters that learnt to translate between invented languages, and to copy; how much of
translation is a dial. One training of an adapter takes a minute of a core. See `tasks.babel_words` for the texts.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import cells, study
from benchmarks.words import inside
from modjax import checkpoints

HERE = pathlib.Path(__file__).resolve().parent
# The base's cross-lingual strength: the share of the directed language pairs that it learnt to translate.
BASES = {"all": 1.0, "some": 0.15, "none": 0.0}
EXAMPLES = {"validation": 30, "test": 50}


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


@functools.cache
def register(output: pathlib.Path, prefix: str, dials: tuple[tuple[str, Any], ...]) -> None:
    """Registers a world of words, see `tasks.babel.register`.

    Args:
      output: a folder; its tokenizer is written there.
      prefix: of all its names.
      dials: fields of its BabelConfig that are not the benchmark's own.
    """
    from tasks import babel, babel_words
    from tasks.babel_examples import Babel
    from tasks.babel_world import BabelConfig

    config = BabelConfig(**dict(dials))
    world = Babel(config)
    output.mkdir(parents=True, exist_ok=True)
    # Every process of a study writes it, the same, and none may read half of it.
    file, partial = output / f"{prefix}.json", output / f"{prefix}.{os.getpid()}"
    babel_words.write_tokenizer(world, partial)
    os.replace(partial, file)
    copied = functools.partial(babel_words.copy_examples, world)
    babel.register(config, prefix, babel_words.vocabulary(file), copied)


def pretrain(base: str, settings: Settings) -> study.Found:
    """Makes a base; gives `validation`, how well it translates from other languages."""
    import gin

    import train

    prefix, folder = f"pretrain_{base}", settings.base(base)
    register(settings.output, prefix, (("pretrain_pairs", BASES[base]),))
    macros = {
        "MIXTURE_OR_TASK_NAME": f"{prefix}_pretrain_bytes",
        "MODEL_DIR": folder + "_training",
        "EXPORT_DIR": folder,
        "train.train.tensorboard": False,
    }
    files = ("methods/full.gin", str(HERE / "pretrain.gin"))
    cells.configure("train", files, [*bound(macros), *settings.bind, *short(settings)])
    gin.get_configurable(train.train)(operative_config=gin.operative_config_str)
    macros = {"MIXTURE_OR_TASK_NAME": f"{prefix}_pretrain", "BASE": folder, "CHECKPOINT_PATH": None}
    macros["EVAL_OUTPUT_DIR"] = folder + "_eval"
    found = score(("methods/full.gin",), macros, settings, "validation")
    return {"validation": {name: v for name, v in found.items() if name.startswith("translate")}}


def train(
    files: Sequence[str], macros: Mapping[str, Any], bindings: Sequence[str], settings: Settings
) -> study.Found:
    """Trains a method; gives `steps`, parameters `trained` and `training_seconds`.

    Where it has them also `norms` and `routing`, see `benchmarks.words.inside`.

    Args:
      files: gin files of the method.
      macros: gin macros and parameters of the run, among them BASE and MODEL_DIR.
      bindings: of the method.
      settings: the study's.
    """
    import gin
    import jax

    import train as training

    files = ("bases/folder.gin", *files, str(HERE / "adapt.gin"))
    cells.configure("train", files, [*bound(macros), *bindings, *settings.bind, *short(settings)])
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
    bindings: Sequence[str] = (),
) -> dict[str, float]:
    """Exact match in percent by dataset, as "parse ta".

    Args:
      files, bindings: of the method.
      macros: of the evaluation, among them BASE, CHECKPOINT_PATH, MIXTURE_OR_TASK_NAME and EVAL_OUTPUT_DIR.
      settings: the study's.
      split: of EXAMPLES, which says how many of each dataset are taken.
    """
    import gin

    import eval as evaluation

    number = 2 if settings.smoke else EXAMPLES[split]
    own = bound({**macros, "SPLIT": split, "eval.evaluate.max_examples": number})
    cells.configure("eval", ("bases/folder.gin", *files, str(HERE / "eval.gin")), [*own, *bindings])
    rows = gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)
    return by_dataset(rows)


def by_dataset(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match of an evaluation's rows, by dataset."""
    rows = [row for row in rows if row["metric"] == "exact_match"]
    return {f"{row['task']} {row['language']}": round(row["value"], 2) for row in rows}


def adapt(
    files: Sequence[str],
    bindings: Sequence[str],
    world: str,
    base: str,
    folder: pathlib.Path,
    rate: float,
    seed: int,
    settings: Settings,
    off: Sequence[str] = (),
) -> study.Found:
    """Trains a method on the datasets of a world that are seen, and scores it.

    Args:
      files, bindings: gin files and bindings of the method.
      world: the prefix that it is registered under.
      base: of BASES.
      folder: of the training and its evaluations.
      rate, seed: of the training.
      settings: the study's.
      off: features that are switched off, one at a time, for a further test each.

    Returns:
      What `train` gives; `validation` of the seen datasets; `test` of all; and `<feature>_off`, the test with a feature
      off on seen datasets and unseen pairs.
    """
    macros = {"MIXTURE_OR_TASK_NAME": f"{world}_train", "BASE": settings.base(base)}
    macros |= {"MODEL_DIR": str(folder), "RANDOM_SEED": seed, "LEARNING_RATE": rate}
    found = train(files, macros, bindings, settings)

    def scored(name: str, mixture: str, split: str, **more: Any) -> None:
        to = {"MIXTURE_OR_TASK_NAME": mixture, "EVAL_OUTPUT_DIR": str(folder / name)}
        to |= {"BASE": settings.base(base), "CHECKPOINT_PATH": str(folder)}
        found[name] = score(files, to | more, settings, split, bindings)

    scored("validation", f"{world}_eval_seen", "validation")
    scored("test", f"{world}_eval", "test")
    for feature in off:
        where = dict.fromkeys(("seen", "unseen_pair"), (feature,))
        scored(f"{feature}_off", f"{world}_eval", "test", **{"eval.evaluate.switch_off": where})
    return found


def row(
    method: str, dataset: str, setting: str, value: float, n: int, seed: int, point: str
) -> dict[str, Any]:
    """A row of results.json, see `modjax.evaluation.results`, and the point of the study that it is of."""
    task, language = dataset.split()
    return {
        "method": method,
        "task": task,
        "language": language,
        "setting": setting,
        "metric": "exact_match",
        "value": value,
        "n": n,
        "seed": seed,
        "point": point,
    }


def bound(macros: Mapping[str, Any]) -> list[str]:
    """Values as gin bindings."""
    return [f"{name} = {value!r}" for name, value in macros.items()]


def short(settings: Settings) -> list[str]:
    """Bindings of a training that is only to be seen to work."""
    return ["TRAIN_STEPS = 4", "WARMUP = 1"] if settings.smoke else []


def parser(text: str, seed: int) -> argparse.ArgumentParser:
    """The arguments that the studies share.

    Args:
      text: the module's, whose first line says what it does.
      seed: the one that is taken if none is given.
    """
    made = argparse.ArgumentParser(description=text.split("\n")[0])
    made.add_argument("--seeds", nargs="+", type=int, default=[seed])
    made.add_argument(
        "--output", default="runs/words", type=pathlib.Path, help="bases, checkpoints, logs"
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
