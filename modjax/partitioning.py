"""Where arrays live: a device mesh with the axes "data", "fsdp" and "model", and the rules that place
arrays on it.

A batch is divided over "data" and "fsdp". Parameters and activations name their dimensions by logical
axes ("embed", "mlp", ...); rules say over which mesh axes each is divided. Over "model" both are, so
that a layer's work is shared; over "fsdp" parameters only, to be gathered where they are used. Adapters
carry the names of the kernel they adapt, so they follow it, unless they are to be whole everywhere.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax import errors

MESH_AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, Axis]]

# As in T5X the first rule of a name that fits is taken; "embed" of an activation, for one, cannot be divided
# over "fsdp", which its batch is.
RULES: Rules = (
    ("batch", BATCH_AXES),
    ("lookup", "data"),  # rows looked up in a table whose width is divided over "fsdp"
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("kv", None),
    ("embed", "fsdp"),
    ("relpos_buckets", None),
    ("layers", None),
    ("length", None),
    ("rank", None),
    ("module", None),
)
ADAPTERS = ("sharded", "replicated")
# The name of what `move` marks: rematerialisation keeps it, or it would be sent again.
SENT = "sent"


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How a job uses its devices.

    Attributes:
      fsdp: devices that share one copy of the frozen base (and of all that follows it) and have rows of
        their own.
      model: devices that share rows, too, each doing a part of every layer's work.
      adapters: "sharded" as the kernels they adapt, or "replicated" on every device.
      rules: (logical axis, mesh axis, several of them, or None) that come before `RULES`.

    What `fsdp * model` leaves of the devices is the axis "data".
    """

    fsdp: int = 1
    model: int = 1
    adapters: str = "sharded"
    rules: Rules = ()

    def __post_init__(self) -> None:
        if self.adapters not in ADAPTERS:
            raise ValueError(
                f"Partitioner.adapters: unknown {self.adapters!r}."
                + errors.nearest(self.adapters, ADAPTERS)
            )
        errors.check_integer("Partitioner.fsdp", self.fsdp)
        errors.check_integer("Partitioner.model", self.model)
        for rule in self.rules:
            if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
                raise ValueError(
                    f"Partitioner.rules: {rule!r} is no pair (logical axis, mesh axis or None)."
                )
            for axis in _axes(rule[1]):
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"Partitioner.rules: {tuple(rule)} names no axis of the mesh."
                        + errors.nearest(str(axis), MESH_AXES)
                    )

    @property
    def all_rules(self) -> Rules:
        """The job's own rules, then the usual ones."""
        return (*((str(name), _as_axis(axis)) for name, axis in self.rules), *RULES)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The job's mesh, of all devices unless given. Raises as `make_mesh`."""
        return make_mesh(self.model, devices, self.fsdp)

    def check(self, axes: Mapping[str, Sequence[str | None]]) -> None:
        """Raises a ValueError where a rule is for a logical axis that neither a parameter of `axes` (names by
        path) nor an activation has.
        """
        known = {name for names in axes.values() for name in names if name is not None}
        known |= {name for name, _ in RULES}
        for name, _ in self.rules:
            if name not in known:
                raise ValueError(
                    f"Partitioner.rules: nothing has the logical axis {name!r}."
                    + errors.nearest(str(name), sorted(known))
                )


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh ("data", "fsdp", "model") of all devices of all processes, `model` of them along "model" and
    `fsdp` along "fsdp".

    Raises:
      ValueError: if the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or fsdp < 1 or len(devices) % (model * fsdp):
        raise ValueError(
            f"{len(devices)} devices cannot be divided in groups of fsdp={fsdp} times model={model}: "
            "their product must divide the number of devices"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp, model), MESH_AXES)


def _axes(axis: Any) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _as_axis(axis: Any) -> Axis:
    return axis if axis is None or isinstance(axis, str) else tuple(axis)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """The partition of one array by the logical names of its dimensions.

    The first rule of a name is taken whose mesh axes are not used by an earlier dimension and divide this one;
    without any the dimension stays whole. Vectors are not divided over "fsdp", which is there to save memory:
    what they take is not worth a gather.

    Raises:
      ValueError: a name without a rule, or not one name per dimension.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {shape}")
    long = [n for n, size in zip(names, shape, strict=True) if n != "layers" and size > 1]
    taken = set() if len(long) > 1 else {"fsdp"}
    parts: list[Axis] = []
    for name, size in zip(names, shape, strict=True):
        options = [axis for key, axis in rules if key == name]
        if name is not None and not options:
            known = [key for key, _ in rules]
            raise ValueError(
                f"no rule for the logical axis {name!r} (Partitioner.rules may add one)."
                + errors.nearest(name, known)
            )
        part: Axis = None
        for axis in options:
            mine = _axes(axis)
            if not taken & set(mine) and size % math.prod(mesh.shape[a] for a in mine) == 0:
                part = axis
                taken |= set(mine)
                break
        parts.append(part)
    return PartitionSpec(*parts)


# The mesh and rules of the step that is being traced.
_IN_FORCE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "rules in force", default=None
)


@contextlib.contextmanager
def in_force(mesh: Mesh | None, rules: Rules = RULES) -> Iterator[None]:
    """Makes `constrain` place activations on a mesh. To be entered inside a jitted function, for it is no part
    of jit's cache key.
    """
    token = _IN_FORCE.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _IN_FORCE.reset(token)


def device() -> Any:
    """A device of those that the step that is being traced will run on.

    Of the mesh in force, whose devices need not be here (`modjax.aot`); jax's first one where there is none.
    """
    found = _IN_FORCE.get()
    return jax.devices()[0] if found is None else found[0].devices.flat[0]


def platform() -> str:
    """What the step that is being traced will run on: "cpu", "gpu", "tpu"."""
    return str(device().platform)


def rows_are_divided() -> bool:
    """Whether the step that is being traced divides a batch over several devices, as far as is known."""
    found = _IN_FORCE.get()
    return found is not None and row_shards(found[0]) > 1


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """An activation, placed by the rules in force; a dimension that they cannot divide stays whole.

    Not Flax's `with_logical_constraint`, which fails there, and whose rules would constrain parameters too. It is
    used where nothing of ours is in force: T5X sets its rules, and where it has none for a name, x is left alone.
    """
    found = _IN_FORCE.get()
    if found is None:
        known = {name for name, _ in nn.get_logical_axis_rules()} | {None}
        return nn.with_logical_constraint(x, tuple(names)) if known >= set(names) else x
    mesh, rules = found
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, spec(names, x.shape, mesh, rules))
    )


def move(x: jax.Array, names: Sequence[str | None], to: Sequence[str | None]) -> jax.Array:
    """An activation placed by `names` and then by `to`, marked as `SENT` if devices send each other parts of it."""
    moved = constrain(constrain(x, names), to)
    found = _IN_FORCE.get()
    if found is None:
        return moved
    mesh, rules = found
    here, there = (NamedSharding(mesh, spec(way, x.shape, mesh, rules)) for way in (names, to))
    return moved if here.is_equivalent_to(there, x.ndim) else checkpoint_name(moved, SENT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def constrain_forward(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """`constrain` for values alone: `constrain` places their gradient likewise, and here that is left to XLA.

    For what is looked up in a table that may train: with both placed, a gradient was once off by 8e-4 on a mesh of all
    three axes (not found again).
    """
    return constrain(x, names)


def _constrained(x: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return constrain(x, names), None


def _unconstrained(
    names: tuple[str | None, ...], _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del names
    return (cotangent,)


constrain_forward.defvjp(_constrained, _unconstrained)


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


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first dimension is a batch's."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_shards(mesh: Mesh) -> int:
    """In how many parts a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises a ValueError where a global batch cannot be divided over the mesh and the microbatches."""
    errors.check_integer("batch_size", batch_size)
    errors.check_integer("microbatches", microbatches)
    share = row_shards(mesh) * microbatches
    if batch_size % share:
        raise ValueError(
            f"the batch of {batch_size} does not divide into {microbatches} microbatches over "
            f"{row_shards(mesh)} data-parallel devices (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']}): use a multiple of {share}"
        )


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


def whole(tree: Any) -> Any:
    """The other way: arrays that several processes share, whole in each. Every process has to call it."""

    def get(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            return value
        return multihost_utils.process_allgather(value, tiled=True)

    return jax.tree.map(get, tree)
