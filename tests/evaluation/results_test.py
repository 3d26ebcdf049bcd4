"""Rows of results are checked, merged and averaged without letting a contradiction through."""

import json
import os

import pytest

from modjax.evaluation import results
from modjax.evaluation.results import ResultsError


def row(**changes):
    base = {
        "method": "flix",
        "task": "parse",
        "language": "sw",
        "setting": "seen",
        "metric": "exact_match",
        "value": 50.0,
        "n": 10,
        "seed": 0,
    }
    return {**base, **changes}


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(), row(seed=1, value=0), row(language="zh_Hans", method="lora|ü", value=1 / 3)]
    path = tmp_path / "deep" / "results.json"
    results.write(path, rows)
    assert results.read(path) == rows
    assert os.listdir(path.parent) == ["results.json"]


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, [row()])
    with pytest.raises(ResultsError):
        results.write(path, [row(seed=1), row(value=101)])
    with pytest.raises(UnicodeEncodeError):  # fails in the middle of writing
        results.write_text(path, "x" * 100_000 + "\ud800")
    assert results.read(path) == [row()]
    assert os.listdir(tmp_path) == ["results.json"]
    with open(path) as reader:  # it goes on reading what it opened
        results.write(path, [row(seed=1)])
        assert json.load(reader) == [row()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "'value' must be a number from -100 to 100, got nan"),
        ({"value": 100.1}, "'value' must be a number from -100 to 100, got 100.1"),
        ({"value": True}, "'value' must be a number"),
        ({"value": "50"}, "'value' must be a number"),
        ({"n": 0}, "'n' must be a whole number >= 1, got 0"),
        ({"seed": -1}, "'seed' must be a whole number >= 0, got -1"),
        ({"seed": 1.0}, "'seed' must be a whole number"),
        ({"method": ""}, "'method' must be a non-empty text"),
        ({"setting": "unsen"}, "unknown setting 'unsen'. Did you mean 'unseen_pair'|'seen'"),
        ({"langauge": "sw"}, "unknown field 'langauge'. Did you mean 'language'"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_and_field(tmp_path, changes, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([row(), row(**changes)]))
    with pytest.raises(ResultsError, match=rf"results\.json, row 1: .*({message})"):
        results.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list of rows, got dict"),
        ("[1]", "row 0: expected an object"),
        ('[\n{"method": ', "not valid JSON, line 2"),
        (json.dumps([{k: v for k, v in row().items() if k != "n"}]), "the field 'n' is missing"),
    ],
)
def test_a_file_that_holds_no_rows_is_an_error(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=rf"results\.json.*{message}"):
        results.read(path)


def test_a_missing_or_undecodable_file_is_named(tmp_path):
    with pytest.raises(ResultsError, match="none.json: there is no such results file"):
        results.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"[\xff]")
    with pytest.raises(ResultsError, match=r"bad.json: not valid UTF-8 \(byte 1\)"):
        results.read(tmp_path / "bad.json")


def test_unseen_features_of_any_name_are_settings():
    for name in ("domain", "text-type", "source.kind", "two words"):
        assert results.check([row(setting=f"unseen_{name}")], "x")


def test_merging_keeps_order_and_what_is_said_twice_once():
    merged = results.merge({"a": [row(), row(seed=1)], "b": [row(seed=2), row()]})
    assert merged == [row(), row(seed=1), row(seed=2)]


@pytest.mark.parametrize("changes", [{"value": 51.0}, {"n": 11}, {"setting": "unseen_pair"}])
def test_merging_refuses_two_results_for_one_thing_and_names_both_files(changes):
    with pytest.raises(ResultsError, match=f"{next(iter(changes))} is .* in a.json and .* in b.js"):
        results.merge({"a.json": [row()], "b.json": [row(**changes)]})


def test_over_seeds_gives_mean_range_and_deviation():
    rows = [row(seed=1, value=70.0, n=9), row(seed=0, value=50.0), row(seed=5, value=60.0)]
    summary = results.over_seeds(rows)["exact_match", "seen", "parse", "sw", "flix"]
    assert summary == results.Summary(60.0, 50.0, 70.0, 10.0, (0, 1, 5), 9)
    single = results.over_seeds([row()])["exact_match", "seen", "parse", "sw", "flix"]
    assert single.std is None and single.low == single.high == 50.0


def test_averages_count_datasets_alike_within_a_seed_and_spread_over_seeds():
    rows = [
        row(value=10.0, seed=0, n=1),
        row(value=30.0, seed=0, language="en", n=99),
        row(value=20.0, seed=1, n=1),
        row(value=60.0, seed=1, language="en", n=99),
    ]
    average = results.averages(rows)["exact_match", "seen", "", "flix"]
    assert average.summary == results.Summary(
        30.0, 20.0, 40.0, pytest.approx(200**0.5), (0, 1), 100
    )
    assert average.datasets == (("parse", "sw"), ("parse", "en"))
    assert average.missing == ()


def test_averages_compare_methods_on_the_datasets_that_all_have():
    rows = [
        row(value=10.0),
        row(value=90.0, language="en"),
        row(value=20.0, method="lora"),
        row(value=40.0, method="lora", seed=1),
        row(value=80.0, method="lora", seed=1, language="en"),
    ]
    found = results.averages(rows)
    assert found["exact_match", "seen", "", "flix"].summary.mean == 10.0
    assert found["exact_match", "seen", "", "flix"].missing == ()
    assert found["exact_match", "seen", "", "lora"].summary.mean == 30.0
    assert found["exact_match", "seen", "", "lora"].missing == (("parse", "en"),)


def test_averages_keep_settings_metrics_and_on_request_tasks_apart():
    rows = [
        row(value=10.0),
        row(value=20.0, task="tag"),
        row(value=70.0, language="en", setting="unseen_pair"),
        row(value=90.0, metric="chrf"),
    ]
    assert {k: a.summary.mean for k, a in results.averages(rows, by_task=True).items()} == {
        ("exact_match", "seen", "parse", "flix"): 10.0,
        ("exact_match", "seen", "tag", "flix"): 20.0,
        ("exact_match", "unseen_pair", "parse", "flix"): 70.0,
        ("chrf", "seen", "parse", "flix"): 90.0,
    }
    assert results.averages(rows)["exact_match", "seen", "", "flix"].summary.mean == 15.0
