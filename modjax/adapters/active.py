"""The modules that a batch uses, as a small bank of their own.

A batch of B examples has at most B values of a feature. A step can then read and write those values' modules alone:
`narrow` renumbers the batch's ids, `take` makes trees with the columns of those modules, on which the same network
computes the same loss with a smaller feature space, and `put` writes them back.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters.banks import each
from modjax.adapters.routing import DATASET, ModuleName
from modjax.adapters.rules import Mixture
from modjax.adapters.trees import ROUTER_LEAF, banks, leaves_at, routers, split, within
from modjax.features import FeatureSpace

Array = jax.Array
Batch = Mapping[str, Any]
Index = dict[Any, Array]


@dataclasses.dataclass(frozen=True)
class Run:
    """Modules of one group that lie side by side.

    Attributes:
      group: a feature, "dataset", or a module's own group that no feature is.
      count: how many there are.
      size: how much of the axis each of them owns.
    """

    group: str
    count: int
    size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """How a parameter is divided: along a trailing axis (negative), run by run."""

    axis: int
    runs: tuple[Run, ...]

    @property
    def unit(self) -> int:
        """What all sizes are multiples of: the parameter is looked up in pieces of it."""
        return math.gcd(*(run.size for run in self.runs))

    def index(self, used: Mapping[str, Array]) -> Array:
        """The pieces of the used modules, int32; out of range where a group has fewer of them than places."""
        found, start = [], 0
        total = sum(run.count * run.size for run in self.runs) // self.unit
        for run in self.runs:
            pieces = run.size // self.unit
            at = used.get(run.group, np.arange(run.count))
            places = start + at[:, None] * pieces + np.arange(pieces)
            found.append(jnp.where(at[:, None] < run.count, places, total).reshape(-1))
            start += run.count * pieces
        return jnp.concatenate(found).astype(jnp.int32)

    def take(self, x: Any, index: Array) -> Array:
        """The parameter's pieces at an index, zeros where it is out of range; `x` may be any array alike."""
        axis = x.ndim + self.axis
        found = jnp.take(self._pieces(x), index, axis=axis, mode="fill", fill_value=0)
        return found.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def put(self, x: Array, small: Array, index: Array) -> Array:
        """`x` with the pieces at an index replaced."""
        place = (slice(None),) * (x.ndim + self.axis) + (index,)
        return self._pieces(x).at[place].set(self._pieces(small), mode="drop").reshape(x.shape)

    def _pieces(self, x: Any) -> Array:
        axis = x.ndim + self.axis
        size = x.shape[axis] // self.unit
        return jnp.reshape(x, (*x.shape[:axis], size, self.unit, *x.shape[axis + 1 :]))


class ActiveModules:
    """A model's parameters that belong to the values of features.

    Args:
      model: bound to its feature space.
      trained: nested dict of the trained parameters, arrays or shapes.

    Raises:
      ValueError: there are none, or the settings of a group's modules differ, but for their learning rates.
    """

    def __init__(self, model: Any, trained: Mapping[str, Any]):
        self._model = model
        adapted = model.adapted
        space = None if adapted is None else adapted.space
        groups = () if space is None else (*space.names, DATASET)
        self._parts: dict[str, Part] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

        def add(path: str, leaf: Any, part: Part) -> None:
            if any(run.group in groups for run in part.runs):
                self._parts[path], self._shapes[path] = part, leaf.shape

        added = {} if adapted is None else split(trained, adapted)[0]
        for (path, name), bank in banks(added, adapted).items() if added else ():
            mixture = adapted.rule_for(path, name).mixture
            modules = mixture.modules(space)
            if getattr(mixture.router, "copies", 1) > 1:
                raise ValueError(
                    f"Optimizer.lazy: {name!r} has Features.copies, and looks up one module for each value. "
                    "Modules that a step does not use rest with copies anyway: leave LAZY off."
                )
            for leaf, spec in leaves_at(adapted, path, name).items():
                if leaf in bank and spec.axis is not None:
                    sizes = [size for _, size in spec.parts]
                    runs = _runs([module.group for module in modules], sizes, within(path, name))
                    add(within(path, f"{name}/{leaf}"), bank[leaf], Part(spec.axis, runs))
        for (path, name), logits in routers(added, adapted).items() if added else ():
            router = _router(adapted, name)
            runs = (Run(router.routes_by[0], len(router.rows(space)), 1),)
            add(within(path, f"{name}/{ROUTER_LEAF}"), logits, Part(-3, runs))
        if not self._parts:
            raise ValueError(
                "Optimizer.lazy: no trained parameter belongs to a value of a feature, so that none could rest."
            )
        self._groups = {run.group for part in self._parts.values() for run in part.runs}
        self._groups &= set(groups)
        # A step has other names for the values, which no setting knows.
        rules = []
        for rule in adapted.rules:
            mixture = _by_group(rule.mixture, rule.mixture.modules(space), self._groups)
            rules.append(dataclasses.replace(rule, mixture=mixture))
        self._narrowed = dataclasses.replace(model, module=adapted.clone(rules=tuple(rules)))

    def check_state(self, state: Any) -> None:
        """Raises ValueError unless an optimizer's state has what belongs to a module in the parameter's own places."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            owner = self._owner(path)
            if owner is not None and leaf.shape != self._shapes[owner]:
                raise ValueError(
                    f"Optimizer.lazy needs an algorithm that keeps its state element by element, as adamw(): "
                    f"of {owner}, {self._shapes[owner]}, this one keeps {leaf.shape}."
                )

    def narrow(self, batch: Batch) -> tuple[Any, dict[str, Any], Index]:
        """(the model with a place for each value that a batch can have, the batch with ids of places, the index for
        `take` and `put`).
        """
        space = self._model.adapted.space
        small = dict(batch)
        values, used = dict(space.features), {}
        for group in self._groups - {DATASET}:
            columns = np.flatnonzero(np.array(space.slot_features) == group)
            ids = jnp.asarray(small["features"])[..., columns]
            used[group], ids = _renumbered(ids, len(values[group]))
            small["features"] = jnp.asarray(small["features"]).at[..., columns].set(ids)
            values[group] = _places(len(used[group]))
        datasets = space.datasets
        if DATASET in self._groups:
            used[DATASET], small["tasks"] = _renumbered(jnp.asarray(batch["tasks"]), len(datasets))
            datasets = _places(len(used[DATASET]))
        fewer = FeatureSpace(tuple(values.items()), datasets, space.slots)
        index = {part: part.index(used) for part in set(self._parts.values())}
        return self._narrowed.with_space(fewer), small, index

    def take(self, tree: Any, index: Index) -> Any:
        """A tree of parameters, or an optimizer's state of them, with the used modules alone."""

        def take(path: Any, x: Array) -> Array:
            owner = self._owner(path)
            return x if owner is None else self._parts[owner].take(x, index[self._parts[owner]])

        return jax.tree_util.tree_map_with_path(take, tree)

    def put(self, tree: Any, small: Any, index: Index) -> Any:
        """The tree with the used modules replaced; what belongs to no module is that of `small`."""

        def put(path: Any, x: Array, new: Array) -> Array:
            owner = self._owner(path)
            return (
                new if owner is None else self._parts[owner].put(x, new, index[self._parts[owner]])
            )

        return jax.tree_util.tree_map_with_path(put, tree, small)

    def factors(self, factors: Mapping[str, Any], index: Index) -> dict[str, Any]:
        """{path: an array that broadcasts over the parameter}, likewise."""
        found = dict(factors)
        for path in self._parts.keys() & factors.keys():
            part, factor = self._parts[path], np.asarray(factors[path])
            if factor.ndim >= -part.axis and factor.shape[part.axis] > 1:
                found[path] = part.take(factor, index[part])
        return found

    def _owner(self, path: Any) -> str | None:
        """The parameter that a leaf of any tree stands for, by the end of its path."""
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        ends = ("/".join(keys[start:]) for start in range(len(keys)))
        return next((end for end in ends if end in self._parts), None)


def _runs(groups: list[str], sizes: list[int], where: str) -> tuple[Run, ...]:
    runs: list[Run] = []
    for group, size in zip(groups, sizes, strict=True):
        last = runs[-1] if runs else None
        if last is None or last.group != group:
            runs.append(Run(group, 1, size))
        elif last.size != size:
            raise ValueError(
                f"Optimizer.lazy: the modules of {group!r} at {where} have sizes {last.size} and {size}: "
                "give them one size, or leave LAZY off."
            )
        else:
            runs[-1] = Run(group, last.count + 1, size)
    return tuple(runs)


def _by_group(mixture: Mixture, modules: Sequence[ModuleName], groups: Set[str]) -> Mixture:
    """The mixture with settings that name no value of the groups; values' learning rates are those of `factors`.

    Raises:
      ValueError: another setting differs between values of a group.
    """
    named = {name for m in modules if m.group in groups for name in m.names if name != m.group}
    module: Any = mixture.module
    changed: dict[str, Any] = {}
    for setting in module.settings:
        value = getattr(module, setting)
        if not isinstance(value, tuple) or not named & dict(value).keys():
            continue
        table = {key: own for key, own in value if key not in named}
        for group in sorted(groups) if setting != "learning_rate" else ():
            owned = each(value, [m for m in modules if m.group == group], None)
            if len(set(owned)) > 1:
                where = f"{type(module).__name__}.{setting}"
                raise ValueError(
                    f"Optimizer.lazy: {where} of {mixture.name!r} differs between the modules of {group!r}, "
                    f"{sorted(set(owned), key=str)}: give them one {setting}, or leave LAZY off."
                )
            if owned and owned[0] is not None:
                table[group] = owned[0]
        changed[setting] = table
    return dataclasses.replace(mixture, module=dataclasses.replace(module, **changed))


def _router(adapted: Any, name: str) -> Any:
    return next(r.mixture.router for r in adapted.rules if r.mixture.name == name)


def _renumbered(ids: Array, count: int) -> tuple[Array, Array]:
    """(int32 [n]: the values that ids 1..count name, from 0, ascending and then `count`; ids of their places)."""
    known = (ids > 0) & (ids <= count)
    there = jnp.any(ids.reshape(-1, 1) == np.arange(1, count + 1), axis=0)
    (used,) = jnp.nonzero(there, size=min(count, ids.size), fill_value=count)
    places = jnp.cumsum(there, dtype=jnp.int32)
    return used, jnp.where(known, places[jnp.where(known, ids - 1, 0)], 0)


def _places(count: int) -> tuple[str, ...]:
    return tuple(f"place {i}" for i in range(count))
