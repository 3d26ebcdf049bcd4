"""How long a job takes until its first step is done, with an empty and with a filled compilation cache.

    python -m benchmarks.start [--rounds 3] [--cores 1]

Each start is a process of its own: train.py with FLix on a T5 of width 512, 6+6 layers and 32128 tokens (random
weights, float32), batch 8, 64/64 tokens, on the generated babel mixture, until its log tells the loss of step 1. Cold
and warm take turns, each round with a cache folder of its own. On one core the processor's time of the process is
told, which does not count what others do on a shared machine; else wall time.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]
MACROS = {
    "MIXTURE_OR_TASK_NAME": "babel_train",
    "MIXTURE_OR_TASK_MODULE": "tasks.babel",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 64},
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 1,
    "BASE": "random",
    "train.train.log_period": 1,
    "train.train.tensorboard": False,
}
FILES = ("bases/t5_small.gin", "methods/flix.gin", "runs/finetune.gin")


def first_step(folder: pathlib.Path, cache: pathlib.Path, processor: bool) -> tuple[float, str]:
    """(seconds from the start of the process to its line about step 1, what its log says of compiling)."""
    values = MACROS | {"MODEL_DIR": str(folder)}
    command = [sys.executable, str(ROOT / "train.py"), f"--compilation_cache={cache}"]
    command += [f"--gin_file={name}" for name in FILES]
    command += [f"--gin.{name}={value!r}" for name, value in values.items()]
    began, compiled, lines = time.perf_counter(), "", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "compiled in" in line:
                compiled = line.rsplit("compiled in", 1)[1].strip()
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                if processor:
                    fields = (
                        pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
                    )
                    ticks = sum(int(field) for field in fields.split()[11:13])
                    seconds = ticks / os.sysconf("SC_CLK_TCK")
                process.communicate()
                return seconds, compiled
    raise RuntimeError("the run ended before its first step:\n" + "".join(lines[-30:]))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1, help="0 for all; on one, processor time")
    args = parser.parse_args(argv)
    measure.use_cores(args.cores)
    found: measure.Seconds = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            cache = pathlib.Path(folder) / f"cache_{number}"
            for side in found:
                run = pathlib.Path(folder) / f"{side}_{number}"
                seconds, compiled = first_step(run, cache, args.cores == 1)
                found[side].append(seconds)
                print(
                    f"{side}: {seconds:.1f}s to the first step; its program took {compiled}",
                    flush=True,
                )
    print(measure.machine())
    for side, seconds in found.items():
        print(f"{side}  {measure.spread(seconds)} s")
    share = measure.ratio(found, "warm", "cold")
    measure.report([measure.goal("first step, warm over cold", share, 0.40)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
