"""What is kept of each point, as tables and goals.

Results are `{"values 100": {"auto": the form that is chosen, "sides": {step: {"seconds": [of each round], "peak":
bytes, "state": bytes, "operations": count, "instructions": count, "tracing": seconds}}, ...}, ...}`.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import measure

Cell = Mapping[str, Any]
Results = Mapping[str, Cell]
FORMS = ("dense", "gathered")


def of_axis(results: Results, axis: str) -> dict[int, Cell]:
    """{size: a point's results}, ascending, of those that are there."""
    sizes = sorted(int(name.split()[1]) for name in results if name.split()[0] == axis)
    return {size: results[f"{axis} {size}"] for size in sizes}


def median(cell: Cell, step: str) -> float:
    """Of a step's seconds."""
    return statistics.median(cell["sides"][step]["seconds"])


def over_better(cell: Cell) -> float:
    """The time of the form that is chosen over that of the faster one."""
    return median(cell, cell["auto"]) / min(median(cell, form) for form in FORMS)


def crossing(cells: Mapping[int, Cell]) -> float | None:
    """Where gathered begins to be faster for good, between the sizes that were measured, as of straight lines on
    logarithmic axes: the first size if it is faster all along, None if dense is at the last one.

    Args:
      cells: those of an axis, ascending.
    """
    over = {n: math.log(median(c, "dense") / median(c, "gathered")) for n, c in cells.items()}
    sizes = list(over)
    last = max((i for i, size in enumerate(sizes) if over[size] < 0), default=-1)
    if last < 0 or last == len(sizes) - 1:
        return float(sizes[0]) if sizes and last < 0 else None
    before, size = sizes[last : last + 2]
    share = -over[before] / (over[size] - over[before])
    return float(before * (size / before) ** share)


def table(results: Results, axis: str) -> list[str]:
    """An axis as a table: a line for each step of each point."""
    lines = [
        f"| {axis} | step | seconds | memory MB | state MB | StableHLO | HLO | tracing s | auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, cell in of_axis(results, axis).items():
        for name, side in cell["sides"].items():
            chosen = f"{over_better(cell):.2f}" if name == cell["auto"] else ""
            lines.append(
                f"| {size} | {name} | {measure.spread(side['seconds'])} | {side['peak'] / 1e6:.0f} "
                f"| {side['state'] / 1e6:.1f} | {side['operations']} | {side['instructions']} "
                f"| {side['tracing']:.2f} | {chosen} |"
            )
    return lines


def goals(results: Results) -> list[dict[str, Any]]:
    """What is asked for, of the points that are there."""
    found = []
    for axis in ("values", "datasets"):
        cells = list(of_axis(results, axis).items())
        if len(cells) < 2:
            continue
        (few, first), (many, last) = cells[0], cells[-1]
        for name in (*first["sides"], "auto"):
            steps = [
                cell["sides"][cell["auto"] if name == "auto" else name] for cell in (last, first)
            ]
            for kind in ("operations", "instructions"):
                over = steps[0][kind] / steps[1][kind]
                label = f"{axis}: {kind} of {name}, {many:,} over {few:,}"
                found.append(measure.goal(label, over, 1.01))
    for axis in dict.fromkeys(name.split()[0] for name in results):
        over = {size: over_better(cell) for size, cell in of_axis(results, axis).items()}
        worst = max(over, key=over.__getitem__)
        label = f"{axis}: time of auto over the faster form, worst at {worst:,}"
        found.append(measure.goal(label, over[worst], 1.1))
    return found
