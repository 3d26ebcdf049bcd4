"""The report of an evaluation: Markdown, and one self-contained page with plots."""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modjax.evaluation import grids, report_html, results
from modjax.evaluation.curves import Curve
from modjax.evaluation.grids import Cell, Grid, Tables
from modjax.evaluation.results import Average, Row

_SPECIAL = str.maketrans(
    {c: "\\" + c for c in "\\`*[]|"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


def render(
    rows: Sequence[Row],
    curves: Sequence[Curve] = (),
    facts: Mapping[str, Any] | None = None,
    *,
    title: str = "Evaluation",
) -> tuple[str, str]:
    """The report of some results.

    Args:
      rows: as in results.json; methods, tasks, languages and metrics appear in the rows' order. The
        first metric of each task is the one in the overview.
      curves: what the runs logged; may be empty.
      facts: about the run, name -> text, number or a list of them, e.g. machine, date, command.
      title: of the report.

    Returns:
      (Markdown, HTML). The HTML needs no other file, no network and no script.

    Raises:
      ResultsError: see `grids.build`.
    """
    tables = grids.build(rows)
    facts = facts or {}
    return _markdown(tables, facts, title), report_html.page(tables, curves, facts, title)


def write_report(
    directory: str | os.PathLike[str],
    rows: Sequence[Row],
    curves: Sequence[Curve] = (),
    facts: Mapping[str, Any] | None = None,
    *,
    title: str = "Evaluation",
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes report.md and report.html (see `render`) and returns their paths."""
    markdown, html = render(rows, curves, facts, title=title)
    paths = pathlib.Path(directory) / "report.md", pathlib.Path(directory) / "report.html"
    for path, text in zip(paths, (markdown, html), strict=True):
        results.write_text(path, text)
    return paths


def table(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> str:
    """The grids alone, as Markdown; for a terminal or a log.

    Args:
      rows: as in results.json.
      metrics: those to show; all unless given.
    """
    tables = grids.build(rows)
    shown = [grid for grid in tables.grids if metrics is None or grid.metric in metrics]
    return "\n\n".join(f"{grid.metric}\n\n{_grid(grid)}" for grid in shown)


def _markdown(tables: Tables, facts: Mapping[str, Any], title: str) -> str:
    parts = [f"# {_escape(title)}", _escape(grids.how_to_read(tables))]
    parts.append("\n".join(f"- {_escape(sentence)}" for sentence in grids.findings(tables)))
    for grid in tables.grids:
        parts.append(f"## {_escape(grid.metric)}")
        parts.append(_escape(grids.describe(grid)))
        parts.append(_grid(grid))
        parts += [_escape(sentence) for sentence in grids.missing(grid)]
    if facts:
        parts.append("## The run")
        parts.append(_table(["fact", "value"], ([name, _fact(v)] for name, v in facts.items())))
    return "\n\n".join(parts) + "\n"


def _fact(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _grid(grid: Grid) -> str:
    means = [f"mean {grids.title(s)} {grids.mark(s)}".strip() for s in grid.settings]
    lines = []
    for task, block in grid.blocks.items():
        for line in block:
            absent = "–" if line.cells else ""
            cells = [_average(line.averages.get(s), s in line.best) for s in grid.settings]
            cells += [_cell(line.cells.get(x), absent) for x in grid.languages]
            lines.append([_escape(task), _escape(line.method), *cells])
    return _table(["task", "method", *map(_escape, (*means, *grid.languages))], lines, escape=False)


def _cell(cell: Cell | None, absent: str) -> str:
    """A mean; ranges over seeds stand beside averages only, or the table would be too wide."""
    if cell is None:
        return absent
    value = grids.number(cell.summary.mean)
    value = f"**{value}**" if cell.best else value
    return f"{value}{grids.mark(cell.setting)}"


def _average(average: Average | None, best: bool) -> str:
    if average is None:
        return "–"
    value = grids.number(average.summary.mean)
    return f"{f'**{value}**' if best else value}{grids.spread(average.summary)}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], escape: bool = True) -> str:
    def write(cells: Iterable[str]) -> str:
        return f"| {' | '.join(_escape(c) if escape else c for c in cells)} |"

    return "\n".join([write(head), f"|{' --- |' * len(head)}", *map(write, lines)])


def _escape(text: str) -> str:
    # An underscore within a word means nothing in Markdown, and names are full of them.
    text = " ".join(text.split()).translate(_SPECIAL)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)
