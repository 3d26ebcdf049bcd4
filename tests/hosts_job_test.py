"""A whole job, gin files to checkpoints, by several processes in turn: what one alone would have done.

The longer one is marked slow: `make hosts`.
"""

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
}
TRAINING = {
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
    "DROPOUT_RATE": 0.1,
    "WARMUP": 0,
    "optimizers.schedule.decay": "constant",
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


def command(entry, folder, method="flix", **macros):
    run, values = ("finetune", TRAINING) if entry == "train" else ("eval", EVALUATION)
    files = ("bases/folder.gin", f"methods/{method}.gin", f"runs/{run}.gin")
    dropout = {"FEATURE_DROPOUT": 0.3} if method == "flix" else {}
    values = {**SHARED, **dropout, **values, "BASE": str(folder / "base"), **macros}
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


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with a base, and a run of one process of eight steps with a checkpoint after every other."""
    folder = tmp_path_factory.mktemp("one")
    config = t5.T5Config(260, 16, 2, 8, 32, 1, 1)
    tokens = jax.numpy.ones((1, 4), int)
    init = jax.jit(t5.Transformer(config).init)
    hub.save_base(folder / "base", config, init(jax.random.key(0), tokens, tokens)["params"])
    alone("train", folder, MODEL_DIR=str(folder / "run"), TRAIN_STEPS=8)
    return folder


@pytest.fixture
def begun(one, tmp_path):
    """The run as it was after two steps."""
    folder = tmp_path / "turns"
    shutil.copytree(one / "run", folder)
    for step in (4, 6, 8):
        shutil.rmtree(folder / f"checkpoint_{step}")
    return folder


def assert_same(folder, expected):
    assert checkpoints.steps(folder)[-1] == checkpoints.steps(expected)[-1]
    np.testing.assert_allclose(losses(folder), losses(expected), rtol=1e-5)
    want, found = (
        traverse_util.flatten_dict(checkpoints.load_trained(run)[0], sep="/")
        for run in (expected, folder)
    )
    for path, value in want.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=2e-6, err_msg=path)


def test_two_processes_go_on_from_one_and_one_from_two(one, begun):
    options = {"MODEL_DIR": str(begun)}
    said = together(2, 1, command("train", one, TRAIN_STEPS=6, **options))
    assert "process 1 of 2, with 1 of 2 devices" in said[1]
    assert "known by the environment (JAX_PROCESS_COUNT)" in said[0]
    assert (
        "resuming at step 2, to step 6, on 2 device(s) cpu, 2 process(es), mesh data 2" in said[0]
    )
    alone("train", one, TRAIN_STEPS=8, **options)
    assert_same(begun, one / "run")


@pytest.mark.slow
def test_four_processes_two_that_share_a_model_and_one_train_in_turn_and_two_evaluate(
    one, begun, tmp_path
):
    options = {"MODEL_DIR": str(begun)}
    together(4, 1, command("train", one, TRAIN_STEPS=4, **options))
    place = {"CHECKPOINT_PATH": str(begun / "checkpoint_6")}
    together(
        2,
        1,
        # They read the same rows.
        command("train", one, TRAIN_STEPS=6, MODEL_PARALLEL=2, **options),
        command("eval", one, EVAL_OUTPUT_DIR=str(tmp_path / "two"), **place),
    )
    alone("train", one, TRAIN_STEPS=8, **options)
    assert_same(begun, one / "run")
    alone("eval", one, EVAL_OUTPUT_DIR=str(tmp_path / "alone"), **place)
    for name in ("results.json", *(f"predictions/toy_turn_{c}.jsonl" for c in ("en", "sw"))):
        texts = [(tmp_path / by / name).read_text() for by in ("two", "alone")]
        assert texts[0] == texts[1] != ""


@pytest.mark.slow
def test_a_base_that_is_spread_over_two_processes_is_exported_whole(one, tmp_path):
    def options(name):
        places = {"MODEL_DIR": str(tmp_path / name), "EXPORT_DIR": str(tmp_path / f"{name}_base")}
        return {"train__train__export_dir": places.pop("EXPORT_DIR"), "TRAIN_STEPS": 2, **places}

    together(2, 1, command("train", one, "full", MODEL_PARALLEL=2, **options("two")))
    alone("train", one, "full", **options("alone"))
    (_, found), (_, want) = (hub.load_base(tmp_path / f"{name}_base") for name in ("two", "alone"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), found, want)
