"""Thousands of values or datasets are no thousands of operations, and the benchmark says what it measured."""

import dataclasses
import functools
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks import measure, setting
from benchmarks.growth import __main__ as growth
from benchmarks.growth import plot, points, stored

TINY = dataclasses.replace(
    points.CONFIG,
    vocab_size=32,
    emb_dim=8,
    num_heads=1,
    head_dim=8,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def tiny(axis, size):
    return dataclasses.replace(points.point(axis, size), rows=2, length=4)


@functools.cache
def base():
    point = tiny("values", 10)
    method = points.methods(point, TINY)["lora"]
    return setting.Step(method, rows=points.batch(point, method)).frozen


def operations(point, name):
    method = points.methods(point, TINY)[name]
    step = setting.Step(method, base(), points.batch(point, method))
    return points.operations(step.lowered)


@pytest.mark.parametrize(
    ("axis", "most", "name"),
    [("values", 10_000, "dense"), ("values", 10_000, "gathered")]
    + [("datasets", 1000, "polytropon"), ("datasets", 1000, "poly_s")],
)
def test_a_step_has_as_many_operations_however_many_values_or_datasets_there_are(axis, most, name):
    few, many = (operations(tiny(axis, size), name) for size in (10, most))
    assert few == many > 100


def test_a_point_is_measured_with_the_form_that_choose_form_takes():
    point = tiny("datasets", 65)
    assert point.columns == 520 and point.chosen == "gathered"
    found = points.measure_point(point, 2, measure.use_cores(0), TINY)
    assert found["auto"] == "gathered"
    assert set(found["sides"]) == {"lora", "dense", "gathered", "polytropon", "poly_s"}
    for side in found["sides"].values():
        assert len(side["seconds"]) == 2 and side["peak"] > side["state"] > 0
    # Both forms train the same bank: 6 layers, a and b, and two moments of each; the counts of steps beside them.
    bank = 3 * 4 * 6 * 520 * (8 + 8)
    assert bank < found["sides"]["dense"]["state"] < bank + 64


def test_packed_rows_hold_segments_of_one_length_with_features_of_their_own():
    point = points.point("segments", 8)
    method = points.methods(point)["dense"]
    rows = {name: np.asarray(value) for name, value in points.batch(point, method).items()}
    for stream in ("encoder", "decoder"):
        assert (np.bincount(rows[f"{stream}_segment_ids"][0])[1:] == 256 // 8).all()
        assert rows[f"{stream}_positions"].max() == 256 // 8 - 1
    assert rows["features"].shape == (4, 8, 2)
    assert len(np.unique(rows["features"][..., 1])) == 4 * 8
    assert rows["features"].max() <= method.languages == 296


def test_tokens_of_a_batch_stay_the_same_along_segments_and_sequence():
    for axis, tokens in (("segments", 1024), ("sequence", 4096)):
        made = [points.point(axis, size) for size in points.SIZES[axis]]
        assert {point.rows * point.length for point in made} == {tokens}


def test_choose_form_gathers_on_a_cpu_from_the_first_sizes_on():
    assert points.chosen_from("values") == 10 and points.chosen_from("datasets") == 10
    assert points.chosen_from("segments") == 1 and points.chosen_from("sequence") == 64


def side(seconds, operations=100, instructions=200):
    return {
        "seconds": [seconds] * 3,
        "peak": 10**8,
        "state": 10**6,
        "operations": operations,
        "instructions": instructions,
        "tracing": 0.5,
    }


def cell(dense, gathered, auto, **counts):
    return {
        "auto": auto,
        "sides": {"dense": side(dense), "gathered": side(gathered, **counts)},
    }


RESULTS = {
    "values 10": cell(1.0, 2.0, "dense"),
    "values 1000": cell(4.0, 2.0, "gathered", operations=103),
    "sequence 64": cell(1.5, 1.0, "dense"),
    "sequence 128": cell(1.5, 1.2, "gathered"),
}


def test_the_crossing_lies_where_straight_lines_on_logarithmic_axes_meet():
    assert stored.crossing(stored.of_axis(RESULTS, "values")) == pytest.approx(100)
    assert stored.crossing(stored.of_axis(RESULTS, "sequence")) == 64
    back = {**stored.of_axis(RESULTS, "values"), 2000: cell(1.0, 2.0, "dense")}
    assert stored.crossing(back) is None


def test_goals_say_what_holds():
    found = {goal["name"]: (goal["value"], goal["holds"]) for goal in stored.goals(RESULTS)}
    assert found["values: operations of dense, 1,000 over 10"] == (1.0, True)
    assert found["values: operations of gathered, 1,000 over 10"] == (1.03, False)
    assert found["values: operations of auto, 1,000 over 10"] == (1.03, False)
    assert found["values: time of auto over the faster form, worst at 10"] == (1.0, True)
    assert found["sequence: time of auto over the faster form, worst at 64"] == (1.5, False)
    lines = stored.table(RESULTS, "values")
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6


def test_the_plot_has_a_panel_of_seconds_and_one_of_memory_for_each_axis_that_was_measured():
    page = ET.fromstring(plot.draw(RESULTS))
    panels = page.findall("{http://www.w3.org/2000/svg}svg")
    assert [panel.get("aria-label").partition(",")[0] for panel in panels] == [
        f"{quantity} against {plot.AXES[axis]}".partition(",")[0]
        for axis in ("values", "sequence")
        for quantity in ("seconds of a step", "memory of a step, MB")
    ]
    words = ["".join(text.itertext()) for text in panels[0].iter() if text.tag.endswith("text")]
    assert {"measured", "choose_form", "feature values", "1k"} <= set(words)


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path, capsys):
    asked = []

    def measured(point, rounds, clock):
        asked.append((point.axis, point.size, rounds))
        return cell(1.0, 1.0, "dense")

    monkeypatch.setattr(points, "measure_point", measured)
    monkeypatch.setattr(measure, "use_cores", lambda count: None)
    monkeypatch.setattr(growth, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(growth, "PLOT", tmp_path / "growth.svg")
    assert growth.main(["--only", "values 10", "datasets 300", "--rounds", "2"]) == 0
    assert asked == [("values", 10, 2), ("datasets", 300, 2)]
    asked.clear()
    assert growth.main(["--only", "values", "--rounds", "5"]) == 0
    assert asked == [("values", size, 5) for size in points.SIZES["values"][1:]]
    asked.clear()
    assert growth.main(["--none"]) == 0 and not asked
    assert growth.main(["--again", "--only", "datasets 300"]) == 0
    assert asked == [("datasets", 300, 5)]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(goal["holds"] for goal in last["goals"])
    assert list(json.loads((tmp_path / "results.json").read_text()))[-1] == "datasets 300"
