"""Learning curves are read from what training wrote, also where it was cut short."""

import json

import pytest

from modjax.evaluation import curves
from modjax.evaluation.curves import Curve, CurveError


def test_a_file_is_read_but_for_a_last_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "lo')
    assert curves.read(path, "flix", 4) == Curve("flix", 4, rows)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', ""])
def test_a_bad_line_is_named_with_its_file(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(CurveError, match=r"metrics\.jsonl, line 2: "):
        curves.read(path, "flix", 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CurveError, match="none.jsonl: there is no such file"):
        curves.read(tmp_path / "none.jsonl", "flix", 0)


def test_points_are_sorted_finite_and_one_per_step():
    rows = [
        {"step": 2, "loss": 5.0},
        {"step": 1, "loss": 7.0},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "accuracy": 0.5},
    ]
    assert curves.points(Curve("a", 0, rows), "loss") == [(1, 7.0), (2, 4.0)]
    assert curves.names([Curve("a", 0, rows)], ("accuracy", "loss")) == ["loss"]


def test_thinning_keeps_the_ends_and_the_mean():
    line = [(step, float(step % 10)) for step in range(1, 1001)]
    thin = curves.thin(line, 50)
    assert len(thin) == 50
    assert (thin[0][0], thin[-1][0]) == (1, 1000)
    assert sum(v for _, v in thin) / 50 == pytest.approx(4.5)
    assert curves.thin(line[:50], 50) == line[:50]


def test_the_mean_line_stands_where_all_seeds_have_a_value():
    assert curves.mean([[(1, 2.0), (2, 4.0), (3, 9.0)], [(2, 6.0), (3, 1.0)]]) == [
        (2, 5.0),
        (3, 5.0),
    ]
    assert curves.mean([]) == []
