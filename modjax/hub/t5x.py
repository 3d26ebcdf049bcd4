"""T5X checkpoints in and out: T5, mT5, ByT5, umT5 and Flan-T5 as bases; ours for T5X's own programs.

T5X's parameter names are ours, so that only the layout of two kinds of network is changed:

    its minimal T5 (T5, mT5, ByT5)  encoder/layers_0/attention/query/kernel  [D, H * head_dim]     as ours, unrolled
    its scalable T5 (umT5)          encoder/encoder/attention/query/kernel   [D, layers, H, head_dim]

A checkpoint has no configuration: sizes follow from the shapes, the number of heads from the position biases.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modjax import checkpoints
from modjax.hub.base import Base, compare, is_base, load_base
from modjax.hub.errors import HubError, listed
from modjax.hub.hf_import import check_free, write
from modjax.hub.kinds import KINDS
from modjax.hub.layers import flatten, unflatten
from modjax.hub.run import open_run
from modjax.hub.safetensors_io import TensorFiles, float_dtype
from modjax.hub.sources import Source
from modjax.hub.t5x_files import PREFIX, STATE, Tensor, locate, read_headers

SPACE_FILE = "feature_space.json"
_STACKED = re.compile(r"(encoder|decoder)/(encoder|decoder|layers)/(.+)")
# A stacked tensor is kept for the layers that follow, up to so many bytes of them.
_KEEP_BYTES = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter of ours lies: a tensor, or a layer of it, and its shape there without the layers' axis."""

    tensor: Tensor
    shape: tuple[int, ...]
    layer: int | None = None
    axis: int = 0


class T5XFiles(TensorFiles):
    """The parameters of a T5X checkpoint by our names, unrolled; each is read when it is asked for.

    Attributes:
      directory: the checkpoint's folder.
      step: its own.
      shapes, dtypes: by name.

    Raises (on opening):
      HubError: there is no checkpoint, it is of another kind, or what it says of itself cannot be read.
    """

    def __init__(self, path: Any, step: int | None = None):
        self.directory = locate(path, step)
        tensors, self.step = read_headers(self.directory)
        self._places = _places(tensors, self.directory)
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.dtypes = {name: place.tensor.dtype for name, place in self._places.items()}
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def read(self, name: str) -> np.ndarray:
        """The parameter, in the checkpoint's dtype."""
        place = self._places[name]
        if place.layer is None:
            value = place.tensor.load()
        else:
            value = np.take(self._stack(place.tensor), place.layer, axis=place.axis)
        return value.reshape(place.shape)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The parameter in one piece."""
        yield self.read(name)

    def _stack(self, tensor: Tensor) -> np.ndarray:
        if tensor.name not in self._kept:
            self._kept[tensor.name] = tensor.load()
            while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > _KEEP_BYTES:
                self._kept.popitem(last=False)
        return self._kept[tensor.name]


def open_t5x(path: Any, *, step: int | None = None, **fields: Any) -> Base:
    """Reads the headers of a T5X checkpoint and checks that it holds a T5, whole.

    Args:
      path: a checkpoint, or a folder of some.
      step: which of them, by default the last.
      **fields: those of `T5Config` that shapes do not say, where they are not as in the published models:
        `mlp_activations` (("gelu", "linear"), or ("relu",) for units without a gate), `relpos_max_distance` (128).

    Raises:
      HubError: the checkpoint cannot be read, or is no T5; what is missing, superfluous or of another shape is named.
    """
    files = T5XFiles(path, step)
    network = {**_sizes(files), **fields}
    expected = KINDS["t5"].shapes(KINDS["t5"].config(**network))
    compare(expected, files.shapes, str(files.directory))
    sources = {name: Source(name) for name in files.shapes}
    return Base("t5", network, files, sources, expected, None)


def import_t5x(
    source: Any,
    destination: Any,
    *,
    dtype: str | None = None,
    step: int | None = None,
    force: bool = False,
    max_shard_bytes: int = 2_000_000_000,
    **fields: Any,
) -> Base:
    """Writes a base directory of ours from a T5X checkpoint, one parameter at a time.

    Args:
      source, step, **fields: see `open_t5x`.
      destination: the folder to write.
      dtype: float32, bfloat16, float16 to convert the weights to; None keeps the checkpoint's own.
      force: replace a base that is there.
      max_shard_bytes: size of a file.

    Returns:
      The base as it was read.

    Raises:
      HubError: the destination exists, or as `open_t5x`.
    """
    check_free(Path(destination), force)
    base = open_t5x(source, step=step, **fields)
    write(base, Path(destination), dtype, max_shard_bytes)
    return base


def export_t5x(
    source: Any,
    destination: Any,
    *,
    base: Any = None,
    step: int | None = None,
    dtype: str | None = None,
    scan_layers: bool = False,
    force: bool = False,
) -> Path:
    """Writes a base, or a run of `train.py` with its base, as an Orbax checkpoint that T5X restores.

    A run's adapters keep their names, and its feature space is written beside the checkpoint, where
    `t5x_model.Model` looks for it.

    Args:
      source: a base's folder, or a MODEL_DIR (its last checkpoint) or a checkpoint of `train.py`.
      destination: where `checkpoint_<step>` is written.
      base: of a run: the folder of its base, if it has moved.
      step: the number to write; by default the run's own, 0 for a base.
      dtype: to write the base's weights in; None keeps theirs.
      scan_layers: stack a base's layers, for a network with `scan_layers`; a run's are as they were trained.
      force: replace a checkpoint that is there.

    Returns:
      The checkpoint's folder.

    Raises:
      HubError: the checkpoint is there already, or the base is not.
      CheckpointError: there is no run's checkpoint, or `base` is not what it was trained on.
    """
    if is_base(source):
        params = load_base(source, dtype=dtype, scan_layers=scan_layers)[1]
        return save_checkpoint(destination, params, step or 0, force=force)
    params, metadata, own_step = checkpoints.load_trained(source)
    if metadata["base"]["arrays"]:
        flat = flatten(open_run(source, base).params)
        target = None if dtype is None else float_dtype(dtype)
        of_base = metadata["base"]["arrays"]
        params = unflatten(
            {n: x.astype(target) if target and n in of_base else x for n, x in flat.items()}
        )
    step = own_step if step is None else step
    return save_checkpoint(destination, params, step, space=metadata["space"], force=force)


def save_checkpoint(
    directory: Any,
    params: Mapping[str, Any],
    step: int,
    *,
    space: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Writes parameters as the Orbax checkpoint `directory/checkpoint_<step>` of T5X, without an optimizer's state.

    Args:
      params: nested dict of arrays, by T5X's names.
      space: `FeatureSpace.to_json()`, to lie beside it.

    Raises:
      HubError: the checkpoint is there already, and `force` is not given.
    """
    import orbax.checkpoint as ocp

    folder = Path(directory).absolute()
    where = folder / f"{PREFIX}_{step}"
    if where.exists() and not force:
        raise HubError(f"{where} is there already; say --force to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(step_prefix=PREFIX)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if where.exists():
            manager.delete(step)
        state = {"target": params, "state": {"step": np.asarray(step, np.int32)}}
        # T5X looks for the data's position, too, if it is told to save it.
        items = {STATE: ocp.args.PyTreeSave(state), "dataset": ocp.args.JsonSave({})}
        manager.save(step, args=ocp.args.Composite(**items), force=True)
    if space is not None:
        (folder / SPACE_FILE).write_text(json.dumps(space, indent=1, ensure_ascii=False) + "\n")
    return where


def _places(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, _Place]:
    places = {}
    for name, tensor in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            places[name] = _Place(tensor, _joined(name, tensor.shape))
            continue
        stack, _, rest = match.groups()
        axis = _layer_axis(tensors, match, directory)
        if len(tensor.shape) <= axis:
            raise HubError(
                f"{directory}: {name} is {list(tensor.shape)}, without an axis of layers."
            )
        shape = _joined(name, tensor.shape[:axis] + tensor.shape[axis + 1 :])
        for i in range(tensor.shape[axis]):
            places[f"{stack}/layers_{i}/{rest}"] = _Place(tensor, shape, i, axis)
    return places


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """An attention kernel's shape with its heads and their width as one axis."""
    if len(shape) == 3 and name.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return (shape[0], shape[1] * shape[2])
    if len(shape) == 3 and name.endswith("out/kernel"):
        return (shape[0] * shape[1], shape[2])
    return shape


def _layer_axis(tensors: Mapping[str, Tensor], match: re.Match[str], directory: Path) -> int:
    """Which axis of a stack's tensors counts layers: the second in T5X unless a norm's scales say otherwise."""
    name = f"{match[1]}/{match[2]}/pre_mlp_layer_norm/scale"
    embedding = tensors.get("token_embedder/embedding")
    if name not in tensors or embedding is None or len(tensors[name].shape) != 2:
        raise HubError(
            f"{directory} has stacked layers, and no {name} [width, layers] that says how."
        )
    own = match[2] == "layers"
    axes = [
        i for i in ((0, 1) if own else (1, 0)) if tensors[name].shape[1 - i] == embedding.shape[-1]
    ]
    if not axes:
        raise HubError(
            f"{directory}: {name} is {list(tensors[name].shape)}, without the width {embedding.shape[-1]} of the "
            "embedding."
        )
    return axes[0]


def _sizes(files: T5XFiles) -> dict[str, Any]:
    """The fields of `T5Config` that follow from the shapes."""
    shapes = files.shapes

    def shape(*names: str) -> tuple[int, ...]:
        for name in names:
            if len(shapes.get(name, ())) == 2:
                return shapes[name]
        raise HubError(
            f"{files.directory} is no T5: it has no matrix {' or '.join(names)}, but {listed(list(shapes))}."
        )

    vocabulary, width = shape("token_embedder/embedding")
    per_layer = "encoder/layers_0/relpos_bias/rel_embedding"
    heads, buckets = shape("encoder/relpos_bias/rel_embedding", per_layer)
    _, joined = shape("encoder/layers_0/attention/query/kernel")
    gated = "encoder/layers_0/mlp/wi_0/kernel"
    _, hidden = shape(gated, "encoder/layers_0/mlp/wi/kernel")
    if joined % heads:
        raise HubError(
            f"{files.directory}: {heads} heads do not divide the {joined} columns of a query."
        )
    depths = {
        stack: 1
        + max(
            (int(n.split("/")[1][7:]) for n in shapes if re.match(rf"{stack}/layers_\d+/", n)),
            default=-1,
        )
        for stack in ("encoder", "decoder")
    }
    if not depths["decoder"]:
        raise HubError(
            f"{files.directory} has no decoder's layers: an encoder-decoder is expected."
        )
    return {
        "vocab_size": vocabulary,
        "emb_dim": width,
        "num_heads": heads,
        "head_dim": joined // heads,
        "mlp_dim": hidden,
        "num_encoder_layers": depths["encoder"],
        "num_decoder_layers": depths["decoder"],
        "mlp_activations": ("gelu", "linear") if gated in shapes else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in shapes,
        "relpos_per_layer": per_layer in shapes,
        "relpos_buckets": buckets,
        "relpos_max_distance": 128,
    }
