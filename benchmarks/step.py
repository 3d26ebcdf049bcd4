"""What a training step of each method costs, in time and in operations: `python -m benchmarks.step`.

The setting is that of `setting.py`. All methods take turns in one run, so that what else the machine does hits all
alike; a ratio is the median over the rounds of two steps of one round. With one core the clock is the processor's time.
"On paper" counts the products of matrices alone, see `setting.flops_on_paper`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks import measure


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=[], help="all by default")
    parser.add_argument("--cores", type=int, default=1, help="0 for all")
    args = parser.parse_args(argv)
    clock = measure.use_cores(args.cores)
    from benchmarks import setting

    names = args.methods or list(setting.METHODS)
    sides: dict[str, Callable[[], object]] = {}
    counted: dict[str, float] = {}
    sides["forward"], counted["forward"] = setting.forward()
    base = None
    for name in dict.fromkeys(["lora", *names]):
        step = setting.Step(setting.METHODS[name], base)
        base = step.frozen if name == "lora" else base
        sides[name], counted[name] = step, step.flops
    seconds = measure.in_turn(sides, args.rounds, clock=clock)

    print(
        f"{measure.machine()}; {args.rounds} rounds on {args.cores or 'all'} core(s); seconds: median (quartiles)\n"
    )
    print("| step | seconds | x LoRA | GFLOP (XLA) | on paper | ratio |")
    print("|---|---|---|---|---|---|")
    off = {}
    for name in sides:
        paper = setting.flops_on_paper(name)
        off[name] = abs(counted[name] / paper - 1)
        print(
            f"| {name} | {measure.spread(seconds[name])} | {measure.ratio(seconds, name, 'lora'):.3f} "
            f"| {counted[name] / 1e9:.1f} | {paper / 1e9:.1f} | {counted[name] / paper:.3f} |"
        )
    speed = counted["lora"] / statistics.median(seconds["lora"]) / 1e9
    print(f"\nLoRA: {speed:.0f} GFLOP/s\n")
    bounds = {"flix_26": 1.05, "flix_500": 1.10, "polytropon": 1.15}
    bounds |= {"flix_26_lazy": 1.05, "flix_500_lazy": 1.10}
    goals = [
        measure.goal(f"{name} / lora, time", measure.ratio(seconds, name, "lora"), bound)
        for name, bound in bounds.items()
        if name in sides
    ]
    goals += [measure.goal(f"{name}: operations off paper", off[name], 0.03) for name in sides]
    measure.report(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
