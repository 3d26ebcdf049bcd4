"""The demo: LoRA and FLix of the same compute on the shipped base, seen and zero-shot, in minutes.

    python benchmarks/demo.py [--output runs/demo] [--methods lora flix] [--seeds 0 1 2]

The point (gin_configs/demo.gin) was chosen on LoRA's scores alone, see benchmarks/babel/README.md. Each method has a
process for all of its seeds: a program this small keeps one core busy, and starting anew for each seed would take
longer than training. If the next seed would not fit into the time, the demo ends with fewer seeds and says so.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIXTURE = "babel_eval"
# Each method's best of a sweep, see benchmarks/babel/README.md; other methods take demo.gin's.
LEARNING_RATES = {"lora": 0.015, "flix": 0.01}
LENGTHS = {"inputs": 80, "targets": 80}


def run(
    method: str,
    seed: int,
    folder: pathlib.Path,
    base: str,
    bindings: Sequence[str],
    examples: int,
) -> None:
    """Trains and evaluates one method with one seed."""
    import gin

    import eval as evaluation
    import train
    from modjax import launch

    # The base has never written a bracket, so its output layer needs adapting, too.
    files = ("bases/folder.gin", f"methods/{method}.gin", "methods/every_linear_layer.gin")
    model_dir = folder / f"{method}_{seed}"
    mine = (f"MODEL_DIR = {str(model_dir)!r}", f"RANDOM_SEED = {seed}", f"BASE = {base!r}")
    if method in LEARNING_RATES:
        mine += (f"LEARNING_RATE = {LEARNING_RATES[method]}",)
    launch.load_gin(launch.Flags((*files, "demo.gin"), (*mine, *bindings), ()), "train")
    gin.get_configurable(train.train)(operative_config=gin.operative_config_str)

    values = {
        "MIXTURE_OR_TASK_NAME": MIXTURE,
        "MIXTURE_OR_TASK_MODULE": "tasks.babel",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 128,
        "BASE": base,
        "CHECKPOINT_PATH": str(model_dir),
        "EVAL_OUTPUT_DIR": str(model_dir / "eval"),
        "eval.evaluate.max_examples": examples,
        "eval.evaluate.write_report": False,
    }
    mine = tuple(f"{name} = {value!r}" for name, value in values.items())
    launch.load_gin(launch.Flags((*files, "runs/eval.gin"), mine, ()), "eval")
    gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/demo", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=["lora", "flix"])
    parser.add_argument("--base", default="tasks/assets/babel_base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="start no seed that would exceed this"
    )
    parser.add_argument("--examples", type=int, default=40, help="evaluated of each dataset")
    parser.add_argument("--bind", nargs="*", default=[], help="gin bindings, as 'TRAIN_STEPS = 50'")
    parser.add_argument("--worker", action="store_true", help="run one method, compare nothing")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.worker:
        return work(args)
    start = time.monotonic()
    workers = [begin(method, argv) for method in args.methods]
    failed = [method for method, worker in zip(args.methods, workers, strict=True) if worker()]
    if failed:
        print(f"error: {' and '.join(failed)} failed, see above", file=sys.stderr)
        return 1
    done = [json.loads((args.output / f"{method}.json").read_text()) for method in args.methods]
    seeds = [seed for seed in args.seeds if all(seed in those for those in done)]

    import eval as evaluation
    from modjax.evaluation import report, results

    rows = evaluation.compare(
        [str(args.output / f"{m}_{seed}" / "eval") for seed in seeds for m in args.methods],
        str(args.output),
        "modjax demo",
        minutes=round((time.monotonic() - start) / 60, 1),
    )
    results.write(args.output / "results.json", rows)
    print(report.table(rows, ["exact_match"]))
    print(
        "\nHow to read it: exact match in percent, the mean over seeds; 'seen' are the datasets trained on, "
        "'unseen pair' is parsing in languages that training saw only in other tasks, 'unseen language' one that "
        "only the frozen base has seen."
    )
    if len(seeds) < len(args.seeds):
        print(f"Time was short: {len(seeds)} of {len(args.seeds)} seeds were run.")
    print(f"wrote {args.output / 'results.json'} and {args.output / 'report.html'}")
    return 0


def begin(method: str, argv: Sequence[str]) -> Callable[[], int]:
    """Starts a method's process, whose lines come out with its name before them; returns what waits for its status."""
    command = [sys.executable, __file__, *argv, "--worker", "--methods", method]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def show() -> None:
        for line in process.stdout or ():
            print(f"{method} | {line}", end="", flush=True)

    reader = threading.Thread(target=show)
    reader.start()

    def wait() -> int:
        reader.join()
        return process.wait()

    return wait


def work(args: argparse.Namespace) -> int:
    """Trains and evaluates a method with one seed after the other, and notes which were done."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(args.output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    (method,) = args.methods
    note = args.output / f"{method}.json"
    note.unlink(missing_ok=True)
    start, seeds = time.monotonic(), []
    for seed in args.seeds:
        elapsed = (time.monotonic() - start) / 60
        if seeds and elapsed * (len(seeds) + 1) / len(seeds) > args.minutes:
            break
        run(method, seed, args.output, args.base, args.bind, args.examples)
        seeds.append(seed)
    note.write_text(json.dumps(seeds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
