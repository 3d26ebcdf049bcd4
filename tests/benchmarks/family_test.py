"""The study of the family: which cells there are, what starts from what, and what is reported."""

import pytest

from benchmarks import cells, study, trainings
from benchmarks.family import run
from benchmarks.words import setting as words

RUN = [f"{name} = 'some'" for name in ("MIXTURE_OR_TASK_NAME", "BASE", "MODEL_DIR")]


@pytest.fixture
def gin():
    import gin

    yield gin
    gin.clear_config(clear_constants=True)


@pytest.fixture
def settings(tmp_path):
    return trainings.Settings(tmp_path)


def plan(settings, methods=("poly_s",), ways=("z",), seeds=(0, 1)):
    store = study.Store(settings.output / "cells.jsonl")
    return run.Plan(methods, ways, seeds, store, settings), store


def done(store, settings, cell, score=50.0, source=None):
    validation = {"0": 0.0, "200": score} if cell.shots else {"parse ta": score}
    found = {"validation": validation, "test": {"parse ta": score, "qa ta": 1.0}}
    store.add({"name": cell.name, "config": run.config(cell, source, settings), **found})
    (settings.output / "family" / cell.name).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", [*run.METHODS, *run.WAYS])
def test_the_bindings_of_every_method_and_way_are_read(name, gin):
    method = run.WAYS[name].method if name in run.WAYS else run.METHODS[name]
    files = ("bases/folder.gin", f"methods/{method.file}.gin", str(words.HERE / "adapt.gin"))
    cells.configure("train", files, [*RUN, *method.bindings])
    assert gin.query_parameter("%METHOD")


def test_a_way_waits_for_the_rate_and_the_checkpoint_of_its_source(settings):
    first, store = plan(settings)
    trials = [run.Cell("poly_s", rate, 0) for rate in run.RATES]
    assert [cell for cell, _ in first.open()] == trials
    for trial, score in zip(trials, (40.0, 60.0, 50.0), strict=True):
        done(store, settings, trial, score)
    best = run.Cell("poly_s", run.RATES[1], 0)
    opened = first.open()
    assert opened[-1] == (run.Cell("poly_s", run.RATES[1], 1), None)
    tried = run.WAYS["z"].method.few_rates
    assert len(opened) == len(run.SHOTS) * len(run.TARGETS) * len(tried) + 1
    assert {cell.rate for cell, _ in opened if cell.shots} == set(tried)
    assert all(source == best for cell, source in opened if cell.shots)


def test_a_way_of_another_seed_starts_from_that_seeds_checkpoint(settings):
    first, store = plan(settings)
    for rate in run.RATES:
        done(store, settings, run.Cell("poly_s", rate, 0))
    source = run.Cell("poly_s", run.RATES[0], 0)
    for cell, _ in first.open():
        if cell.shots:
            done(store, settings, cell, 10 * cell.rate, source)
    waiting = [cell for cell, _ in first.open()]
    assert waiting == [run.Cell("poly_s", run.RATES[0], 1)]
    done(store, settings, waiting[0])
    assert {(cell.rate, cell.seed, source) for cell, source in first.open()} == {
        (max(run.WAYS["z"].method.few_rates), 1, waiting[0])
    }


def test_what_a_way_learnt_from_another_checkpoint_is_not_its_result(settings):
    first, store = plan(settings)
    for rate, score in zip(run.RATES, (40.0, 60.0, 50.0), strict=True):
        done(store, settings, run.Cell("poly_s", rate, 0), score)
    cell = next(cell for cell, _ in first.open() if cell.shots)
    done(store, settings, cell, source=run.Cell("poly_s", run.RATES[0], 0))
    with pytest.raises(SystemExit, match=r"source was 'poly_s_0.003_0' and is 'poly_s_0.01_0'"):
        first.open()


def test_what_a_way_starts_from_is_trained_though_nobody_asked_for_it(settings):
    first, _ = plan(settings, methods=("lora",), ways=("mu",))
    assert {cell.name_of for cell, _ in first.open()} == {"lora", "poly_s"}


def test_a_source_whose_checkpoint_is_gone_is_trained_again(settings):
    first, store = plan(settings, seeds=(0,))
    for rate, score in zip(run.RATES, (60.0, 40.0, 40.0), strict=True):
        done(store, settings, run.Cell("poly_s", rate, 0), score)
    best = run.Cell("poly_s", run.RATES[0], 0)
    assert all(cell.shots for cell, _ in first.open())
    best.folder(settings).rmdir()
    assert first.open() == [(best, None)]


def test_a_way_from_the_base_waits_for_nothing(settings):
    first, _ = plan(settings, methods=(), ways=("lora_from_base",))
    assert all(source is None for _, source in first.open()) and first.open()


def test_results_say_what_they_are_of(settings):
    first, store = plan(settings, seeds=(0,))
    for rate in run.RATES:
        done(store, settings, run.Cell("poly_s", rate, 0))
    source = run.Cell("poly_s", run.RATES[0], 0)
    for rate in run.WAYS["z"].method.few_rates:
        done(store, settings, run.Cell("z", rate, 0, "task", 8), source=source)
    rows = run.rows(first)
    assert {(row["method"], row["point"], row["setting"]) for row in rows} == {
        ("poly_s", "many", "seen"),
        ("poly_s", "many", "unseen_task"),
        ("z", "task, 8 shots", "seen"),
        ("z", "task, 8 shots", "unseen_task"),
    }


def test_questions_are_held_out_in_every_language(settings):
    run.world(settings.output)
    from modjax.data import registry

    seen = registry.tasks_of(f"{run.WORLD}_train")
    assert len(seen) == 28 and not any("_qa_" in name or name.endswith("_mo") for name in seen)
    assert registry.tasks_of(f"{run.WORLD}_new_task") == [
        f"family_qa_{c}" for c in ("ka", "ma", "ta")
    ]
