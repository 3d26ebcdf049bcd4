"""The report as one page that needs nothing else: its style and its plots are in it."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from modjax.evaluation import curves as curve_lines
from modjax.evaluation import grids, plots
from modjax.evaluation.curves import Curve
from modjax.evaluation.grids import Cell, Grid, Line, Tables
from modjax.evaluation.report_style import CSS
from modjax.evaluation.results import Average, Summary

# Figures of training that are drawn, where they were logged, and what they are.
FIGURES = {
    "loss": "mean cross entropy of a target token, nats",
    "accuracy": "share of target tokens predicted from the right prefix",
    "eval_loss": "on validation data",
    "eval_accuracy": "on validation data",
}
MOST_POINTS = 150

_text = html.escape


def page(tables: Tables, curves: Sequence[Curve], facts: Mapping[str, Any], title: str) -> str:
    """The whole document."""
    runs = f"{len(tables.methods)} methods" if len(tables.methods) != 1 else "1 method"
    seeds = f"seed{'s' if len(tables.seeds) > 1 else ''} {', '.join(map(str, tables.seeds))}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{runs}, {seeds}</p>',
        f'<div class="lead"><p>{_text(grids.how_to_read(tables))}</p></div>',
        "<h2>In short</h2>",
        _findings(tables),
        _contents(tables),
        _legend(tables),
        _overview(tables),
        *(_grid(grid, tables, f"metric-{i}") for i, grid in enumerate(tables.grids)),
        _curves(curves, tables),
        _facts(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _findings(tables: Tables) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in grids.findings(tables))
    return f'<ul class="findings">{items}</ul>'


def _contents(tables: Tables) -> str:
    if len(tables.grids) < 2:
        return ""
    links = (f'<a href="#metric-{i}">{_text(g.metric)}</a>' for i, g in enumerate(tables.grids))
    return f"<nav>{''.join(links)}</nav>"


def _legend(tables: Tables) -> str:
    items = []
    for style, method in enumerate(tables.methods):
        dash = f' stroke-dasharray="{plots.dash(style)}"' if plots.dash(style) else ""
        line = f'<line x1="0" y1="5" x2="26" y2="5"{dash}/>'
        swatch = f'<svg class="swatch {plots.css_class(style)}" viewBox="0 0 26 10">{line}</svg>'
        items.append(f"<li>{swatch}{_text(method)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _overview(tables: Tables) -> str:
    figures = []
    for setting in tables.settings:
        groups: list[tuple[str, list[plots.Bar]]] = []
        for task, metric in tables.headline:
            if task == grids.ALL_TASKS and len(groups) < 2:
                continue  # it would show the only task again
            some = [
                plots.Bar(
                    line.method,
                    line.averages[setting].summary.mean,
                    line.averages[setting].summary.low,
                    line.averages[setting].summary.high,
                    tables.methods.index(line.method),
                )
                for line in tables.grid(metric).blocks[task]
                if setting in line.averages
            ]
            if some:
                groups.append((f"{task}, {metric}", some))
        if groups:
            name = grids.title(setting)
            caption = f"{name.capitalize()} {grids.mark(setting)}"
            note = grids.explain(setting).partition(": ")[2]
            figures.append(
                f"<figure><figcaption>{_text(caption)} <small>{_text(note)}</small></figcaption>"
                + plots.bars(groups, f"Averages over datasets: {name}")
                + "</figure>"
            )
    return f'<div class="plots">{"".join(figures)}</div>'


def _grid(grid: Grid, tables: Tables, anchor: str) -> str:
    head = "".join(
        f'<th scope="col" class="average">mean<br>{_text(grids.title(s))}&nbsp;{grids.mark(s)}</th>'
        for s in grid.settings
    )
    head += "".join(f'<th scope="col">{_text(x)}</th>' for x in grid.languages)
    width = 1 + len(grid.languages) + len(grid.settings)
    body = []
    for task, lines in grid.blocks.items():
        rows = [
            f'<tr class="task"><th colspan="{width}" scope="rowgroup">'
            f"<span>{_text(task)}</span></th></tr>"
        ]
        rows += [_line(line, grid, tables) for line in lines]
        body.append(f"<tbody>{''.join(rows)}</tbody>")
    missing = grids.missing(grid)
    return (
        f'<section id="{anchor}"><h2>{_text(grid.metric)}</h2><p class="soft">'
        f"{_text(grids.describe(grid))}</p>"
        f'<div class="scroll{" lower" if grid.lower_is_better else ""}" tabindex="0"><table>'
        f'<thead><tr><th class="name" scope="col">task, method</th>{head}</tr></thead>'
        f"{''.join(body)}</table></div>"
        + "".join(f'<p class="soft">{_text(sentence)}</p>' for sentence in missing)
        + "</section>"
    )


def _line(line: Line, grid: Grid, tables: Tables) -> str:
    style = plots.css_class(tables.methods.index(line.method))
    name = _text(line.method)
    cells = [
        f'<th class="name {style}" scope="row" title="{name}"><span class="dot"></span>{name}</th>'
    ]
    absent = "–" if line.cells else ""
    cells += [_average(line.averages.get(s), s in line.best) for s in grid.settings]
    cells += [_cell(line.cells.get(language), absent) for language in grid.languages]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(cell: Cell | None, absent: str) -> str:
    if cell is None:
        return f'<td class="none">{absent}</td>'
    summary = cell.summary
    value = grids.number(summary.mean)
    value = f"<b>{value}</b>" if cell.best else value
    kind = {"seen": "", "unseen_pair": " unseen"}.get(cell.setting, " far")
    sign = grids.mark(cell.setting)
    tip = f"{grids.title(cell.setting)}; {summary.n} examples; seeds " + ", ".join(
        map(str, summary.seeds)
    )
    if summary.std is not None:
        tip += f"; range{grids.spread(summary)}, standard deviation {grids.number(summary.std)}"
    return (
        f'<td title="{_text(tip)}"><span class="cell{kind}" style="--v:{summary.mean / 100:.3f}">'
        f"{value}{f'<i>{sign}</i>' if sign else ''}{_range(summary, 0)}</span></td>"
    )


def _average(average: Average | None, best: bool) -> str:
    if average is None:
        return '<td class="average none">–</td>'
    tip = f"over {len(average.datasets)} datasets"
    value = grids.number(average.summary.mean)
    value = f"<b>{value}</b>" if best else value
    return f'<td class="average" title="{tip}">{value}{_range(average.summary, 1)}</td>'


def _range(summary: Summary, digits: int) -> str:
    if len(summary.seeds) < 2:
        return ""
    return f"<small>{summary.low:.{digits}f}–{summary.high:.{digits}f}</small>"


def _curves(curves: Sequence[Curve], tables: Tables) -> str:
    methods = list(dict.fromkeys((*tables.methods, *(c.method for c in curves))))
    figures = []
    for name in curve_lines.names(curves, tuple(FIGURES)):
        series = []
        for style, method in enumerate(methods):
            runs = {
                c.seed: line
                for c in curves
                if c.method == method and len(line := curve_lines.points(c, name)) > 1
            }
            mean = curve_lines.thin(curve_lines.mean(list(runs.values())), MOST_POINTS)
            # Without steps in common there is no mean line, and the seeds are drawn in its place.
            single = len(runs) > 1 and len(mean) > 1
            if single:
                label = f"{method}, mean of {len(runs)} seeds"
                series.append(plots.Series(label, mean, style))
            for seed, line in runs.items():
                some = curve_lines.thin(line, MOST_POINTS)
                series.append(plots.Series(f"{method}, seed {seed}", some, style, thin=single))
        figures.append(
            f"<figure><figcaption>{_text(name)} <small>{_text(FIGURES[name])}</small></figcaption>"
            + plots.lines(series, f"{name} over training steps")
            + "</figure>"
        )
    if not figures:
        return ""
    return (
        '<section><h2>Learning curves</h2><p class="soft">Strong lines are means over seeds, faint '
        f'ones single seeds.</p><div class="plots">{"".join(figures)}</div></section>'
    )


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    items = []
    for name, value in facts.items():
        values = value if isinstance(value, list | tuple) else [value]
        tag = "code" if name.startswith("command") else "span"
        between = "<br>" if any(len(str(v)) > 24 for v in values) else ", "
        inner = between.join(f"<{tag}>{_text(str(v))}</{tag}>" for v in values)
        items.append(f"<dt>{_text(name)}</dt><dd>{inner}</dd>")
    return f'<section><h2>The run</h2><dl class="facts">{"".join(items)}</dl></section>'
