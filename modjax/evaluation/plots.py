"""Plots as inline SVG: bars of averages, and learning curves. Colours come from the page's CSS.

A method has one class, `m0`, `m1`, ..., in every plot and table; the page says which colour that
is in light and in dark. Nothing is told by colour alone: bars are labelled, lines are dashed by
method.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

from modjax.evaluation.curves import Point

STYLES = 8  # methods with a colour of their own
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A method's value: mean, its range over seeds, and the method's style."""

    label: str
    value: float
    low: float
    high: float
    style: int


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a plot; thin ones are single seeds."""

    label: str
    points: Sequence[Point]
    style: int
    thin: bool = False


def css_class(style: int) -> str:
    return f"m{style % STYLES}"


def dash(style: int) -> str:
    return DASHES[style % len(DASHES)]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], label: str) -> str:
    """Horizontal bars from 0 to 100 in titled groups, with whiskers from lowest to highest seed."""
    left, right, width = 118, 40, 390
    scale = (width - left - right) / 100
    parts, y = [], 0.0
    for name, some in groups:
        parts.append(_text(0, y + 13, name, "group", limit=60))
        y += 20
        for bar in some:
            middle, style = y + 8, css_class(bar.style)
            tip = f"{bar.label}: {bar.value:.1f} ({bar.low:.1f} to {bar.high:.1f} over seeds)"
            length = max(bar.value * scale, 1.0)
            parts.append(f"<g><title>{html.escape(tip)}</title>")
            parts.append(_text(left - 8, middle + 4, bar.label, "end", limit=17))
            track = f'x="{left}" y="{y}" width="{100 * scale:.1f}" height="16"'
            parts.append(f'<rect class="track" {track}/>')
            parts.append(
                f'<rect class="bar {style}" x="{left}" y="{y}" width="{length:.1f}" height="16"/>'
            )
            low, high = left + bar.low * scale, left + bar.high * scale
            if high > low:
                parts.append(
                    f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}'
                    f'M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8"/>'
                )
            parts.append(_text(width - right + 6, middle + 4, f"{bar.value:.1f}", "value"))
            parts.append("</g>")
            y += 20
        y += 10
    return _svg(width, y, label, parts)


def lines(
    series: Sequence[Series],
    label: str,
    across: str = "step",
    log_x: bool = False,
    log_y: bool | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over steps, or over something else.

    Args:
      series: what is drawn.
      label: for readers who do not see it.
      across: what the horizontal axis is.
      log_x: whether it is logarithmic; all its values are then positive.
      log_y: whether the vertical axis is; None: where values are positive and span a factor of 30.
      marks: (place on the horizontal axis, name) of vertical lines.
    """
    width, height, left, right, top, bottom = 440, 250, 46, 14, 10, 34
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 30 if log_y is None else log_y
    warp = math.log10 if logarithmic else float
    warp_x = math.log10 if log_x else float
    # A linear axis ends at its outermost ticks, a logarithmic one at the data.
    ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    x_ticks = _log_ticks(x0, x1) if log_x else _ticks(x0, x1)
    y0, y1 = (warp(v) for v in (min(*ticks, *ys), max(*ticks, *ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        along = (warp_x(x) - warp_x(x0)) / (warp_x(x1) - warp_x(x0)) * (width - left - right)
        up = (warp(y) - y0) / ((y1 - y0) or 1) * (height - top - bottom)
        return left + along, height - bottom - up

    parts = []
    for tick in ticks:
        _, at = place(x0, tick)
        parts.append(f'<path class="rule" d="M{left} {at:.1f}H{width - right}"/>')
        parts.append(_text(left - 6, at + 4, _short(tick), "end"))
    for tick in x_ticks:
        if x0 <= tick <= x1:
            at, _ = place(tick, ys[0])
            # The last label would stick out of the plot if it were centred.
            anchor = "end" if at > width - right - 14 else "middle"
            parts.append(_text(at, height - bottom + 16, _short(tick), anchor))
    parts.append(_text((left + width - right) / 2, height - 3, across, "middle"))
    for i, (x, name) in enumerate(marks):
        at, _ = place(x, ys[0])
        tip = f"<title>{html.escape(name)}</title>"
        path = f"M{at:.1f} {top}V{height - bottom}"
        parts.append(f'<path class="mark" stroke-dasharray="2 4" d="{path}">{tip}</path>')
        parts.append(_text(at + 4, top + 10 + 14 * i, name, "mark"))
    for one in sorted(series, key=lambda s: not s.thin):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in one.points))
        kind = "seed" if one.thin else "mean"
        dashes = f' stroke-dasharray="{dash(one.style)}"' if dash(one.style) else ""
        parts.append(
            f'<polyline class="{kind} {css_class(one.style)}" points="{path}"{dashes}>'
            f"<title>{html.escape(one.label)}</title></polyline>"
        )
    return _svg(width, height, label + (", logarithmic" if logarithmic else ""), parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    label = html.escape(label)
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, limit: int = 30) -> str:
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about four steps, that enclose low and high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 times each where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"
