"""The six-language benchmark's run: its gin files fit together, and done steps are not repeated."""

import json
import os

import pytest
import seqio

from benchmarks.mtop6 import run
from modjax import adapters, launch
from modjax.data import registry
from tasks import files, mtop6


@pytest.fixture
def gin():
    import gin

    yield gin
    gin.clear_config(clear_constants=True)


@pytest.fixture
def base(tmp_path):
    """A folder with the configuration of a base, as `bases/folder.gin` reads it."""
    from modjax import hub
    from modjax.networks import t5

    config = t5.T5Config(
        vocab_size=384,
        emb_dim=8,
        num_heads=1,
        head_dim=8,
        mlp_dim=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    import jax
    import numpy as np

    tokens, network = np.ones((1, 2), np.int32), t5.Transformer(config)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens, tokens, tokens))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    hub.save_base(tmp_path / "base", config, params)
    return tmp_path / "base"


def called(monkeypatch, gin, entry, name):
    """Replaces an entry point's function by one that keeps what gin would call it with."""
    calls = []
    real = gin.get_configurable

    def configurable(function):
        assert (function.__module__, function.__name__) == (entry, name)
        bound = gin.get_bindings(real(function))
        return lambda **kwargs: calls.append({**bound, **kwargs})

    monkeypatch.setattr(gin, "get_configurable", configurable)
    return calls


def test_pretraining_trains_all_of_a_base_whose_vocabulary_is_that_of_the_tasks(
    monkeypatch, gin, tmp_path
):
    calls = called(monkeypatch, gin, "train", "train")
    run.pretrain(tmp_path / "b", ["DATA_DIR = '/data'"])
    (call,) = calls
    assert call["model"].adapted is None and call["export_dir"] == str(tmp_path / "b")
    config = call["model"].network.config
    for task in registry.tasks_of(call["mixture_or_task_name"]):
        features = seqio.TaskRegistry.get(task).output_features
        assert features["targets"].vocabulary.vocab_size <= config.vocab_size
    assert files.data_dir() == "/data"


@pytest.mark.parametrize("method", ["lora", "flix"])
def test_methods_adapt_the_same_base_with_the_same_compute(monkeypatch, gin, base, method):
    calls = called(monkeypatch, gin, "train", "train")
    run.adapt(method, 3, base, base.parent / "m", ["TRAIN_STEPS = 7"])
    (call,) = calls
    assert (call["random_seed"], call["train_steps"]) == (3, 7)
    assert call["mixture_or_task_name"] == "mtop6_train" and call["base"] == str(base)
    lengths, (inputs, targets, _) = call["task_feature_lengths"], mtop6.limits()
    assert lengths == {"inputs": inputs + 1, "targets": targets + 1}
    (rule,) = call["model"].adapted.rules
    # An example has a task and a language.
    active = {"lora": 1, "flix": 2}[method]
    assert isinstance(rule, adapters.Rule) and rule.mixture.module.rank * active == 16


def test_the_evaluation_covers_all_languages_and_is_not_shorter_than_training(
    monkeypatch, gin, base
):
    calls = called(monkeypatch, gin, "eval", "evaluate")
    run.evaluate("flix", base, base.parent / "m", [])
    (call,) = calls
    assert call["mixture_or_task_name"] == "mtop6_parse" and call["split"] == "test"
    inputs, targets, _ = mtop6.limits()
    assert call["task_feature_lengths"]["inputs"] > inputs
    assert call["task_feature_lengths"]["targets"] > targets
    assert call["checkpoint_path"] == str(base.parent / "m")


def test_a_misspelt_binding_of_the_run_is_an_error(gin, tmp_path):
    with pytest.raises(launch.ConfigError, match="TRAIN_STEP "):
        run.pretrain(tmp_path / "b", ["TRAIN_STEP = 1"])


def test_done_steps_are_not_repeated_and_failed_ones_are(tmp_path):
    path, done = tmp_path / "seconds.json", []

    def fail():
        raise RuntimeError("stopped")

    ledger = run.Ledger(path)
    ledger.do("one", lambda: done.append("one"))
    with pytest.raises(RuntimeError):
        ledger.do("two", fail)
    again = run.Ledger(path)
    again.do("one", lambda: done.append("one again"))
    again.do("two", lambda: done.append("two"))
    assert done == ["one", "two"]
    assert set(json.loads(path.read_text())) == {"one", "two"}


@pytest.fixture
def workers(tmp_path):
    made = []

    def make(script, count):
        path = tmp_path / "script.py"
        path.write_text(script)
        made.append(run.Workers(["--a"], tmp_path, count, str(path)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_step_is_a_process_with_the_commands_arguments_and_a_log(workers, tmp_path):
    work = workers("import sys; print(sys.argv[1:])", 1)
    work.run("lora_0")
    work.run("lora_0")
    assert (tmp_path / "lora_0.log").read_text() == "['--a', '--only=lora_0']\n" * 2


def test_a_failing_step_is_an_error_with_the_end_of_its_log_and_gives_its_core_back(workers):
    work = workers("print('why'); raise SystemExit(3)", 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"lora_0 ended with status 3(.|\n)*why"):
            work.run("lora_0")


def test_a_step_alone_has_a_device_for_each_of_the_cores(workers, tmp_path):
    workers("import os; print(os.environ['XLA_FLAGS'])", 3).run("pretrain", alone=True)
    assert "device_count=3" in (tmp_path / "pretrain.log").read_text()


def test_processes_get_a_core_each_where_there_are_enough():
    usable = sorted(os.sched_getaffinity(0))
    assert run.cores(1) == [None]
    assert run.cores(len(usable) + 1) == [None] * (len(usable) + 1)
    if len(usable) > 1:
        assert run.cores(2) == usable[:2]


def test_the_base_comes_before_the_runs_and_each_run_before_its_evaluation(monkeypatch, tmp_path):
    done, told = [], []
    monkeypatch.setattr(run.Workers, "run", lambda self, step, alone=False: done.append(step))
    monkeypatch.setattr(run, "tell", lambda args, runs, ledger, minutes: told.append(runs))
    command = ["--output", str(tmp_path), "--methods", "lora", "flix", "--seeds", "4"]
    assert run.main(command) == run.main(command) == 0
    assert done[0] == "pretrain"
    assert sorted(done[1:]) == ["flix_4", "flix_4_eval", "lora_4", "lora_4_eval"]
    assert all(done.index(name) < done.index(f"{name}_eval") for name in ("lora_4", "flix_4"))
    assert told == [["lora_4", "flix_4"]] * 2


def test_a_run_that_fails_ends_the_benchmark(monkeypatch, tmp_path):
    def work(self, step, alone=False):
        if step == "lora_0":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(run.Workers, "run", work)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main(
            ["--output", str(tmp_path), "--methods", "lora", "--seeds", "0", "--parallel", "1"]
        )
    assert set(run.Ledger(tmp_path / "seconds.json").seconds) == {"pretrain"}
