"""The report of the studies, from cells that are made up."""

import json

import pytest

from benchmarks import report, study

METHODS = {"lora": 40.0, "flix": 60.0, "flix_no_dropout": 50.0, "flix_shared": 55.0}


def row(method, setting, value, seed=0, point="all-4", task="parse", language="ta"):
    return {
        "method": method,
        "task": task,
        "language": language,
        "setting": setting,
        "metric": "exact_match",
        "value": value,
        "n": 50,
        "seed": seed,
        "point": point,
    }


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "HERE", tmp_path)
    return tmp_path


def zero_shot(folder):
    rows, cells = [], []
    for method, value in METHODS.items():
        for seed in (0, 1):
            seen = row(method, "seen", value + 2 * seed, seed)
            unseen = row(method, "unseen_pair", 100 - value, seed, language="te")
            rows += [seen, unseen]
            if method != "lora":
                tests = {"parse ta": value, "parse te": 100 - value}
                off = {"parse ta": 1.0, "parse te": 9.0}
                cells.append(
                    {"name": f"{method}{seed}", "validation": {"parse ta": 1.0}, "test": tests}
                    | {"config": {"point": "all-4", "method": method, "rate": 0.01, "seed": seed}}
                    | {"language_off": off, "task_off": {"parse ta": 0.0, "parse te": 0.0}}
                    | {"norms": {"encoder 0": {"task=parse": 1.0, "language=ta": 2.0}}}
                )
    (folder / "zero_shot").mkdir()
    study.write_rows(rows, folder / "zero_shot" / "cells.jsonl")
    store = study.Store(folder / "zero_shot" / "cells.jsonl")
    for cell in cells:
        store.add(cell)


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
    gap = goals["FLix over LoRA of the same compute, seen (1 points)"]
    assert gap["value"] == 20.0 and gap["holds"]
    gap = goals["FLix over LoRA of the same compute, unseen pair (1 points)"]
    assert gap["value"] == -20.0 and not gap["holds"]
    text = (folder / "out" / "tables.md").read_text()
    assert "| flix | 61.0 ± 1.0 | 40.0 ± 0.0 |  | 2 |" in text
    assert "| all-4 | flix | 60.0 ± 0.0 | 1.0 ± 0.0 | 0.0 ± 0.0 | 40.0 ± 0.0 | 9.0 ± 0.0 |" in text
    for name in ("zero_shot.svg", "feature_norms.svg"):
        assert "<svg" in (folder / "out" / name).read_text()


def test_the_same_results_give_the_same_plots(folder):
    zero_shot(folder)
    for name in ("one", "two"):
        report.main(["--output", str(folder / name)])
    for file in (folder / "one").iterdir():
        assert file.read_bytes() == (folder / "two" / file.name).read_bytes()


def family_rows():
    for method, value in (("poly_s", 50.0), ("polytropon", 40.0), ("lora", 45.0)):
        yield row(method, "seen", value, point="many")
        for shots in (8, 32):
            yield row(method, "unseen_task", value + shots, point=f"task, {shots} shots", task="qa")


def test_the_family_has_plots_of_shots_and_of_routing(folder):
    (folder / "family").mkdir()
    rows = list(family_rows())
    study.write_rows(rows, folder / "family" / "cells.jsonl")
    store = study.Store(folder / "family" / "cells.jsonl")
    for method in {row["method"] for row in rows}:
        store.add(
            {"name": method, "config": {"name_of": method, "shots": 0}, "trained": 1000}
            | {"steps": 10, "training_seconds": 5.0, "routing": {"x_parse_ta": [0.4, 0.6]}}
        )
    text, goals = report.family(folder / "out")
    assert "| poly_s | 58.0 | 1 |" in text and "task, 32 shots" in text
    values = {goal["name"]: goal["value"] for goal in goals}
    assert values["Poly-S over Polytropon, few-shot (2 points)"] == 10.0
    assert values["Poly-S over shared LoRA, few-shot (2 points)"] == 5.0
    plots = {path.name for path in (folder / "out").iterdir()}
    assert plots == {"parameters.svg", "step_time.svg", "routing.svg", "few_shot_task.svg"}
