"""What training adapters on large bases takes on TPU pods: the tables of README.md.

    python -m benchmarks.pods                            # compiles what results.json lacks, then prints the tables
    python -m benchmarks.pods --only llama3_8b v5e-16    # cells whose name has all of these words
    python -m benchmarks.pods --none                     # only prints
    python -m benchmarks.pods --only mt5_xl lora v5e-16 --bind "LOSS_CHUNK = 16"   # otherwise trained; is not kept

Each cell is one training step, compiled for a pod that is not there (`modjax.aot`; needs the extra `tpu`), which takes
one to two minutes of a core. Results are kept in results.json beside this file, cell by cell.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

RESULTS = pathlib.Path(__file__).with_name("results.json")
# A v5p slice is named by its cores, two to a chip.
PODS = {"v5e-16": "v5e:4x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4"}
# Methods, and how many examples a row holds. LoRA has 8 columns, FLix 200 values of rank 4, 2 of them active.
METHODS = {"lora": ("lora", 0), "flix": ("flix", 0), "flix_packed": ("flix", 8)}
# Kernels are gathered whole. Else each product becomes a loop that sends pieces of them around: the same bytes, and
# longer to compile.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
FEATURES = {"task": 10, "language": 190}
LAYERS = ".*/(query|value)"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a base is trained on every pod.

    Attributes:
      config: the gin name of its configuration.
      inputs, targets: tokens of a row.
      rows: of each chip.
      fsdp: chips that share the base.
      remat: policy.
    """

    config: str
    inputs: int
    targets: int
    rows: int
    fsdp: int = 16
    remat: str = "full"

    @property
    def tokens(self) -> int:
        """Positions of a chip."""
        return self.rows * (self.inputs + self.targets)


BASES = {
    "llama3_8b": Setting("decoder.DecoderConfig", 768, 256, 4),
    "mt5_xl": Setting("t5.T5Config", 512, 128, 16),
    "mt5_xxl": Setting("t5.T5Config", 512, 128, 8),
}


def flags_of(base: str, method: str, chips: int, bind: Sequence[str] = ()) -> Any:
    """A cell as a command line, with further gin bindings."""
    from modjax import launch

    setting = BASES[base]
    files = (f"bases/{base}.gin", f"methods/{METHODS[method][0]}.gin", "runs/finetune.gin")
    bindings = {
        "TASK_FEATURE_LENGTHS": {"inputs": setting.inputs, "targets": setting.targets},
        "BATCH_SIZE": setting.rows * chips,
        "FSDP": setting.fsdp,
        "ADAPTED_LAYERS": LAYERS,
        "partitioning.Partitioner.rules": [("joined_kv", ("model", "fsdp"))],
        "train.train.base_dtype": "bfloat16",
        f"{setting.config}.scan_layers": True,
        f"{setting.config}.remat_policy": setting.remat,
        f"{setting.config}.dtype": "bfloat16",
    }
    own = (f"{name} = {value!r}" for name, value in bindings.items())
    return launch.Flags(files, (*own, *bind), ())


def measure_cell(
    base: str, method: str, pod: str, text: pathlib.Path | None, bind: Sequence[str] = ()
) -> dict[str, Any]:
    """One cell, compiled."""
    from modjax.aot import chips, job, measure

    devices = measure.devices_of(PODS[pod])
    kind = devices[0].device_kind
    made = job.from_gin(flags_of(base, method, len(devices), bind), FEATURES, METHODS[method][1])
    began = time.monotonic()
    program = job.training(made, devices)
    cost = measure.compile_for(program, kind, text, OPTIONS)
    useful = job.model_flops(made) / len(devices)
    peak = chips.of(kind).flops
    return {
        **dataclasses.asdict(cost),
        "chips": len(devices),
        "setting": dataclasses.asdict(BASES[base]),
        "tokens": program.tokens // len(devices),
        "useful": useful,
        "mfu": [useful / peak / s for s in reversed(cost.seconds)] if cost.computing else None,
        "compiled_in": round(time.monotonic() - began),
    }


def table(results: dict[str, Any]) -> list[str]:
    """The cells that are there, as a table."""
    lines = [
        "| base | method | pod | fits | peak GiB | tokens a chip | TFLOP | collectives GiB | for adapters | "
        "computing s | sending s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in results.items():
        if not cell["fits"]:
            lines.append(
                f"| {' | '.join(name.split())} | no | {cell['peak'] / 2**30:.1f} | {cell['tokens']:,} |"
                + " - |" * 6
            )
            continue
        total = sum(cell["collectives"].values())
        low, high = cell["mfu"]
        lines.append(
            f"| {' | '.join(name.split())} | yes | {cell['peak'] / 2**30:.1f} | {cell['tokens']:,} "
            f"| {cell['flops'] / 1e12:.1f} | {total / 2**30:.2f} | {cell['added'] / total:.2%} "
            f"| {cell['computing']:.3f} | {cell['sending']:.3f} | {low:.0%}-{high:.0%} |"
        )
    return lines


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What issue 5 asks for, of the cells that are there."""
    found = []

    def add(name: str, value: float, goal: float) -> None:
        found.append({"name": name, "value": round(value, 4), "goal": goal, "holds": value <= goal})

    for base in BASES:
        for method in METHODS:
            small, large = (results.get(f"{base} {method} {pod}") for pod in ("v5e-16", "v5e-256"))
            if small and large and small["fits"] and large["fits"]:
                cost = [cell["computing"] + cell["sending"] for cell in (small, large)]
                add(f"{base} {method}: seconds a step, 256 chips over 16", cost[1] / cost[0], 1.1)
        for pod in PODS:
            for method in ("flix", "flix_packed"):
                cell = results.get(f"{base} {method} {pod}")
                if cell and cell["fits"]:
                    total = sum(cell["collectives"].values())
                    name = f"{base} {method} {pod}: its own collectives, of all bytes"
                    add(name, cell["added"] / total, 0.01)
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="words of the cells to compile")
    parser.add_argument("--none", action="store_true", help="compile nothing")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--bind", nargs="*", default=[], help="gin bindings; is told, and not kept")
    parser.add_argument("--hlo", help="a folder for the compiled programs' text")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cells = [f"{b} {m} {p}" for p in PODS for b in BASES for m in ("lora", "flix")]
    cells.append("llama3_8b flix_packed v5e-16")
    for cell in cells:
        if args.none or not set(args.only) <= set(cell.split()):
            continue
        if cell in results and not args.again and not args.bind:
            continue
        text = pathlib.Path(args.hlo) / f"{cell.replace(' ', '_')}.txt" if args.hlo else None
        found = measure_cell(*cell.split(), text, args.bind)
        if args.bind:
            print("\n".join(table({cell: found})), flush=True)
            continue
        results[cell] = found
        ordered = {name: results[name] for name in cells if name in results}
        draft = RESULTS.with_suffix(".part")
        draft.write_text(json.dumps(ordered, indent=1) + "\n")
        draft.replace(RESULTS)
        print("\n".join(table({cell: results[cell]})[2:]), flush=True)
    if args.bind:
        return 0
    ordered = {name: results[name] for name in cells if name in results}
    print("\n".join(table(ordered)))
    print(f"{len(ordered)} of {len(cells)} cells are there")
    print(json.dumps({"goals": goals(ordered)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
