"""What an average of other languages' modules does where a language has none that was trained with the task.

    python benchmarks/zero_shot/averages.py --output runs/words [--points all-16] [--methods flix] [--seeds 0 1]

Takes the checkpoints of the study's chosen trainings that are still there (`run.py`, with the same arguments), and
scores the unseen pairs and the unseen language once more, with the mean of the language modules of `RELATIVES` in
place of the dataset's own: those of its family, or all, that trained with the task. What is done is in
`averages.jsonl`, and `python -m benchmarks.report` makes a table of it. Nothing is trained.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import study, trainings  # noqa: E402
from benchmarks.trainings import Settings  # noqa: E402
from benchmarks.words import setting as words  # noqa: E402
from benchmarks.zero_shot import run  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
RELATIVES = ("family", "all")
LENGTHS = {"inputs": 16, "targets": 16}


def relatives(datasets: Mapping[tuple[str, str], str], task: str, code: str) -> dict[str, Any]:
    """The languages, by RELATIVES, that trained with a task: `{"family": [...], "all": [...]}`.

    Args:
      datasets: of a Babel, (task, language) -> setting.
      task, code: of the dataset that needs them; a code's first letter is its family.
    """
    every = [c for (t, c), setting in datasets.items() if t == task and setting == "seen"]
    return {"family": [c for c in every if c[0] == code[0]], "all": every}


def trained(gave: study.Found) -> dict[str, Any]:
    """Which training an average is of, for the store."""
    return {key: gave.get(key) for key in ("commit", "date")}


def score(cell: run.Cell, settings: Settings) -> study.Found:
    """The exact matches of a training's checkpoint, `{"family": {"parse te": ...}, "all": {...}}`."""
    from modjax import adapters
    from modjax.evaluation import predict, runner
    from modjax.hub.run import open_run
    from tasks.babel_examples import Babel

    words.register(settings.output, run.WORLD, ())
    opened = open_run(settings.output / "cells" / cell.name, settings.base(cell.base))
    model = opened.model
    added, base = adapters.split(opened.params, model.adapted)
    datasets = Babel().datasets()
    unseen = {dataset: s for dataset, s in datasets.items() if s != "seen"}
    found: study.Found = {kind: {} for kind in RELATIVES}
    for (task, code), setting in unseen.items():
        name = f"{run.WORLD}_{task}_{code}"
        examples = runner.read(
            name,
            "test",
            model.adapted.space,
            task_feature_lengths=LENGTHS,
            converter=model.converter,
            max_examples=2 if settings.smoke else words.EXAMPLES["test"],
        )
        for kind, codes in relatives(datasets, task, code).items():
            shares = dict.fromkeys(codes, 1 / len(codes))
            composed, leaves = adapters.compose(model.adapted, added, task=task, language=shares)
            one = dataclasses.replace(model, module=composed)
            rows = runner.evaluate(
                predict.predictor(one, adapters.join(base, leaves)),
                examples,
                {name: setting},
                method=kind,
                seed=cell.seed,
                batch_size=64,
            ).rows
            found[kind] |= words.by_dataset(rows)
    return found


# A cell, and which training's checkpoint it has to be.
Open = tuple[run.Cell, tuple[tuple[str, Any], ...]]


def do(which: Open, settings: Settings) -> study.Found:
    """Scores a checkpoint, in a process of the pool."""
    cell, config = which
    job = functools.partial(score, cell, settings)
    return study.do(cell.name, dict(config), job, settings.output / "logs" / cell.name)


def table(store: study.Store, chosen: Sequence[tuple[run.Cell, study.Found]]) -> str:
    """Markdown: unseen pairs and the unseen language by point and method, mean and error over seeds.

    Args:
      store: of the averages.
      chosen: the study's cells and what they gave, for the columns of the dataset's own module and of none.
    """
    from tasks.babel_examples import Babel

    settings = {f"{task} {code}": s for (task, code), s in Babel().datasets().items()}
    columns = ("test", "language_off", *RELATIVES)
    values: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for cell, gave in chosen:
        average = store.get(cell.name, trained(gave))
        if average is None:
            continue
        into = values.setdefault((cell.point, cell.method), {})
        for setting in ("unseen_pair", "unseen_language"):
            for column in columns:
                scores = (average if column in RELATIVES else gave).get(column, {})
                of = [value for name, value in scores.items() if settings[name] == setting]
                into.setdefault((setting, column), []).append(sum(of) / len(of))
    if not values:
        return ""
    shown = [("unseen_pair", column) for column in columns]
    shown += [("unseen_language", column) for column in ("test", *RELATIVES)]
    names = {
        "test": "its own",
        "language_off": "none",
        "family": "family's mean",
        "all": "all's mean",
    }
    heads = [f"{setting.replace('_', ' ')}: {names[column]}" for setting, column in shown]
    lines = ["| point | method | " + " | ".join(heads) + " | seeds |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for (point, method), scores in values.items():
        cells = [study.mean(scores[key]) for key in shown]
        seeds = len(scores[shown[0]])
        lines.append(f"| {point} | {method} | " + " | ".join(cells) + f" | {seeds} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = trainings.parser(__doc__, run.TRIAL_SEED, "runs/words")
    parser.add_argument("--points", nargs="+", default=list(run.POINTS), choices=list(run.POINTS))
    flix = [name for name, method in run.METHODS.items() if method.off]
    parser.add_argument("--methods", nargs="+", default=flix, choices=flix)
    args = parser.parse_args(argv)
    folder = args.output / "smoke" / HERE.name if args.smoke else HERE
    done = study.Store(args.store or folder / "cells.jsonl")
    store = study.Store(done.path.with_name("averages.jsonl"))
    settings = Settings(args.output.resolve(), args.smoke, tuple(args.bind))
    plan = run.Plan(args.points, args.methods, args.seeds, done, settings)
    chosen = [(cell, gave) for cell in plan.chosen() if (gave := plan.found(cell))]
    there = [pair for pair in chosen if (settings.output / "cells" / pair[0].name).exists()]

    def ready() -> list[Open]:
        each = [(cell, tuple(trained(gave).items())) for cell, gave in there]
        return [(cell, config) for cell, config in each if not store.get(cell.name, dict(config))]

    def keep(_: Open, found: study.Found) -> None:
        store.add(found)
        print(f"{found['name']}: {found['seconds']:.0f} s", flush=True)

    until = time.monotonic() + 60 * args.minutes
    job = functools.partial(do, settings=settings)
    study.work(ready, job, keep, args.parallel, settings.output / "compiled", until)
    print(f"{len(chosen) - len(there)} of {len(chosen)} checkpoints are not there")
    print(table(store, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
