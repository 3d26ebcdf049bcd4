"""Trained models as Hugging Face reads them: the whole model for transformers, with one dataset's update merged in."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from modjax.adapters.compose import merges_last
from modjax.hub import tokenizers
from modjax.hub.hf_import import check_free
from modjax.hub.run import Layers, Run, open_run
from modjax.hub.safetensors_io import float_dtype, write_tensors
from modjax.hub.sources import Target

# What goes with the weights as it is.
_COPIED = (*tokenizers.FILES, "generation_config.json")


def export_hf(
    run: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    features: Mapping[str, Any] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    max_shard_bytes: int = 2_000_000_000,
) -> dict[str, Any]:
    """Writes a model for `transformers`: safetensors by its names, config.json and the tokenizer's files.

    Adapters are merged into the weights in float32, tensor by tensor while they are written; beside the run one tensor
    is held in memory.

    Args:
      run: a checkpoint, or a MODEL_DIR, whose latest one is taken; of any method that merges, or without adapters.
      destination: the folder to write.
      features: the dataset's, `{"task": "parse", "language": "sw"}`; see `Run.compose`.
      base: the folder of the run's base, if it has moved.
      dtype: float32, bfloat16 or float16; None for that of the base.
      force: write over what is there.
      max_shard_bytes: size of a file.

    Returns:
      config.json.

    Raises:
      HubError: the destination exists, or the model cannot be expressed; the reason is given.
      ValueError: a module that does not merge, or features that do not exist.
      CheckpointError: see `open_run`.
    """
    folder = Path(destination)
    check_free(folder, force)
    target = None if dtype is None else float_dtype(dtype)
    opened = open_run(run, base)
    opened.base.warn_float16(target)
    layers = opened.compose(features or {})
    config, targets = opened.base.kind.huggingface.export(opened.huggingface(), opened.fields)
    tensors = merged(opened, targets, layers, target)
    kinds = [tensor.dtype for tensor in tensors.values()]
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config["dtype"] = np.result_type(*kinds).name
    files: dict[str, Any] = {
        name: (opened.folder / name).read_bytes()
        for name in _COPIED
        if (opened.folder / name).exists()
    }
    last = {**files, "config.json": json.dumps(config, indent=2) + "\n"}
    write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes, last=last)
    for name in _COPIED:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    return config


def merged(
    run: Run, targets: Mapping[str, Target], layers: Layers, dtype: np.dtype | None = None
) -> dict[str, "_Tensor"]:
    """Their tensors of a trained network, each made when numpy asks for it.

    Args:
      run: the network.
      targets: what each tensor is made of.
      layers: what changes the network's layers.
      dtype: of the tensors; None for their parameters'.

    Raises:
      ValueError: a module that does not merge.
    """
    params = run.network_params()
    kinds = {tuple(type(module) for module, _ in found): layer for layer, found in layers.items()}
    for layer in kinds.values():
        _merge(params, layer, layers[layer])  # raises before anything is written
    return {name: _Tensor(target, params, layers, dtype) for name, target in targets.items()}


class _Tensor:
    """A tensor of theirs, whose adapters are merged when numpy asks for it."""

    def __init__(
        self,
        target: Target,
        params: Mapping[str, np.ndarray],
        layers: Layers,
        dtype: np.dtype | None,
    ) -> None:
        self._target, self._params, self._layers = target, params, layers
        values = [params[name] for name in target.parameters]
        self.dtype = np.result_type(*values) if dtype is None else dtype
        self.shape = target.shape([value.shape for value in values])
        self.size = int(np.prod(self.shape, dtype=np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # nobody writes into it
        values = [self._merged(name) for name in self._target.parameters]
        return self._target.make(values).astype(dtype or self.dtype, copy=False)

    def _merged(self, name: str) -> np.ndarray:
        layer, _, leaf = name.rpartition("/")
        found = self._layers.get(layer)
        return _merge(self._params, layer, found)[leaf] if found else self._params[name]


def _merge(
    params: Mapping[str, np.ndarray], layer: str, found: Sequence[tuple[Any, Mapping[str, Any]]]
) -> dict[str, np.ndarray]:
    """Kernel and bias of a layer with modules merged in, float32."""
    kernel, bias = (params.get(f"{layer}/{leaf}") for leaf in ("kernel", "bias"))
    new = jnp.asarray(kernel, jnp.float32)
    new_bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    for module, leaves in sorted(found, key=lambda part: merges_last(part[0])):
        new, new_bias = module.merge(leaves, new, new_bias)
    return {"kernel": np.asarray(new)} | ({} if bias is None else {"bias": np.asarray(new_bias)})
