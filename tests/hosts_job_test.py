"""A whole job, gin files to checkpoints, by one, four and two processes in turn: what one alone would have done."""

import importlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from modjax import checkpoints, hub
from modjax.networks import t5

TESTDATA = pathlib.Path(__file__).parent / "testdata"
sys.path.insert(0, str(TESTDATA))
pytestmark = pytest.mark.usefixtures("compile_once")

SHARED = {
    "MIXTURE_OR_TASK_MODULE": "toy_tasks",
    "MIXTURE_OR_TASK_NAME": "toy_turn",
    "BATCH_SIZE": 8,
    "FEATURE_DROPOUT": 0.3,
}
TRAINING = {
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
    "DROPOUT_RATE": 0.1,
    "WARMUP": 0,
    "DATA_SHARDS": 2,
    "train.train.tensorboard": False,
    "train.train.log_period": 1,
    "train.train.checkpoint_period": 2,
    "train.train.keep_checkpoints": None,
}
EVALUATION = {
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 6},
    "SPLIT": "validation",
    "eval.evaluate.max_examples": 5,
    "eval.evaluate.write_report": False,
}


def command(entry, folder, **macros):
    run, values = ("finetune", TRAINING) if entry == "train" else ("eval", EVALUATION)
    files = ("bases/folder.gin", "methods/flix.gin", f"runs/{run}.gin")
    values = {**SHARED, **values, "BASE": str(folder / "base"), **macros}
    return [
        entry,
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{name.replace('__', '.')}={value!r}" for name, value in values.items()),
    ]


def alone(entry, *args, **macros):
    """Runs an entry point in this process."""
    name, *flags = command(entry, *args, **macros)
    assert importlib.import_module(name).main(flags) == 0


def together(count, devices, *commands):
    """Runs commands one after the other in a job of so many processes; gives what each process said."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_COORDINATOR_ADDRESS=f"localhost:{port}")
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    env["JAX_PROCESS_COUNT"] = str(count)
    words = [word for i, part in enumerate(commands) for word in (["--then"] * (i > 0) + part)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(TESTDATA / "job.py"), *words],
            env=env | {"JOB_COMPLETION_INDEX": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [worker.communicate(timeout=900)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)
    return said


def losses(folder):
    text = (folder / "train" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["padding"], row["grad_norm"]) for row in rows]


def test_one_four_two_and_one_processes_in_turn_train_and_evaluate_as_one_alone(tmp_path):
    config = t5.T5Config(260, 16, 2, 8, 32, 1, 1)
    tokens = jax.numpy.ones((1, 4), int)
    init = jax.jit(t5.Transformer(config).init)
    hub.save_base(tmp_path / "base", config, init(jax.random.key(0), tokens, tokens)["params"])
    one, turns = tmp_path / "one", tmp_path / "turns"
    alone("train", tmp_path, MODEL_DIR=str(one), TRAIN_STEPS=8)
    shutil.copytree(one, turns)
    for step in (4, 6, 8):
        shutil.rmtree(turns / f"checkpoint_{step}")

    options = {"MODEL_DIR": str(turns)}
    said = together(4, 1, command("train", tmp_path, TRAIN_STEPS=4, **options))
    assert "process 3 of 4, with 1 of 4 devices" in said[3]
    assert "known by the environment (JAX_PROCESS_COUNT)" in said[0]
    assert "resuming at step 2, to step 4, on 4 cpu device(s) of 4 process(es)" in said[0]
    # Two processes share one copy of the model, and so read the same rows.
    together(
        2,
        1,
        command("train", tmp_path, TRAIN_STEPS=6, train__train__model_parallel=2, **options),
        command(
            "eval", tmp_path, CHECKPOINT_PATH=str(turns), EVAL_OUTPUT_DIR=str(tmp_path / "two")
        ),
    )
    alone("train", tmp_path, TRAIN_STEPS=8, **options)
    assert checkpoints.steps(turns) == [2, 4, 6, 8]

    np.testing.assert_allclose(losses(turns), losses(one), rtol=1e-5)
    expected, found = (
        traverse_util.flatten_dict(checkpoints.load_trained(folder)[0], sep="/")
        for folder in (one, turns)
    )
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=2e-6, err_msg=path)

    alone(
        "eval",
        tmp_path,
        CHECKPOINT_PATH=str(turns / "checkpoint_6"),
        EVAL_OUTPUT_DIR=str(tmp_path / "alone"),
    )
    for name in ("results.json", *(f"predictions/toy_turn_{c}.jsonl" for c in ("en", "sw"))):
        texts = [(tmp_path / by / name).read_text() for by in ("two", "alone")]
        assert texts[0] == texts[1] != ""
