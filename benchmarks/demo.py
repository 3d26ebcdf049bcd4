"""The demo: LoRA and FLix of the same compute on the shipped base, seen and zero-shot, in minutes.

    python benchmarks/demo.py [--output runs/demo] [--methods lora flix] [--seeds 0 1 2]

The point (gin_configs/demo.gin) was chosen on LoRA's scores alone, see benchmarks/babel/README.md. All runs share one
process and one compilation cache, since a new process would spend longer on starting than on training. If the next seed
would not fit into the time, the demo ends with fewer seeds and says so.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

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
) -> str:
    """Trains and evaluates one method with one seed; returns the evaluation's folder."""
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
    return str(model_dir / "eval")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/demo", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=["lora", "flix"])
    parser.add_argument("--base", default="tasks/assets/babel_base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, default=9.2, help="start no seed that would exceed this"
    )
    parser.add_argument("--examples", type=int, default=25, help="evaluated of each dataset")
    parser.add_argument("--bind", nargs="*", default=[], help="gin bindings, as 'TRAIN_STEPS = 50'")
    args = parser.parse_args(argv)

    import jax

    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    import eval as evaluation
    from modjax.evaluation import report, results

    start, evaluations, seeds = time.monotonic(), [], []
    for seed in args.seeds:
        elapsed = (time.monotonic() - start) / 60
        if seeds and elapsed * (len(seeds) + 1) / len(seeds) > args.minutes:
            break
        for method in args.methods:
            evaluations.append(run(method, seed, args.output, args.base, args.bind, args.examples))
        seeds.append(seed)
    rows = evaluation.compare(
        evaluations,
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
