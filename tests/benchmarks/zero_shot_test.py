"""The study of zero-shot: which cells there are, how a rate is chosen, and what is reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cells, study, trainings
from benchmarks.words import setting as words
from benchmarks.zero_shot import averages, orthogonal, run
from modjax import adapters
from modjax.evaluation import results

POINT = "all-4"


RUN = [f"{name} = 'some'" for name in ("MIXTURE_OR_TASK_NAME", "BASE", "MODEL_DIR")]


@pytest.fixture
def gin():
    import gin

    yield gin
    gin.clear_config(clear_constants=True)


@pytest.mark.parametrize("method", run.METHODS)
def test_the_bindings_of_every_method_are_read(method, gin):
    cell = run.Cell("all-16", method)
    files = ("bases/folder.gin", *cell.files(), str(words.HERE / "adapt.gin"))
    cells.configure("train", files, [*RUN, *cell.bindings()])
    assert gin.query_parameter("%METHOD")


def test_the_languages_leave_the_span_of_the_tasks_and_nothing_else_moves():
    key = jax.random.split(jax.random.key(0), 2)
    params = {"flix": {"a": jax.random.normal(key[0], (6, 5)), "b": jnp.ones((5, 3))}}
    step = optax.chain(orthogonal.adamw(2, 30.0), optax.scale_by_learning_rate(0.01))
    moved, _ = step.update(jax.tree.map(jnp.zeros_like, params), step.init(params), params)
    a = np.asarray(params["flix"]["a"], np.float64)
    tasks, languages = a[:, :2], a[:, 2:]
    within = tasks @ np.linalg.solve(tasks.T @ tasks, tasks.T @ languages)
    assert np.abs(within).max() > 0.1
    np.testing.assert_allclose(moved["flix"]["a"][:, 2:], -0.3 * within, rtol=1e-4, atol=1e-6)
    assert not moved["flix"]["a"][:, :2].any() and not moved["flix"]["b"].any()


def test_a_layer_of_tasks_alone_is_refused():
    params = {"flix": {"a": jnp.ones((6, 2))}}
    step = orthogonal.adamw(2, 30.0)
    with pytest.raises(ValueError, match=r"'flix'.*'a'.*tasks' columns alone"):
        step.update(params, step.init(params), params)


def test_the_tasks_columns_are_the_first_ones():
    from modjax.data import registry
    from tasks import babel
    from tasks.babel_world import BabelConfig

    babel.register(BabelConfig(), "columns")
    space = registry.feature_space("columns_train")
    modules = adapters.Features().modules(space)
    assert [str(m).partition("=")[0] for m in modules] == ["task"] * 4 + ["language"] * 11


@pytest.fixture
def settings(tmp_path):
    return trainings.Settings(tmp_path)


def plan(settings, methods=("lora", "flix"), seeds=(0, 1)):
    store = study.Store(settings.output / "cells.jsonl")
    return run.Plan([POINT], methods, seeds, store, settings), store


def done(store, settings, cell, score=50.0, **more):
    test = {"parse ta": score, "parse te": 10.0, "parse mo": 5.0}
    found = {"validation": {"parse ta": score}, "test": test, **more}
    store.add({"name": cell.name, "config": cell.config(settings), **found})


def with_base(store, settings):
    folder = settings.output / "bases" / "all"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    done(store, settings, run.Cell(POINT))


def test_the_base_comes_first(settings):
    first, _ = plan(settings)
    assert [cell.name for cell in first.open()] == ["base_all"]


def test_a_base_whose_folder_is_gone_is_made_again(settings):
    first, store = plan(settings)
    done(store, settings, run.Cell(POINT))
    assert [cell.name for cell in first.open()] == ["base_all"]


def test_rates_are_tried_with_one_seed_and_the_best_is_taken_for_the_others(settings):
    first, store = plan(settings, methods=("lora",))
    with_base(store, settings)
    assert [(c.rate, c.seed) for c in first.open()] == [(rate, 0) for rate in run.RATES]
    for rate, score in zip(run.RATES, (20.0, 60.0, 60.0), strict=True):
        assert first.rate(POINT, "lora") is None
        done(store, settings, run.Cell(POINT, "lora", rate, 0), score)
    assert first.rate(POINT, "lora") == run.RATES[1]  # the smaller one, of equals
    assert first.open() == [run.Cell(POINT, "lora", run.RATES[1], 1)]


def test_all_methods_have_gin_files_and_sizes_of_their_rank():
    for method in run.METHODS:
        cell = run.Cell("all-16", method, 0.01, 0)
        assert not any("{R" in binding for binding in cell.bindings())
    assert run.Cell("all-16", "flix").bindings()[0] == "adapters.LowRank.rank = 8"
    shared = run.Cell("all-16", "flix_shared").bindings()
    assert "adapters.LowRank.rank = {'task': 8, 'language': 4, 'shared': 4}" in shared
    flix = {name for name in run.METHODS if name.startswith("flix")}
    assert {name for name, method in run.METHODS.items() if method.off} == flix


def test_results_have_the_policy_as_a_method_of_its_own(settings):
    first, store = plan(settings, methods=("flix",), seeds=(0,))
    with_base(store, settings)
    off = {"parse ta": 1.0, "parse te": 30.0, "parse mo": 1.0}
    for rate in run.RATES:
        done(store, settings, run.Cell(POINT, "flix", rate, 0), language_off=off)
    rows = run.rows(first)
    values = {(r["method"], r["setting"]): r["value"] for r in rows}
    policy = "flix" + run.POLICY
    assert values["flix", "unseen_pair"] == 10.0 and values[policy, "unseen_pair"] == 30.0
    assert values["flix", "seen"] == values[policy, "seen"] == 50.0
    assert values["flix", "unseen_language"] == values[policy, "unseen_language"] == 5.0
    results.check([{k: v for k, v in row.items() if k != "point"} for row in rows], "rows")
    assert {row["point"] for row in rows} == {POINT}
    json.dumps(rows)


def test_relatives_are_the_languages_that_trained_with_the_task():
    from tasks.babel_examples import Babel

    datasets = Babel().datasets()
    assert averages.relatives(datasets, "parse", "te")["family"] == ["ta", "ti"]
    assert averages.relatives(datasets, "tag", "mo")["family"] == ["ma", "me", "mi"]
    found = averages.relatives(datasets, "parse", "mo")["all"]
    assert found == ["ta", "ka", "ma", "ke", "ti", "mi", "ko"]


def test_averages_stand_beside_what_the_checkpoint_gave_and_are_of_that_checkpoint(settings):
    cells = [run.Cell(POINT, "flix", 0.004, seed) for seed in (0, 1)]
    of = {"commit": "abc", "date": "2026-01-01"}
    gave = {
        "test": {"parse te": 10.0, "parse mo": 20.0},
        "language_off": {"parse te": 30.0, "parse mo": 0.0},
        **of,
    }
    store = study.Store(settings.output / "averages.jsonl")
    chosen = [(cell, gave) for cell in cells]
    assert averages.table(store, chosen) == ""
    for cell, value in zip(cells, (40.0, 50.0), strict=True):
        found = {"family": {"parse te": value, "parse mo": 60.0}}
        found["all"] = {"parse te": 70.0, "parse mo": 80.0}
        store.add({"name": cell.name, "config": averages.trained(gave), **found})
    row = averages.table(store, chosen).splitlines()[-1]
    shown = [text.partition(" ± ")[0] for text in row.strip("| ").split(" | ")]
    assert shown == [POINT, "flix", "10.0", "30.0", "45.0", "70.0", "20.0", "60.0", "80.0", "2"]
    with pytest.raises(SystemExit, match="commit was 'abc' and is 'new'"):
        averages.table(store, [(cells[0], gave | {"commit": "new"})])
