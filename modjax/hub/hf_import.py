"""Other people's models as bases of ours: weights, configuration, tokenizer and fingerprint in one folder.

Weights come as safetensors, or where a model has none as pytorch_model.bin, which is read with torch.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modjax.hub import tokenizers
from modjax.hub.base import Base, describe, open_base
from modjax.hub.errors import HubError, listed
from modjax.hub.safetensors_io import (
    PICKLED,
    SINGLE,
    float_dtype,
    holds_safetensors,
    read_json,
    write_tensors,
)
from modjax.hub.torch_files import import_torch, open_files

FINGERPRINT = "fingerprint.json"
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt")
_WANTED_PICKLED = "pytorch_model*.bin"


def import_hf(
    source: str,
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    force: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> Base:
    """Writes a base directory of ours from a Hugging Face model.

    The folder then holds the weights under our names (safetensors), config.json, the tokenizer's
    files with vocabulary.json, and fingerprint.json. Parameters are read, converted and written one
    at a time. Weights are read from safetensors; where a model has none, from pytorch_model.bin,
    which needs torch and runs no code of the file (see `torch_files`).

    Args:
      source: a folder of `save_pretrained`, or the name of a model on the hub ("google/mt5-small"),
        which needs the extra `hf` and a connection.
      destination: the folder to write.
      dtype: float32, bfloat16, float16 to convert the weights to; None keeps the files' own.
      force: replace a base that is there.
      revision: of a model on the hub.
      max_shard_bytes: size of a file.

    Raises:
      HubError: the destination exists; the model is none that is computed here, its files lack
        something or hold something else (what is wrong is listed); or it wants torch, and there is
        none.
    """
    folder = Path(destination)
    check_free(folder, force)
    found = _local(source, revision)
    if found.resolve() == folder.resolve():
        raise HubError(f"{folder} would be written over while it is read: give another folder.")
    base = open_base(found, open_files)
    tokenizers.describe(found)  # finds what is wrong with it before anything is written
    write(base, folder, dtype, max_shard_bytes)
    tokenizers.copy(found, folder)
    return open_base(folder)


def write(base: Base, folder: Path, dtype: str | None, max_shard_bytes: int) -> None:
    """Writes a base's weights, config.json and fingerprint.json, one parameter at a time; see `import_hf`."""
    target = None if dtype is None else float_dtype(dtype)
    base.warn_float16(target)
    digests: dict[str, str] = {}
    tensors = {name: _Parameter(base, name, target, digests) for name in base.shapes}
    config = base.kind.config(**base.fields)
    last: dict[str, Any] = {
        FINGERPRINT: lambda: json.dumps(_whole(digests), indent=1) + "\n",
        "config.json": describe(config, base.huggingface),
    }
    write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes, last=last)


def verify(path: str | os.PathLike[str]) -> int:
    """Compares a base directory with the fingerprint that was written with it.

    Returns:
      The number of parameters that were compared.

    Raises:
      HubError: there is no fingerprint, or a parameter is not as it was written; they are listed.
    """
    base = open_base(path)
    said = Path(path) / FINGERPRINT
    if not said.exists():
        raise HubError(f"{path} has no {FINGERPRINT}: it was not written by import_hf.")
    arrays = read_json(said).get("arrays", {})
    digests: dict[str, str] = {}
    for name in base.shapes:
        np.asarray(_Parameter(base, name, None, digests))
    wrong = [name for name in {**arrays, **digests} if arrays.get(name) != digests.get(name)]
    if wrong:
        raise HubError(f"{path} is not as it was written: {listed(wrong)}. Import it again.")
    return len(digests)


def check_free(folder: Path, force: bool) -> None:
    """Refuses to write over what is there.

    Raises:
      HubError: the folder exists and holds something, and `force` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise HubError(f"{folder} is a file; give a folder to write.")
    if not force and folder.exists() and any(folder.iterdir()):
        raise HubError(f"{folder} exists and is not empty; --force writes over it.")


class _Parameter:
    """A parameter that is read when numpy asks for it, and leaves its digest behind."""

    def __init__(
        self, base: Base, name: str, dtype: np.dtype | None, digests: dict[str, str]
    ) -> None:
        self._base, self._name, self._digests = base, name, digests
        self.shape = base.shapes[name]
        self.dtype = base.dtype_of(name) if dtype is None else dtype
        self.size = int(np.prod(self.shape, dtype=np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is nobody else's
        value = self._base.read(self._name, self.shape, self.dtype)
        digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        self._digests[self._name] = f"{value.dtype}{list(value.shape)} {digest}"
        return value if dtype is None else value.astype(dtype, copy=False)


def _whole(digests: Mapping[str, str]) -> dict[str, Any]:
    arrays = dict(sorted(digests.items()))
    text = "".join(f"{name} {digest}\n" for name, digest in arrays.items())
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), "arrays": arrays}


def _local(source: str, revision: str | None) -> Path:
    """The folder of a model, fetched from the hub if it is not one."""
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return Path(source)
    snapshot: Callable[..., str]
    try:
        from huggingface_hub import snapshot_download as snapshot
    except ImportError:
        raise HubError(
            f"{source} is no folder here. To fetch it from the hub, install the extra: "
            "pip install 'modjax[hf]'."
        ) from None

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot(source, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # of many kinds: no such model, no connection, no permission
            said = " ".join(str(error).split())
            raise HubError(f"{source} is no folder here, and the hub says: {said}") from error

    folder = fetch(*_WANTED)
    if holds_safetensors(folder):
        return folder
    import_torch(f"{source} has no {SINGLE} on the hub, at best a {PICKLED}")
    return fetch(*_WANTED, _WANTED_PICKLED)
