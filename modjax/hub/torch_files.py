"""The tensors of `pytorch_model.bin`, or of its shards, for `import_hf`: many models on the hub have nothing else.

Such a file is a pickle, and a pickle can run code when it is read. torch reads these with
`weights_only=True`, which builds tensors and plain containers and refuses all else. Nothing of a
file is read in another way, and without torch there is none.
"""

import importlib
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modjax.hub.errors import HubError
from modjax.hub.safetensors_io import (
    DTYPES,
    OTHER_DTYPES,
    PICKLED,
    PICKLED_INDEX,
    TensorFiles,
    is_pickled,
    not_readable,
)

# Older ones have holes in what weights_only promises (CVE-2025-32434, CVE-2026-24747).
_OLDEST_TORCH = (2, 10)
_RECIPE = """\
    import glob, safetensors.torch, torch
    weights = {}
    for name in glob.glob("pytorch_model*.bin"):
        weights.update(torch.load(name, map_location="cpu", weights_only=True))
    weights = {name: w.clone().contiguous() for name, w in weights.items()}
    safetensors.torch.save_file(weights, "model.safetensors")"""


class TorchFiles(TensorFiles):
    """As `TensorFiles`, of a folder that `is_pickled`.

    Files are mapped into memory, not read, but for those of torch before 1.6, which are held whole.

    Raises (on opening):
      HubError: as `TensorFiles`; or torch is missing or too old, or a file holds more than tensors.
    """

    _single, _index = PICKLED, PICKLED_INDEX

    def _tensors(self, path: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Any]]:
        arrays = _Arrays(_read(path))
        for name, array in arrays.items():
            yield name, array.shape, array.dtype, arrays


class _Arrays(dict[str, np.ndarray]):
    """Arrays by name, asked for as an open safetensors file is."""

    def get_tensor(self, name: str) -> np.ndarray:
        return np.asarray(self[name], order="C")

    def get_slice(self, name: str) -> np.ndarray:
        return self[name]


def open_files(folder: Path) -> TensorFiles:
    """A folder's tensors: of its safetensors, or else of its pytorch_model.bin; errors as those classes'."""
    return TorchFiles(folder) if is_pickled(folder) else TensorFiles(folder)


def import_torch(why: str) -> Any:
    """The module.

    Args:
      why: it is needed, for the message.

    Raises:
      HubError: it is not installed, or reads what it should not.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise HubError(
            f"{why}. That is read with torch, which is not installed: pip install torch (a CPU build is enough). Or "
            f"convert it where torch and safetensors are, in the folder of the files, beside config.json:\n{_RECIPE}"
        ) from None
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        raise HubError(
            f"{why}. Torch {torch.__version__} can be made to run code by such a file; install "
            f"{'.'.join(map(str, _OLDEST_TORCH))} or newer."
        )
    return torch


def _read(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors, in its memory."""
    torch = import_torch(f"{path.parent} has no safetensors but {path.name}")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it deprecates, or cannot read and then raises
            found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(found, Mapping):
            raise HubError(f"{path} holds a {type(found).__name__}, not tensors by name.")
        return {name: _array(found[name], name, path, torch) for name in found}
    except HubError:
        raise
    except Exception as error:  # of many kinds: what torch, zip and pickle make of a damaged file
        raise HubError(f"{path} {_reason(error, path)}") from error


def _array(tensor: Any, name: Any, path: Path, torch: Any) -> np.ndarray:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise HubError(
            f"{path} holds a {type(tensor).__name__} under {name!r}; weights are tensors by name."
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in {known.name for known in (*DTYPES.values(), *OTHER_DTYPES.values())}:
        raise HubError(not_readable(path, name, dtype))
    if dtype == "bfloat16":  # torch's numpy has none
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def _reason(error: Exception, path: Path) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        if asked := re.search(r"GLOBAL (\S+)", said):
            return f"asks for {asked[1]}: it holds more than weights, and reading it could run code. It was not read."
        said = said.split("WeightsUnpickler error: ")[-1]
    # What follows the first sentence is advice, also to read the file without weights_only.
    reason = said.split(". ")[0].rstrip(".") or type(error).__name__
    return (
        f"cannot be read as weights of torch: {reason}. It holds {path.stat().st_size} bytes; a file cut short by an "
        "interrupted download or copy looks like this: fetch it again."
    )
