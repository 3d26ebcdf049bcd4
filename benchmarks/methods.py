"""What each method trains, and what a training step of it costs: the table of README.md.

    python benchmarks/methods.py [--base t5_small] [--batch 8] [--length 64]

A step is counted, not timed: the floating point operations of the program that jax makes of it, before XLA optimises it
(forward, backward and update of one batch; AdaMix's two passes included), as a multiple of LoRA's. The data are 39
datasets of 4 tasks in 11 languages, not packed.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

METHODS = (
    "lora",
    "lora_wide",
    "lora_per_dataset",
    "flix",
    "polytropon",
    "poly_s",
    "poly_mu",
    "poly_z",
    "adamix_lora",
    "adamix_adapter",
    "houlsby",
    "pfeiffer",
    "ia3",
    "bitfit",
    "full",
)
ACTIVE = {"lora_wide": ("WIDE_RANK = 60",)}  # the columns of FLix's bank: 4 for each of 15 values


def step(method: str, base: str, batch_size: int, length: int) -> tuple[int, int, float]:
    """(trained parameters, parameters of the base, floating point operations of a step)."""
    import dataclasses

    import jax
    import numpy as np

    from modjax import adapters, initialize, launch
    from modjax.aot import job as jobs
    from modjax.features import FeatureSpace

    lengths = {"inputs": length, "targets": length}
    macros = {"MIXTURE_OR_TASK_NAME": "", "MODEL_DIR": "", "BASE": "", "BATCH_SIZE": batch_size}
    values = [f"{name} = {value!r}" for name, value in macros.items()]
    files = (f"bases/{base}.gin", f"methods/{method}.gin", "runs/finetune.gin")
    bindings = (*values, f"TASK_FEATURE_LENGTHS = {lengths}", *ACTIVE.get(method, ()))
    job = jobs.from_gin(launch.Flags(files, bindings, ()), {"task": 4, "language": 11}, 0)
    features = jobs.generated_space({"task": 4, "language": 11}).features
    space = FeatureSpace(features, tuple(f"dataset{i}" for i in range(39)))
    job = dataclasses.replace(job, model=job.model.with_space(space))
    model = job.model
    batch = model.example_batch(lengths, space, rows=batch_size)
    layout = initialize.layout(model, batch, job.optimizer.groups)
    cost = jobs.training(job, jax.devices()[:1]).lowered.cost_analysis()

    def count(tree: object) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    names = model.adapted.names if model.adapted else ()
    added = count(initialize.added(layout.trained, names)) if names else 0
    base_size = count(layout.frozen) + count(layout.trained) - added
    return adapters.count_moving(layout.trained, layout.rates), base_size, cost["flops"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="t5_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args(argv)
    found = {name: step(name, args.base, args.batch, args.length) for name in args.methods}
    reference = step("lora", args.base, args.batch, args.length)[2]
    print("| method | trained parameters | of the base | step, x LoRA |")
    print("|---|---|---|---|")
    for name, (trained, base, flops) in found.items():
        share = f"{100 * trained / base:.2f} %"
        print(f"| `{name}` | {trained:,} | {share} | {flops / reference:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
