"""Results as rows: reading, writing, merging of several runs, and averages over seeds.

`results.json` is a list of rows
`{method, task, language, setting, metric, value, n, seed}`: one metric of one dataset, as one
method trained with one seed reaches it. `value` is 0 to 100 over `n` examples (correlations begin
at -100); `setting` says what training saw of the dataset: "seen", "unseen_pair" (each feature's
value, but not together) or "unseen_<feature>" (a value of that feature never), e.g.
"unseen_language".
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modjax.errors import nearest

Row = dict[str, Any]
Path = str | os.PathLike[str]

FIELDS = ("method", "task", "language", "setting", "metric", "value", "n", "seed")
# What a row is about. The setting is not part of it: the same method, dataset and seed under two
# settings are two trainings, and need two method names.
KEY = ("method", "task", "language", "metric", "seed")
SETTINGS = ("seen", "unseen_pair", "unseen_language")

_SETTING = re.compile(r"seen|unseen_.+")


class ResultsError(ValueError):
    """Rows that are not what this module's text says, or that contradict each other."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """One number of several seeds.

    Attributes:
      mean, low, high: mean, smallest and largest value over seeds.
      std: sample standard deviation over seeds; None for a single seed.
      seeds: the seeds, ascending.
      n: examples behind each seed's value (the smallest, should they differ).
    """

    mean: float
    low: float
    high: float
    std: float | None
    seeds: tuple[int, ...]
    n: int


@dataclasses.dataclass(frozen=True)
class Average:
    """A method's mean over datasets of one setting.

    Attributes:
      summary: over seeds, each seed's value being its mean over datasets.
      datasets: the `(task, language)` pairs averaged.
      missing: pairs that another method has results for, but this method (or one of its seeds) has
        not. They are in nobody's average, so that methods stay comparable.
    """

    summary: Summary
    datasets: tuple[tuple[str, str], ...]
    missing: tuple[tuple[str, str], ...]


def check(rows: Any, where: str) -> list[Row]:
    """Rows as they came, checked.

    Args:
      rows: what should be a list of rows.
      where: named in errors, e.g. the file.

    Raises:
      ResultsError: it names `where`, the row (from 0) and the field.
    """
    if not isinstance(rows, list):
        raise ResultsError(f"{where}: expected a list of rows, got {type(rows).__name__}.")
    for i, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise ResultsError(f"{where}, row {i}: {problem}")
    return rows


def _problem(row: Any) -> str:
    if not isinstance(row, dict):
        return f"expected an object with {', '.join(FIELDS)}; got {row!r}."
    for name in row:
        if name not in FIELDS:
            return f"unknown field {name!r}.{nearest(str(name), FIELDS)}"
    for name in FIELDS:
        if name not in row:
            return f"the field {name!r} is missing."
        value = row[name]
        if name == "value":
            if not _is_number(value) or not -100 <= value <= 100:
                return f"'value' must be a number from -100 to 100, got {value!r}."
        elif name in ("n", "seed"):
            smallest = 1 if name == "n" else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                return f"{name!r} must be a whole number >= {smallest}, got {value!r}."
        elif not isinstance(value, str) or not value:
            return f"{name!r} must be a non-empty text, got {value!r}."
    if not _SETTING.fullmatch(row["setting"]):
        return f"unknown setting {row['setting']!r}.{nearest(row['setting'], SETTINGS)}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read(path: Path) -> list[Row]:
    """The rows of a results.json.

    Raises:
      ResultsError: no such file, no JSON, or rows that are wrong; it names the file and the row.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"{path}: there is no such results file.") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: not valid UTF-8 (byte {error.start}).") from None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}: not valid JSON, line {error.lineno}: {error.msg}.") from None
    return check(rows, str(path))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, checked, one per line; the file appears whole or not at all."""
    check(list(rows), str(path))
    lines = (json.dumps({f: row[f] for f in FIELDS}, ensure_ascii=False) for row in rows)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file by way of a temporary one beside it, so that a reader never sees half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def merge(sources: Mapping[str, Sequence[Row]]) -> list[Row]:
    """All rows of several runs, in order; what is said twice in the same words is kept once.

    Args:
      sources: name (as a rule the file) -> its rows.

    Raises:
      ResultsError: two rows are about the same thing and differ; it names both sources.
    """
    first: dict[tuple, tuple[str, Row]] = {}
    for name, rows in sources.items():
        for row in check(list(rows), name):
            key = tuple(row[f] for f in KEY)
            known_name, known = first.setdefault(key, (name, row))
            differing = [f for f in ("value", "n", "setting") if row[f] != known[f]]
            if differing:
                field = differing[0]
                raise ResultsError(
                    f"Two results for {dict(zip(KEY, key, strict=True))}: {field} is "
                    f"{known[field]!r} in {known_name} and {row[field]!r} in {name}. Give the runs "
                    "different method names or seeds."
                )
    return [row for _, row in first.values()]


def over_seeds(rows: Iterable[Row]) -> dict[tuple[str, str, str, str, str], Summary]:
    """`(metric, setting, task, language, method)` -> the summary over seeds, in the rows' order."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["metric"], row["setting"], row["task"], row["language"], row["method"])
        groups.setdefault(key, []).append(row)
    return {
        key: summarise({r["seed"]: r["value"] for r in group}, min(r["n"] for r in group))
        for key, group in groups.items()
    }


def averages(
    rows: Iterable[Row], *, by_task: bool = False
) -> dict[tuple[str, str, str, str], Average]:
    """`(metric, setting, task, method)` -> the method's average over datasets.

    Every dataset counts the same, whatever its size. Only datasets that all methods of the metric
    and setting have, with all of their seeds, are averaged; the others are listed as missing. If
    there is none, the method has no entry.

    Args:
      rows: checked rows.
      by_task: average each task for itself; else over all of them, and the key's task is "".
    """
    values: dict[tuple, dict[str, dict[int, dict[tuple[str, str], Row]]]] = {}
    for row in rows:
        group = values.setdefault(
            (row["metric"], row["setting"], row["task"] if by_task else ""), {}
        )
        seeds = group.setdefault(row["method"], collections.defaultdict(dict))
        seeds[row["seed"]][row["task"], row["language"]] = row
    result = {}
    for key, methods in values.items():
        runs = [run for seeds in methods.values() for run in seeds.values()]
        datasets = list(dict.fromkeys(dataset for run in runs for dataset in run))
        common = tuple(d for d in datasets if all(d in run for run in runs))
        if not common:
            continue
        for method, seeds in methods.items():
            missing = tuple(d for d in datasets if any(d not in run for run in seeds.values()))
            means = {
                seed: statistics.fmean(run[d]["value"] for d in common)
                for seed, run in seeds.items()
            }
            n = min(sum(run[d]["n"] for d in common) for run in seeds.values())
            result[*key, method] = Average(summarise(means, n), common, missing)
    return result


def summarise(values: Mapping[int, float], n: int) -> Summary:
    """The summary of seed -> value."""
    numbers = list(values.values())
    return Summary(
        mean=statistics.fmean(numbers),
        low=min(numbers),
        high=max(numbers),
        std=statistics.stdev(numbers) if len(numbers) > 1 else None,
        seeds=tuple(sorted(values)),
        n=n,
    )
