"""growth.svg: for each axis the seconds and the memory of a step, and where gathered takes over from dense."""

from collections.abc import Mapping

from benchmarks.growth import points, stored
from modjax.evaluation import plots

AXES = {
    "values": "feature values",
    "datasets": "datasets",
    "segments": "packed segments of a row",
    "sequence": "tokens of a row",
}
SIDES = {"lora": "LoRA", "dense": "FLix, dense", "gathered": "FLix, gathered"}
SIDES |= {"polytropon": "Polytropon", "poly_s": "Poly-S"}
COLOURS = ("#5a5a5a", "#c2410c", "#1d4ed8", "#15803d", "#7e22ce")
STYLE = (
    "text{font:12.5px system-ui,sans-serif;fill:#444}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.head{font-weight:600;font-size:14px}.rule{stroke:#ddd;fill:none}"
    "polyline{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}"
    ".mark{stroke:#999;fill:none}text.mark{stroke:none;fill:#666}"
    + "".join(f".m{i}{{--c:{colour};stroke:{colour}}}" for i, colour in enumerate(COLOURS))
)
WIDTH, HEIGHT, TOP, HEAD = 440, 250, 40, 26


def draw(results: stored.Results) -> str:
    """The plot of the points that are there, as a page of SVG; an axis of fewer than two is left out."""
    parts = []
    for i, label in enumerate(SIDES.values()):
        x, dash = 14 + 170 * i, plots.dash(i)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline class="m{i}" points="{x},20 {x + 34},20"{dashes}/>')
        parts.append(f'<text x="{x + 42}" y="24">{label}</text>')
    y = TOP
    for axis, across in AXES.items():
        found = stored.of_axis(results, axis)
        if len(found) < 2:
            continue
        for x, quantity in ((0, "seconds of a step"), (WIDTH, "memory of a step, MB")):
            parts.append(f'<text class="head" x="{x + 14}" y="{y + 16}">{quantity}</text>')
            panel = _panel(found, axis, across, quantity)
            place = f'x="{x}" y="{y + HEAD}" width="{WIDTH}" height="{HEIGHT}"'
            parts.append(panel.replace("<svg ", f"<svg {place} ", 1))
        y += HEAD + HEIGHT + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {y}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _panel(found: Mapping[int, stored.Cell], axis: str, across: str, quantity: str) -> str:
    timed = quantity.startswith("seconds")

    def value(cell: stored.Cell, name: str) -> float:
        return stored.median(cell, name) if timed else cell["sides"][name]["peak"] / 1e6

    sides = next(iter(found.values()))["sides"]
    series = [
        plots.Series(SIDES[name], [(n, value(c, name)) for n, c in found.items()], i)
        for i, name in enumerate(SIDES)
        if name in sides
    ]
    marks = []
    if timed:
        places = {"measured": stored.crossing(found), "choose_form": points.chosen_from(axis)}
        marks = [(at, name) for name, at in places.items() if at is not None]
    label = f"{quantity} against {across}"
    return plots.lines(series, label, across, log_x=True, log_y=True, marks=marks)
