"""Where a run's parameters come from: a base, fresh adapters, an earlier checkpoint.

Every parameter has exactly one source. Nothing is taken at random because it was not found: a base
that does not fit is an error that lists what differs.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from modjax import adapters, checkpoints, memo, optimizers, partitioning, provenance, quantization
from modjax.adapters.routing import DATASET
from modjax.errors import check_bool, nearest
from modjax.features import FeatureSpace, as_values

RANDOM = "random"
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run starts from INITIAL_CHECKPOINT_PATH.

    Attributes:
      collapse: from the checkpoint's uniform average, or what remains of it without any feature: one module at each
        layer, which this run's method has to be (Polytropon's "mu": `methods/lora.gin` with the skills' rank).
      new_from: `{feature: values}`; a value that the checkpoint lacks starts as the mean of those values' parameters,
        instead of adding nothing. "dataset" for datasets and their logits.
      freeze_known: only what the checkpoint lacks trains: new values' modules, a new task's logits.
    """

    collapse: bool = False
    new_from: Mapping[str, Sequence[str]] | None = None
    freeze_known: bool = False

    def __post_init__(self) -> None:
        check_bool("Start.collapse", self.collapse)
        check_bool("Start.freeze_known", self.freeze_known)
        if self.collapse and (self.new_from or self.freeze_known):
            raise ValueError(
                "Start.collapse makes one module of all, so that Start.new_from and Start.freeze_known mean nothing."
            )
        if self.new_from:
            named = {f: as_values(v, f"Start.new_from[{f!r}]") for f, v in self.new_from.items()}
            object.__setattr__(self, "new_from", named)

    def check(self, checkpoint: Any, adapted: bool) -> None:
        """Raises ValueError where the options mean nothing for the run."""
        if self != Start() and (not checkpoint or not adapted):
            what = "a method with adapters" if checkpoint else "an INITIAL_CHECKPOINT_PATH"
            raise ValueError(f"{self} is set, but this run does not have {what}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a model's parameters look like, and which of them train.

    Attributes:
      trained, frozen: nested dicts of shapes that together hold every parameter.
      axes: the names of the dimensions, by path.
      rates: {path: factors on the updates of a trained parameter}, where they are not all 1.
      lazy: {path: how modules own it} of those whose modules rest in a step that does not use them.
    """

    trained: Tree
    frozen: Tree
    axes: Mapping[str, Sequence[str | None]]
    rates: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lazy: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@memo.keep(4)
def _init(model: Any) -> Any:
    """A model's `init`, which jax traces once for each shape of a batch: every start asks for it several times."""
    return jax.jit(model.init)


def variable_shapes(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of a model's variables {params, params_axes}; computes nothing."""
    return dict(_init(model).eval_shape(jax.random.key(0), dict(batch)))


def layout(
    model: Any,
    batch: Mapping[str, Any],
    groups: Sequence[optimizers.Group] = (),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),  # noqa: B008
) -> Layout:
    """The shapes of a model's parameters, divided by the optimizer's groups; computes nothing.

    Raises:
      ValueError: adapters' rules, groups or the partitioner's rules that do not fit the network.
    """
    variables = variable_shapes(model, batch)
    params, named = variables["params"], variables.get("params_axes", {})
    axes: dict[str, Any] = dict(partitioning.flat_axes(named))
    paths: list[str] = []
    rates: Mapping[str, Any] = {}
    lazy: Mapping[str, Any] = {}
    if model.adapted is not None:
        added, base = adapters.split(params, model.adapted)
        paths = list(traverse_util.flatten_dict(added, sep="/"))
        added_axes = adapters.logical_axes(added, model.adapted, base, named)
        axes.update(traverse_util.flatten_dict(added_axes, sep="/"))
        if partitioner.adapters == "replicated":
            axes.update({path: (None,) * len(axes[path]) for path in paths})
        nested = adapters.update_rates(added, model.adapted)
        rates = traverse_util.flatten_dict(nested or {}, sep="/")
        lazy = adapters.lazy_parts(added, model.adapted)
    partitioner.check(axes)
    trained, frozen = optimizers.select(params, groups, paths)
    resting = [p for p in traverse_util.flatten_dict(frozen, sep="/") if p in set(paths)]
    if resting:
        raise ValueError(
            f"a group freezes adapters ({resting[0]}, {len(resting)} in all), which would then be in no checkpoint: "
            "give their module learning_rate 0 instead"
        )
    return Layout(trained, frozen, axes, rates, lazy)


def place(model: Any, params: Tree, mesh: Any, partitioner: partitioning.Partitioner) -> Tree:
    """All parameters of a model, host arrays, on the devices of a mesh."""
    batch = model.example_batch({"inputs": 1, "targets": 1}, _space(model))
    axes = layout(model, batch, partitioner=partitioner).axes
    homes = partitioning.shardings(params, axes, mesh, partitioner.all_rules)
    return partitioning.place(params, homes)


def _space(model: Any) -> FeatureSpace:
    return FeatureSpace((), ()) if model.adapted is None else model.adapted.space


def factors(
    layout: Layout, start: Start, method: Any, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """{path: factors on its updates}: the method's own, and 0 for what a run freezes.

    Args:
      layout: of the run.
      start: how it started.
      method: its `describe_method`.
      before: `{"method": ..., "trained": ...}` of the metadata of the checkpoint it started from, or None.

    Raises:
      ValueError: nothing would train, or fresh modules would stay fresh.
    """
    found = dict(layout.rates)
    if before is None and any((np.asarray(factor) == 0).any() for factor in found.values()):
        raise ValueError(
            "modules with learning_rate 0 would stay as they are initialised, at nothing: start them from an "
            "INITIAL_CHECKPOINT_PATH"
        )
    if start.freeze_known and before is not None:
        anew = _heads_of(layout.trained) != _heads_of(before["trained"])
        for path, factor in adapters.known_rates(layout.trained, before["method"], method).items():
            if not (anew and is_head(path)):
                found[path] = found.get(path, 1.0) * factor
    if adapters.count_moving(layout.trained, found) == 0:
        raise ValueError(
            "nothing would train: every parameter has learning rate 0"
            + (", for the checkpoint knows them all" if start.freeze_known else "")
        )
    return found


def check_routed(model: Any, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that every dataset that is trained on has logits of its own where routing is learned.

    Args:
      model: bound to its feature space.
      datasets: {name: its features}.

    Raises:
      ValueError: a dataset would be routed as an unknown task; it is named.
    """
    for rule in model.adapted.rules if model.adapted else ():
        router = rule.mixture.router
        rows = router.rows(model.adapted.space)
        for name, features in datasets.items() if rows else ():
            (by,) = router.routes_by
            row = name if by == "dataset" else features.get(by)
            if row not in rows:
                raise ValueError(
                    f"The router of {rule.mixture.name!r}: dataset {name!r} has no logits, for its {by} is "
                    f"{row!r}; training would leave it to the uniform average."
                    + nearest(str(row), rows)
                )


def take_base(wanted: Tree, base: Tree, adapter_names: Sequence[str], where: str) -> Tree:
    """The leaves of `wanted` that a base holds, from the base; adapters are left out.

    Args:
      wanted: nested dict of shapes.
      base: nested dict of host arrays.
      adapter_names: the mixtures' names; paths through them belong to no base, nor does a head.
      where: the base's name for messages.

    Raises:
      ValueError: a parameter that the base lacks or has in another shape.
    """
    flat = traverse_util.flatten_dict(base, sep="/")
    taken, problems = {}, []
    for path, leaf in traverse_util.flatten_dict(wanted, sep="/").items():
        if path in flat:
            if tuple(flat[path].shape) != tuple(leaf.shape):
                problems.append(
                    f"{path} is {list(flat[path].shape)}, the model has {list(leaf.shape)}"
                )
            taken[path] = flat[path]
        elif not set(path.split("/")) & set(adapter_names) and not is_head(path):
            problems.append(f"{path} is missing")
    if problems:
        more = f" ({len(problems)} in all)" if len(problems) > 6 else ""
        raise ValueError(
            f"the base {where} does not fit the model: {'; '.join(problems[:6])}{more}. "
            "Choose the gin file of the base's size"
        )
    return traverse_util.unflatten_dict(taken, sep="/")


def to_float32(tree: Tree) -> Tree:
    """Parameters that train, whatever their files hold: a bfloat16 loses an update of a thousandth of it."""

    def cast(x: Any) -> Any:
        narrow = jax.numpy.issubdtype(x.dtype, np.floating) and x.dtype.itemsize < 4
        return np.asarray(x, np.float32) if narrow else x

    return jax.tree.map(cast, tree)


def host_init(model: Any, batch: Mapping[str, Any], wanted: Tree, seed: int) -> Tree:
    """The leaves of `wanted` as the model initialises them, host arrays that are the same in every
    process.
    """
    keep = set(traverse_util.flatten_dict(wanted, sep="/"))
    if not keep:
        return {}

    @jax.jit
    def draw(rng: jax.Array) -> Tree:
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), dict(batch))
        params = traverse_util.flatten_dict(_init(model)(rng, zeros)["params"], sep="/")
        return {path: leaf for path, leaf in params.items() if path in keep}

    return traverse_util.unflatten_dict(jax.device_get(draw(jax.random.key(seed))), sep="/")


def resolve_space(
    derived: FeatureSpace, stored: FeatureSpace, own: bool, where: Any
) -> FeatureSpace:
    """The feature space of a run that continues a checkpoint: the checkpoint's ids, whatever the
    mixture's order is.

    Args:
      derived: of the run's mixture.
      stored: of the checkpoint.
      own: the checkpoint is the run's own, with an optimizer state that fits its space exactly;
        otherwise values that it lacks are appended, and an example may have as many at once as the
        run's need.
      where: the checkpoint, for messages.

    Raises:
      CheckpointError: `own`, and the checkpoint lacks a name, or room for several values at once.
    """
    for name in derived.names:
        if name not in stored.names:
            raise provenance.CheckpointError(
                f"the feature space of {where} has no feature {name!r}."
                + nearest(name, stored.names)
            )
    extended = stored.merge(derived)
    if own and extended != stored:
        new = [
            f"{name} {value!r}"
            for name, values in extended.features
            for value in values
            if value not in stored.values(name)
        ]
        new += [f"dataset {name!r}" for name in extended.datasets if name not in stored.datasets]
        room = zip(extended.names, extended.slots, stored.slots, strict=True)
        new += [f"{wide} values of {name} at once" for name, wide, less in room if wide > less]
        raise provenance.CheckpointError(
            f"{where} was trained without {', '.join(new)}. To add them, start a run in a new "
            f"MODEL_DIR with INITIAL_CHECKPOINT_PATH={str(where)!r}"
        )
    return extended


def to_dtype(tree: Tree, dtype: str | None) -> Tree:
    """A frozen base in another precision: its floating leaves in float32 or bfloat16, or its weights in int8.

    Args:
      tree: nested dict of arrays.
      dtype: "float32", "bfloat16", "int8" (see `modjax.quantization`), or None to leave it as it is.

    Raises:
      ValueError: another dtype, or nothing is frozen.
    """
    if dtype is None:
        return tree
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(
            f"base_dtype {dtype!r}: use float32 or bfloat16, or int8 (float16 overflows in the T5 family)"
        )
    if not tree:
        raise ValueError(
            f"base_dtype {dtype!r} is for a frozen base, and nothing is frozen: everything trains, as with "
            "methods/full.gin. Leave base_dtype out"
        )
    if dtype == "int8":
        return quantization.quantize(tree)
    target = jax.numpy.dtype(dtype)

    def cast(x: Any) -> Any:
        return x.astype(target) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x

    return jax.tree.map(cast, tree)


def is_head(path: str) -> bool:
    """Whether a parameter belongs to a task's own output layer, which a base need not have."""
    return re.fullmatch(optimizers.HEAD, path) is not None


def added(trained: Tree, names: Sequence[str]) -> Tree:
    """The leaves of a tree that belong to the mixtures of these names, or to a task's head."""
    flat = traverse_util.flatten_dict(dict(trained), sep="/")
    mine = {
        path: leaf
        for path, leaf in flat.items()
        if set(path.split("/")) & set(names) or is_head(path)
    }
    return traverse_util.unflatten_dict(mine, sep="/")


def without(tree: Tree, other: Tree) -> Tree:
    """The leaves of a tree whose paths another one does not have."""
    taken = set(traverse_util.flatten_dict(other))
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({k: v for k, v in flat.items() if k not in taken})


def start_from(
    path: Any,
    metadata: Mapping[str, Any],
    fresh: Any,
    stored: Mapping[str, Any],
    model: Any,
    start: Start = Start(),
) -> Any:
    """The trained parameters of another checkpoint, widened where this run's feature space has more
    values.

    Args:
      path: the checkpoint.
      metadata: this run's.
      fresh: this run's trained parameters as it would start by itself.
      stored: the checkpoint's metadata.
      model: this run's.
      start: see `Start`.

    A task's head is carried over where it has the same outputs; otherwise the run's own starts anew, and says so.

    Raises:
      CheckpointError: made with another base, or with another method that is not to be collapsed.
      ValueError: this run's modules are not those that are to be carried over.
    """
    where = checkpoints.locate(path)
    provenance.check_same("base", stored["base"], metadata["base"], where)
    if start.collapse:
        return _collapsed(where, fresh, stored, model)
    theirs, own_method = (_no_bank(adapters.of_evaluation(x["method"])) for x in (stored, metadata))
    provenance.check_same("method", theirs, own_method, where)
    old, _, _ = checkpoints.load_trained(where)
    old, heads = _parted(old)
    own, own_heads = _parted(fresh)
    if stored["method"] != metadata["method"]:
        old = adapters.extend(old, stored["method"], own, metadata["method"])
    if start.new_from:
        _check_sources(start.new_from, metadata, stored, where)
        old = adapters.fill(old, stored["method"], metadata["method"], start.new_from)
    return optimizers.combine(old, _carried(heads, own_heads, where))


def _check_sources(
    sources: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any],
    stored: Mapping[str, Any],
    where: Any,
) -> None:
    """Raises ValueError where `Start.new_from` names a feature, or a value of the checkpoint, that there is not."""
    names = (*FeatureSpace.from_json(metadata["space"]).names, DATASET)
    known = FeatureSpace.from_json(stored["space"])
    for feature, values in sources.items():
        if feature not in names:
            raise ValueError(
                f"Start.new_from: unknown feature {feature!r}.{nearest(feature, names)}"
            )
        there = known.datasets if feature == DATASET else dict(known.features).get(feature, ())
        for value in values:
            if value not in there:
                raise ValueError(
                    f"Start.new_from: {where} has no {feature} {value!r}.{nearest(value, there)}"
                )


def _parted(tree: Tree) -> tuple[Tree, Tree]:
    """(the rest, the task's head) of trained parameters."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    heads = {path: leaf for path, leaf in flat.items() if is_head(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in heads}
    return traverse_util.unflatten_dict(rest, sep="/"), traverse_util.unflatten_dict(heads, sep="/")


def _heads_of(trained: Tree) -> dict[str, str]:
    """{path: shape} of a task's head, in a tree or as a checkpoint's metadata describes one."""
    flat = traverse_util.flatten_dict(dict(trained), sep="/")
    shapes = {p: x if isinstance(x, str) else str(list(x.shape)) for p, x in flat.items()}
    return {path: shape[shape.index("[") :] for path, shape in shapes.items() if is_head(path)}


def _carried(heads: Tree, own: Tree, where: Any) -> Tree:
    """A checkpoint's head for a run, or the run's own where that has another form."""
    if _heads_of(heads) == _heads_of(own):
        return heads
    print(f"the head of {where} has another form than this run's, which starts anew")
    return own


def _collapsed(where: Any, fresh: Any, stored: Mapping[str, Any], model: Any) -> Any:
    """A checkpoint's modules composed without any feature, in the places of this run's single modules."""
    if model.adapted is None or len(model.adapted.names) != 1:
        raise ValueError("Start.collapse needs a method with one module, as methods/lora.gin.")
    for rule in model.adapted.rules:
        mixture = rule.mixture
        scales = getattr(mixture.module, "scales", lambda modules: np.ones(1))
        if (
            not isinstance(mixture.router, adapters.Single)
            or (scales(mixture.modules(None)) != 1).any()
        ):
            raise ValueError(
                "Start.collapse gives one module without a scale of its own: this run's router must be Single and its "
                "alpha the rank (None)."
            )
    space = FeatureSpace.from_json(stored["space"])
    rules = adapters.rules_of(stored["method"])
    old = adapters.Adapted(model.network, rules, space, model.adapted.streams)
    tree, _, _ = checkpoints.load_trained(where)
    tree, others = adapters.split(tree, old)
    _, leaves = adapters.compose(old, tree, name=model.adapted.names[0])
    found = traverse_util.flatten_dict(leaves, sep="/")
    wanted = traverse_util.flatten_dict(dict(fresh), sep="/")
    mine = {path for path in wanted if set(path.split("/")) & set(model.adapted.names)}
    for path in sorted(mine | set(found)):
        there, here = (tree[path].shape if path in tree else None for tree in (found, wanted))
        if there != here:
            raise ValueError(
                f"{where} collapses to {path} of shape {there}, and this run has {here}: give its method the rank and "
                "the layers of the checkpoint's"
            )
    heads = _carried(_parted(others)[1], _parted(fresh)[1], where)
    found |= traverse_util.flatten_dict(heads, sep="/")
    return traverse_util.unflatten_dict({**wanted, **found}, sep="/")


def _no_bank(part: Any) -> Any:
    """A method without the lists of its modules, which follow from the feature space."""
    if not isinstance(part, Mapping) or "rules" not in part:
        return part
    return {"rules": [{k: v for k, v in rule.items() if k != "bank"} for rule in part["rules"]]}


def restore(
    model: Any, checkpoint: Any, base: Tree | None, base_dtype: str | None = None
) -> tuple[Any, Tree, dict[str, Any], int]:
    """A trained model as it was saved, for evaluation or export.

    Args:
      model: of the checkpoint's method; its feature space is replaced by the checkpoint's.
      checkpoint: a checkpoint, or a MODEL_DIR, whose latest one is taken.
      base: the base's weights, nested dict of host arrays; None if all of it was trained.
      base_dtype: precision that the frozen base is wanted in, see `to_dtype`.

    Returns:
      (model, params, metadata, step): the model bound to the checkpoint's feature space, and the
      parameters of base and adapters in one nested dict of host arrays.

    Raises:
      CheckpointError: damaged, or made with another method or base; what differs is named.
      ValueError: the base does not fit the model.
    """
    trained, metadata, step = checkpoints.load_trained(checkpoint)
    where = checkpoints.locate(checkpoint)
    space = FeatureSpace.from_json(metadata["space"])
    model = model.with_space(space)
    method = adapters.describe_method(model.adapted) if model.adapted else "full"
    theirs, own = map(adapters.of_evaluation, (metadata["method"], method))
    provenance.check_same("method", theirs, own, where)
    batch = model.example_batch({"inputs": 1, "targets": 1}, space)  # any lengths will do
    flat = traverse_util.flatten_dict(variable_shapes(model, batch)["params"], sep="/")
    kept = {path: leaf for path, leaf in flat.items() if path not in metadata["trained"]}
    wanted = traverse_util.unflatten_dict(kept, sep="/")
    names = model.adapted.names if model.adapted else ()
    frozen = take_base(wanted, base or {}, names, "given")
    provenance.check_same("base", metadata["base"], provenance.fingerprint(frozen), where)
    frozen = to_dtype(frozen, base_dtype)
    return model, optimizers.combine(trained, frozen), metadata, step
