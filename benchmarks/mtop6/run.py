"""mtop6: every method on real parses, tags, translations and questions in six languages, and its zero-shot parses.

    python benchmarks/mtop6/run.py --data_dir /data [--splits first] [--methods lora_16 flix] [--minutes 60]

README.md beside this file says what data it needs and how to read the results. A cell is one training of a method, or
the pretraining of a base; what has a line in `cells.jsonl` is not done again (see `benchmarks.study`). Every method has
as many rates to choose from, with seed 0, on the first split, by the exact matches of the validation parses of trained
languages: nothing held out decides.
"""

import dataclasses
import functools
import os
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
# The base of the generated benchmark (see benchmarks/words) that ours begins with.
WORDS = "all"
BASE = "text"
# The training mixture of a split of the parsing languages.
SPLITS = {"first": "train", "second": "train_second"}
TRIAL_SEED = 0
RATES = (0.002, 0.005)
# Of each language: all validation parses, so many test parses, and texts of a base's validation.
EXAMPLES = {"validation": 159, "test": 400, "lesson": 60}
METRICS = ("exact_match", "inexact_match", "structure_match", "malformed")
# The method's name in results where a pair that was never trained does without its language.
POLICY = "_off"


@dataclasses.dataclass(frozen=True)
class Method:
    """A gin file of methods/, what is set beside it, and whether it is also asked with its language off."""

    file: str
    bindings: tuple[str, ...] = ()
    off: bool = False
    rates: tuple[float, ...] = RATES


def _rank(rank: Any) -> str:
    return f"adapters.LowRank.rank = {rank!r}"


_EVERYWHERE = "ADAPTED_LAYERS = '.*/(query|key|value|out|wi|wi_0|wi_1|wo)'"
_SKILLS = ("SKILLS = 8", _rank(16), "adapters.LowRank.alpha = 16.0")
_LANGUAGE_DROPOUT = "FEATURE_DROPOUT = {'language': 0.5}"
_SLOW = "adapters.LowRank.learning_rate = {'language': 0.1}"
_SHARED = (
    _rank({"task": 8, "language": 4, "shared": 4}),
    "adapters.Features.shared = True",
    _LANGUAGE_DROPOUT,
)
# An example computes rank 16 at every layer, but for LoRA's other two.
METHODS = {
    "lora_4": Method("lora", (_rank(4),)),
    "lora_16": Method("lora", (_rank(16),)),
    "lora_64": Method("lora", (_rank(64),)),
    "monolingual": Method("flix", (_rank(16), "adapters.Features.features = ('language',)")),
    "task_only": Method("flix", (_rank(16), "adapters.Features.features = ('task',)")),
    "flix": Method("flix", (_rank(8),), off=True),
    "flix_shared_language_dropout": Method("flix", _SHARED, off=True),
    "flix_slow_language": Method("flix", (_rank(8), _SLOW), off=True),
    "polytropon": Method("polytropon", _SKILLS),
    # As many heads as the base's attention has.
    "poly_s": Method("poly_s", (*_SKILLS, "HEADS = 4")),
    "adamix_lora": Method(
        "adamix_lora", ("MODULES = 4", _rank(16), "adapters.LowRank.alpha = 16.0", _EVERYWHERE)
    ),
    "full": Method("full", rates=(0.001, 0.003)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training on a split, or with no split the pretraining of the base `method`, BASE or WORDS."""

    split: str
    method: str
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its line and its folder."""
        if not self.split:
            return f"base_{self.method}"
        return f"{self.split}_{self.method}_{self.rate:g}_{self.seed}"

    def config(self, settings: Settings) -> dict[str, Any]:
        """What it was, for the store."""
        found = dataclasses.asdict(self) | {"bind": list(settings.bind), "smoke": settings.smoke}
        if self.split:
            method = METHODS[self.method]
            found |= {"file": method.file, "bindings": list(method.bindings)}
        return found


@functools.cache
def register(output: pathlib.Path) -> None:
    """Makes the vocabulary, if it is not there, and registers the datasets in its pieces."""
    from tasks import mtop6_pieces

    file, partial = output / "spiece.model", output / f"spiece.{os.getpid()}"
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        # Every process of a study writes it, the same, and none may read half of it.
        mtop6_pieces.write_vocabulary(partial)
        os.replace(partial, file)
    mtop6_pieces.register(file)


def begin(settings: Settings) -> str:
    """Writes what the base begins with, and returns the folder: the layers of WORDS, and a random row for each piece.

    From random weights alone a model of this size does not find out how to copy what it reads; one that learnt it on
    a few hundred generated words does it with the embeddings of any others.
    """
    import numpy as np

    from modjax import hub
    from tasks import mtop6_pieces

    known, folder = settings.base(WORDS), settings.base(BASE) + "_begin"
    rows = mtop6_pieces.SIZE + mtop6_pieces.SENTINELS
    _, params = hub.load_base(known)
    table = params["token_embedder"]["embedding"]
    drawn = np.random.default_rng(0).normal(0.0, table.std(), (rows, table.shape[1]))
    params["token_embedder"]["embedding"] = drawn.astype(np.float32)
    hub.save_base(folder, hub.config_of(known, vocab_size=rows), params)
    return folder


def pretrain(base: str, settings: Settings) -> study.Found:
    """Makes a base; gives `validation`: of BASE the chrF of the texts that it restores, by language."""
    # First of all: what gin configures cannot be imported by a process that has used a configuration.
    register(settings.output)
    if base == WORDS:
        return words.pretrain(WORDS, settings)
    folder = settings.base(BASE)
    macros = {"MIXTURE_OR_TASK_NAME": "mtop6_pieces_pretrain", "MODEL_DIR": folder + "_training"}
    macros |= {"BASE": begin(settings), "EXPORT_DIR": folder}
    files = ("bases/folder.gin", "methods/full.gin")
    found = trainings.train((*files, str(HERE / "pretrain.gin")), macros, (), settings)
    # The other lessons' targets are not their texts, which scores are computed from.
    asked = [f"mtop6_pieces_restore_{language}" for language in languages()]
    macros = {"MIXTURE_OR_TASK_NAME": asked, "BASE": folder, "CHECKPOINT_PATH": None}
    macros["EVAL_OUTPUT_DIR"] = folder + "_eval"
    evaluation = (*files, str(HERE / "eval.gin"))
    rows = trainings.score(evaluation, macros, settings, "validation", EXAMPLES["lesson"])
    return found | {"validation": {row["language"]: round(row["value"], 2) for row in rows}}


def adapt(cell: Cell, settings: Settings) -> study.Found:
    """Trains a method and scores its parses.

    Returns:
      What `trainings.train` gives; `validation`, exact match by trained language; `test`, and for FLix `language_off`
      (every language's parses without what belongs to it), by metric and language.
    """
    register(settings.output)
    method, folder = METHODS[cell.method], settings.output / "mtop6" / cell.name
    mixture, base = f"mtop6_pieces_{SPLITS[cell.split]}", settings.base(BASE)
    macros = {"MIXTURE_OR_TASK_NAME": mixture, "BASE": base}
    macros |= {"MODEL_DIR": str(folder), "RANDOM_SEED": cell.seed, "LEARNING_RATE": cell.rate}
    files = ("bases/folder.gin", f"methods/{method.file}.gin")
    found = trainings.train((*files, str(HERE / "adapt.gin")), macros, method.bindings, settings)

    def scored(name: str, languages: Sequence[str], on: str, **more: Any) -> dict[str, Any]:
        to = {"MIXTURE_OR_TASK_NAME": [f"mtop6_pieces_parse_{language}" for language in languages]}
        to |= {"EVAL_OUTPUT_DIR": str(folder / name), "BASE": base}
        to |= {"CHECKPOINT_PATH": str(folder), **more}
        rows = trainings.score(
            (*files, str(HERE / "eval.gin")), to, settings, on, EXAMPLES[on], method.bindings
        )
        return {
            metric: {
                row["language"]: round(row["value"], 2) for row in rows if row["metric"] == metric
            }
            for metric in METRICS
        }

    found["validation"] = scored("validation", trained(cell.split), "validation")["exact_match"]
    found["test"] = scored("test", languages(), "test")
    if method.off:
        where = dict.fromkeys(("seen", "unseen_pair"), ("language",))
        off = {"eval.evaluate.switch_off": where}
        found["language_off"] = scored("language_off", languages(), "test", **off)
    return found


def languages() -> tuple[str, ...]:
    """All of them."""
    from tasks import mtop6

    return mtop6.LANGUAGES


def trained(split: str) -> tuple[str, ...]:
    """The languages whose parses a split of SPLITS trains."""
    from tasks import mtop6

    return {"first": mtop6.PARSE_TRAINED, "second": mtop6.PARSE_TRAINED_SECOND}[split]


def do(cell: Cell, settings: Settings) -> study.Found:
    """Does a cell, in a process of the pool."""
    work = (
        functools.partial(adapt, cell) if cell.split else functools.partial(pretrain, cell.method)
    )
    job = functools.partial(work, settings)
    return study.do(cell.name, cell.config(settings), job, settings.output / "logs" / cell.name)


class Plan:
    """Which cells there are, and which can be begun."""

    def __init__(
        self,
        splits: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
        store: study.Store,
        settings: Settings,
    ):
        self._splits, self._methods, self._seeds = splits, methods, seeds
        self._store, self._settings = store, settings

    def found(self, cell: Cell) -> study.Found | None:
        """What a cell gave; None if it is not done."""
        return self._store.get(cell.name, cell.config(self._settings))

    def trials(self, method: str) -> list[Cell]:
        """The cells that decide a method's rate."""
        split = next(iter(SPLITS))
        return [Cell(split, method, rate, TRIAL_SEED) for rate in METHODS[method].rates]

    def rate(self, method: str) -> float | None:
        """The rate with the best mean on validation (the smaller one, of equals), once all are known."""
        trials = self.trials(method)
        found = [self.found(trial) for trial in trials]
        if not all(found):
            return None
        scores = [sum(f["validation"].values()) for f in found if f]
        return trials[scores.index(max(scores))].rate

    def chosen(self) -> Iterator[Cell]:
        """The cells that are reported, as far as their rates are known; seed by seed."""
        for seed in self._seeds:
            for split in self._splits:
                for method in self._methods:
                    rate = self.rate(method)
                    if rate is not None:
                        yield Cell(split, method, rate, seed)

    def open(self) -> list[Cell]:
        """The cells that can be begun, in the order in which they should: bases, rates, seeds."""
        for base in (WORDS, BASE):
            cell = Cell("", base)
            if not self._settings.has_base(base) or (base == BASE and not self.found(cell)):
                return [cell]
        trials = [trial for method in self._methods for trial in self.trials(method)]
        cells = dict.fromkeys([*trials, *self.chosen()])
        return [cell for cell in cells if not self.found(cell)]


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Of results.json: the tests of the chosen cells; a method that does without the language where parsing was not
    trained in it is a method of its own."""
    out = []
    for cell in plan.chosen():
        found = plan.found(cell)
        if not found:
            continue
        seen = trained(cell.split)
        tests = {cell.method: found["test"]}
        if "language_off" in found:
            tests[cell.method + POLICY] = {
                metric: {
                    language: (values if language in seen else found["language_off"][metric])[
                        language
                    ]
                    for language in values
                }
                for metric, values in found["test"].items()
            }
        for method, test in tests.items():
            for metric, values in test.items():
                for language, value in values.items():
                    setting = "seen" if language in seen else "unseen_pair"
                    out.append(
                        trainings.row(
                            method,
                            f"parse {language}",
                            setting,
                            value,
                            EXAMPLES["test"],
                            cell.seed,
                            cell.split,
                            metric,
                        )
                    )
    return out


def main(argv: Sequence[str]) -> int:
    parser = trainings.parser(__doc__, TRIAL_SEED, "runs/mtop6")
    parser.add_argument("--data_dir", help="by default the environment variable MODJAX_DATA")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args(argv)
    if args.data_dir:
        from tasks import files

        # Also for the processes of the pool, and whatever gin file they have loaded.
        os.environ[files.VARIABLE] = args.data_dir

    def plan(store: study.Store, settings: Settings) -> Plan:
        return Plan(args.splits, args.methods, args.seeds, store, settings)

    return trainings.sit(args, HERE, plan, do, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
