"""Whole jobs on decoder-only and encoder bases: from a folder of weights and a tokenizer to results."""

import dataclasses
import json
import pathlib
import sys

import gin
import jax
import numpy as np
import pytest

import eval as eval_entry
import train as train_entry
from modjax import checkpoints, hub, launch
from modjax.hub import tokenizers
from modjax.networks import decoder, encoder, t5
from tests.testdata import tokenizer_folders

TESTDATA = pathlib.Path(__file__).parent / "testdata"
sys.path.insert(0, str(TESTDATA))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: folder of a tiny random base with a tokenizer}; the tasks of both are importable."""
    root = tmp_path_factory.mktemp("bases")
    folders = {"decoder": root / "decoder", "encoder": root / "encoder"}
    sizes = dict(emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_layers=1)
    for kind, made, module in (
        ("decoder", "byte_level", decoder),
        ("encoder", "word_piece", encoder),
    ):
        source = tokenizer_folders.make(made, root / made)
        rows = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
        described = tokenizers.describe(source)
        size = max([*rows.values(), (described["eos_id"] or 0)]) + 1
        if kind == "decoder":
            config = decoder.DecoderConfig(vocab_size=size, num_kv_heads=1, **sizes)
        else:
            config = encoder.EncoderConfig(vocab_size=size, max_positions=24, **sizes)
        tokens = jax.numpy.ones((1, 4), int)
        params = jax.jit(module.Transformer(config).init)(jax.random.key(0), tokens)["params"]
        hub.save_base(folders[kind], config, params)
        tokenizers.copy(source, folders[kind])
    with pytest.MonkeyPatch.context() as patch:
        for kind, folder in folders.items():
            patch.setenv(f"KINDS_{kind.upper()}", str(folder))
        yield folders


def flags(files, lengths, **macros):
    values = {
        "MIXTURE_OR_TASK_MODULE": "kinds_tasks",
        "TASK_FEATURE_LENGTHS": lengths,
        "BATCH_SIZE": 8,
    } | {name.replace("__", "."): value for name, value in macros.items()}
    texts = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in values.items()}
    return [f"--gin_file={f}" for f in files] + [f"--gin.{k}={v!r}" for k, v in texts.items()]


def job(base, run, mixture, files, lengths, steps, **more):
    """Trains and evaluates; gives the training losses, results.json and the predictions' folder."""
    options = dict(MIXTURE_OR_TASK_NAME=mixture, MODEL_DIR=run, LEARNING_RATE=0.03) | more
    quiet = dict(train__train__tensorboard=False, train__train__log_period=5)
    files, model = files[:-1], files[-1]
    common = (model, *files)
    status = train_entry.main(
        flags(
            (*common, "runs/finetune.gin"),
            lengths,
            TRAIN_STEPS=steps,
            BASE=base,
            **options,
            **quiet,
        )
    )
    assert status == 0
    gin.clear_config(clear_constants=True)
    kept = {k: v for k, v in more.items() if k == "NUM_OUTPUTS"}
    status = eval_entry.main(
        flags(
            (*common, "runs/eval.gin"),
            lengths,
            MIXTURE_OR_TASK_NAME=mixture,
            BASE=base,
            CHECKPOINT_PATH=run,
            EVAL_OUTPUT_DIR=run / "eval",
            SPLIT="train",
            **kept,
        )
    )
    assert status == 0
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    return losses, json.loads((run / "eval" / "results.json").read_text())


LENGTHS = {"inputs": 24, "targets": 12}


def test_flix_on_a_decoder_trains_packed_writes_and_chooses(bases, tmp_path):
    files = ("methods/flix.gin", "bases/decoder_folder.gin")
    losses, rows = job(bases["decoder"], tmp_path / "copy", "kinds_copy", files, LENGTHS, 20)
    assert losses[-1] < losses[0]
    assert {row["language"] for row in rows} == {"el", "ru", "ko"}
    config = (tmp_path / "copy" / "config.gin").read_text()
    assert "models.DecoderOnlyModel.eos_id = @eos/launch.token_id()" in config
    described = tokenizers.describe(bases["decoder"])
    for name in ("bos", "eos"):
        assert launch.token_id(str(bases["decoder"]), name) == described[f"{name}_id"] is not None
    with pytest.raises(launch.ConfigError, match="has no tokenizer, so its eos token is not known"):
        launch.token_id(str(tmp_path), "eos")
    predictions = tmp_path / "copy" / "eval" / "predictions" / "kinds_copy_el.jsonl"
    first = json.loads(predictions.read_text().splitlines()[0])
    assert first["input"].startswith("copy ") and isinstance(first["prediction"], str)

    # The possible answers are compared, whatever the model would write.
    gin.clear_config(clear_constants=True)
    _, rows = job(bases["decoder"], tmp_path / "say", "kinds_say", files, LENGTHS, 40)
    said = {
        json.loads(line)["prediction"]
        for path in (tmp_path / "say" / "eval" / "predictions").iterdir()
        for line in path.read_text().splitlines()
    }
    assert said <= {"el", "ru", "ko"}
    # The language is a feature of the dataset, so that FLix has nothing to find out.
    assert np.mean([row["value"] for row in rows]) > 60


@pytest.mark.parametrize(
    "file", ["decoder_folder", "encoder_folder", "folder", "t5_small", "llama3_8b"]
)
def test_a_run_says_how_layers_of_any_base_compute(file, bases, tmp_path):
    from modjax import launch
    from modjax.aot import job as jobs

    folder = bases.get(file.removesuffix("_folder"), tmp_path)
    if file == "folder":
        config = t5.T5Config(vocab_size=8, emb_dim=8, num_heads=1, head_dim=8, mlp_dim=8)
        config = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
        tokens = jax.numpy.ones((1, 4), int)
        made = jax.jit(t5.Transformer(config).init)(jax.random.key(0), tokens, tokens)
        hub.save_base(tmp_path, config, made["params"])
    said = dict(DTYPE="bfloat16", REMAT_POLICY="minimal", SCAN_LAYERS=True)
    for asked in ({}, said):
        gin.clear_config(clear_constants=True)
        outputs = {"NUM_OUTPUTS": 2} if file == "encoder_folder" else {}
        files = (f"bases/{file}.gin", "methods/lora.gin", "runs/finetune.gin")
        argv = flags(files, LENGTHS, BASE=folder, **outputs, **asked)
        config = jobs.from_gin(launch.parse_flags(argv, ""), {"task": 1}, 0).model.network.config
        found = (config.dtype, config.remat_policy, config.scan_layers)
        assert found == (tuple(said.values()) if asked else ("float32", "none", False))


def test_a_head_trains_with_lora_on_an_encoder_and_is_in_the_checkpoint(bases, tmp_path):
    files = ("methods/lora.gin", "bases/encoder_folder.gin")
    lengths = {"inputs": 24, "targets": 1}
    losses, rows = job(
        bases["encoder"],
        tmp_path / "run",
        "kinds_name",
        files,
        lengths,
        300,
        NUM_OUTPUTS=3,
        LEARNING_RATE=0.01,
    )
    assert losses[-1] < losses[0]
    exact = [row["value"] for row in rows if row["metric"] == "exact_match"]
    assert np.mean(exact) > 80, rows
    info = (tmp_path / "run" / "model-info.txt").read_text()
    assert "also trained: classifier/logits_dense/kernel 16 x 3" in info
    assert "trained 1,843 " in info  # 1,792 of LoRA, and the head's 51
    described = checkpoints.read_metadata(tmp_path / "run")
    heads = [path for path in described["trained"] if path.startswith("classifier/")]
    assert sorted(heads) == ["classifier/logits_dense/bias", "classifier/logits_dense/kernel"]
    assert not any("classifier" in path and "lora" in path for path in described["trained"])


def test_a_base_with_a_head_goes_on_with_it_and_another_number_of_labels_starts_anew(
    bases, tmp_path, capsys
):
    """The head of a folder, and that of a checkpoint, are where training starts if they fit."""
    _, params = hub.load_base(bases["encoder"])
    config = dataclasses.replace(hub.config_of(bases["encoder"]), head="pooled", num_outputs=3)
    draw = np.random.default_rng(0)
    params["classifier"] = {
        "logits_dense": {"kernel": draw.normal(size=(16, 3)), "bias": draw.normal(size=3)}
    }
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    hub.save_base(tmp_path / "base", config, params)
    tokenizers.copy(bases["encoder"], tmp_path / "base")
    options = dict(
        MIXTURE_OR_TASK_NAME="kinds_name",
        BASE=tmp_path / "base",
        TRAIN_STEPS=1,
        train__train__tensorboard=False,
        train__train__checkpoint_start=True,
    )
    files = ("methods/lora.gin", "bases/encoder_folder.gin", "runs/finetune.gin")
    lengths = {"inputs": 24, "targets": 1}

    def start(folder, **more):
        gin.clear_config(clear_constants=True)
        argv = flags(files, lengths, MODEL_DIR=tmp_path / folder, **(options | more))
        assert train_entry.main(argv) == 0
        trained, _, _ = checkpoints.load_trained(tmp_path / folder / "checkpoint_0")
        return trained["classifier"]["logits_dense"]["kernel"], capsys.readouterr()

    kept, _ = start("same")
    np.testing.assert_array_equal(kept, params["classifier"]["logits_dense"]["kernel"])
    after, _, _ = checkpoints.load_trained(tmp_path / "same")
    # From that run's checkpoint: its head as it was left, if the outputs are the same.
    again, _ = start("again", INITIAL_CHECKPOINT_PATH=tmp_path / "same")
    np.testing.assert_array_equal(again, after["classifier"]["logits_dense"]["kernel"])
    options |= dict(BASE=bases["encoder"], MIXTURE_OR_TASK_NAME="kinds_measure", NUM_OUTPUTS=1)
    first, _ = start("first")
    other, said = start(
        "other",
        MIXTURE_OR_TASK_NAME="kinds_name",
        NUM_OUTPUTS=3,
        INITIAL_CHECKPOINT_PATH=tmp_path / "first",
    )
    assert first.shape == (16, 1) and other.shape == (16, 3)
    assert "has another form than this run's, which starts anew" in said.out


def test_one_output_learns_a_number(bases, tmp_path):
    files = ("methods/full.gin", "bases/encoder_folder.gin")
    losses, rows = job(
        bases["encoder"],
        tmp_path / "run",
        "kinds_measure",
        files,
        {"inputs": 24, "targets": 1},
        400,
        NUM_OUTPUTS=1,
        LEARNING_RATE=0.01,
    )
    assert losses[-1] < 0.5 * losses[0]
    assert [row["metric"] for row in rows] == ["pearson"] and rows[0]["value"] > 80, rows


@pytest.mark.parametrize(
    "kind, files, macros, message",
    [
        ("decoder", ("methods/lora.gin", "bases/folder.gin"), {}, "use bases/decoder_folder.gin"),
        ("encoder", ("methods/lora.gin", "bases/decoder_folder.gin"), {}, "use bases/encoder_f"),
        (
            "encoder",
            ("methods/lora.gin", "bases/encoder_folder.gin"),
            {},
            "set --gin.NUM_OUTPUTS=N",
        ),
        (
            "decoder",
            ("methods/lora.gin", "bases/decoder_folder.gin"),
            {"MIXTURE_OR_TASK_NAME": "kinds_name"},
            "task 'kinds_name_el': token t of the vocabulary",
        ),
        (
            "encoder",
            ("methods/lora.gin", "bases/encoder_folder.gin"),
            {"NUM_OUTPUTS": 2, "MIXTURE_OR_TASK_NAME": "kinds_name"},
            "has 3 labels, the network 2",
        ),
        (
            "encoder",
            ("methods/lora.gin", "bases/encoder_folder.gin"),
            {"NUM_OUTPUTS": 1, "MIXTURE_OR_TASK_NAME": "kinds_name"},
            "has labels as targets, and the network 1 output",
        ),
        (
            "decoder",
            ("methods/lora.gin", "bases/decoder_folder.gin"),
            {"models__DecoderOnlyModel__eos_id": 5},
            "ends its targets with token .* set the model's eos_id",
        ),
        ("decoder", ("methods/lora.gin", "bases/decoder_folder.gin"), {"BASE": None}, "BASE must"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    bases, tmp_path, capsys, kind, files, macros, message
):
    options = {"MIXTURE_OR_TASK_NAME": "kinds_copy", "BASE": bases[kind], "TRAIN_STEPS": 1}
    argv = flags((*files, "runs/finetune.gin"), LENGTHS, MODEL_DIR=tmp_path, **(options | macros))
    assert train_entry.main(argv) == 2
    error = capsys.readouterr().err
    import re

    assert re.search(message, error), error
    assert error.count("\n") == 1 and not list(tmp_path.glob("checkpoint_*"))


def test_a_base_may_be_given_as_the_initial_checkpoint(bases, tmp_path):
    files = ("methods/lora.gin", "bases/decoder_folder.gin", "runs/finetune.gin")
    argv = flags(
        files,
        LENGTHS,
        MIXTURE_OR_TASK_NAME="kinds_copy",
        INITIAL_CHECKPOINT_PATH=bases["decoder"],
        MODEL_DIR=tmp_path / "run",
        TRAIN_STEPS=1,
        train__train__tensorboard=False,
    )
    assert train_entry.main(argv) == 0
    assert list((tmp_path / "run").glob("checkpoint_1"))
