"""What a report shows, before it has a look: grids of tasks and languages, averages, findings.

A grid holds one metric: a block of rows per task, a row per method, a column per language, then an
average for each setting. Markdown and HTML are two views of the same `Tables`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modjax.evaluation import metrics, results
from modjax.evaluation.results import Average, ResultsError, Row, Summary

ALL_TASKS = "all tasks"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method's result on a dataset.

    Attributes:
      summary: over seeds.
      setting: what training saw of the dataset.
      best: no other method's mean is better (only where there are several methods).
    """

    summary: Summary
    setting: str
    best: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a grid: a method on a task, or on all of them (then without cells).

    Attributes:
      cells: by language.
      averages: by setting.
      best: settings in which no other method's average is better.
    """

    method: str
    cells: Mapping[str, Cell]
    averages: Mapping[str, Average]
    best: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Grid:
    """One metric: `blocks` of lines by task; the block `ALL_TASKS` stands last if there is one."""

    metric: str
    languages: tuple[str, ...]
    settings: tuple[str, ...]
    blocks: Mapping[str, tuple[Line, ...]]

    @property
    def lower_is_better(self) -> bool:
        return self.metric in metrics.LOWER_IS_BETTER


@dataclasses.dataclass(frozen=True)
class Tables:
    """Everything of a report that comes from rows.

    Attributes:
      methods, settings, seeds: in the order of first sight; settings and seeds sorted.
      grids: one per metric.
      headline: (task, metric) pairs that the overview shows: each task by its first metric, and all
        tasks together where that is the same one.
    """

    methods: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    grids: tuple[Grid, ...]
    headline: tuple[tuple[str, str], ...]

    def grid(self, metric: str) -> Grid:
        return next(grid for grid in self.grids if grid.metric == metric)


def build(rows: Sequence[Row]) -> Tables:
    """Rows as tables.

    Raises:
      ResultsError: a row is wrong, two rows contradict each other, there is none, or a method has
        the same dataset under two settings.
    """
    rows = results.merge({"results": rows})
    if not rows:
        raise ResultsError("There are no results to report.")
    first_metric: dict[str, str] = {}
    for row in rows:
        first_metric.setdefault(row["task"], row["metric"])
    headline = list(first_metric.items())
    if len(headline) > 1 and len(set(first_metric.values())) == 1:
        headline.append((ALL_TASKS, headline[0][1]))
    by_metric: dict[str, list[Row]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    return Tables(
        methods=_unique(row["method"] for row in rows),
        settings=_settings(rows),
        seeds=tuple(sorted({row["seed"] for row in rows})),
        grids=tuple(_grid(metric, some) for metric, some in by_metric.items()),
        headline=tuple(headline),
    )


def _grid(metric: str, rows: Sequence[Row]) -> Grid:
    cells = _cells(rows)
    averages = {
        (task or ALL_TASKS, method, setting): average
        for by_task in (True, False)
        for (_, setting, task, method), average in results.averages(rows, by_task=by_task).items()
    }
    settings, tasks = _settings(rows), _unique(row["task"] for row in rows)
    methods, languages = (_unique(row[name] for row in rows) for name in ("method", "language"))
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    blocks = {}
    for task in (*tasks, *([ALL_TASKS] if len(tasks) > 1 else [])):
        lines = []
        for method in methods:
            some = {s: averages[task, method, s] for s in settings if (task, method, s) in averages}
            best = frozenset(
                setting
                for setting, average in some.items()
                if _is_best(
                    sign * average.summary.mean,
                    [
                        sign * a.summary.mean
                        for (t, _, s), a in averages.items()
                        if (t, s) == (task, setting)
                    ],
                )
            )
            there = {x: cells[task, x, method] for x in languages if (task, x, method) in cells}
            if there or some:
                lines.append(Line(method, there, some, best))
        blocks[task] = tuple(lines)
    return Grid(metric, languages, settings, blocks)


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str, str], Cell]:
    found: dict[tuple[str, str, str], tuple[Summary, str]] = {}
    for (metric, setting, task, language, method), summary in results.over_seeds(rows).items():
        key = (task, language, method)
        if key in found:
            raise ResultsError(
                f"Method {method!r} has {metric} of task {task!r} in language {language!r} under "
                f"two settings, {found[key][1]!r} and {setting!r}: give the runs different names."
            )
        found[key] = (summary, setting)
    sign = -1 if rows[0]["metric"] in metrics.LOWER_IS_BETTER else 1
    rivals: dict[tuple[str, str], list[float]] = {}
    for (task, language, _), (summary, _) in found.items():
        rivals.setdefault((task, language), []).append(sign * summary.mean)
    return {
        (task, language, method): Cell(
            summary,
            setting,
            best=_is_best(sign * summary.mean, rivals[task, language]),
        )
        for (task, language, method), (summary, setting) in found.items()
    }


def _is_best(value: float, rivals: Sequence[float]) -> bool:
    """Whether a value is the highest of several (its own among them); one alone is not "best"."""
    return len(rivals) > 1 and value >= max(rivals)


def how_to_read(tables: Tables) -> str:
    """What stands above the tables."""
    seeds = len(tables.seeds)
    parts = ["Every number is a percentage"]
    if seeds > 1:
        parts[0] += (
            f", the mean over {seeds} seeds; beside it stand the lowest and the highest seed."
        )
    else:
        parts[0] += " from one seed, so nothing here says which differences are chance."
    if len(tables.methods) > 1:
        parts.append(
            "Compare methods within a task and a language"
            + ("; where their ranges overlap, the difference may be chance." if seeds > 1 else ".")
        )
    unseen = [s for s in tables.settings if s != "seen"]
    if unseen:
        parts.append("Unmarked datasets were trained on, marked ones were not.")
        parts += [f"{mark(s)} {explain(s)}." for s in unseen]
    return " ".join(parts)


def findings(tables: Tables) -> list[str]:
    """One sentence per setting and headline: the methods' averages from best to worst."""
    sentences = []
    shown = [h for h in tables.headline if h[0] == ALL_TASKS] or list(tables.headline)
    for setting in tables.settings:
        for task, metric in shown:
            grid = tables.grid(metric)
            lines = [line for line in grid.blocks[task] if setting in line.averages]
            if not lines:
                continue
            lines.sort(key=lambda x: x.averages[setting].summary.mean)  # noqa: B023
            if not grid.lower_is_better:
                lines.reverse()
            summaries = [line.averages[setting].summary for line in lines]
            ranking = ", ".join(
                f"{line.method} {number(s.mean)}{spread(s)}"
                for line, s in zip(lines, summaries, strict=True)
            )
            count = len(lines[0].averages[setting].datasets)
            datasets = "1 dataset" if count == 1 else f"{count} datasets"
            sentences.append(
                f"{title(setting).capitalize()}, {metric} of {task} ({datasets}): "
                f"{ranking}.{_verdict(summaries)}"
            )
    return sentences


def _verdict(ranked: Sequence[Summary]) -> str:
    if len(ranked) < 2 or min(len(s.seeds) for s in ranked[:2]) < 2:
        return ""
    one, two = ranked[:2]
    overlap = one.low <= two.high and two.low <= one.high
    return f" The ranges of the first two {'overlap' if overlap else 'do not overlap'}."


def missing(grid: Grid) -> list[str]:
    """Sentences on the datasets that one method has results for and another has not."""
    last = list(grid.blocks.values())[-1]
    sentences = []
    for line in last:
        datasets = [d for average in line.averages.values() for d in average.missing]
        if datasets:
            listed = ", ".join(" ".join(d) for d in datasets)
            sentences.append(
                f"{line.method} has no result, or not for every seed, for: {listed}. The means "
                "leave these out for all methods."
            )
    for setting in grid.settings:
        if not any(setting in line.averages for line in last):
            sentences.append(f"No dataset that is {title(setting)} has results of all methods.")
    return sentences


def number(value: float) -> str:
    return f"{value:.1f}"


def spread(summary: Summary) -> str:
    """The range over seeds, in brackets, or nothing for one seed."""
    if len(summary.seeds) < 2:
        return ""
    return f" ({number(summary.low)}–{number(summary.high)})"


def title(setting: str) -> str:
    return setting.replace("_", " ")


def mark(setting: str) -> str:
    """The sign beside a number of that setting; none for what was seen."""
    return {"seen": "", "unseen_pair": "◇", "unseen_language": "△"}.get(setting, "○")


def explain(setting: str) -> str:
    """What a setting means, as the end of a sentence."""
    if setting == "seen":
        return "seen: training had this dataset"
    if setting == "unseen_pair":
        return "unseen pair: training had this task and this language, but never together"
    feature = setting.removeprefix("unseen_").replace("_", " ")
    return f"{title(setting)}: training never had this {feature}"


def describe(grid: Grid) -> str:
    """What a grid's numbers are: the metric's documentation in a sentence, and which is better."""
    function: Any = metrics.METRICS.get(grid.metric)
    text = ((function.__doc__ or "") if function else "").strip().split("\n")[0]
    sense = "Lower is better" if grid.lower_is_better else "Higher is better"
    several = any(len(block) > 1 for block in grid.blocks.values())
    return f"{text} {sense}{'; the best is bold' if several else ''}.".strip()


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _settings(rows: Iterable[Row]) -> tuple[str, ...]:
    """Settings from the nearest to training to the farthest."""
    there = {row["setting"] for row in rows}
    known = [s for s in results.SETTINGS if s in there]
    return (*known, *sorted(there.difference(known)))
