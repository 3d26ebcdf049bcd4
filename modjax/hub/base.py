"""Loading and saving a frozen base: a Hugging Face folder, or one of our own.

Our own folder holds safetensors whose tensors are named as our parameters, joined with "/" and
always unrolled (`encoder/layers_0/attention/query/kernel`), and a config.json

    {"format": "modjax", "version": 1, "network": "t5", "config": {"vocab_size": 384, ...}}

with "huggingface", the configuration that it was imported from, where there is one (the way back
needs it); beside them the tokenizer's files and fingerprint.json, where it was imported. A folder
loads completely or not at all: every parameter the network has must be there in its shape, and
nothing else.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modjax.errors import nearest
from modjax.hub import t5x_files
from modjax.hub.errors import HubError, listed
from modjax.hub.kinds import KINDS, Kind, name_of
from modjax.hub.layers import flatten, unflatten, unstack_layers
from modjax.hub.safetensors_io import (
    TensorFiles,
    explain_other_format,
    float_dtype,
    read_json,
    write_tensors,
)
from modjax.hub.sources import Source

FORMAT = "modjax"
VERSION = 1
ALIGNMENT = 64  # bytes

_logger = logging.getLogger(__name__)


def load_base(
    path: str | os.PathLike[str], *, dtype: str | None = None, scan_layers: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a base network's configuration and weights.

    Args:
      path: a folder: of `save_base`, of transformers' `save_pretrained` (see `kinds`), or a T5X
        checkpoint of a T5 (see `t5x`).
      dtype: float32, bfloat16, ... to convert the weights to while reading; None keeps the files'
        own.
      scan_layers: stack the layers, for a network with `scan_layers=True`.

    Returns:
      `(overrides, params)`. The kind's configuration with `overrides` (`T5Config(**overrides)`) is
      that of the network of `params`; `overrides` says nothing about dropout, activations'
      precision or rematerialisation, which a run chooses. `params` are nested dicts of numpy
      arrays. Beside what is returned, some rows of one tensor are held in memory at a time.

    Raises:
      HubError: what is missing, superfluous, truncated or in another format, by name, and what to
        do.
    """
    base = open_base(path)
    overrides = {**base.fields, "scan_layers": scan_layers}
    expected = base.kind.shapes(base.kind.config(**overrides)) if scan_layers else base.shapes
    target = None if dtype is None else float_dtype(dtype)
    base.warn_float16(target)
    params = {name: base.read(name, shape, target) for name, shape in expected.items()}
    count = sum(x.size for x in params.values())
    _logger.info(
        "base %s: %s parameters, vocabulary of %d rows, %s.",
        path,
        f"{count:,}",
        base.fields["vocab_size"],
        " and ".join(sorted({x.dtype.name for x in params.values()})),
    )
    return overrides, unflatten(params)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The overrides of `load_base` without `scan_layers`, from headers alone; same errors."""
    return dict(open_base(path).fields)


def config_of(path: str | os.PathLike[str], network: str | None = None, **changes: Any) -> Any:
    """The configuration of the network whose weights lie in a folder.

    Args:
      path: the folder.
      network: the kind of network it must be, if not any: "t5", "decoder" or "encoder".
      **changes: fields of the configuration: what a run chooses, and an encoder's head.

    Raises:
      HubError: as `load_base`; or the folder holds another kind of network.
    """
    base = open_base(path)
    if network is not None and base.network != network:
        raise HubError(
            f"{path} holds a network of the kind {base.network!r}, not {network!r}: use "
            f"{base.kind.gin}."
        )
    return base.kind.config(**{**base.fields, **changes})


def save_base(
    path: str | os.PathLike[str],
    config: Any,
    params: Mapping[str, Any],
    dtype: str | None = None,
    *,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes a base in our own format; an earlier one in the folder stays until this is on disk.

    Args:
      path: the folder, created where it does not exist.
      config: the network's (T5Config, DecoderConfig, EncoderConfig).
      params: its parameters (no adapters), scanned or unrolled as `config.scan_layers` says; numpy
        or jax arrays.
      dtype: to write in; None keeps each array's own.
      max_shard_bytes: size of a file.

    Raises:
      HubError: `params` are not exactly the network's parameters; what differs is named.
      OSError: the folder cannot be written or the disk is full.
    """
    flat = flatten(params)
    shapes = {name: tuple(x.shape) for name, x in flat.items()}
    compare(KINDS[name_of(config)].shapes(config), shapes, "these parameters")
    if config.scan_layers:
        host = {name: np.asarray(x) if "/layers/" in name else x for name, x in flat.items()}
        flat = flatten(unstack_layers(unflatten(host)))
    write_tensors(
        path,
        flat,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        last={"config.json": describe(config)},
    )


def describe(config: Any, huggingface: Mapping[str, Any] | None = None) -> str:
    """The text of a config.json of ours."""
    network = name_of(config)
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k in KINDS[network].fields}
    text = {"format": FORMAT, "version": VERSION, "network": network, "config": fields}
    if huggingface is not None:
        text["huggingface"] = huggingface
    return json.dumps(text, indent=2) + "\n"


@dataclasses.dataclass(frozen=True)
class Base:
    """A folder whose names and shapes fit its network; nothing but headers was read.

    Attributes:
      network: the kind's name.
      fields: of its configuration, without what a run chooses.
      files: the tensors.
      sources: where each parameter of the unrolled network comes from.
      shapes: of those parameters.
      huggingface: config.json as Hugging Face has it; None for a base that was never theirs.
    """

    network: str
    fields: dict[str, Any]
    files: TensorFiles
    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    huggingface: Mapping[str, Any] | None

    @property
    def kind(self) -> Kind:
        """What is known about such networks."""
        return KINDS[self.network]

    def dtype_of(self, name: str) -> np.dtype:
        """The dtype of an unrolled parameter in the files."""
        return self.files.dtypes[self.sources[name].tensor]

    def read(self, name: str, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
        """One parameter as the network holds it; a stacked one is filled layer by layer."""
        stacked = "/layers/" in name
        layers = [name]
        if stacked:
            layers = [name.replace("/layers/", f"/layers_{i}/", 1) for i in range(shape[0])]
        if dtype is None:
            kinds = [self.dtype_of(layer) for layer in layers]
            dtype = functools.reduce(np.promote_types, kinds)
        out = _aligned(shape, dtype)
        for i, layer in enumerate(layers):
            self.sources[layer].fill(out[i] if stacked else out, self.files)
        return out

    def warn_float16(self, dtype: np.dtype | None) -> None:
        """Says where half precision is dangerous."""
        kinds = set(self.files.dtypes.values()) if dtype is None else {dtype}
        if self.network == "t5" and np.dtype(np.float16) in kinds:
            warnings.warn(
                f"{self.files.directory}: weights in float16. T5-family activations overflow "
                "float16 (mT5 above all) and give NaN: run in bfloat16 or float32, and load with "
                "dtype='bfloat16' or 'float32'.",
                stacklevel=3,
            )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins where jax wants one to: its CPU backend then uses it as it is, without a copy."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + memory.size - ALIGNMENT].view(dtype).reshape(shape)


def open_base(
    path: str | os.PathLike[str], open_files: Callable[[Path], TensorFiles] = TensorFiles
) -> Base:
    """Reads a folder's headers and checks that it holds a network, whole; errors as `load_base`."""
    folder = Path(path)
    if t5x_files.is_checkpoint(folder):
        from modjax.hub.t5x import open_t5x

        return open_t5x(folder)
    config = _read_config(folder)
    files = open_files(folder)
    if config.get("format") == FORMAT:
        network, fields = _own_network(config, folder)
        sources = {name: Source(name) for name in files.shapes}
        huggingface = config.get("huggingface")
    else:
        network = _kind_of(config, folder)
        fields, sources = KINDS[network].huggingface.read_config(config, files)
        huggingface = config
    kind = KINDS[network]
    files.check_floating(s.tensor for s in sources.values() if s.tensor in files.shapes)
    found = {
        name: source.shape(files.shapes[source.tensor])
        for name, source in sources.items()
        if source.tensor in files.shapes
    }
    theirs = {name: source.tensor for name, source in sources.items()}
    expected = kind.shapes(kind.config(**fields))
    compare(expected, found, str(folder), theirs)
    return Base(network, fields, files, sources, expected, huggingface)


def is_base(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a base, whole or not: a folder with a config.json, or a T5X checkpoint."""
    return (Path(path) / "config.json").is_file() or t5x_files.is_checkpoint(path)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise HubError(
            f"{folder} does not exist. Weights are read from a local folder; to fetch public "
            f"ones: hf download OWNER/NAME --local-dir {folder}"
        )
    if not folder.is_dir():
        raise HubError(explain_other_format(folder))
    path = folder / "config.json"
    if not path.exists():
        there = listed([p.name for p in folder.iterdir()])
        raise HubError(
            f"{folder} has no config.json, so it is not a base (or its saving was cut short). It "
            f"holds: {there or 'nothing'}."
        )
    return read_json(path)


def _kind_of(config: Mapping[str, Any], folder: Path) -> str:
    model_type = config.get("model_type")
    for name, kind in KINDS.items():
        if model_type in kind.huggingface.MODEL_TYPES:
            return name
    known = [name for kind in KINDS.values() for name in kind.huggingface.MODEL_TYPES]
    raise HubError(
        f"{folder}/config.json is neither ours ('format': '{FORMAT}') nor of a Hugging Face model "
        f"that is computed here: model_type is {model_type!r}; known: {', '.join(known)}."
    )


def _own_network(config: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    network = config.get("network")
    if config.get("version") != VERSION or network not in KINDS:
        raise HubError(
            f"{folder}/config.json is version {config.get('version')!r} of network {network!r}; "
            f"readable is version {VERSION} of {', '.join(KINDS)}."
        )
    fields = dict(config.get("config") or {})
    known = KINDS[network].fields
    for name in fields:
        if name not in known:
            raise HubError(f"{folder}/config.json: unknown field {name!r}." + nearest(name, known))
    absent = [name for name in known if name not in fields]
    if absent:
        raise HubError(f"{folder}/config.json: 'config' lacks {listed(absent)}.")
    # Configurations turn JSON's lists into their tuples.
    made = KINDS[network].config(**fields)
    return network, {name: getattr(made, name) for name in known}


def compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    theirs: Mapping[str, str] | None = None,
) -> None:
    """Raises a HubError that names what shapes `where` lacks, has too many, or has otherwise than expected."""

    def called(name: str) -> str:
        source = (theirs or {}).get(name, name)
        return name if source == name else f"{name} (from {source})"

    missing = [called(name) for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [
        f"{called(name)} is {list(found[name])}, the network has {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {listed(missing)}")
    if surplus:
        problems.append(f"holds what the network does not have: {listed(surplus)}")
    if wrong:
        problems.append(f"has other shapes: {'; '.join(wrong[:8])}")
    if problems:
        raise HubError(f"{where} does not fit its configuration: it {'; and it '.join(problems)}.")
