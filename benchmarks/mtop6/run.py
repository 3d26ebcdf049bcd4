"""mtop6 from the data to the report: a base is pretrained, then methods adapt it, with three seeds each.

    python benchmarks/mtop6/run.py --data_dir /data [--output runs/mtop6] [--methods lora flix] [--seeds 0 1 2]

README.md beside this file says what data it needs and how to read the results. What is done is not done again: the same
command continues where the last one was stopped, and `--methods` and `--seeds` may be added to.

Every step is a process of its own. On a CPU a model this small keeps one core busy and no more, so the pretraining
divides its batch over `--parallel` devices, one for each core, and as many runs of adapters go on at once, each on a
core of its own.
"""

import argparse
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import configure, cores  # noqa: E402

HERE = "benchmarks/mtop6"
# What pretraining goes on from: the generated benchmark's base can copy, and has seen no real text.
START = "tasks/assets/babel_base"
SMOKE = {
    "pretrain": ["TRAIN_STEPS = 4", "WARMUP = 1"],
    "adapt": ["TRAIN_STEPS = 4"],
    "eval": ["MAX_EXAMPLES = 4"],
}


# An example of FLix has two modules, its task's and its language's, so both methods compute as much. README.md says how
# the rates were chosen.
METHODS = {
    "lora": ("adapters.LowRank.rank = 16", "LEARNING_RATE = 0.01"),
    "flix": ("adapters.LowRank.rank = 8", "LEARNING_RATE = 0.005"),
}


def pretrain(base: pathlib.Path, bindings: Sequence[str]) -> None:
    """Trains the base, on from `START`, and writes its weights to the folder `base`."""
    import gin

    import train

    files = ("bases/folder.gin", "methods/full.gin", f"{HERE}/pretrain.gin")
    places = (
        f"BASE = {str(ROOT / START)!r}",
        f"MODEL_DIR = {str(base) + '_training'!r}",
        f"EXPORT_DIR = {str(base)!r}",
    )
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
    configure("train", files, (*places, *METHODS.get(method, ()), *bindings))
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
    configure("eval", files, (*places, *METHODS.get(method, ())[:1], *bindings))
    gin.get_configurable(evaluation.evaluate)(operative_config=gin.operative_config_str)


class Ledger:
    """The steps that are done and the seconds each took, in a file, so that none is repeated.

    A step that was interrupted and continued counts with its last part only.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def do(self, name: str, step: Callable[[], None]) -> None:
        """Does a step unless it is done, and notes it. Several threads may do different steps."""
        if name in self.seconds:
            print(f"{name}: done before", flush=True)
            return
        print(f"{name}: begins", flush=True)
        start = time.monotonic()
        step()
        seconds = round(time.monotonic() - start, 1)
        with self._lock:
            self.seconds[name] = seconds
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.seconds, indent=1) + "\n")
            os.replace(partial, self._path)
        print(f"{name}: took {seconds:.0f} s", flush=True)


class Workers:
    """Runs this script's steps as processes that write to files of `logs`; ends them when it is closed.

    Args:
      argv: the command line that the steps share.
      logs: a folder.
      count: how many there may be at once.
      script: is run with `argv` and `--only=STEP`.
    """

    def __init__(self, argv: Sequence[str], logs: pathlib.Path, count: int, script: str = __file__):
        self._command, self._logs = (sys.executable, script, *argv), logs
        self._running: set[subprocess.Popen] = set()
        self._cores: queue.Queue[int | None] = queue.Queue()
        for core in cores(count):
            self._cores.put(core)

    def run(self, step: str, alone: bool = False) -> None:
        """Does one step in a process, on a core of its own, or `alone` with a device for each core.

        Raises:
          RuntimeError: it failed; with the end of what it wrote.
        """
        environment = dict(os.environ)
        core = None if alone else self._cores.get()
        if alone:
            flags = environment.get("XLA_FLAGS", "")
            count = self._cores.qsize()
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
        pin = () if core is None else (f"--core={core}",)
        path = self._logs / f"{step}.log"
        try:
            with path.open("a") as log:
                process = subprocess.Popen(
                    [*self._command, f"--only={step}", *pin],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self._running.add(process)
                status = process.wait()
                self._running.discard(process)
        finally:
            if not alone:
                self._cores.put(core)
        if status:
            end = "\n".join(path.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{step} ended with status {status}; the end of {path}:\n{end}")

    def close(self) -> None:
        """Ends what still runs; training saves where it is."""
        for process in list(self._running):
            process.terminate()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="by default the environment variable MODJAX_DATA")
    parser.add_argument("--output", default="runs/mtop6", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", default=["lora", "flix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument(
        "--bind", nargs="*", default=[], help="gin bindings of all steps, as 'BATCH_SIZE = 32'"
    )
    for step in SMOKE:
        parser.add_argument(f"--bind_{step}", nargs="*", default=[], help=f"of the step {step}")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all works")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        do_step(args)
        return 0

    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.output / "seconds.json")
    workers = Workers(argv, args.output / "logs", args.parallel)
    runs = [f"{method}_{seed}" for seed in args.seeds for method in args.methods]

    def one_run(name: str) -> None:
        for step in (name, f"{name}_eval"):
            ledger.do(step, functools.partial(workers.run, step))

    start = time.monotonic()
    try:
        ledger.do("pretrain", lambda: workers.run("pretrain", alone=True))
        with futures.ThreadPoolExecutor(args.parallel) as pool:
            pending = [pool.submit(one_run, name) for name in runs]
            try:
                for future in futures.as_completed(pending):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                workers.close()
                raise
    finally:
        workers.close()
    tell(args, runs, ledger, (time.monotonic() - start) / 60)
    return 0


def do_step(args: argparse.Namespace) -> None:
    """What a process of `Workers` does."""
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})

    import jax

    jax.config.update("jax_compilation_cache_dir", str(args.output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def bindings(step: str) -> list[str]:
        data = [f"DATA_DIR = {args.data_dir!r}"] if args.data_dir else []
        small = SMOKE[step] if args.smoke else []
        return [*data, *small, *args.bind, *getattr(args, f"bind_{step}")]

    base = args.output / "base"
    if args.only == "pretrain":
        return pretrain(base, bindings("pretrain"))
    name = args.only.removesuffix("_eval")
    method, _, seed = name.rpartition("_")
    if args.only == name:
        return adapt(method, int(seed), base, args.output / name, bindings("adapt"))
    return evaluate(method, base, args.output / name, bindings("eval"))


def tell(args: argparse.Namespace, runs: Sequence[str], ledger: Ledger, minutes: float) -> None:
    """Writes the report of all runs, and prints the parses' scores."""
    import eval as evaluation
    from modjax.evaluation import report, results

    rows = evaluation.compare(
        [str(args.output / name / "eval") for name in runs],
        str(args.output),
        "mtop6: parsing in six languages, held out in three",
        minutes=", ".join(f"{name} {value / 60:.1f}" for name, value in ledger.seconds.items()),
        note="own splits, contexts cut to a window: not comparable with published scores",
    )
    results.write(args.output / "results.json", rows)
    parses = [row for row in rows if row["task"] == "parse"]
    print(report.table(parses, ["exact_match", "inexact_match", "structure_match"]))
    print(
        "Own splits: not comparable with published scores. 'Unseen pair' is parsing in es, hi and th, which "
        f"training saw in other tasks only. {minutes:.1f} minutes by the clock.\n"
        f"wrote {args.output / 'results.json'} and {args.output / 'report.html'}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
