"""How a bank grows: modules (and tasks' logits) keep their parameters by name when there are more of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax.adapters.trees import Tree
from modjax.errors import nearest


def extend(
    old: Tree, old_method: Mapping[str, Any], new: Tree, new_method: Mapping[str, Any]
) -> dict[str, Any]:
    """Carries a smaller bank's modules into a larger bank, by the modules' names.

    Args:
      old: adapters of the old run.
      old_method: its `describe_method`.
      new: fresh adapters of the new run; modules that the old one does not have keep these values.
      new_method: its `describe_method`.

    Returns:
      A tree like `new` in which every module of `old` has its old values.

    Raises:
      ValueError: the methods attach to different layers, the new bank lacks a module of the old one, or a module's
        rank differs; it is named.
    """
    old_flat, new_flat = flatten_dict(old, sep="/"), flatten_dict(new, sep="/")
    if set(old_flat) != set(new_flat):
        missing, extra = (
            sorted(set(new_flat) - set(old_flat)),
            sorted(set(old_flat) - set(new_flat)),
        )
        raise ValueError(
            "The checkpoint's adapters are not at the same layers as this run's. Only in the run: "
            f"{missing[:5]}; only in the checkpoint: {extra[:5]}."
        )
    old_rules, new_rules = _rules(old_method), _rules(new_method)
    if len(old_rules) != len(new_rules):
        raise ValueError(
            f"The checkpoint has {len(old_rules)} adapter rules, and this run {len(new_rules)}."
        )
    out = {}
    for path, fresh in new_flat.items():
        name, leaf = path.split("/")[-2:]
        candidates = [
            (o[leaf], n[leaf])
            for (o_name, o), (n_name, n) in zip(old_rules, new_rules, strict=True)
            if o_name == n_name == name and leaf in o and leaf in n
            if _fits(n[leaf], fresh) and _fits(o[leaf], old_flat[path])
        ]
        if not candidates:
            raise ValueError(f"{path!r}: no rule of the checkpoint and of this run fits its shape.")
        (axis, old_parts), (_, new_parts) = candidates[0]
        if axis is None:
            if old_flat[path].shape != fresh.shape:
                raise ValueError(
                    f"{path!r} is {old_flat[path].shape} in the checkpoint and {fresh.shape} in this run."
                )
            out[path] = old_flat[path]
        else:
            out[path] = _carry(path, old_flat[path], fresh, old_parts, new_parts, axis)
    return unflatten_dict(out, sep="/")


def _rules(method: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(rule["name"], rule["bank"]) for rule in method["rules"]]


def _fits(division: Sequence[Any], leaf: Any) -> bool:
    axis, parts = division
    return axis is None or leaf.shape[axis] == sum(size for _, size in parts)


def _carry(
    path: str,
    old: Any,
    fresh: Any,
    old_bank: Sequence[Sequence[Any]],
    new_bank: Sequence[Sequence[Any]],
    axis: int,
) -> Any:
    def ranges(bank: Sequence[Sequence[Any]]) -> dict[str, range]:
        stops = np.cumsum([r for _, r in bank])
        return {m: range(int(s) - r, int(s)) for (m, r), s in zip(bank, stops, strict=True)}

    source, target = ranges(old_bank), ranges(new_bank)
    to: list[int] = []
    from_: list[int] = []
    for module, columns in source.items():
        if module not in target:
            raise ValueError(
                f"{path!r}: the checkpoint has a module {module!r} that this run's feature space lacks."
                + nearest(module, target)
            )
        if len(columns) != len(target[module]):
            raise ValueError(
                f"{path!r}: module {module!r} has rank {len(columns)} in the checkpoint and "
                f"{len(target[module])} in this run."
            )
        to.extend(target[module])
        from_.extend(columns)
    moved = jnp.moveaxis(jnp.asarray(fresh), axis, 0)
    moved = moved.at[np.array(to)].set(jnp.moveaxis(jnp.asarray(old), axis, 0)[np.array(from_)])
    return jnp.moveaxis(moved, 0, axis)
