"""Where arrays live: a device mesh with the axes "data" and "model", and the rules that place
parameters on it.

Parameters name their dimensions by logical axes ("embed", "mlp", ...); `RULES` says which mesh axis
each is divided over. A batch is divided over "data". Adapters carry the names of the kernel they
adapt, so they follow it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax import errors

Rules = Sequence[tuple[str, str | None]]

RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("kv", None),
    ("embed", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("length", None),
    ("rank", None),
    ("module", None),
)


def make_mesh(model_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "model") of all devices of all processes, `model_parallel` of them along
    "model".

    Raises:
      ValueError: if the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if model_parallel < 1 or len(devices) % model_parallel:
        raise ValueError(
            f"{len(devices)} devices cannot be divided in groups of model_parallel={model_parallel}"
        )
    grid = np.asarray(devices).reshape(-1, model_parallel)
    return Mesh(grid, ("data", "model"))


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """The partition of one array by the logical names of its dimensions.

    A dimension stays whole where its mesh axis is already used by an earlier dimension or does not
    divide it.

    Raises:
      ValueError: a name without a rule, or not one name per dimension.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {shape}")
    table = dict(rules)
    axes: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"no rule for the logical axis {name!r}.{errors.nearest(name, table)}")
        axis = table.get(name) if name is not None else None
        if axis is not None and (axis in axes or size % mesh.shape[axis]):
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)


def flat_axes(params_axes: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """The `params_axes` collection of a Flax network as {path of the parameter: names of its
    dimensions}.
    """
    is_leaf = lambda path, value: hasattr(value, "names")  # noqa: E731
    flat = traverse_util.flatten_dict(dict(params_axes), sep="/", is_leaf=is_leaf)
    return {
        path.removesuffix("_axes"): tuple(value.names)
        for path, value in flat.items()
        if hasattr(value, "names")
    }


def shardings(
    tree: Mapping[str, Any],
    axes: Mapping[str, Sequence[str | None]],
    mesh: Mesh,
    rules: Rules = RULES,
) -> dict[str, Any]:
    """One sharding per array of a parameter tree; a leaf without axis names is replicated.

    A quantised leaf's arrays have the same axes, and so the same names.
    """
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    placed = {}

    def place(leaf: Any, names: Sequence[str | None] | None) -> NamedSharding:
        part = PartitionSpec() if names is None else spec(names, leaf.shape, mesh, rules)
        return NamedSharding(mesh, part)

    for path, leaf in flat.items():
        try:
            placed[path] = jax.tree.map(lambda x, path=path: place(x, axes.get(path)), leaf)
        except ValueError as error:
            raise ValueError(f"parameter {path}: {error}") from error
    return traverse_util.unflatten_dict(placed, sep="/")


def like_params(
    state: Any, params: Mapping[str, Any], placed: Mapping[str, Any], mesh: Mesh
) -> Any:
    """Shardings for an optimizer state: leaves that mirror a parameter (same path and shape) follow
    it.

    Args:
      state: shapes of the optimizer's state (any pytree).
      params: shapes of the trained parameters.
      placed: their shardings.
      mesh: where everything else is replicated.
    """
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(dict(params)).items()}
    homes = traverse_util.flatten_dict(dict(placed))

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        for start in range(len(keys)):
            if shapes.get(keys[start:]) == leaf.shape:
                return homes[keys[start:]]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def one_per_device(mesh: Mesh) -> NamedSharding:
    """Of an array [devices], for what each process says for itself."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises a ValueError where a global batch cannot be divided over the mesh and the microbatches."""
    share = mesh.shape["data"] * microbatches
    if batch_size < 1 or microbatches < 1 or batch_size % share:
        raise ValueError(
            f"the batch of {batch_size} does not divide into {microbatches} microbatches over "
            f"{mesh.shape['data']} data-parallel devices: use a multiple of {share}"
        )


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first dimension is a batch's."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shares(batch_size: int, mesh: Mesh) -> list[np.ndarray]:
    """For each process the rows of the global batch that its devices hold, ascending.

    Where a model is divided over the devices of several processes, those hold the same rows.
    """
    held: list[set[int]] = [set() for _ in range(jax.process_count())]
    home: Any = rows(mesh)  # jax types its devices by a name that mypy does not find
    for device, index in home.devices_indices_map((batch_size,)).items():
        held[device.process_index].update(range(batch_size)[index[0]])
    return [np.array(sorted(mine), np.int64) for mine in held]


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch, see `shares`, on its devices; the result is the global
    batch [B, ...].
    """
    home = rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), home)
    return {
        name: jax.make_array_from_process_local_data(home, values) for name, values in batch.items()
    }


def place_whole_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The same for a batch [B, ...] that every process has the whole of."""
    mine = shares(len(next(iter(batch.values()))), mesh)[jax.process_index()]
    return place_batch({name: value[mine] for name, value in batch.items()}, mesh)


def place(tree: Any, placed: Any) -> Any:
    """Puts host arrays, whole and equal in every process, on the devices by a tree of shardings."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placed)

    def put(value: Any, home: NamedSharding) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, home, lambda index: value[index])

    return jax.tree.map(put, tree, placed)
