"""Safetensors files: named arrays in and out, one tensor or one shard in memory at a time.

A folder holds either `model.safetensors`, or shards `model-00001-of-00003.safetensors` and the
index `model.safetensors.index.json` (`{"metadata": {"total_size": bytes}, "weight_map": {tensor:
file}}`), as Hugging Face lays them out. Nothing here unpickles; see `torch_files`.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modjax.errors import nearest
from modjax.hub.errors import HubError, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The same, pickled by torch.
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Of buffers that some models store beside their weights; listed, but not read.
OTHER_DTYPES: dict[str, Any] = {
    "BOOL": np.dtype(np.bool_),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
Contents = str | bytes
_DEFAULT_SHARD_BYTES = 2_000_000_000
_CHUNK_BYTES = 4_000_000

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")
_CONVERT = "Only import_hf reads that: python -m modjax.hub import_hf {} DESTINATION (needs torch)."


class TensorFiles:
    """The tensors of a folder by name. Opening reads headers only; each `read` reads one tensor.

    Attributes:
      directory: the folder.
      shapes: tensor name -> shape, for every tensor in the files.
      dtypes: tensor name -> numpy dtype of the file. Integers and booleans are listed, not read.

    Raises (on opening):
      HubError: no safetensors in the folder (with what to do about other formats), a missing or
        truncated file, an index that does not fit its shards, or a tensor of a dtype that numpy does
        not have.
    """

    _single, _index = SINGLE, INDEX

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._file_of: dict[str, Any] = {}
        weight_map = self._weight_map()
        for file_name in sorted(set(weight_map.values())) or [self._single]:
            self._open(file_name, weight_map)
        absent = [name for name in weight_map if name not in self._file_of]
        if absent:
            where = listed(sorted({weight_map[name] for name in absent}))
            raise HubError(
                f"{self.directory / self._index} lists tensors that {where} does not hold: "
                f"{listed(absent)}."
            )

    def check_floating(self, names: Iterable[str]) -> None:
        """Raises HubError, naming the tensor, if one of these is not floating point."""
        for name in names:
            for kind, dtype in OTHER_DTYPES.items():
                if self.dtypes[name] == dtype:
                    raise HubError(not_readable(self.directory, name, kind))

    def read(self, name: str) -> np.ndarray:
        """The tensor, C-contiguous, in the file's dtype; HubError if that is not floating point."""
        self.check_floating([name])
        return self._file_of[name].get_tensor(name)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The tensor in slices along its first axis, of at most some 4 MB each; errors as `read`."""
        self.check_floating([name])
        shape = self.shapes[name]
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtypes[name].itemsize
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        part = self._file_of[name].get_slice(name)
        for start in range(0, shape[0], step):
            yield part[start : min(start + step, shape[0])]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, value by value, without holding either whole."""
        if self.shapes[name] != self.shapes[other]:
            return False
        pairs = zip(self.rows(name), self.rows(other), strict=False)
        return all(np.array_equal(a, b) for a, b in pairs)

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file by the index; empty where one file holds everything."""
        if (self.directory / self._single).exists():
            return {}
        index = self.directory / self._index
        if not index.exists():
            raise HubError(_no_weights(self.directory))
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HubError(f"{index}: no 'weight_map' of tensor names to file names.")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise HubError(f"{index}: {name!r} is not the name of a file in this folder.")
        return weight_map

    def _open(self, file_name: str, weight_map: Mapping[str, str]) -> None:
        path = self.directory / file_name
        if not path.exists():
            needs = [name for name, at in weight_map.items() if at == file_name]
            raise HubError(f"{path} is missing; {self._index} says it holds {listed(needs)}.")
        for name, shape, dtype, opened in self._tensors(path):
            if weight_map.get(name, file_name) == file_name:
                self.shapes[name] = shape
                self.dtypes[name] = dtype
                self._file_of[name] = opened

    def _tensors(self, path: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Any]]:
        """Name, shape and dtype of a file's tensors, and what reads them: `get_tensor`, `get_slice`."""
        import safetensors

        try:
            # Read, not mapped: a mapped file's pages count as this process's memory.
            opened = safetensors.safe_open(path, framework="np", backend="pread")
        except (safetensors.SafetensorError, OSError) as error:
            raise HubError(
                f"{path} cannot be read as safetensors: {error}. It holds {path.stat().st_size} "
                "bytes; a file cut short by an interrupted download or copy looks like this: "
                "fetch it again."
            ) from error
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            view = opened.get_slice(name)
            dtype = {**DTYPES, **OTHER_DTYPES}.get(view.get_dtype())
            if dtype is None:
                raise HubError(not_readable(path, name, view.get_dtype()))
            yield name, tuple(view.get_shape()), dtype, opened


def write_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    last: Mapping[str, Contents | Callable[[], Contents]] | None = None,
    stem: str = "model",
) -> None:
    """Writes arrays as one `<stem>.safetensors`, or where that is too large as shards and an index.

    All data is on disk under temporary names before a file of an earlier model in the folder is
    touched, so a full disk leaves the earlier model whole. Then `last` (say, config.json) is
    removed, files are renamed, and `last` is written at the end: a folder whose saving was cut
    short has no `last` and cannot be mistaken for a model. In a job of several processes, call it
    on one of them.

    Args:
      directory: created where it does not exist.
      tensors: name -> array (numpy, jax, or anything that numpy can make one of), floating point;
        shapes are free. One at a time is held in memory beside what is given.
      dtype: float32, bfloat16, float16 or float64 to write in; None keeps each array's own.
      max_shard_bytes: size of a file; a single larger tensor has a file of its own.
      last: file name -> contents, or what gives them once the tensors are written; written after
        everything else.
      stem: what the files of tensors are called.

    Raises:
      HubError: an unknown dtype, or a tensor that is not floating point.
      OSError: the folder cannot be written or the disk is full.
    """
    target = None if dtype is None else float_dtype(dtype)
    sizes = {}
    for name, x in tensors.items():
        if np.dtype(x.dtype) not in DTYPES.values():
            raise HubError(
                f"tensor {name} has dtype {x.dtype}; only floating point weights are written."
            )
        sizes[name] = int(x.size) * (target or np.dtype(x.dtype)).itemsize
    shards = _shards(sizes, max_shard_bytes)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    index_file = f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        files = {f"{stem}.safetensors": shards[0]}
    else:
        total = len(shards)
        files = {f"{stem}-{i + 1:05}-of-{total:05}.safetensors": s for i, s in enumerate(shards)}
    with _Staging(folder) as staging:
        for file_name, names in files.items():
            staging.add(file_name, _shard_writer(tensors, names, target))
        if len(shards) > 1:
            weight_map = {name: file for file, names in files.items() for name in sorted(names)}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            staging.add(index_file, _text_writer(json.dumps(index, indent=2) + "\n"))
        for file_name, text in (last or {}).items():
            staging.add(file_name, _text_writer(text() if callable(text) else text))
        for file_name in last or {}:
            (folder / file_name).unlink(missing_ok=True)
        stale = [*folder.glob(f"{stem}*.safetensors"), folder / index_file]
        for path in stale:
            if path.name not in staging.names:
                path.unlink(missing_ok=True)
        staging.publish()


def float_dtype(name: str) -> np.dtype:
    """The numpy dtype of 'float32', 'bfloat16', 'float16' or 'float64'."""
    known = {d.name: d for d in DTYPES.values()}
    text = name if isinstance(name, str) else np.dtype(name).name
    if text not in known:
        raise HubError(f"unknown dtype {text!r} for weights." + nearest(text, known))
    return known[text]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a HubError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise HubError(f"{path} holds a {type(value).__name__}; a JSON object is expected.")
    return value


def holds_safetensors(directory: Path) -> bool:
    """Whether a folder holds model.safetensors, or the index of its shards."""
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def is_pickled(directory: Path) -> bool:
    """Whether a folder holds pytorch_model.bin, or its shards with their index, and no safetensors."""
    return not holds_safetensors(directory) and any(
        (directory / name).exists() for name in (PICKLED, PICKLED_INDEX)
    )


def explain_other_format(path: Path) -> str:
    """What to say about a path to a file, where a folder is wanted."""
    if is_pickled(path.parent) and path.match("pytorch_model*.bin"):
        return f"{path} is not safetensors. {_CONVERT.format(path.parent)}"
    return f"{path} is a file; give the folder that holds config.json and {SINGLE}."


def not_readable(where: Path, name: str, dtype: str) -> str:
    """What to say about a tensor of a dtype that is not read."""
    return (
        f"{where}: tensor {name} has dtype {dtype}; readable are {', '.join(DTYPES)}. Quantised "
        "weights must be saved again in a floating point dtype."
    )


def _no_weights(directory: Path) -> str:
    there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    other = [name for name in there if name.endswith(_OTHER_WEIGHTS)]
    if is_pickled(directory):
        return f"{directory} has no {SINGLE} but {listed(other)}. {_CONVERT.format(directory)}"
    if other:
        return (
            f"{directory} has neither {SINGLE} nor {PICKLED}, nor the index of shards ({INDEX}, {PICKLED_INDEX}), but "
            f"{listed(other)}: save the model again as safetensors, as transformers' save_pretrained does."
        )
    return f"{directory} has neither {SINGLE} nor {INDEX}; it holds: {listed(there) or 'nothing'}."


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds `limit` bytes unless by a single tensor."""
    if limit < 1:
        raise HubError(f"max_shard_bytes must be at least 1, got {limit}.")
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _shard_writer(
    tensors: Mapping[str, Any], names: list[str], dtype: np.dtype | None
) -> Callable[[Path], None]:
    """Writes the format itself, tensor by tensor: the library would hold the whole shard, twice."""

    def write(path: Path) -> None:
        kinds = {kind: code for code, kind in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # Wide dtypes first, so that every tensor is aligned.
        order = sorted(names, key=lambda n: (-(dtype or np.dtype(tensors[n].dtype)).itemsize, n))
        for name in order:
            kind = dtype or np.dtype(tensors[name].dtype)
            stop = at + int(tensors[name].size) * kind.itemsize
            shape = [int(length) for length in tensors[name].shape]
            header[name] = {"dtype": kinds[kind], "shape": shape, "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                # Views (a transpose, a slice of a stack) are laid out first.
                array = np.array(tensors[name], dtype=dtype, order="C", copy=None)
                file.write(array.reshape(-1).view(np.uint8).data)

    return write


def _text_writer(text: Contents) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


class _Staging:
    """Files under temporary names in a folder: renamed together, or removed where one failed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: dict[str, Path] = {}
        self._tag = uuid.uuid4().hex[:8]

    def __enter__(self) -> "_Staging":
        return self

    def __exit__(self, *_: Any) -> None:
        for path in self.names.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        path = self.folder / f".{name}.{self._tag}.tmp"
        self.names[name] = path
        write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def publish(self) -> None:
        for name, path in self.names.items():
            os.replace(path, self.folder / name)
