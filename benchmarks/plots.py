"""The plots of the studies' report, from scores that it has counted (`benchmarks.report`); as SVG, by matplotlib."""

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import study
from benchmarks.zero_shot.run import POLICY

SETTINGS = {
    "seen": "seen datasets",
    "unseen_pair": "unseen pair",
    "unseen_language": "unseen language",
}
Scores = Mapping[
    tuple[str, str, str], Sequence[float]
]  # (point, method, setting) -> the mean of each seed


def distinct(items: Iterable[Any]) -> list[Any]:
    """Each once, in the order in which they first come."""
    return list(dict.fromkeys(items))


def draw_bars(found: Scores, path: pathlib.Path, settings: Sequence[str] = tuple(SETTINGS)) -> None:
    """Bars of every method at every point, a column for each setting; whiskers are standard errors over seeds."""
    plt = _pyplot()
    points = distinct(point for point, _, _ in found)
    methods = distinct(method for _, method, _ in found)
    figure, axes = plt.subplots(
        len(points), len(settings), squeeze=False, sharex=True, sharey=True,
        figsize=(11, 0.6 + len(points) * (0.5 + 0.19 * len(methods))), layout="constrained",
    )  # fmt: skip
    for across, setting in enumerate(settings):
        title = SETTINGS[setting]
        for down, point in enumerate(points):
            axis = axes[down][across]
            for place, method in enumerate(methods):
                values = found.get((point, method, setting))
                if values:
                    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
                    axis.barh(
                        place,
                        statistics.fmean(values),
                        xerr=error,
                        color=_colour(method),
                        height=0.75,
                    )
            axis.set_yticks(range(len(methods)), methods, fontsize=7)
            axis.set_title(f"{title}, {point}", fontsize=9)
            axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    most = max(map(statistics.fmean, found.values()))
    axes[0][0].set_xlim(0, 100 if most > 50 else 1.2 * most)
    for axis in axes[-1]:
        axis.set_xlabel("exact match, %")
    _save(figure, path)


def leaders(
    found: Scores, point: str, setting: str, count: int = 2
) -> list[tuple[str, list[float]]]:
    """The methods with the best means at a point, best first, each with the mean of each seed.

    Where some methods have several seeds, those with one do not compete. A method that is also scored without its
    language competes once, with the better of the two.
    """
    here = {
        method: list(values)
        for (at, method, of), values in found.items()
        if (at, of) == (point, setting)
    }
    if any(len(values) > 1 for values in here.values()):
        here = {method: values for method, values in here.items() if len(values) > 1}
    best: dict[str, list[float]] = {}
    for method in sorted(here, key=lambda method: -statistics.fmean(here[method])):
        if method.removesuffix(POLICY) not in [name.removesuffix(POLICY) for name in best]:
            best[method] = here[method]
    return list(best.items())[:count]


def draw_leaders(
    found: Scores, places: Mapping[str, tuple[str, str]], path: pathlib.Path, against: str = "lora"
) -> None:
    """For each setting a map of the points: who leads there, coloured by the lead over `against`.

    Args:
      found: all scores.
      places: of each point (its row, its column), in the order in which they are drawn.
      path: of the plot.
      against: a method.
    """
    plt = _pyplot()
    rows, columns = (distinct(place[i] for place in places.values()) for i in (0, 1))
    size = (13, 0.6 + 0.9 * len(rows))
    figure, axes = plt.subplots(1, len(SETTINGS), squeeze=False, figsize=size, layout="constrained")
    for axis, (setting, title) in zip(axes[0], SETTINGS.items(), strict=True):
        leads = [[float("nan")] * len(columns) for _ in rows]
        for point, (row, column) in places.items():
            y, x = rows.index(row), columns.index(column)
            first = leaders(found, point, setting)
            theirs = found.get((point, against, setting))
            if not (first and theirs):
                axis.text(x, y, "not measured", ha="center", va="center", fontsize=6)
                continue
            leads[y][x] = statistics.fmean(first[0][1]) - statistics.fmean(theirs)
            told = [f"{name.replace(POLICY, ' (off)')}\n{study.mean(v)}" for name, v in first]
            told.append(f"({against}: {study.mean(theirs)})")
            axis.text(x, y, "\n".join(told), ha="center", va="center", fontsize=6)
        image = axis.imshow(leads, vmin=0, vmax=25, cmap="Greens", alpha=0.6, aspect="auto")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows, rotation=90, va="center")
        axis.set_title(title)
    figure.colorbar(image, ax=axes[0][-1], label=f"lead over {against}, points")
    _save(figure, path)


def _colour(method: str) -> str:
    if method.startswith("lora") or method == "task_only":
        return "#777777"
    return "#c2410c" if POLICY in method else "#1d4ed8"


def draw_scatter(
    places: Mapping[str, tuple[float, float]], across: str, up: str, path: pathlib.Path, log: bool
) -> None:
    """Methods as labelled points."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, (x, y) in places.items():
        axis.plot(x, y, "o", color=_colour(method))
        axis.annotate(method, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    _save(figure, path)


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, path: pathlib.Path
) -> None:
    """A line for each name, which a legend beside the plot tells, the highest line's first."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    series = dict(sorted(series.items(), key=lambda item: -item[1][-1][1]))
    styles = ("-", "--", ":", "-.")
    for i, (name, line) in enumerate(series.items()):
        axis.plot(
            *zip(*line, strict=True), styles[i // 10 % 4], marker="o", markersize=3, label=name
        )
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    _save(figure, path)


def draw_heat(
    values: Mapping[str, Sequence[float]], columns: Sequence[str], title: str, path: pathlib.Path
) -> None:
    """A heat map, rows by name."""
    plt = _pyplot()
    size = (1.8 + 0.45 * len(columns), 0.9 + 0.17 * len(values))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(list(values.values()), aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(values)), list(values), fontsize=6)
    axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45, ha="right")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axis)
    _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "The plots need matplotlib: pip install -c constraints.txt -e '.[studies]'"
        ) from None
    matplotlib.use("svg")
    # The same data give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "modjax", "svg.fonttype": "none", "font.size": 8}
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)
