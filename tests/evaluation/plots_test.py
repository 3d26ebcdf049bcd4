"""Lines lie where their axes say."""

import re

from modjax.evaluation import plots


def drawn(points, **options):
    text = plots.lines([plots.Series("one", points, 0)], "loss", **options)
    (path,) = re.findall(r'<polyline[^>]* points="([^"]*)"', text)
    return text, [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    points = [(10, 1.0), (100, 2.0), (1000, 4.0)]
    text, places = drawn(points, across="values", log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = places
    assert abs((x1 - x0) - (x2 - x1)) <= 0.2 and x2 > x0
    assert abs((y1 - y0) - (y2 - y1)) <= 0.2 and y2 < y0
    assert ">values</text>" in text and ">step</text>" not in text
    _, linear = drawn(points)
    assert linear[1][0] - linear[0][0] < (linear[2][0] - linear[1][0]) / 5


def test_a_mark_stands_at_its_place_with_its_name():
    points = [(10, 1.0), (100, 2.0), (1000, 4.0)]
    text, places = drawn(points, log_x=True, marks=[(100, "here")])
    (at,) = re.findall(r'class="mark"[^>]* d="M([\d.]+) ', text)
    assert float(at) == places[1][0] and ">here</text>" in text
