"""Learning curves: the JSON lines that training writes, thinned and averaged over seeds."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

Point = tuple[float, float]


class CurveError(ValueError):
    """A file of training figures that is not what `read` expects."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one run logged.

    Attributes:
      method, seed: which run.
      rows: each with `step` and figures by name, e.g. `loss`.
    """

    method: str
    seed: int
    rows: Sequence[Mapping[str, float]]


def read(path: str | os.PathLike[str], method: str, seed: int) -> Curve:
    """A run's curve from its metrics.jsonl.

    A last line without its end is left out: the run was stopped while writing it.

    Raises:
      CurveError: no such file, or a line that is no JSON object with a `step`; file and line are
        named.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise CurveError(f"{path}: there is no such file of training figures.") from None
    lines = text.split("\n")
    rows = []
    for i, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CurveError(f"{path}, line {i}: not valid JSON: {error.msg}.") from None
        if not isinstance(row, dict) or "step" not in row:
            raise CurveError(
                f"{path}, line {i}: expected an object with 'step', got {line[:80]!r}."
            )
        rows.append(row)
    return Curve(method, seed, rows)


def points(curve: Curve, name: str) -> list[Point]:
    """`(step, value)` of one figure where it is there and finite; a step's last line counts."""
    found = {
        row["step"]: float(row[name])
        for row in curve.rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    }
    return sorted(found.items())


def thin(line: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means of equal stretches of a line. The ends in time are kept."""
    if len(line) <= most:
        return list(line)
    size = len(line) / most
    stretches = [line[round(i * size) : round((i + 1) * size)] for i in range(most)]
    steps = [statistics.fmean(step for step, _ in some) for some in stretches]
    steps[0], steps[-1] = line[0][0], line[-1][0]
    return [
        (step, statistics.fmean(value for _, value in some))
        for step, some in zip(steps, stretches, strict=True)
    ]


def mean(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean line, at the steps that all lines have."""
    if not lines:
        return []
    tables = [dict(line) for line in lines]
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    return [(step, statistics.fmean(table[step] for table in tables)) for step in steps]


def names(curves: Iterable[Curve], preferred: Sequence[str]) -> list[str]:
    """Those of the preferred figures that at least one curve can draw (two points or more)."""
    curves = list(curves)
    return [name for name in preferred if any(len(points(c, name)) > 1 for c in curves)]
