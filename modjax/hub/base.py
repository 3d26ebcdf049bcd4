"""Loading and saving the frozen base of a T5: a Hugging Face folder, or one of our own.

Our own folder holds safetensors whose tensors are named as our parameters, joined with "/" and
always unrolled (`encoder/layers_0/attention/query/kernel`), and a config.json

    {"format": "modjax", "version": 1, "network": "t5", "config": {"vocab_size": 384, ...}}

A folder loads completely or not at all: every parameter the network has must be there in its shape,
and nothing else.
"""

import dataclasses
import functools
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from modjax.errors import nearest
from modjax.hub import hf_t5
from modjax.hub.errors import HubError, listed
from modjax.hub.layers import flatten, unflatten, unstack_layers
from modjax.hub.safetensors_io import (
    TensorFiles,
    explain_other_format,
    float_dtype,
    read_json,
    write_tensors,
)
from modjax.networks import t5

FORMAT = "modjax"
VERSION = 1

# What a run chooses; the same weights serve any choice, so a folder does not say it.
_RUN_FIELDS = ("dropout_rate", "scan_layers", "remat_policy", "dtype")
_logger = logging.getLogger(__name__)


def load_base(
    path: str | os.PathLike[str], *, dtype: str | None = None, scan_layers: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a base network's configuration and weights.

    Args:
      path: a folder: of `save_base`, or of transformers' `save_pretrained` (model_type t5, mt5 or
        umt5).
      dtype: float32, bfloat16, ... to convert the weights to while reading; None keeps the files'
        own.
      scan_layers: stack the layers, for a network with `scan_layers=True`.

    Returns:
      `(overrides, params)`. `T5Config(**overrides)` is the network of `params`; `overrides` says
      nothing about dropout, activations' precision or rematerialisation, which a run chooses.
      `params` are nested dicts of numpy arrays. Beside what is returned, one tensor is held in
      memory at a time.

    Raises:
      HubError: what is missing, superfluous, truncated or in another format, by name, and what to
        do.
    """
    base = _open(path)
    overrides = {**base.network, "scan_layers": scan_layers}
    expected = _expected_shapes(t5.T5Config(**overrides)) if scan_layers else base.shapes
    target = None if dtype is None else float_dtype(dtype)
    _warn_float16(base, target)
    params = {name: _read(name, shape, base, target) for name, shape in expected.items()}
    count = sum(x.size for x in params.values())
    _logger.info(
        "base %s: %s parameters, vocabulary of %d rows, %s.",
        path,
        f"{count:,}",
        base.network["vocab_size"],
        " and ".join(sorted({x.dtype.name for x in params.values()})),
    )
    return overrides, unflatten(params)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The overrides of `load_base` without `scan_layers`, from headers alone; same errors."""
    return dict(_open(path).network)


def save_base(
    path: str | os.PathLike[str],
    config: t5.T5Config,
    params: Mapping[str, Any],
    dtype: str | None = None,
    *,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes a base in our own format; an earlier one in the folder stays until this is on disk.

    Args:
      path: the folder, created where it does not exist.
      config: the network's.
      params: its parameters (no adapters), scanned or unrolled as `config.scan_layers` says; numpy
        or jax arrays.
      dtype: to write in; None keeps each array's own.
      max_shard_bytes: size of a file, and of what is held in memory beside `params`.

    Raises:
      HubError: `params` are not exactly the network's parameters; what differs is named.
      OSError: the folder cannot be written or the disk is full.
    """
    flat = flatten(params)
    shapes = {name: tuple(x.shape) for name, x in flat.items()}
    _compare(_expected_shapes(config), shapes, "these parameters")
    if config.scan_layers:
        host = {name: np.asarray(x) if "/layers/" in name else x for name, x in flat.items()}
        flat = flatten(unstack_layers(unflatten(host)))
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _RUN_FIELDS}
    text = {"format": FORMAT, "version": VERSION, "network": "t5", "config": fields}
    write_tensors(
        path,
        flat,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        last={"config.json": json.dumps(text, indent=2) + "\n"},
    )


@dataclasses.dataclass(frozen=True)
class _Base:
    """A folder whose names and shapes fit its network; nothing but headers was read."""

    network: dict[str, Any]
    files: TensorFiles
    sources: Mapping[str, hf_t5.Source]  # by unrolled parameter name
    shapes: Mapping[str, tuple[int, ...]]  # of the unrolled network


def _open(path: str | os.PathLike[str]) -> _Base:
    folder = Path(path)
    config = _read_config(folder)
    files = TensorFiles(folder)
    if config.get("format") == FORMAT:
        network = _own_network(config, folder)
        sources = {name: hf_t5.Source(name) for name in files.shapes}
    elif config.get("model_type") in hf_t5.MODEL_TYPES:
        network, sources = hf_t5.read_config(config, files)
    else:
        raise HubError(
            f"{folder}/config.json is neither ours ('format': '{FORMAT}') nor a Hugging Face T5: "
            f"model_type is {config.get('model_type')!r}; known: {', '.join(hf_t5.MODEL_TYPES)}."
        )
    found = {
        name: source.shape(files.shapes[source.tensor])
        for name, source in sources.items()
        if source.tensor in files.shapes
    }
    theirs = {name: source.tensor for name, source in sources.items()}
    expected = _expected_shapes(t5.T5Config(**network))
    _compare(expected, found, str(folder), theirs)
    return _Base(network, files, sources, expected)


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


def _own_network(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if config.get("version") != VERSION or config.get("network") != "t5":
        raise HubError(
            f"{folder}/config.json is version {config.get('version')!r} of network "
            f"{config.get('network')!r}; readable is version {VERSION} of network 't5'."
        )
    network = dict(config.get("config") or {})
    known = [f.name for f in dataclasses.fields(t5.T5Config) if f.name not in _RUN_FIELDS]
    for name in network:
        if name not in known:
            raise HubError(f"{folder}/config.json: unknown field {name!r}." + nearest(name, known))
    absent = [name for name in known if name not in network]
    if absent:
        raise HubError(f"{folder}/config.json: 'config' lacks {listed(absent)}.")
    network["mlp_activations"] = tuple(network["mlp_activations"])
    return network


def _expected_shapes(config: t5.T5Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network by name, told by the network itself."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    variables = jax.eval_shape(
        t5.Transformer(config).init, jax.random.key(0), tokens, tokens, tokens
    )
    return {name: tuple(leaf.shape) for name, leaf in flatten(variables["params"]).items()}


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    theirs: Mapping[str, str] | None = None,
) -> None:
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


def _read(name: str, shape: tuple[int, ...], base: _Base, dtype: np.dtype | None) -> np.ndarray:
    """One parameter as the network holds it; a stacked one is filled layer by layer."""

    if "/layers/" not in name:
        return np.array(_tensor(base, name), dtype=dtype, order="C", copy=None)
    unrolled = [name.replace("/layers/", f"/layers_{i}/", 1) for i in range(shape[0])]
    if dtype is None:
        kinds = [base.files.dtypes[base.sources[layer].tensor] for layer in unrolled]
        dtype = functools.reduce(np.promote_types, kinds)
    stacked = np.empty(shape, dtype)
    for i, layer in enumerate(unrolled):
        stacked[i] = _tensor(base, layer)
    return stacked


def _tensor(base: _Base, name: str) -> np.ndarray:
    source = base.sources[name]
    tensor = base.files.read(source.tensor)
    if not np.isfinite(tensor).all():
        raise HubError(
            f"{base.files.directory}: tensor {source.tensor} holds values that are not finite."
        )
    return source.apply(tensor)


def _warn_float16(base: _Base, dtype: np.dtype | None) -> None:
    kinds = set(base.files.dtypes.values()) if dtype is None else {dtype}
    if np.dtype(np.float16) in kinds:
        warnings.warn(
            f"{base.files.directory}: weights in float16. T5-family activations overflow float16 "
            "(mT5 above all) and give NaN: run in bfloat16 or float32, and load with "
            "dtype='bfloat16' or 'float32'.",
            stacklevel=3,
        )
