"""Compiles a job for a TPU pod on a machine without one, and tells what it takes on each chip.

    python -m modjax.aot --topology v5e:16x16 --gin_file=bases/mt5_xl.gin --gin_file=methods/flix.gin \\
        --gin_file=runs/finetune.gin --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 128}" \\
        --gin.BATCH_SIZE=512 --gin.FSDP=256 --features task=10,language=190

The job is given as train.py takes it. A base needs no weights: its size file says its shapes. The features are those of
the mixture, or so many as --features says. Needs libtpu: pip install -c constraints.txt -e '.[tpu]'.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled for is not here

from modjax import launch, mistakes  # noqa: E402
from modjax.aot import chips, job, measure  # noqa: E402

STEPS = ("train", "decode")


def main(argv: Sequence[str]) -> int:
    """Compiles, prints; 0 if every step fits, 1 if one does not, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m modjax.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--topology", required=True, help="as v5e:16x16, or cpu for this machine")
    parser.add_argument("--features", help="FEATURE=VALUES,... instead of the mixture's")
    parser.add_argument("--segments", type=int, help="of a packed row, 0 for rows of one example")
    parser.add_argument("--steps", default="train,decode", help="which to compile")
    parser.add_argument("--hlo", help="a folder for the compiled programs' text, STEP.txt")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, too")
    try:
        args, rest = parser.parse_known_args(argv)
        steps = args.steps.split(",")
        if not set(steps) <= set(STEPS):
            raise measure.AotError(f"--steps {args.steps}: say train, decode or train,decode")
        features = None if args.features is None else parse_features(args.features)
        flags = launch.parse_flags(rest, parser.description or "")
        if not flags.gin_files:
            raise measure.AotError(
                "no --gin_file: a job is a base, a method and a run, as "
                "--gin_file=bases/mt5_xl.gin --gin_file=methods/lora.gin --gin_file=runs/finetune.gin"
            )
        devices = devices_for(args.topology)
        made = job.from_gin(flags, features, args.segments)
        found = {step: compile_step(step, made, devices, args.hlo) for step in steps}
    except Exception as error:
        if "--traceback" in argv or not mistakes.is_users(error):
            raise
        print(f"error: {mistakes.tell(error, ())}", file=sys.stderr)
        return 2
    kind, useful = devices[0].device_kind, job.model_flops(made) / len(devices)
    print(f"{len(devices)} x {kind}, {dict(made.partitioner.mesh(devices).shape)}")
    for step, (program, cost) in found.items():
        print("\n".join(describe(step, program, cost, kind, useful)))
    if args.json:
        print(json.dumps({step: dataclasses.asdict(cost) for step, (_, cost) in found.items()}))
    return 0 if all(cost.fits for _, cost in found.values()) else 1


def parse_features(text: str) -> dict[str, int]:
    """ "task=10,language=190" as {feature: number of values}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    bad = [name for name, _, count in pairs if not name.isidentifier() or not count.isdigit()]
    if bad:
        raise measure.AotError(
            f"--features {text}: say FEATURE=VALUES,..., as task=10,language=190"
        )
    return {name: int(count) for name, _, count in pairs}


def devices_for(topology: str) -> list[Any]:
    """The devices of a topology's name."""
    if topology == "cpu":
        import jax

        return list(jax.devices("cpu"))
    return measure.devices_of(topology)


def compile_step(
    step: str, made: job.Job, devices: Sequence[Any], folder: str | None = None
) -> tuple[job.Program, measure.Cost]:
    """One of `STEPS`, compiled; its text is written into the folder."""
    program = (job.training if step == "train" else job.decoding)(made, devices)
    text = pathlib.Path(folder) / f"{step}.txt" if folder else None
    return program, measure.compile_for(program, devices[0].device_kind, text)


def describe(
    step: str, program: job.Program, cost: measure.Cost, kind: str, useful: float
) -> list[str]:
    """The report of one step, as lines."""
    what = "training step" if step == "train" else f"decoding, {program.trips} steps"
    lines = [f"{what}: {program.rows} rows, {program.tokens:,} positions; on each chip:"]

    def say(name: str, value: str) -> None:
        lines.append(f"  {name:24s}{value}")

    for name, held in cost.held.items():
        say(name, _bytes(held))
    if cost.temporary is not None:
        say("activations, temporary", _bytes(cost.temporary))
    room = f" of {_bytes(cost.memory)}" if cost.memory else ""
    say("peak", _bytes(cost.peak) + room)
    say("fits", "yes" if cost.fits else "NO")
    if cost.temporary is None:
        return lines
    say("operations", f"{cost.flops / 1e12:.3f} TFLOP")
    total = sum(cost.collectives.values())
    say("collectives", _bytes(total) if total else "none")
    for name, size in sorted(cost.collectives.items(), key=lambda pair: -pair[1]):
        say(f"  {name}", f"{_bytes(size)} in {cost.calls[name]:.0f}")
    if total:
        say("  for adapters", f"{_bytes(cost.added)}, {cost.added / total:.2%} of them")
    if not kind.startswith("TPU"):
        return lines
    least, most = cost.seconds
    say("time, computing", f"{1e3 * cost.computing:.1f} ms (XLA's estimate)")
    say("time, sending", f"{1e3 * cost.sending:.1f} ms (bytes over all links)")
    say("time", f"{1e3 * least:.1f} to {1e3 * most:.1f} ms")
    say("XLA's optimal_seconds", f"{1e3 * cost.optimal:.1f} ms (each loop's body once)")
    if step == "train":
        peak = chips.of(kind).flops
        say(
            "MFU",
            f"{useful / peak / most:.1%} to {useful / peak / least:.1%} of {peak / 1e12:.0f} TFLOP/s",
        )
    return lines


def _bytes(size: float) -> str:
    return f"{size / 2**30:.3f} GiB" if size >= 2**27 else f"{size / 2**20:.3f} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
