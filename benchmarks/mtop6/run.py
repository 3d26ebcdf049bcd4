"""mtop6 from the data to the report: a base is pretrained, then methods adapt it, with three seeds each.

    python benchmarks/mtop6/run.py --data_dir /data [--output runs/mtop6] [--methods lora flix] [--seeds 0 1 2]

README.md beside this file says what data it needs and how to read the results. What is done is not done again: the same
command continues where the last one was stopped, and `--methods` and `--seeds` may be added to.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HERE = "benchmarks/mtop6"
SMOKE = {
    "pretrain": ["TRAIN_STEPS = 4"],
    "adapt": ["TRAIN_STEPS = 4"],
    "eval": ["MAX_EXAMPLES = 4"],
}


def configure(entry: str, files: Sequence[str], bindings: Sequence[str]) -> None:
    """Loads gin files of this folder and of gin_configs, and bindings, which win."""
    from modjax import launch

    launch.load_gin(launch.Flags(tuple(files), tuple(bindings), (str(ROOT),)), entry)


def pretrain(base: pathlib.Path, bindings: Sequence[str]) -> None:
    """Trains the base and writes its weights to the folder `base`."""
    import gin

    import train

    files = (f"{HERE}/base.gin", "methods/full.gin", f"{HERE}/pretrain.gin")
    places = (f"MODEL_DIR = {str(base) + '_training'!r}", f"EXPORT_DIR = {str(base)!r}")
    configure("train", files, (*places, *bindings))
    gin.get_configurable(train.train)(operative_config=gin.operative_config_str)


def adapt(
    method: str, seed: int, base: pathlib.Path, model_dir: pathlib.Path, bindings: Sequence[str]
) -> None:
    """Trains a method's adapters on the base."""
    import gin

    import train

    files = ("bases/folder.gin", f"methods/{method}.gin", f"{HERE}/adapt.gin")
    places = (f"BASE = {str(base)!r}", f"MODEL_DIR = {str(model_dir)!r}", f"RANDOM_SEED = {seed}")
    configure("train", files, (*places, *bindings))
    gin.get_configurable(train.train)(operative_config=gin.operative_config_str)


def evaluate(
    method: str, base: pathlib.Path, model_dir: pathlib.Path, bindings: Sequence[str]
) -> None:
    """Scores trained adapters; predictions and results are written below `model_dir`."""
    import gin

    import eval as evaluation

    files = ("bases/folder.gin", f"methods/{method}.gin", f"{HERE}/eval.gin")
    places = (
        f"BASE = {str(base)!r}",
        f"CHECKPOINT_PATH = {str(model_dir)!r}",
        f"EVAL_OUTPUT_DIR = {str(model_dir / 'eval')!r}",
        "eval.evaluate.write_report = False",
    )
    configure("eval", files, (*places, *bindings))
    gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)


class Ledger:
    """The steps that are done and the seconds each took, in a file, so that none is repeated.

    A step that was interrupted and continued counts with its last part only.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def do(self, name: str, step: Callable[[], None]) -> None:
        """Does a step unless it is done, and notes it."""
        if name in self.seconds:
            print(f"{name}: done before", flush=True)
            return
        print(f"{name}: begins", flush=True)
        start = time.monotonic()
        step()
        self.seconds[name] = round(time.monotonic() - start, 1)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.seconds, indent=1) + "\n")
        os.replace(partial, self._path)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="by default the environment variable MODJAX_DATA")
    parser.add_argument("--output", default="runs/mtop6", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=["lora", "flix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--bind", nargs="*", default=[], help="gin bindings of all steps, as 'BATCH_SIZE = 32'"
    )
    for step in SMOKE:
        parser.add_argument(f"--bind_{step}", nargs="*", default=[], help=f"of the step {step}")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all works")
    args = parser.parse_args(argv)

    import jax

    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def bindings(step: str) -> list[str]:
        data = [f"DATA_DIR = {args.data_dir!r}"] if args.data_dir else []
        small = SMOKE[step] if args.smoke else []
        return [*data, *small, *args.bind, *getattr(args, f"bind_{step}")]

    ledger = Ledger(args.output / "seconds.json")
    base = args.output / "base"
    ledger.do("pretrain", lambda: pretrain(base, bindings("pretrain")))
    runs = [(method, seed) for seed in args.seeds for method in args.methods]
    for method, seed in runs:
        name, folder = f"{method}_{seed}", args.output / f"{method}_{seed}"
        ledger.do(name, lambda m=method, s=seed, f=folder: adapt(m, s, base, f, bindings("adapt")))
        ledger.do(f"{name} eval", lambda m=method, f=folder: evaluate(m, base, f, bindings("eval")))

    import eval as evaluation
    from modjax.evaluation import report, results

    minutes = {name: round(value / 60, 1) for name, value in ledger.seconds.items()}
    rows = evaluation.compare(
        [str(args.output / f"{method}_{seed}" / "eval") for method, seed in runs],
        str(args.output),
        "mtop6: parsing in six languages, held out in three",
        minutes=", ".join(f"{name} {value}" for name, value in minutes.items()),
        note="own splits, contexts cut to a window: not comparable with published scores",
    )
    results.write(args.output / "results.json", rows)
    parses = [row for row in rows if row["task"] == "parse"]
    print(report.table(parses, ["exact_match", "inexact_match", "structure_match"]))
    print(
        "Own splits: not comparable with published scores. 'Unseen pair' is parsing in es, hi and th, which "
        f"training saw in other tasks only. {sum(ledger.seconds.values()) / 60:.1f} minutes in all.\n"
        f"wrote {args.output / 'results.json'} and {args.output / 'report.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
