"""How cost grows with feature values, datasets, packed segments and the length of a sequence.

    python -m benchmarks.growth                                # measures what results.json lacks, then draws growth.svg
    python -m benchmarks.growth --again                        # all anew
    python -m benchmarks.growth --only "values 1000" sequence  # some points, or some axes
    python -m benchmarks.growth --none                         # only tables, plot and goals

The setting is that of `points.py`. The steps of a point take turns, on one core by the processor's time; results are
kept point by point, so that a run that was stopped goes on. Memory is XLA's analysis of the compiled step.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from benchmarks import measure
from benchmarks.growth import stored

os.environ.setdefault("JAX_PLATFORMS", "cpu")

HERE = pathlib.Path(__file__).parent
RESULTS, PLOT = HERE / "results.json", HERE / "growth.svg"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="points, as 'values 10', or axes")
    parser.add_argument("--none", action="store_true", help="measure nothing")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    clock = measure.use_cores(1)
    from benchmarks.growth import plot, points

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [f"{axis} {size}" for axis, sizes in points.SIZES.items() for size in sizes]
    for name in [] if args.none else names:
        axis, size = name.split()
        if args.only and not {name, axis} & set(args.only):
            continue
        if name in results and not args.again:
            continue
        found = points.measure_point(points.point(axis, int(size)), args.rounds, clock)
        results[name] = {"date": time.strftime("%Y-%m-%d"), "machine": measure.machine(), **found}
        draft = RESULTS.with_suffix(".part")
        ordered = {name: results[name] for name in names if name in results}
        draft.write_text(json.dumps(ordered, indent=1) + "\n")
        draft.replace(RESULTS)
        print("\n".join(stored.table({name: results[name]}, axis)[2:]), flush=True)

    for axis in points.SIZES:
        print("\n" + "\n".join(stored.table(results, axis)))
        measured = stored.crossing(stored.of_axis(results, axis))
        shown = None if measured is None else round(measured)
        print(
            f"\ngathered is faster from {shown} on; choose_form takes it from {points.chosen_from(axis)}"
        )
    if results:
        PLOT.write_text(plot.draw(results))
    print(f"\n{len(results)} of {len(names)} points are there")
    measure.report(stored.goals(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
