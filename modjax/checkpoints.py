"""Checkpoints of what trains, written by Orbax in the background.

A checkpoint MODEL_DIR/checkpoint_<step> has four parts, so that each reader takes what it needs:

    trained/    the trained parameters (the adapters)
    optimizer/  the optimizer's state, the step, the rng
    data/       the position of the input, for any number of processes
    metadata/   JSON: method, feature space, fingerprint of the frozen base, operative gin config,
    versions

The frozen base is never written: its fingerprint is, and a checkpoint is refused on another base.
`manifest.json` lists the files with their sizes, so that a truncated or missing one is named.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

import modjax
from modjax import errors
from modjax.provenance import CheckpointError, check_same
from modjax.trainer import TrainState

FORMAT = 1
PREFIX = "checkpoint"
MANIFEST = "manifest.json"
_AGAIN = ": copy it again, or delete this folder to use the checkpoint before it"


class Positioned(Protocol):
    """An input that can write and take back its position, as `modjax.data` makes them.

    All processes of a job call both, with one folder for all of them.
    """

    def save(self, directory: Any) -> None: ...

    def restore(self, directory: Any) -> None: ...


class _DataHandler(ocp.CheckpointHandler):
    """Lets each process write its part of the input's position, all in one folder."""

    def save(self, directory: Any, args: Any) -> None:
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        args.iterator.save(str(folder))

    def restore(self, directory: Any, args: Any = None) -> None:
        try:
            args.iterator.restore(str(directory))
        except ValueError as error:
            raise CheckpointError(str(error)) from error


@ocp.args.register_with_handler(_DataHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _DataArgs(ocp.args.CheckpointArgs):
    iterator: Positioned


def check_writable(model_dir: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Creates MODEL_DIR and writes a probe in it, so that a run fails before its first step and not
    at its first save.

    Raises:
      CheckpointError: if it cannot be created or written, or has less room than `needed_bytes`.
    """
    if "://" in str(model_dir) or str(model_dir).startswith("~"):
        raise CheckpointError(
            f"{model_dir} is no path of a folder here: give its whole path, and mount a bucket to write into one"
        )
    if _is_one(pathlib.Path(model_dir)):
        raise CheckpointError(f"{model_dir} is a checkpoint: name a run's folder, not one in it")
    try:
        os.makedirs(model_dir, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=model_dir, prefix=".probe") as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise CheckpointError(f"MODEL_DIR {model_dir} cannot be written: {error}") from error
    free = shutil.disk_usage(model_dir).free
    if free < needed_bytes:
        raise CheckpointError(
            f"MODEL_DIR {model_dir} has {free / 1e6:.0f} MB free, a checkpoint of this run takes "
            f"{needed_bytes / 1e6:.0f} MB: free some space or choose another MODEL_DIR"
        )


def steps(model_dir: str | os.PathLike[str]) -> list[int]:
    """The steps whose checkpoints are complete, ascending; a save that was cut short is not among
    them.
    """
    folder = pathlib.Path(model_dir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [re.fullmatch(rf"{PREFIX}_(\d+)", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def _is_one(folder: pathlib.Path) -> bool:
    return bool(re.fullmatch(rf"{PREFIX}_\d+", folder.name)) and (folder / "trained").exists()


def locate(path: str | os.PathLike[str], step: int | None = None) -> pathlib.Path:
    """The folder of one checkpoint: `path` itself if it is one, else that of `step` (the latest
    one) in a MODEL_DIR.

    Raises:
      CheckpointError: if there is none.
    """
    folder = pathlib.Path(path)
    if _is_one(folder):
        return folder
    known = steps(folder)
    if not known:
        there = "has no checkpoint_<step> in it" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"no checkpoint at {path}: the folder {there}")
    if step is not None and step not in known:
        names = [f"{PREFIX}_{number}" for number in known]
        raise CheckpointError(
            f"no checkpoint of step {step} in {path}." + errors.nearest(f"{PREFIX}_{step}", names)
        )
    return folder / f"{PREFIX}_{known[-1] if step is None else step}"


def verify(checkpoint: pathlib.Path) -> None:
    """Compares a checkpoint's files with its manifest, where it has one (a save cut short at the
    very end has none).

    Raises:
      CheckpointError: names the first missing or truncated file.
    """
    listing = checkpoint / MANIFEST
    if not listing.exists():
        return
    try:
        files = json.loads(listing.read_text())
    except ValueError as error:
        raise CheckpointError(f"{listing} is truncated: {error}") from error
    for name, size in files.items():
        file = checkpoint / name
        if not file.exists():
            raise CheckpointError(f"the checkpoint {checkpoint} lacks the file {name}{_AGAIN}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"the checkpoint {checkpoint} is damaged: {name} has {file.stat().st_size} bytes, "
                f"not {size}{_AGAIN}"
            )


def read_metadata(path: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, or written by a newer modjax.
    """
    checkpoint = locate(path, step)
    verify(checkpoint)
    file = checkpoint / "metadata" / "metadata"
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {metadata.get('format')}, "
            f"this modjax {modjax.__version__} reads {FORMAT}"
        )
    return metadata


def load_trained(
    path: str | os.PathLike[str], step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Reads only the trained parameters of a checkpoint, as host arrays.

    Returns:
      (trained, metadata, step): a nested dict of numpy arrays, see `read_metadata`, and the step.
    """
    checkpoint = locate(path, step)
    metadata = read_metadata(checkpoint)
    item = checkpoint / "trained"
    handler = ocp.PyTreeCheckpointHandler()
    try:
        shapes = {
            tuple(name.split("/")): ocp.RestoreArgs(restore_type=np.ndarray)
            for name in metadata["trained"]
        }
        tree = handler.restore(
            item.absolute(),
            args=ocp.args.PyTreeRestore(restore_args=traverse_util.unflatten_dict(shapes)),
        )
    except Exception as error:
        raise CheckpointError(f"{item} cannot be read: {error}") from error
    return tree, metadata, int(checkpoint.name.rsplit("_", 1)[1])


class Checkpointer:
    """Writes and restores the checkpoints of one run.

    Args:
      model_dir: where they lie.
      metadata: JSON-able values with the keys method, space, base, gin; see `read_metadata`.
      keep: how many of the latest are kept; None for all.

    Raises:
      ValueError: none is kept.
    """

    def __init__(
        self, model_dir: str | os.PathLike[str], metadata: Mapping[str, Any], keep: int | None = 3
    ):
        if keep is not None and keep < 1:
            raise ValueError(
                f"keep_checkpoints is at least 1, or None for all of them, got {keep}."
            )
        self._dir = pathlib.Path(model_dir).absolute()
        self._metadata = {"format": FORMAT, "modjax": modjax.__version__, **metadata}
        self._unsealed: list[int] = []
        self._manager = ocp.CheckpointManager(
            self._dir,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                step_prefix=PREFIX,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def save(self, step: int, state: TrainState, iterator: Positioned) -> None:
        """Copies the state to the host and the input's position to disk, then writes in the
        background.
        """
        self.wait()
        flat = traverse_util.flatten_dict(state.trained, sep="/")
        described = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat.items()}
        rest = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer=ocp.args.StandardSave(rest),
                data=_DataArgs(iterator),
                metadata=ocp.args.JsonSave({**self._metadata, "trained": described}),
            ),
        )
        self._unsealed.append(step)

    def restore(self, step: int, state: TrainState, iterator: Positioned) -> TrainState:
        """Reads a whole checkpoint of this run.

        Args:
          step: which one.
          state: the state to replace; gives structure, shapes and placement.
          iterator: is moved to the position of the checkpoint.

        Raises:
          CheckpointError: damaged, or of another method, base, or feature space.
        """
        checkpoint = self._dir / f"{PREFIX}_{step}"
        stored = read_metadata(checkpoint)
        for part in ("method", "base", "space"):
            check_same(part, stored.get(part), self._metadata.get(part), checkpoint)
        flat = traverse_util.flatten_dict(state.trained, sep="/")
        shapes = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat.items()}
        check_same("set of trained parameters", stored["trained"], shapes, checkpoint)
        rest = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (state.trained, rest),
        )
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    trained=ocp.args.StandardRestore(like[0]),
                    optimizer=ocp.args.StandardRestore(like[1]),
                    data=_DataArgs(iterator),
                ),
            )
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint} cannot be restored (was the optimizer changed?): {error}"
            ) from error
        return TrainState(trained=read.trained, **read.optimizer)

    def wait(self) -> None:
        """Returns when all saves are on disk, and lists their files."""
        self._manager.wait_until_finished()
        while self._unsealed:
            checkpoint = self._dir / f"{PREFIX}_{self._unsealed.pop()}"
            if jax.process_index() or not checkpoint.is_dir():
                continue
            files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
            sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
            draft = checkpoint / f".{MANIFEST}"
            draft.write_text(json.dumps(sizes, indent=1))
            draft.replace(checkpoint / MANIFEST)

    def close(self) -> None:
        self.wait()
        self._manager.close()
