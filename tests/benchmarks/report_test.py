"""The report of the studies, from cells that are made up."""

import json
import pathlib

import pytest

from benchmarks import plots, report, study, trainings
from benchmarks.family import run as family_study
from benchmarks.mtop6 import run as mtop6_study
from benchmarks.zero_shot import run as zero_shot_study

SETTINGS = trainings.Settings(pathlib.Path())

METHODS = {"lora": 40.0, "flix": 60.0, "flix_no_dropout": 50.0, "flix_shared": 55.0}


def row(method, setting, value, seed=0, language="ta"):
    return trainings.row(method, f"parse {language}", setting, value, 50, seed, "all-4")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "HERE", tmp_path)
    return tmp_path


def zero_shot(folder):
    """Cells of four methods with two seeds, of which the rate 0.0065 is the best and the others say nothing true."""
    store = study.Store(folder / "zero_shot" / "cells.jsonl")
    for method, value in METHODS.items():
        for rate, seed in [*((rate, 0) for rate in zero_shot_study.RATES), (0.0065, 1)]:
            best = rate == 0.0065
            cell = zero_shot_study.Cell("all-4", method, rate, seed)
            test = {"parse ta": value + 2 * seed, "parse te": 100 - value, "parse mo": 7.0}
            found = {"validation": {"parse ta": 9.0 if best else 1.0}}
            found["test"] = test if best else dict.fromkeys(test, 0.0)
            if method != "lora":
                found["language_off"] = {"parse ta": 1.0, "parse te": 9.0, "parse mo": 7.0}
                found["task_off"] = dict.fromkeys(test, 0.0)
                found["norms"] = {"encoder 0": {"task=parse": 1.0, "language=ta": 2.0}}
            store.add({"name": cell.name, "config": cell.config(SETTINGS), **found})


def test_a_mean_is_over_datasets_first_and_its_error_over_seeds():
    rows = [
        row("lora", "seen", value, seed, language=str(value)) for seed, value in enumerate((10, 20))
    ]
    rows += [row("lora", "seen", value, seed, language="x") for seed, value in enumerate((30, 60))]
    found = report.scores(rows)
    assert found == {("all-4", "lora", "seen"): [20, 40]}
    assert "| lora | 30.0 ± 10.0 | 2 |" in report.table(found, ["seen"])


def test_tables_plots_and_goals(folder, capsys):
    zero_shot(folder)
    assert report.main(["--output", str(folder / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "family has no results yet" in out
    goals = {goal["name"]: goal for goal in json.loads(out[-1])["goals"]}
    gap = goals["FLix over LoRA of the same compute, seen (1 point)"]
    assert gap["value"] == 20.0 and gap["holds"]
    gap = goals["FLix over LoRA of the same compute, unseen pair (1 point)"]
    assert gap["value"] == -20.0 and not gap["holds"]
    text = (folder / "out" / "tables.md").read_text()
    assert "| flix | 61.0 ± 1.0 | 40.0 ± 0.0 | 7.0 ± 0.0 | 2 |" in text
    assert f"| flix{plots.POLICY} | 61.0 ± 1.0 | 9.0 ± 0.0 | 7.0 ± 0.0 | 2 |" in text
    switched = "61.0 ± 1.0 | 1.0 ± 0.0 | 0.0 ± 0.0 | 40.0 ± 0.0 | 9.0 ± 0.0 | 0.0 ± 0.0"
    assert f"| all-4 | flix | {switched} |" in text
    assert "mean of 2 seeds" in text
    for name in ("zero_shot.svg", "zero_shot_map.svg", "feature_norms.svg"):
        assert "<svg" in (folder / "out" / name).read_text()


def test_who_leads_has_several_seeds_where_others_have_and_competes_once():
    off = plots.POLICY
    found = {
        ("p", "lucky", "seen"): [99.0],
        ("p", "lora", "seen"): [50.0, 60.0],
        ("p", "flix", "seen"): [60.0, 70.0],
        ("p", f"flix{off}", "seen"): [62.0, 72.0],
        ("q", "lucky", "seen"): [99.0],
        ("q", "lora", "seen"): [50.0],
        ("p", "lora", "unseen_pair"): [90.0, 90.0],
    }
    assert plots.leaders(found, "p", "seen") == [(f"flix{off}", [62, 72]), ("lora", [50, 60])]
    assert plots.leaders(found, "q", "seen") == [("lucky", [99]), ("lora", [50])]
    assert plots.leaders(found, "q", "unseen_pair") == []


def test_the_map_tells_who_leads_where_and_what_was_not_measured(folder):
    found = {("p", "lora", "seen"): [50.0, 60.0], ("p", "flix", "seen"): [60.0, 70.0]}
    places = {"p": ("base: all", "rank 4"), "q": ("base: none", "rank 4")}
    plots.draw_leaders(found, places, folder / "map.svg")
    text = (folder / "map.svg").read_text()
    assert text.index("flix") < text.index("65.0 ± 5.0") < text.index("(lora: 55.0 ± 5.0)")
    assert text.count("not measured") == 5  # q, and p in the settings without scores


def test_the_same_results_give_the_same_plots(folder):
    zero_shot(folder)
    for name in ("one", "two"):
        report.main(["--output", str(folder / name)])
    for file in (folder / "one").iterdir():
        assert file.read_bytes() == (folder / "two" / file.name).read_bytes()


def test_the_family_has_plots_of_shots_and_of_routing(folder):
    store = study.Store(folder / "family" / "cells.jsonl")
    for name, value in {"poly_s": 50.0, "polytropon": 40.0, "lora": 45.0}.items():

        def keep(cell, source, found):
            config = family_study.config(cell, source, SETTINGS)
            store.add({"name": cell.name, "config": config, **found})

        for rate in family_study.RATES:
            found = {"validation": {"parse ta": 1.0}, "test": {"parse ta": value, "qa ta": 0.0}}
            found |= {"trained": 1000, "steps": 10, "training_seconds": 5.0}
            found["routing"] = {"x_parse_ta": [0.4, 0.6]}
            keep(family_study.Cell(name, rate, 0), None, found)
        source = family_study.Cell(name, family_study.RATES[0], 0)
        for rate in family_study.FEW_RATES:
            for shots in family_study.SHOTS:
                found = {"validation": {"0": 0.0}, "test": {"qa ta": value + shots}}
                keep(family_study.Cell(name, rate, 0, "task", shots), source, found)
    text, goals = report.family(folder / "out")
    assert "| | task, 8 shots | task, 32 shots | seeds |" in text
    assert "| poly_s | 58.0 | 82.0 | 1 |" in text
    values = {goal["name"]: goal["value"] for goal in goals}
    assert values["Poly-S over Polytropon, few-shot (2 points)"] == 10.0
    assert values["Poly-S over shared LoRA, few-shot (2 points)"] == 5.0
    plots = {path.name for path in (folder / "out").iterdir()}
    assert plots == {"parameters.svg", "step_time.svg", "routing.svg", "few_shot_task.svg"}


def test_real_data_has_tables_by_language_and_its_questions(folder):
    store = study.Store(folder / "mtop6" / "cells.jsonl")
    for name, value in {
        "lora_16": 20.0,
        "flix": 30.0,
        "flix_shared_language_dropout": 25.0,
    }.items():
        for rate in mtop6_study.RATES:
            cell = mtop6_study.Cell("first", name, rate, 0)
            of_language = {
                "en": value,
                "de": value + 2,
                "fr": value + 4,
                "es": 9.0,
                "hi": 0.0,
                "th": 3.0,
            }
            found = {
                "validation": {"en": 1.0},
                "test": dict.fromkeys(mtop6_study.METRICS, of_language),
            }
            store.add({"name": cell.name, "config": cell.config(SETTINGS), **found})
    text, goals = report.mtop6(folder / "out")
    assert "| first | de | en | fr | (es) | (hi) | (th) | trained | held out | seeds |" in text
    assert "| flix | 32.0 | 30.0 | 34.0 | 9.0 | 0.0 | 3.0 | 32.0 | 4.0 | 1 |" in text
    values = {goal["name"]: goal["value"] for goal in goals}
    assert values["mtop6: ours over LoRA of the same compute, seen (1 point)"] == 5.0
    assert values["mtop6: ours over FLix, held out (1 point)"] == 0.0
    assert "<svg" in (folder / "out" / "mtop6.svg").read_text()


def test_a_question_is_answered_with_its_standard_error():
    def asked(*sides, point="p"):
        each = [dict(side) if isinstance(side, dict) else dict(enumerate(side)) for side in sides]
        return {(point, name, "seen"): values for name, values in zip("abc", each, strict=False)}

    def answer(found, ours=("a",), theirs=("b",)):
        (goal,) = report._question(found, "a over b", "seen", set(ours), set(theirs))
        return goal

    goal = answer(asked([3.0, 5.0, 7.0], [2.0, 3.0, 7.0]) | {("q", "b", "seen"): {0: 1.0}})
    # Differences of 1, 2 and 0: their deviation is 1, and 1 is less than twice its error.
    assert goal == {
        "name": "a over b (1 point)",
        "value": 1.0,
        "goal": "> 0 by two standard errors",
        "holds": False,
        "error": round(1 / 3**0.5, 2),
    }
    assert answer(asked([13.0, 15.0, 17.0], [2.0, 3.0, 7.0]))["holds"]
    # The seeds that both have, and no answer from one.
    goal = answer(asked({0: 9.0, 1: 3.0, 2: 5.0}, {1: 2.0, 2: 3.0}))
    assert (goal["value"], goal["error"]) == (1.5, 0.5) and goal["holds"]
    goal = answer(asked([9.0, 5.0], [2.0]))
    assert (goal["value"], goal["error"], goal["holds"]) == (7.0, None, False)
    # A seed's mean over points where all have the same seeds, else each point by itself.
    first, same = asked([3.0, 5.0], [0.0, 0.0]), asked([5.0, 3.0], [0.0, 0.0], point="q")
    goal = answer(first | same)
    assert (goal["name"], goal["value"], goal["error"]) == ("a over b (2 points)", 4.0, 0.0)
    other = asked({1: 5.0, 2: 3.0}, {1: 0.0, 2: 0.0}, point="q")
    assert answer(first | other)["error"] == round((1 + 1) ** 0.5 / 2, 2)
    # The best of a side has several seeds, if one has.
    goal = answer(asked([3.0, 5.0], [0.0, 1.0], [99.0]), ours=("a", "c"))
    assert goal["value"] == 3.5
