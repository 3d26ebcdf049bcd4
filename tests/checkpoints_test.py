"""Checkpoints: complete, refused where they do not fit, and exact."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modjax import checkpoints, loop, optimizers, partitioning, provenance, trainer

METADATA = {
    "method": {"rules": [{"pattern": ".*/query", "rank": 4}]},
    "space": {"version": 1, "features": [["language", ["en", "sw"]]]},
    "base": provenance.fingerprint({"base": {"kernel": np.ones((8, 16), np.float32)}}),
    "gin": "TRAIN_STEPS = 3",
}


class Model:
    """A linear map trained on a frozen one."""

    def loss_sums(self, params, batch, rng):
        noise = jax.random.uniform(rng, (16, 1))
        out = batch["x"] @ params["base"]["kernel"] @ params["adapter"]["kernel"] * noise
        loss = jnp.sum(jnp.square(out - 1))
        return loss, {"loss": loss, "weight": jnp.float32(16)}

    def denominator(self, sums):
        return sums["weight"]


class Batches:
    position = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return {"x": np.random.default_rng(self.position).normal(size=(16, 8)).astype(np.float32)}

    def save(self, directory):
        pathlib.Path(directory, "position").write_text(str(self.position))

    def restore(self, directory):
        self.position = int(pathlib.Path(directory, "position").read_text())


@pytest.fixture(scope="module")
def made():
    frozen = {"base": {"kernel": np.ones((8, 16), np.float32)}}
    trained = {"adapter": {"kernel": np.full((16, 2), 0.1, np.float32)}}
    optimizer = optimizers.Optimizer(
        learning_rate=optimizers.schedule(0.1, warmup=4), weight_decay=0.1, clip_norm=1.0
    )
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    made = trainer.Trainer(Model(), optimizer, mesh, trained, frozen)
    return made, trained, partitioning.place(frozen, made.frozen_sharding)


def run(made, folder, steps, save_every=0, metadata=METADATA):
    """A run of its own process: resumes if there is something to resume."""
    trainer_, trained, frozen = made
    batches = Batches()
    state = trainer_.init_state(trained, seed=0)
    known = checkpoints.steps(folder)
    checkpointer = checkpoints.Checkpointer(folder, metadata)
    if known:
        state = checkpointer.restore(known[-1], state, batches)
    state, _ = loop.fit(
        trainer_,
        state,
        frozen,
        batches,
        steps,
        save_every=save_every,
        save=lambda step, state: checkpointer.save(step, state, batches),
    )
    checkpointer.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    """A MODEL_DIR with the checkpoints 2 and 4, to be copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("written") / "run"
    state = run(made, folder, 4, save_every=2)
    return folder, state


@pytest.fixture
def damaged(written, tmp_path):
    return pathlib.Path(shutil.copytree(written[0], tmp_path / "run"))


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(made, written, tmp_path):
    whole = run(made, tmp_path / "whole", 7)
    folder = shutil.copytree(written[0], tmp_path / "run")
    resumed = run(made, folder, 7)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_only_what_trains_is_written(written):
    folder, state = written
    assert checkpoints.steps(folder) == [2, 4]
    trained, metadata, step = checkpoints.load_trained(folder)
    assert step == 4
    assert set(metadata["trained"]) == {"adapter/kernel"}
    np.testing.assert_array_equal(trained["adapter"]["kernel"], state.trained["adapter"]["kernel"])
    assert isinstance(trained["adapter"]["kernel"], np.ndarray)
    assert set(trained) == {"adapter"}
    assert metadata["gin"] == "TRAIN_STEPS = 3"


def test_a_checkpoint_is_found_by_its_folder_or_its_step(written):
    folder, _ = written
    assert checkpoints.load_trained(folder, step=2)[2] == 2
    assert checkpoints.load_trained(folder / "checkpoint_2")[2] == 2
    with pytest.raises(checkpoints.CheckpointError, match="checkpoint_4"):
        checkpoints.load_trained(folder, step=3)
    with pytest.raises(checkpoints.CheckpointError, match="does not exist"):
        checkpoints.load_trained(folder / "nowhere")
    with pytest.raises(checkpoints.CheckpointError, match="has no checkpoint_<step>"):
        checkpoints.load_trained(folder / "checkpoint_2" / "data")


def test_every_file_that_is_truncated_or_missing_is_named(made, written, damaged):
    files = [p for p in (damaged / "checkpoint_4").rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        if file.name == checkpoints.MANIFEST:
            continue
        content = file.read_bytes()
        name = str(file.relative_to(damaged / "checkpoint_4"))
        file.write_bytes(content[:-1])
        with pytest.raises(checkpoints.CheckpointError, match="damaged: " + name):
            checkpoints.load_trained(damaged)
        file.unlink()
        with pytest.raises(checkpoints.CheckpointError, match="lacks the file " + name):
            run(made, damaged, 5)
        file.write_bytes(content)


def test_damage_is_found_without_the_manifest_too(made, damaged):
    checkpoint = damaged / "checkpoint_4"
    (checkpoint / checkpoints.MANIFEST).unlink()
    largest = max((checkpoint / "trained" / "d").iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])
    with pytest.raises(checkpoints.CheckpointError, match=r"checkpoint_4.*cannot be re"):
        checkpoints.load_trained(damaged)
    with pytest.raises(checkpoints.CheckpointError, match=r"checkpoint_4.*cannot be re"):
        run(made, damaged, 5)


def test_a_save_that_was_cut_short_is_not_taken_for_a_checkpoint(made, damaged):
    shutil.copytree(damaged / "checkpoint_4", damaged / "checkpoint_6.orbax-checkpoint-tmp")
    shutil.rmtree(damaged / "checkpoint_6.orbax-checkpoint-tmp" / "optimizer")
    assert checkpoints.steps(damaged) == [2, 4]
    state = run(made, damaged, 5)
    assert state.step == 5


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "method",
            {"rules": [{"pattern": ".*/query", "rank": 8}]},
            "another method:\n  rules/0/rank: 4 in the checkpoint, 8 in this run",
        ),
        (
            "base",
            provenance.fingerprint({"base": {"kernel": np.full((8, 16), 2, np.float32)}}),
            "another base:\n  arrays/base/kernel: ",
        ),
        (
            "space",
            {"version": 1, "features": [["language", ["en", "yo"]]]},
            "another space:\n  features/0/1/1: 'sw' in the checkpoint, 'yo' in this run",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    made, written, part, value, message
):
    with pytest.raises(checkpoints.CheckpointError) as error:
        run(made, written[0], 5, metadata=METADATA | {part: value})
    assert message in str(error.value)
    assert checkpoints.steps(written[0]) == [2, 4]


def test_another_optimizer_is_refused(made, written):
    _, trained, frozen = made
    other = optimizers.Optimizer(optimizers.adafactor())
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    with pytest.raises(checkpoints.CheckpointError, match="was the optimizer changed"):
        run(
            (trainer.Trainer(Model(), other, mesh, trained, frozen), trained, frozen), written[0], 5
        )


def test_a_checkpoint_of_another_shape_is_refused(made, written):
    _, _, frozen = made
    trained = {"adapter": {"kernel": np.full((16, 3), 0.1, np.float32)}}
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    other = trainer.Trainer(Model(), optimizers.Optimizer(), mesh, trained, frozen)
    with pytest.raises(checkpoints.CheckpointError, match=r"float32\[16, 2\].*float32\[16, 3\]"):
        run((other, trained, frozen), written[0], 5)


def test_the_oldest_checkpoints_are_removed(made, tmp_path):
    run(made, tmp_path / "run", 5, save_every=1)
    assert checkpoints.steps(tmp_path / "run") == [3, 4, 5]


def test_an_input_that_refuses_a_position_says_why(made, written, monkeypatch):
    def refuse(self, directory):
        raise ValueError("data_shards was 2 and is 1")

    monkeypatch.setattr(Batches, "restore", refuse)
    with pytest.raises(checkpoints.CheckpointError, match="^data_shards was 2 and is 1$"):
        run(made, written[0], 5)


def test_a_fingerprint_tells_names_shapes_dtypes_and_values_apart():
    base = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    kernel = base["a"]["kernel"]
    others = [
        {"b": {"kernel": kernel}},
        {"a": {"kernel": kernel.reshape(3, 2)}},
        {"a": {"kernel": kernel.view(np.int32)}},
        {"a": {"kernel": kernel + np.float32(1e-6)}},
    ]
    digest = provenance.fingerprint(base)["digest"]
    assert provenance.fingerprint({"a": {"kernel": kernel.copy()}})["digest"] == digest
    assert digest not in [provenance.fingerprint(other)["digest"] for other in others]
    bfloat16 = {"a": {"kernel": jnp.asarray(kernel, jnp.bfloat16)}}
    assert provenance.fingerprint(bfloat16)["arrays"]["a/kernel"].startswith("bfloat16[2,3] ")


@pytest.mark.parametrize("part", ["base", "set of trained parameters"])
def test_a_checkpoint_of_scanned_layers_says_how_it_is_read(part):
    one = {"decoder/layers/query/kernel": "float32[2,8,8]", "norm/scale": "float32[8]"}
    other = {f"decoder/layers_{i}/query/kernel": "float32[8,8]" for i in range(2)}
    parts = [{"digest": str(i), "arrays": tree} for i, tree in enumerate((one, other))]
    parts = parts if part == "base" else [one, other]
    with pytest.raises(checkpoints.CheckpointError, match="SCAN_LAYERS = True, and this run has F"):
        provenance.check_same(part, *parts, "here")
    with pytest.raises(checkpoints.CheckpointError, match="SCAN_LAYERS = False, and this run has"):
        provenance.check_same(part, *reversed(parts), "here")


def test_a_model_dir_that_cannot_be_written_fails_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoints.CheckpointError, match="file/run cannot be written"):
        checkpoints.check_writable(tmp_path / "file" / "run")
    with pytest.raises(checkpoints.CheckpointError, match="/proc/run cannot be written"):
        checkpoints.check_writable("/proc/run")  # a read-only file system, also for root
    with pytest.raises(
        checkpoints.CheckpointError, match="MB free, a checkpoint of this run takes"
    ):
        checkpoints.check_writable(tmp_path, needed_bytes=10**18)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoints.CheckpointError, match="No space left"):
        checkpoints.check_writable(tmp_path)


def test_metadata_of_a_newer_version_is_refused(damaged):
    file = damaged / "checkpoint_4" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"format": 99}))
    (damaged / "checkpoint_4" / checkpoints.MANIFEST).unlink()
    with pytest.raises(checkpoints.CheckpointError, match="format 99"):
        checkpoints.read_metadata(damaged)


def test_states_of_all_optax_kinds_come_back(tmp_path):
    params = {"a": {"kernel": np.ones((4, 4), np.float32)}, "b": {"kernel": np.ones(4, np.float32)}}
    groups = (optimizers.Group("a/.*"), optimizers.Group("b/.*", multiplier=0.1))
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    optimizer = optimizers.Optimizer(
        optimizers.adafactor(min_dim_size_to_factor=2, momentum=0.9), groups=groups
    )
    made = trainer.Trainer(Model(), optimizer, mesh, params, {})
    state = made.init_state(params, seed=3)
    grads = jax.tree.map(jnp.ones_like, state.trained)
    _, opt_state = made.transform.update(grads, state.opt_state, state.trained)
    state = state.replace(opt_state=opt_state)
    checkpointer = checkpoints.Checkpointer(tmp_path, METADATA)
    checkpointer.save(1, state, Batches())
    checkpointer.wait()
    restored = checkpointer.restore(1, made.init_state(params, seed=4), Batches())
    assert optax.tree.norm(opt_state) > 0
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpointer.close()
