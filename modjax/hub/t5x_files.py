"""The tensors of a T5X checkpoint by T5X's names, without T5X: headers first, then one tensor at a time.

A checkpoint is a folder `checkpoint_<step>` in one of two formats. Legacy, that of the published ones: a msgpack file
`checkpoint`, `{version: 3, optimizer: {target: {...}, state: {...}}}`, whose leaves are arrays or say in which zarr
folder beside it they lie. Orbax: a folder `state/` with the keys `target` and `state`.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modjax.hub.errors import HubError, listed
from modjax.hub.layers import flatten

PREFIX = "checkpoint"
STATE = "state"
_AGAIN = "A copy or a download that was cut short looks like this: fetch it again."
_DTYPES = {
    "<f8": np.dtype(np.float64),
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read.

    Attributes:
      name: T5X's, joined with "/".
      load: reads it whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


def is_checkpoint(path: Any) -> bool:
    """Whether a path is a T5X checkpoint, or a folder of some; nothing is read."""
    folder = Path(path)
    return _is_one(folder) or bool(_steps(folder))


def locate(path: Any, step: int | None = None) -> Path:
    """The folder of a checkpoint: `path` itself, or in a MODEL_DIR that of `step`, by default the last.

    Raises:
      HubError: there is none.
    """
    folder = Path(path)
    if folder.name == PREFIX and folder.is_file():
        folder = folder.parent
    if _is_one(folder):
        return folder
    steps = _steps(folder)
    if steps and step is not None and step not in steps:
        raise HubError(f"{folder} has no T5X checkpoint of step {step}, only of {sorted(steps)}.")
    if steps:
        return folder / f"{PREFIX}_{max(steps) if step is None else step}"
    if any(folder.parent.glob(f"{folder.name}*.index")) or any(folder.glob("*.index")):
        raise HubError(
            f"{folder} is a TensorFlow checkpoint; T5X can restore and save it as one of its own."
        )
    there = [p.name for p in folder.iterdir()] if folder.is_dir() else None
    holds = "does not exist" if there is None else f"holds {listed(there) or 'nothing'}"
    raise HubError(
        f"{folder} {holds}, and is no T5X checkpoint: that has a file '{PREFIX}', or '{STATE}/_METADATA' (Orbax has "
        "written it since 2023; an older one has to be restored and saved once by T5X)."
    )


def read_headers(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The parameters of a checkpoint by name, not yet read, and its step.

    Raises:
      HubError: the file that cannot be read, or that is not what it should be.
    """
    return _legacy(folder) if (folder / PREFIX).is_file() else _orbax(folder)


def _is_one(folder: Path) -> bool:
    return (folder / PREFIX).is_file() or (folder / STATE / "_METADATA").is_file()


def _steps(folder: Path) -> list[int]:
    names = (p.name for p in folder.glob(f"{PREFIX}_*") if _is_one(p))
    return [
        int(match[1]) for match in (re.fullmatch(rf"{PREFIX}_(\d+)", n) for n in names) if match
    ]


def _legacy(folder: Path) -> tuple[dict[str, Tensor], int]:
    from flax import serialization

    file = folder / PREFIX
    data = file.read_bytes()
    if data.startswith(b"model_checkpoint_path"):
        raise HubError(f"{file} is of TensorFlow; T5X can restore and save it as one of its own.")
    try:
        content = serialization.msgpack_restore(data)
        version = content.get("version", 0)
        optimizer = content["optimizer"] if version else content
        target, state = optimizer["target"], optimizer.get("state", {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(
            f"{file} ({len(data)} bytes) cannot be read as a T5X checkpoint, a msgpack of 'version' and 'optimizer' "
            f"with 'target' in it: {error!r}. {_AGAIN}"
        ) from error
    tensors = {
        name: _inline(name, leaf, folder)
        if isinstance(leaf, np.ndarray)
        else _zarr(name, leaf, folder)
        for name, leaf in _leaves(target).items()
    }
    step = state.get("step", 0)
    if _is_spec(step):
        step = _read_zarr("state/step", folder / _relative(step, "state/step", folder), ())
    return tensors, int(np.asarray(step))


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and {"driver", "kvstore"} <= set(value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arrays and zarr descriptions of a tree, by path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and not _is_spec(value):
            found |= _leaves(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def _inline(name: str, value: np.ndarray, folder: Path) -> Tensor:
    if value.dtype not in _DTYPES.values():
        raise HubError(f"{folder}: {name} has dtype {value.dtype}; weights are floating point.")
    return Tensor(name, value.shape, value.dtype, lambda: value)


def _relative(spec: Mapping[str, Any], name: str, folder: Path) -> str:
    """Where a zarr lies in the folder; the oldest checkpoints say it in another place."""
    path = spec["kvstore"].get("path", spec.get("path"))
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise HubError(f"{folder}/{PREFIX}: {name} is said to lie at {path!r}, not in this folder.")
    return path


def _zarr(name: str, spec: Any, folder: Path) -> Tensor:
    if not _is_spec(spec) or spec["driver"] != "zarr":
        raise HubError(f"{folder}/{PREFIX}: {name} is {spec!r:.200}, neither an array nor a zarr.")
    metadata = spec.get("metadata", {})
    kind = metadata.get("dtype")
    if kind not in _DTYPES:
        hint = " (T5X before June 2021 wrote bfloat16 so: restore and save it once by T5X)"
        raise HubError(
            f"{folder}/{PREFIX}: {name} has dtype {kind!r}{hint if kind == '<u2' else ''}; readable are "
            f"{', '.join(_DTYPES)}."
        )
    shape = tuple(metadata["shape"])
    where = folder / _relative(spec, name, folder)
    return Tensor(name, shape, _DTYPES[kind], lambda: _read_zarr(name, where, shape))


def _read_zarr(name: str, where: Path, shape: tuple[int, ...]) -> np.ndarray:
    import tensorstore

    try:
        header = json.loads((where / ".zarray").read_text())
        grid = [
            range(math.ceil(n / c)) for n, c in zip(header["shape"], header["chunks"], strict=True)
        ]
        separator = header.get("dimension_separator", ".")
        chunks = [separator.join(map(str, i)) if i else "0" for i in itertools.product(*grid)]
        # A chunk that is not there would be read as zeros.
        if missing := [chunk for chunk in chunks if not (where / chunk).is_file()]:
            raise HubError(f"{where} lacks {listed(missing)}, of {name}. {_AGAIN}")
        opened = tensorstore.open(
            {"driver": "zarr", "kvstore": {"driver": "file", "path": str(where.absolute())}},
            open=True,
        ).result()
        found = np.asarray(opened.read().result())
    except HubError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{where}, which should hold {name}, cannot be read: {error}. {_AGAIN}"
        ) from error
    if found.shape != shape:
        raise HubError(
            f"{where} is {list(found.shape)}; the checkpoint says that {name} is {list(shape)}."
        )
    return found


def _orbax(folder: Path) -> tuple[dict[str, Tensor], int]:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    item = (folder / STATE).absolute()

    def load(name: str) -> np.ndarray:
        *parents, last = name.split("/")
        wanted: Any = {last: ocp.RestoreArgs(restore_type=np.ndarray)}
        for parent in reversed(parents):
            wanted = {parent: wanted}
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted, partial_restore=True)
        try:
            return np.asarray(flatten(handler.restore(item, args=args))[name])
        except Exception as error:  # Orbax passes on what its storage raises, of many kinds
            raise HubError(f"{item}: {name} cannot be read: {error}. {_AGAIN}") from error

    try:
        tree = handler.metadata(item).tree
        headers = {name: x for name, x in flatten(tree["target"]).items() if hasattr(x, "shape")}
        step = "step" in tree.get("state", {})
    except Exception as error:
        raise HubError(
            f"{item} cannot be read as an Orbax checkpoint of T5X: {error!r}. {_AGAIN}"
        ) from error
    tensors = {}
    for name, header in headers.items():
        if np.dtype(header.dtype) not in _DTYPES.values():
            raise HubError(f"{item}: {name} has dtype {header.dtype}; weights are floating point.")
        read = lambda name=name: load(f"target/{name}")  # noqa: E731
        tensors[name] = Tensor(name, tuple(header.shape), np.dtype(header.dtype), read)
    return tensors, int(load("state/step")) if step else 0
