"""The entry point from end to end: pretrain, adapt, stop, resume, start from another run."""

import json
import os
import pathlib
import re
import shutil
import signal
import sys

import gin
import jax
import numpy as np
import pytest
from flax import traverse_util

from modjax import adapters, checkpoints, hub, initialize, launch, loop, models
from modjax.data import pipeline, registry, seqio, sources
from modjax.data.vocabularies import vocabulary_of
from modjax.features import FeatureSpace
from modjax.networks import t5

TESTDATA = pathlib.Path(__file__).parent / "testdata"
sys.path.insert(0, str(TESTDATA))
LENGTHS = {"inputs": 16, "targets": 8}
pytestmark = pytest.mark.usefixtures("compile_once")
FEATURES = (("task", ("copy", "turn")), ("language", ("en", "sw")))


def argv(*files, **macros):
    """Flags; a macro's underscores may stand for dots (train__train__log_period)."""
    values = {
        "MIXTURE_OR_TASK_NAME": "toy",
        "MIXTURE_OR_TASK_MODULE": "toy_tasks",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 8,
        "optimizers.schedule.decay": "constant",
        "train.train.tensorboard": False,
    } | {name.replace("__", "."): value for name, value in macros.items()}
    return [f"--gin_file={file}" for file in files] + [
        f"--gin.{name}={str(value)!r}"
        if isinstance(value, pathlib.Path)
        else f"--gin.{name}={value!r}"
        for name, value in values.items()
    ]


def train(*files, **macros):
    """Trains in this process and returns the last state's trained parameters, by path."""
    import train as entry

    launch.load_gin(launch.parse_flags(argv(*files, **macros), "test"), "train")
    state = gin.get_configurable(entry.train)(operative_config=gin.operative_config_str)
    return flat(jax.device_get(state.trained))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    trained = train(
        TESTDATA / "tiny.gin",
        "methods/full.gin",
        "runs/pretrain.gin",
        TRAIN_STEPS=6,
        MODEL_DIR=folder / "run",
        EXPORT_DIR=folder / "base",
        EVAL_STEPS=1,
        WARMUP=2,
        train__train__log_period=2,
    )
    return folder, trained


FLIX = ("runs/finetune.gin", "bases/folder.gin", "methods/flix.gin")


@pytest.fixture(scope="module")
def adapted(pretrained, tmp_path_factory):
    """FLix for eight steps on the pretrained base, not stopped."""
    folder = tmp_path_factory.mktemp("adapted")
    options = {"BASE": pretrained[0] / "base", "TRAIN_STEPS": 8, "FEATURE_DROPOUT": 0.3}
    trained = train(*FLIX, MODEL_DIR=folder / "run", WARMUP=0, **options)
    return folder / "run", trained, options


def test_pretraining_writes_a_base_that_loads_with_the_trained_values(pretrained):
    folder, trained = pretrained
    overrides, base = hub.load_base(folder / "base")
    assert overrides["emb_dim"] == 16
    assert set(flat(base)) == set(trained)
    for path, value in flat(base).items():
        np.testing.assert_array_equal(value, trained[path])
    task = seqio.TaskRegistry.get("toy_copy_en")
    assert vocabulary_of(folder / "base") == task.output_features["inputs"].vocabulary


def test_a_run_writes_its_metrics_its_configuration_and_its_parameters(pretrained):
    folder, trained = pretrained
    rows = lines(folder / "run" / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    wanted = {
        "loss",
        "accuracy",
        "learning_rate",
        "tokens_per_second",
        "steps_per_second",
        "padding",
    }
    assert all(wanted <= set(row) for row in rows)
    assert all(0 < row["padding"] < 1 and row["loss"] > 0 for row in rows)
    (row,) = lines(folder / "run" / "training_eval" / "toy_turn_sw" / "metrics.jsonl")
    assert row["step"] == 6 and row["loss"] > 0
    info = (folder / "run" / "model-info.txt").read_text()
    assert "decoder/logits_dense/kernel" in info and "frozen 0" in info
    config = (folder / "run" / "config.gin").read_text()
    assert "TRAIN_STEPS = 6" in config
    assert checkpoints.read_metadata(folder / "run")["gin"] == config


def test_adapters_move_and_the_base_is_not_saved(adapted, pretrained):
    folder, trained, _ = adapted
    assert all(path.split("/")[-2] == "flix" for path in trained)
    assert all(np.abs(v).max() > 0 for path, v in trained.items() if path.endswith("/b"))
    saved, metadata, step = checkpoints.load_trained(folder)
    assert step == 8 and set(flat(saved)) == set(trained)
    assert FeatureSpace.from_json(metadata["space"]).features == FEATURES
    assert metadata["name"] == "flix"


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(adapted, tmp_path, monkeypatch, capsys):
    _, whole, options = adapted
    place = loop.partitioning.place_batch
    steps = []

    def stop_in_step_three(batch, mesh):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(batch, mesh)

    monkeypatch.setattr(loop.partitioning, "place_batch", stop_in_step_three)
    train(*FLIX, MODEL_DIR=tmp_path, WARMUP=0, **options)
    monkeypatch.undo()
    assert checkpoints.steps(tmp_path) == [3]
    said = capsys.readouterr().err
    assert "stopped by SIGTERM and saved at step 3 of 8; run the same command again" in said
    resumed = train(*FLIX, MODEL_DIR=tmp_path, WARMUP=0, **options)
    assert "resuming at step 3, to step 8" in capsys.readouterr().err
    assert set(resumed) == set(whole)
    for path in whole:
        np.testing.assert_array_equal(resumed[path], whole[path])


def test_a_run_that_goes_on_otherwise_says_so_and_one_that_is_done_keeps_its_configuration(
    adapted, tmp_path, capsys
):
    folder, whole, options = adapted
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    config = (run / "config.gin").read_text()
    found = train(*FLIX, MODEL_DIR=run, WARMUP=0, **options | {"TRAIN_STEPS": 6}, LEARNING_RATE=5.0)
    said = capsys.readouterr().err
    assert f"nothing is left to do: {run} has step 8" in said
    assert re.search(r"not those that the run was begun with: LEARNING_RATE = 5.0, was \S+\n", said)
    assert (run / "config.gin").read_text() == config
    np.testing.assert_array_equal(
        found["decoder/layers_0/mlp/wo/flix/b"], whole["decoder/layers_0/mlp/wo/flix/b"]
    )
    # The same for longer is no change.
    train(*FLIX, MODEL_DIR=run, WARMUP=0, **options | {"TRAIN_STEPS": 9})
    said = capsys.readouterr().err
    assert "step 9/9  loss" in said and "begun with" not in said
    assert (run / "config.gin").read_text() != config


def test_a_run_from_another_checkpoint_keeps_what_each_name_has_learned(pretrained, tmp_path):
    """The first run knows one task and one language; the second adds one of each."""
    options = {"BASE": pretrained[0] / "base"}
    old = train(
        *FLIX, MODEL_DIR=tmp_path / "a", MIXTURE_OR_TASK_NAME="toy_copy", TRAIN_STEPS=2, **options
    )
    options |= {"INITIAL_CHECKPOINT_PATH": tmp_path / "a", "LEARNING_RATE": 0.0, "TRAIN_STEPS": 1}
    new = train(*FLIX, MODEL_DIR=tmp_path / "b", **options)
    space = FeatureSpace.from_json(checkpoints.read_metadata(tmp_path / "b")["space"])
    assert space.features == FEATURES
    options |= {"LEARNING_RATE": 0.02, "WARMUP": 0, "initialize__Start__freeze_known": True}
    moved = train(*FLIX, MODEL_DIR=tmp_path / "c", **options)
    for path in new:
        columns, after, before = (
            x[path] if path.endswith("/a") else x[path].T for x in (new, moved, old)
        )
        assert (before.shape[-1], columns.shape[-1]) == (8, 16)
        # copy, turn, en, sw have four columns each.
        for found in (columns, after):
            np.testing.assert_array_equal(found[:, 0:4], before[:, 0:4])
            np.testing.assert_array_equal(found[:, 8:12], before[:, 4:8])
        if path.endswith("/b"):
            assert not columns[:, 4:8].any() and after[:, 4:8].any() and after[:, 12:].any()
    with pytest.raises(checkpoints.CheckpointError, match="trained without task 'turn', language"):
        train(*FLIX, MODEL_DIR=tmp_path / "a", BASE=options["BASE"], TRAIN_STEPS=4)
    # The same command resumes, also where the first run has gone.
    shutil.rmtree(tmp_path / "a")
    again = train(*FLIX, MODEL_DIR=tmp_path / "c", **options | {"TRAIN_STEPS": 2})
    for path, value in again.items():
        after, before = (x[path] if path.endswith("/a") else x[path].T for x in (again, old))
        np.testing.assert_array_equal(after[:, 0:4], before[:, 0:4])
        assert (value != moved[path]).any()


def test_a_trained_model_is_restored_for_evaluation(adapted, pretrained):
    folder, trained, _ = adapted
    overrides, base = hub.load_base(pretrained[0] / "base")
    rule = adapters.Rule(
        ".*/(query|key|value|out|wi|wi_0|wi_1|wo)",
        adapters.Mixture("flix", adapters.LowRank(4), adapters.Features(dropout=0.3)),
    )
    network = t5.Transformer(t5.T5Config(**overrides))
    model = models.EncoderDecoderModel(adapters.Adapted(network, (rule,)))

    model, params, metadata, step = initialize.restore(model, folder, base)
    assert step == 8 and model.adapted.space.values("language") == ("en", "sw")
    assert set(flat(params)) == set(trained) | set(flat(base))
    flat(base)["encoder/encoder_norm/scale"] += 1  # in place
    with pytest.raises(checkpoints.CheckpointError, match="another base:\n  .*encoder_norm/scale"):
        initialize.restore(model, folder, base)
    with pytest.raises(checkpoints.CheckpointError, match="another method"):
        initialize.restore(models.EncoderDecoderModel(network), folder, base)


def test_what_only_training_draws_need_not_be_repeated(adapted, pretrained, tmp_path):
    """Trained with features dropped at 0.3: evaluated, and gone on from, without; not resumed."""
    folder, trained, options = adapted
    overrides, base = hub.load_base(pretrained[0] / "base")
    rule = adapters.Rule(
        ".*/(query|key|value|out|wi|wi_0|wi_1|wo)",
        adapters.Mixture("flix", adapters.LowRank(4, dropout=0.1), adapters.Features()),
    )
    network = adapters.Adapted(t5.Transformer(t5.T5Config(**overrides)), (rule,))
    _, params, _, _ = initialize.restore(models.EncoderDecoderModel(network), folder, base)
    for path, value in trained.items():
        np.testing.assert_array_equal(flat(params)[path], value)
    options = options | {"FEATURE_DROPOUT": 0.0, "TRAIN_STEPS": 9}
    with pytest.raises(checkpoints.CheckpointError, match="router/dropout: 0.3 in the checkpoint"):
        train(*FLIX, MODEL_DIR=folder, **options)
    options |= {"INITIAL_CHECKPOINT_PATH": folder, "LEARNING_RATE": 0.0, "TRAIN_STEPS": 1}
    options |= {"MIXTURE_OR_TASK_NAME": "toy_copy"}
    for path, value in train(*FLIX, MODEL_DIR=tmp_path, **options).items():
        np.testing.assert_array_equal(value, trained[path])
    # What it started from had trained more, and has not become unseen.
    trained_on = checkpoints.read_metadata(tmp_path)["trained_on"]
    assert set(trained_on) == set(registry.tasks_of("toy"))
    assert set(registry.seen_settings(trained_on, "toy").values()) == {"seen"}


@pytest.fixture
def several():
    """A task that names both languages at once, and one without metadata."""
    import toy_tasks  # noqa: F401

    whole = seqio.TaskRegistry.get("toy_copy_en")
    rows = {"validation": [{"inputs": "copy abc", "targets": "abc"}] * 3, "empty": []}
    features = {name: whole.output_features[name] for name in ("inputs", "targets")}
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
    both = {"task": "copy", "language": ["en", "sw"]}
    for name, metadata in (("toy_both", both), ("toy_bare", None)):
        registry.add_task(name, sources.ExamplesSource(rows), steps, features, metadata=metadata)
    yield
    for name in ("toy_both", "toy_bare"):
        registry.remove(name)


def test_validation_may_have_more_values_at_once_than_training(adapted, tmp_path, several):
    """Its loss is that of the model that the checkpoint gives with both languages on."""
    folder, trained, options = adapted
    options = options | {"INITIAL_CHECKPOINT_PATH": folder, "LEARNING_RATE": 0.0, "TRAIN_STEPS": 1}
    options |= {"EVAL_STEPS": 1, "EVAL_PERIOD": 1, "train__train__eval_mixture": "toy_both"}
    train(*FLIX, MODEL_DIR=tmp_path, **options)
    (row,) = lines(tmp_path / "training_eval" / "toy_both" / "metrics.jsonl")
    network = adapters.Adapted(
        t5.Transformer(hub.config_of(options["BASE"])),
        adapters.rules_of(checkpoints.read_metadata(folder)["method"]),
    )
    model, params, _, _ = initialize.restore(
        models.EncoderDecoderModel(network), folder, hub.load_base(options["BASE"])[1]
    )
    space = registry.with_room(model.adapted.space, "toy_both")
    assert space.slot_features == ("task", "language", "language")
    batches = pipeline.eval_batches(
        "toy_both", "validation", space, task_feature_lengths=LENGTHS, batch_size=8
    )
    batch, _ = next(batches)
    assert (batch["features"][:3] == [1, 1, 2]).all()
    del batch["valid"]
    _, sums = model.with_space(space).loss_sums(params, batch, None)
    np.testing.assert_allclose(row["loss"], sums["loss"] / sums["weight"], rtol=1e-5)


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"train__train__eval_mixture": "toy_bare"}, "task 'toy_bare' has no metadata"),
        (
            {"train__train__eval_mixture": "toy_both", "train__train__eval_split": "empty"},
            "task 'toy_both', split 'empty': Split 'empty' is empty",
        ),
        ({"EVAL_STEPS": -1}, "train.eval_steps must be an integer of at least 0, got -1"),
        ({"EVAL_PERIOD": "2"}, "train.eval_period must be an integer of at least 0, got '2'"),
    ],
)
def test_a_validation_that_cannot_be_is_refused_at_the_start(
    adapted, tmp_path, several, macros, message
):
    options = adapted[2] | {"EVAL_STEPS": 1, "EVAL_PERIOD": 1, "TRAIN_STEPS": 1} | macros
    with pytest.raises(ValueError, match=message):
        train(*FLIX, MODEL_DIR=tmp_path, **options)
    assert not checkpoints.steps(tmp_path)


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"adapters__LowRank__rank": 2}, "another method:\n  rules/0/module/rank: 4 in the"),
        ({"adapters__LowRank__rank": 0}, "rank must be an integer of at least 1"),
        ({"ADAPTED_LAYERS": ".*/qery"}, "matches no linear layer"),
        ({"BATCH_SIZE": 7, "train__train__microbatches": 2}, "batch of 7 does not divide"),
        ({"train__train__base_dtype": "float16"}, "use float32 or bfloat16"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 8}}, 'whole numbers for "inputs" and "targets"'),
        ({"MIXTURE_OR_TASK_NAME": "tyo"}, "Did you mean 'toy'"),
        ({"BASE": "/nowhere"}, "/nowhere does not exist"),
        ({"MODEL_DIR": "/proc/run"}, "MODEL_DIR /proc/run cannot be written"),
        ({"MODEL_DIR": "gs://bucket/run"}, "gs://bucket/run is no path of a folder here"),
        ({"MODEL_DIR": "~/run"}, "~/run is no path of a folder here"),
        (
            {"USE_CACHED_TASKS": "False"},
            "train.use_cached_tasks must be True or False, got 'False'",
        ),
        ({"train__train__pack": "False"}, "train.pack must be True or False, got 'False'"),
        ({"LAZY": "False"}, "Optimizer.lazy must be True or False, got 'False'"),
        ({"SCAN_LAYERS": "False"}, "T5Config.scan_layers must be True or False, got 'False'"),
        ({"initialize__Start__freeze_known": "False"}, "Start.freeze_known must be True or False"),
        ({"train__train__export_dir": "out"}, "export_dir gets a base that was trained itself"),
        ({"train__train__keep_checkpoints": 0}, "keep_checkpoints is at least 1, or None"),
        ({"EVAL_STEPS": 1, "train__train__eval_split": "tset"}, "has no split 'tset'"),
        ({"EVAL_STEPS": 1, "train__train__eval_mixture": "tyo"}, "Did you mean 'toy'"),
        ({"BASE": "random"}, "take the file of a size, as bases/t5_small.gin"),
        ({"INITIAL_CHECKPOINT_PATH": "/nowhere", "MODEL_DIR": "NEW"}, "no checkpoint at /nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(adapted, tmp_path, macros, message):
    folder, _, options = adapted
    options = options | {"MODEL_DIR": folder} | macros
    if options["MODEL_DIR"] == "NEW":
        options["MODEL_DIR"] = tmp_path
    with pytest.raises(ValueError) as error:
        train(*FLIX, **options)
    assert message in str(error.value)
    assert checkpoints.steps(folder) == [8]


def test_a_run_begins_in_no_checkpoint_and_exports_over_nothing(adapted, pretrained, tmp_path):
    folder, _, options = adapted
    inside = checkpoints.locate(folder)
    with pytest.raises(
        checkpoints.CheckpointError, match="_8 is a checkpoint: name a run's folder"
    ):
        train(*FLIX, MODEL_DIR=inside, **options)
    base = pretrained[0] / "base"
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    files = ("runs/finetune.gin", "bases/folder.gin", "methods/full.gin")
    run = {"BASE": base, "MODEL_DIR": tmp_path / "run", "TRAIN_STEPS": 1}
    for begun in (False, True):
        with pytest.raises(launch.ConfigError, match="holds something that is not this run's"):
            train(*files, **run, train__train__export_dir=str(base))
        assert before == {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
        assert bool(checkpoints.steps(tmp_path / "run")) is begun
        train(
            *files, **run, train__train__export_dir=str(tmp_path / "out")
        )  # again where it has written itself
    assert flat(hub.load_base(tmp_path / "out")[1]).keys() == flat(hub.load_base(base)[1]).keys()


def test_a_base_of_another_size_or_vocabulary_is_refused(pretrained, tmp_path):
    sizes = ("runs/finetune.gin", TESTDATA / "tiny.gin", "methods/lora.gin")
    options = {"BASE": pretrained[0] / "base", "TRAIN_STEPS": 1, "MODEL_DIR": tmp_path}
    with pytest.raises(ValueError, match=r"wi_0/kernel is \[16, 32\], the model has \[16, 48\]"):
        train(*sizes, t5__T5Config__mlp_dim=48, **options)
    with pytest.raises(
        ValueError,
        match=r"task 'toy_copy_en': the vocabulary has 259 tokens, the base 100 embeddings",
    ):
        train(*sizes, t5__T5Config__vocab_size=100, **options)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_what_trains_of_a_base_in_bfloat16_trains_in_float32(pretrained, tmp_path, method):
    _, params = hub.load_base(pretrained[0] / "base")
    narrow = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
    hub.save_base(tmp_path / "base", hub.config_of(pretrained[0] / "base"), narrow)
    options = {"BASE": tmp_path / "base", "TRAIN_STEPS": 1, "MODEL_DIR": tmp_path / "run"}
    files = ("runs/finetune.gin", "bases/folder.gin", f"methods/{method}.gin")
    trained = train(*files, LEARNING_RATE=1e-5, WARMUP=0, **options)
    before = flat(narrow)
    for path, value in trained.items():
        assert value.dtype == np.float32, path
        # Half of the last bit of a bfloat16 near 1 is 2e-3.
        assert 0 < np.abs(value - before[path].astype(np.float32)).max() < 1e-4, path


def test_validation_reads_caches_where_training_does(pretrained, tmp_path, monkeypatch):
    asked = set()

    def without_a_cache(name):
        read = getattr(pipeline, name)

        def asked_for(*args, use_cached=False, **options):
            asked.add((name, use_cached))
            return read(*args, **options)

        return asked_for

    for name in ("train_iterator", "eval_batches"):
        monkeypatch.setattr(pipeline, name, without_a_cache(name))
    options = {"BASE": pretrained[0] / "base", "MODEL_DIR": tmp_path, "TRAIN_STEPS": 1}
    train(*FLIX, USE_CACHED_TASKS=True, EVAL_STEPS=1, EVAL_PERIOD=1, **options)
    assert asked == {("train_iterator", True), ("eval_batches", True)}


def test_a_mistake_is_one_line_and_an_exit_status(capsys):
    import train as entry

    assert entry.main(["--gin_file=runs/pretrian.gin"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no gin file 'runs/pretrian.gin'")
    assert "Traceback" not in said


def test_examples_over_the_limit_are_counted_and_reported(pretrained, tmp_path, capsys):
    options = {"BASE": pretrained[0] / "base", "TRAIN_STEPS": 2, "train__train__log_period": 1}
    train(*FLIX, MODEL_DIR=tmp_path, TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 4}, **options)
    said = capsys.readouterr().err
    assert "are cut, so far: {'toy_" in said and "raise TASK_FEATURE_LENGTHS" in said
    counts = [row["too_long"] for row in lines(tmp_path / "train" / "metrics.jsonl")]
    assert 0 < counts[0] <= counts[1]


def test_adamixs_modules_that_no_step_drew_are_where_they_started(pretrained, tmp_path):
    options = {
        "BASE": pretrained[0] / "base",
        "WARMUP": 0,
        "optimizers.Optimizer.weight_decay": 0.5,
        "train.train.checkpoint_start": True,
        "train.train.microbatches": 2,
        "MODULES": 16,
    }
    files = ("runs/finetune.gin", "bases/folder.gin", "methods/adamix_lora.gin")
    options = {name.replace(".", "__"): value for name, value in options.items()}
    whole = train(*files, MODEL_DIR=tmp_path / "run", TRAIN_STEPS=3, **options)
    start, _, _ = checkpoints.load_trained(checkpoints.locate(tmp_path / "run", 0))
    for path, before in flat(start).items():
        if path.endswith("/a"):
            moved = (whole[path] != before).reshape(-1, 16, 4).any(axis=(0, 2)).sum()
            # Of three steps the first leaves a, for b is zero; each other draws in two passes of two microbatches.
            assert 1 <= moved <= 8
        else:
            assert (whole[path] != before).all()
    # Stopped after two steps and resumed, it draws the same.
    train(*files, MODEL_DIR=tmp_path / "part", TRAIN_STEPS=2, **options)
    again = train(*files, MODEL_DIR=tmp_path / "part", TRAIN_STEPS=3, **options)
    for path, value in again.items():
        np.testing.assert_array_equal(value, whole[path])


def test_a_run_tells_what_a_step_costs_and_where_time_went_and_traces_some_steps(
    pretrained, tmp_path, capsys
):
    folder, _ = pretrained
    flags = argv(
        *FLIX,
        TRAIN_STEPS=6,
        MODEL_DIR=tmp_path / "run",
        BASE=folder / "base",
        train__train__profile_steps=(2, 3),
    )
    assert launch.run([*flags, "--profile"], "test", "train", __import__("train").train) == 0
    told = capsys.readouterr().err
    assert "1 device(s) cpu, 1 process(es), mesh data 1" in told and "optimizer" in told
    assert re.search(
        r"a step: [\d.e+]+ FLOPs in matrix products; expected memory .* compiled", told
    )
    assert re.search(r"6 step\(s\) in .*compilation .*checkpoints .*evaluation .*input", told)
    assert "MFU unknown" in told and "tokens/s" in told
    (file,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [2, 3, 4]
