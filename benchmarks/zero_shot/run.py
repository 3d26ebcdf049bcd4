"""When does FLix win in zero-shot? Methods on the generated benchmark, over two dials.

    python benchmarks/zero_shot/run.py [--points all-4 none-4] [--methods lora flix] [--seeds 0 1 2] [--minutes 60]

README.md beside this file says what the dials are and how to read the results. A cell is one method at one point with
one learning rate and one seed: it is trained, scored, and becomes a line of `cells.jsonl` (see `benchmarks.study`);
what has a line is not done again. Each method's rate is the best of `RATES` on the validation split of the datasets it
trains on, with seed 0, at each point anew; what is held out decides nothing. At the end `results.json` is written: the
tests of all cells with their method's best rate.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import study, trainings  # noqa: E402
from benchmarks.trainings import Settings  # noqa: E402
from benchmarks.words import setting as words  # noqa: E402
from benchmarks.words.setting import BASES, EXAMPLES  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
RATES = (0.004, 0.0065, 0.01)
TRIAL_SEED = 0
# Crowding: R, the rank that an example of any method uses. There are 39 datasets.
RANKS = (4, 16)
POLICY = ", language off for unseen pairs"  # ends the name of a method that is scored so
WORLD = "words"  # the prefix of what adapters train on, the same for all bases
POINTS = {f"{base}-{rank}": (base, rank) for base in BASES for rank in RANKS}


@dataclasses.dataclass(frozen=True)
class Method:
    """A gin file, of methods/ or beside this one, and what is set beside it.

    In the bindings `{R}`, `{R2}`, `{R4}` and `{R34}` are R, R/2, R/4 and 3R/4, `{wide}` FLix's columns in all, and
    `{tasks}` those of its tasks.
    An example uses modules of rank R at every layer, unless the comment says otherwise.
    """

    file: str
    bindings: tuple[str, ...]
    # What is switched off for further tests, to see what it holds.
    off: tuple[str, ...] = ()


_BOTH = ("language", "task")
_HALVES = "adapters.LowRank.rank = {R2}"
_SHARED = (
    "adapters.Features.shared = True",
    "adapters.LowRank.rank = {{'task': {R2}, 'language': {R4}, 'shared': {R4}}}",
)
_DROPPED = "FEATURE_DROPOUT = {{'language': 0.5}}"
_SLOW = "adapters.LowRank.learning_rate = {{'language': 0.1}}"
METHODS = {
    "lora": Method("lora", ("adapters.LowRank.rank = {R}",)),
    # As many parameters as flix: R/2 for each of its 4 + 11 values.
    "lora_wide": Method("lora_wide", ("WIDE_RANK = {wide}",)),
    "lora_per_dataset": Method("lora_per_dataset", ("adapters.LowRank.rank = {R}",)),
    "task_only": Method(
        "flix", ("adapters.LowRank.rank = {R}", "adapters.Features.features = ('task',)")
    ),
    "flix": Method("flix", (_HALVES, "FEATURE_DROPOUT = 0.1"), _BOTH),
    "flix_no_dropout": Method("flix", (_HALVES,), _BOTH),
    "flix_shared": Method("flix", (*_SHARED, "FEATURE_DROPOUT = 0.1"), _BOTH),
    # Ours.
    "flix_language_dropout": Method("flix", (_HALVES, _DROPPED), _BOTH),
    "flix_wide_task": Method(
        "flix", ("adapters.LowRank.rank = {{'task': {R34}, 'language': {R4}}}",), _BOTH
    ),
    "flix_shared_language_dropout": Method("flix", (*_SHARED, _DROPPED), _BOTH),
    # In the decoder the task's module has all of the rank.
    "flix_encoder_language": Method(
        "flix_encoder_language", (_HALVES, "DECODER_RANK = {R}"), _BOTH
    ),
    # What else could keep a language from holding half of a task; compare with flix_no_dropout.
    "flix_slow_language": Method("flix", (_HALVES, _SLOW), _BOTH),
    "flix_shared_slow_language": Method("flix", (*_SHARED, _SLOW), _BOTH),
    "flix_slow_language_dropout": Method("flix", (_HALVES, _SLOW, _DROPPED), _BOTH),
    "flix_shared_slow_language_dropout": Method("flix", (*_SHARED, _SLOW, _DROPPED), _BOTH),
    "flix_small_language": Method("flix_apart", (_HALVES, "LANGUAGE_DECAY = 3.0"), _BOTH),
    "flix_late_language": Method(
        "flix_apart", (_HALVES, "LANGUAGE_BEGIN = 400", "LANGUAGE_STEPS = 400"), _BOTH
    ),
    "flix_orthogonal": Method(
        "flix_orthogonal",
        (
            _HALVES,
            "TASK_COLUMNS = {tasks}",
            "optimizers.Optimizer.algorithm = %ALGORITHM",
        ),
        _BOTH,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training, or with method "" the pretraining of a point's base."""

    point: str
    method: str = ""
    rate: float = 0.0
    seed: int = 0

    @property
    def base(self) -> str:
        """Of BASES."""
        return self.point.partition("-")[0]

    @property
    def name(self) -> str:
        """Of its line and its folder."""
        if not self.method:
            return f"base_{self.base}"
        return f"{self.point}_{self.method}_{self.rate:g}_{self.seed}"

    def config(self, settings: Settings) -> dict[str, Any]:
        """What it was, for the store."""
        found = {
            "method": self.method,
            "base": self.base,
            "bind": list(settings.bind),
            "smoke": settings.smoke,
        }
        if self.method:
            found |= {
                "point": self.point,
                "rate": self.rate,
                "seed": self.seed,
                "bindings": self.bindings(),
            }
        return found

    def bindings(self) -> list[str]:
        """Of its method, at its rank."""
        rank = POINTS[self.point][1]
        sizes = {"R": rank, "R2": rank // 2, "R4": rank // 4, "R34": rank - rank // 4}
        sizes |= {"wide": 15 * sizes["R2"], "tasks": 4 * sizes["R2"]}
        return [binding.format(**sizes) for binding in METHODS[self.method].bindings]

    def files(self) -> tuple[str, ...]:
        """Gin files of its training and its evaluation, but for their own."""
        name = METHODS[self.method].file
        own = HERE / f"{name}.gin"
        if own.exists():
            return (str(own),)
        return (f"methods/{name}.gin",)


def adapt(cell: Cell, settings: Settings) -> study.Found:
    """Trains and scores a method."""
    words.register(settings.output, WORLD, ())
    return words.adapt(
        cell.files(),
        cell.bindings(),
        WORLD,
        cell.base,
        settings.output / "cells" / cell.name,
        cell.rate,
        cell.seed,
        settings,
        METHODS[cell.method].off,
    )


def do(cell: Cell, settings: Settings) -> study.Found:
    """Does a cell, in a process of the pool."""
    job = functools.partial(words.pretrain, cell.base, settings)
    if cell.method:
        job = functools.partial(adapt, cell, settings)
    return study.do(cell.name, cell.config(settings), job, settings.output / "logs" / cell.name)


class Plan:
    """Which cells there are, and which can be begun."""

    def __init__(
        self,
        points: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
        store: study.Store,
        settings: Settings,
    ):
        self._points, self._methods, self._seeds = points, methods, seeds
        self._store, self._settings = store, settings

    def found(self, cell: Cell) -> study.Found | None:
        """What a cell gave; None if it is not done."""
        return self._store.get(cell.name, cell.config(self._settings))

    def rate(self, point: str, method: str) -> float | None:
        """The rate with the best mean on validation (the smaller one, of equals), once all are known."""
        trials = [Cell(point, method, rate, TRIAL_SEED) for rate in RATES]
        found = [self.found(trial) for trial in trials]
        if not all(found):
            return None
        scores = [sum(f["validation"].values()) for f in found if f]
        return RATES[scores.index(max(scores))]

    def chosen(self) -> Iterator[Cell]:
        """The cells that are reported, as far as their rates are known; seed by seed."""
        for seed in self._seeds:
            for point in self._points:
                for method in self._methods:
                    rate = self.rate(point, method)
                    if rate is not None:
                        yield Cell(point, method, rate, seed)

    def open(self) -> list[Cell]:
        """The cells that can be begun, in the order in which they should: bases, rates, seeds."""
        bases = {cell.base: cell for cell in map(Cell, self._points)}
        made = {name for name in bases if self._settings.has_base(name)}
        known = [cell for name, cell in bases.items() if name not in made or not self.found(cell)]
        trials = (
            Cell(point, method, rate, TRIAL_SEED)
            for point in self._points
            for method in self._methods
            for rate in RATES
        )
        adapting = [cell for cell in dict.fromkeys([*trials, *self.chosen()]) if cell.base in made]
        return known + [cell for cell in adapting if not self.found(cell)]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Of results.json: the tests of the chosen cells; a method with its language feature off where the pair was never
    trained is a method of its own."""
    from tasks.babel_examples import Babel

    settings = {f"{task} {code}": setting for (task, code), setting in Babel().datasets().items()}
    out = []
    for cell in plan.chosen():
        found = plan.found(cell)
        if not found:
            continue
        tests = {cell.method: found["test"]}
        if "language_off" in found:
            off = {d: v for d, v in found["language_off"].items() if settings[d] == "unseen_pair"}
            tests[cell.method + POLICY] = found["test"] | off
        for method, test in tests.items():
            out += [
                trainings.row(
                    method, name, settings[name], value, EXAMPLES["test"], cell.seed, cell.point
                )
                for name, value in test.items()
            ]
    return out


def main(argv: Sequence[str]) -> int:
    parser = trainings.parser(__doc__, TRIAL_SEED, "runs/words")
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args(argv)

    def plan(store: study.Store, settings: Settings) -> Plan:
        return Plan(args.points, args.methods, args.seeds, store, settings)

    return trainings.sit(args, HERE, plan, do, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
