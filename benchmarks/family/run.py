"""The family of methods: many tasks at once, zero-shot, and a new task or language from a few examples.

    python benchmarks/family/run.py [--methods lora poly_s] [--ways lora z] [--seeds 0 1 2] [--minutes 60]

README.md beside this file says how to read the results. A cell is one training: of a method on the datasets that are
seen, or of a way to adapt on the shots of new datasets, from the checkpoint of its method with the same seed. What has
a line in `cells.jsonl` is not done again (see `benchmarks.study`). Every method and every way has the same rates to
choose from, with seed 0 and by validation: on the seen datasets for a method, on the new ones, for each number of
shots, for a way.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import study, trainings  # noqa: E402
from benchmarks.trainings import Settings  # noqa: E402
from benchmarks.words import setting as words  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
BASE = "all"
WORLD = "family"
TRIAL_SEED = 0
RATES = (0.003, 0.01, 0.03)
# Of a few examples.
FEW_RATES = (0.001, 0.003, 0.01)
SHOTS = (8, 32)
# No method sees an answer to a question, nor the language mo, in training.
HELD_OUT = tuple(("parse", code) for code in ("te", "to", "ki", "me"))
QA = tuple(("qa", a + b) for b in "aeio" for a in "tkm" if a + b != "mo")
DIALS = (("held_out", HELD_OUT + QA),)
TARGETS = {"task": [f"{WORLD}_qa_{code}" for code in ("ta", "ka", "ma")]}
TARGETS["language"] = [f"{WORLD}_{task}_mo" for task in ("parse", "tag", "translate")]


@dataclasses.dataclass(frozen=True)
class Method:
    """A gin file of methods/, and what is set beside it.

    Attributes:
      file, bindings: these.
      rates, few_rates: what is tried on what is seen, and on a few examples.
      macro: which rate that is.
    """

    file: str
    bindings: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES
    few_rates: tuple[float, ...] = FEW_RATES
    macro: str = "LEARNING_RATE"


_EVERYWHERE = "ADAPTED_LAYERS = '.*/(query|key|value|out|wi|wi_0|wi_1|wo)'"
_RANK = "adapters.LowRank.rank = 8"
_HALVES = "adapters.LowRank.rank = 4"
# The scale, alpha by rank, is 1 for all low-rank methods.
_SKILLS = ("SKILLS = 8", "adapters.LowRank.rank = 4", "adapters.LowRank.alpha = 4.0")
# As many as the base's attention has; XLA's CPU compiler is slow at the blocks of more.
_HEADS = "HEADS = 4"
_ADAMIX_LORA = (
    "MODULES = 4",
    "adapters.LowRank.rank = 8",
    "adapters.LowRank.alpha = 8.0",
    _EVERYWHERE,
)
_ADAMIX = ("MODULES = 4", "adapters.Bottleneck.size = 32")
# Rank 8 is what an example of a low-rank method computes; of skills, whose average is used, it is 4.
METHODS = {
    "lora": Method("lora", (_RANK,)),
    "lora_per_dataset": Method("lora_per_dataset", (_RANK,)),
    "flix": Method("flix", (_HALVES,)),
    "flix_adamix": Method("flix", (_HALVES, "adapters.Features.copies = 4", "CONSISTENCY = 1.0")),
    "polytropon": Method("polytropon", _SKILLS),
    "polytropon_by_task": Method("polytropon", (*_SKILLS, "adapters.Skills.by = 'task'")),
    "poly_s": Method("poly_s", (*_SKILLS, _HEADS)),
    "poly_mu": Method("poly_mu", _SKILLS),
    "adamix_lora": Method("adamix_lora", _ADAMIX_LORA),
    "adamix_lora_no_consistency": Method("adamix_lora", (*_ADAMIX_LORA, "CONSISTENCY = 0.0")),
    "pfeiffer": Method("pfeiffer", ("adapters.Bottleneck.size = 32",)),
    "adamix_adapter": Method("adamix_adapter", _ADAMIX),
    "adamix_adapter_no_consistency": Method("adamix_adapter", (*_ADAMIX, "CONSISTENCY = 0.0")),
    "flix_bottleneck": Method(
        "pfeiffer", ("adapters.Bottleneck.size = 16", "ROUTER = @adapters.Features()")
    ),
    "ia3": Method("ia3"),
    "full": Method("full", rates=(0.0003, 0.001, 0.003), few_rates=(0.0003, 0.001, 0.003)),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a new dataset is learnt: what trains then, and whose checkpoint it starts from (None: the base)."""

    method: Method
    source: str | None


_COLLAPSE = "initialize.Start.collapse = True"
# A dataset's own LoRA begins at zero, as lora_from_base does.
_NO_WAY = ("full", "lora_per_dataset")
WAYS = {name: Way(method, name) for name, method in METHODS.items() if name not in _NO_WAY}
WAYS |= {
    "mu": Way(Method("lora", (_HALVES, _COLLAPSE)), "poly_s"),
    # Its routing trains, and nothing else does.
    "z": Way(
        Method(
            "poly_z",
            (*_SKILLS, _HEADS),
            few_rates=(0.03, 0.1, 0.3),
            macro="LOGITS_LEARNING_RATE",
        ),
        "poly_s",
    ),
    "lora_from_base": Way(METHODS["lora"], None),
    "full_from_base": Way(METHODS["full"], None),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: of a method, or, where there are shots, of a way on a target."""

    name_of: str
    rate: float
    seed: int
    target: str = ""
    shots: int = 0

    @property
    def name(self) -> str:
        """Of its line and its folder."""
        few = f"_{self.target}_{self.shots}" if self.shots else ""
        return f"{self.name_of}{few}_{self.rate:g}_{self.seed}"

    def folder(self, settings: Settings) -> pathlib.Path:
        """Of its checkpoints and evaluations."""
        return settings.output / "family" / self.name

    @property
    def method(self) -> Method:
        """What trains."""
        return WAYS[self.name_of].method if self.shots else METHODS[self.name_of]

    @property
    def rates(self) -> tuple[float, ...]:
        """Which rates its kind has to choose from."""
        return self.method.few_rates if self.shots else self.method.rates


@functools.cache
def world(output: pathlib.Path) -> None:
    """Registers the study's datasets, and the mixtures of what is new."""
    from modjax.data import registry

    words.register(output, WORLD, DIALS)
    for target, tasks in TARGETS.items():
        registry.add_mixture(f"{WORLD}_new_{target}", tasks)


def adapt(cell: Cell, settings: Settings) -> study.Found:
    """Trains a method on what is seen, and scores it on that and in zero-shot."""
    return words.adapt(
        (f"methods/{cell.method.file}.gin",),
        cell.method.bindings,
        WORLD,
        BASE,
        cell.folder(settings),
        cell.rate,
        cell.seed,
        settings,
    )


def few(cell: Cell, source: Cell | None, settings: Settings) -> study.Found:
    """Trains a way on a target's shots; gives `validation` by step, `zero` (the start's test) and `test`."""
    import gin

    from benchmarks import cells
    from modjax import fewshot

    folder = cell.folder(settings)
    start = str(source.folder(settings)) if source else None
    macros = {
        "MIXTURE_OR_TASK_NAME": f"{WORLD}_new_{cell.target}",
        "BASE": settings.base(BASE),
        "MODEL_DIR": str(folder),
        "INITIAL_CHECKPOINT_PATH": start,
        cell.method.macro: cell.rate,
        "METHOD": cell.name_of,
        "SHOTS": cell.shots,
        "fewshot.Protocol.seeds": (cell.seed,),
    }
    files = ("bases/folder.gin", f"methods/{cell.method.file}.gin", str(HERE / "few.gin"))
    bindings = [*trainings.bound(macros), *cell.method.bindings, *settings.bind]
    if settings.smoke:
        bindings += ["TRAIN_STEPS = 2", "fewshot.Protocol.validation_examples = 2"]
    cells.configure("fewshot", files, bindings)
    rows = gin.get_configurable(fewshot.adapt)(operative_config=gin.operative_config_str)
    chosen = json.loads((folder / f"seed_{cell.seed}" / "selection.json").read_text())
    tests = {
        when: words.by_dataset(
            [row for row in rows if row["method"] == f"{cell.name_of}_{number}shots"]
        )
        for when, number in (("zero", 0), ("test", cell.shots))
    }
    return {"validation": chosen["validation"], "selected": chosen["selected"], **tests}


def do(job: tuple[Cell, Cell | None], settings: Settings) -> study.Found:
    """Does a cell, in a process of the pool."""
    cell, source = job
    train = functools.partial(few, cell, source) if cell.shots else functools.partial(adapt, cell)

    def work() -> study.Found:
        world(settings.output)
        return train(settings)

    log = settings.output / "logs" / cell.name
    return study.do(cell.name, config(cell, source, settings), work, log)


def config(cell: Cell, source: Cell | None, settings: Settings) -> dict[str, Any]:
    """What a cell was, for the store."""
    own = {
        "file": cell.method.file,
        "bindings": list(cell.method.bindings),
        "source": source and source.name,
        "smoke": settings.smoke,
    }
    return dataclasses.asdict(cell) | own | {"bind": list(settings.bind)}


class Plan:
    """Which cells there are, and which can be begun."""

    def __init__(
        self,
        methods: Sequence[str],
        ways: Sequence[str],
        seeds: Sequence[int],
        store: study.Store,
        settings: Settings,
    ):
        # What a way starts from is trained, too.
        sources = [WAYS[way].source for way in ways]
        self._methods = list(dict.fromkeys([*methods, *filter(None, sources)]))
        self._ways, self._seeds = ways, seeds
        self._store, self._settings = store, settings

    def found(self, cell: Cell) -> study.Found | None:
        """What a cell gave; None if it is not done."""
        source = self.source(cell) if cell.shots else None
        return self._store.get(cell.name, config(cell, source, self._settings))

    def rate(self, cell: Cell) -> float | None:
        """The best rate for what a cell is of, whatever its own rate and seed; None until all are known."""
        if cell.shots and not self._begun(cell):
            return None
        rates = cell.rates
        trials = [dataclasses.replace(cell, rate=rate, seed=TRIAL_SEED) for rate in rates]
        found = [self.found(trial) for trial in trials]
        if not all(found):
            return None
        scores = [f["validation"] for f in found if f]
        if cell.shots:
            best = [max(curve.values()) for curve in scores]
        else:
            best = [sum(by_dataset.values()) for by_dataset in scores]
        return rates[best.index(max(best))]

    def _begun(self, cell: Cell) -> bool:
        """Whether it is known what a way starts from, without which none of its cells was done."""
        return WAYS[cell.name_of].source is None or self.source(cell) is not None

    def source(self, cell: Cell) -> Cell | None:
        """The cell whose checkpoint a way starts from; None for the base, or while the rate is not known."""
        name = WAYS[cell.name_of].source
        rate = None if name is None else self.rate(Cell(name, RATES[0], TRIAL_SEED))
        return None if name is None or rate is None else Cell(name, rate, cell.seed)

    def ready(self, cell: Cell) -> bool:
        """Whether what a way starts from is there."""
        source = self.source(cell)
        if source is None:
            return WAYS[cell.name_of].source is None
        return self.found(source) is not None and source.folder(self._settings).exists()

    def kinds(self) -> Iterator[Cell]:
        """One cell of each method, and of each way, target and number of shots."""
        for name in self._methods:
            yield Cell(name, RATES[0], TRIAL_SEED)
        for shots in SHOTS:
            for target in TARGETS:
                for name in self._ways:
                    yield Cell(name, RATES[0], TRIAL_SEED, target, shots)

    def chosen(self) -> Iterator[Cell]:
        """The cells that are reported, as far as their rates are known; seed by seed."""
        for seed in self._seeds:
            for kind in self.kinds():
                rate = self.rate(kind)
                if rate is not None:
                    yield dataclasses.replace(kind, rate=rate, seed=seed)

    def open(self) -> list[tuple[Cell, Cell | None]]:
        """(cell, its source) of what can be begun, in the order in which it should."""
        trials = (
            dataclasses.replace(kind, rate=rate) for kind in self.kinds() for rate in kind.rates
        )
        known = (
            cell
            for cell in dict.fromkeys([*trials, *self.chosen()])
            if not cell.shots or self._begun(cell)
        )
        cells = [cell for cell in known if not self.found(cell)]
        # The store may be kept where checkpoints are not: what is started from is then trained again.
        sources = dict.fromkeys(self.source(cell) for cell in cells if cell.shots)
        gone = [
            source
            for source in sources
            if source and self.found(source) and not source.folder(self._settings).exists()
        ]
        return [
            (cell, self.source(cell) if cell.shots else None)
            for cell in [*gone, *cells]
            if not cell.shots or self.ready(cell)
        ]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Of results.json: the tests of the chosen cells, `point` says of what: "many" or "task, 8 shots"."""
    from tasks.babel_examples import Babel
    from tasks.babel_world import BabelConfig

    known = Babel(BabelConfig(**dict(DIALS))).datasets()
    settings = {f"{task} {code}": setting for (task, code), setting in known.items()}
    out = []
    for cell in plan.chosen():
        found = plan.found(cell)
        point = f"{cell.target}, {cell.shots} shots" if cell.shots else "many"
        n = 100 if cell.shots else words.EXAMPLES["test"]
        for name, value in (found or {"test": {}})["test"].items():
            setting = "unseen_task" if name.startswith("qa ") else settings[name]
            out.append(trainings.row(cell.name_of, name, setting, value, n, cell.seed, point))
    return out


def main(argv: Sequence[str]) -> int:
    parser = trainings.parser(__doc__, TRIAL_SEED, "runs/words")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args(argv)

    def plan(store: study.Store, settings: Settings) -> Plan:
        if not settings.has_base(BASE):
            words.pretrain(BASE, settings)
        return Plan(args.methods, args.ways, args.seeds, store, settings)

    return trainings.sit(args, HERE, plan, do, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
