"""How a bank grows: modules (and tasks' logits) keep their parameters by name when there are more of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax.adapters.method import rules_of
from modjax.adapters.trees import ROUTER_LEAF, Tree
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
    numbers = [len(method["rules"]) for method in (old_method, new_method)]
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"The checkpoint has {numbers[0]} adapter rules, and this run {numbers[1]}."
        )
    out = {}
    for path, fresh in new_flat.items():
        before = _division(path, old_flat[path], old_method)
        after = _division(path, fresh, new_method)
        if after is None and before is None and old_flat[path].shape == fresh.shape:
            out[path] = old_flat[path]  # no adapter's: a head, or a part of the base that trains
            continue
        if after is None or before is None:
            raise ValueError(f"{path!r}: no rule of the checkpoint and of this run fits its shape.")
        (axis, old_parts), (_, new_parts) = before, after
        if axis is None:
            if old_flat[path].shape != fresh.shape:
                raise ValueError(
                    f"{path!r} is {old_flat[path].shape} in the checkpoint and {fresh.shape} in this run."
                )
            out[path] = old_flat[path]
        else:
            out[path] = _carry(path, old_flat[path], fresh, old_parts, new_parts, axis)
    return unflatten_dict(out, sep="/")


def fill(
    tree: Tree,
    old_method: Mapping[str, Any],
    new_method: Mapping[str, Any],
    sources: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Gives new modules the mean of the parameters of old ones.

    Args:
      tree: what `extend` gave.
      old_method, new_method: as there.
      sources: `{group: the values whose mean a new value of the group starts as}`, as
        `{"language": ["sw", "xh"]}`; `{"dataset": [...]}` is for modules and logits of datasets. Each copy of a
        module starts as the mean of that copy of the others.

    Returns:
      A tree like `tree`; new modules of groups that are not named keep their values.

    Raises:
      ValueError: a group without new values, or a source that the checkpoint does not have.
    """
    flat = dict(flatten_dict(tree, sep="/"))
    filled = set()
    for path, leaf in flat.items():
        rule, known = _rule(path, leaf, new_method), _known(path, old_method)
        if rule is None or rule["bank"][_last(path)][0] is None:
            continue
        axis, parts = rule["bank"][_last(path)]
        ranges = _ranges(parts)
        router = rules_of({"rules": [rule]})[0].mixture.router
        copies = getattr(router, "copies", 1)
        ends = [f"#{i}" for i in range(copies)] if copies > 1 else [""]
        for (group, values), end in itertools.product(sources.items(), ends):
            names = [_name(path, group, value) + end for value in values]
            new = [
                m
                for m in ranges
                if m not in known and _is_of(path, group, m, router) and m.endswith(end)
            ]
            if not new:
                continue
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"The checkpoint has no {name!r} to start new values of {group!r} from."
                        + nearest(name, sorted(known))
                    )
            filled.add(group)
            moved = jnp.moveaxis(jnp.asarray(flat[path]), axis, 0)
            mean = jnp.mean(jnp.stack([moved[np.array(ranges[n])] for n in names]), axis=0)
            for module in new:
                if len(ranges[module]) != mean.shape[0]:
                    raise ValueError(f"{module!r} and {names[0]!r} have different ranks.")
                moved = moved.at[np.array(ranges[module])].set(mean)
            flat[path] = jnp.moveaxis(moved, 0, axis)
    for group in sources:
        if group not in filled:
            raise ValueError(
                f"There is no new value of {group!r} to start from {list(sources[group])}: this run has no modules or "
                "logits for it that the checkpoint lacks."
            )
    return unflatten_dict(flat, sep="/")


def known_rates(
    tree: Tree, old_method: Mapping[str, Any], method: Mapping[str, Any]
) -> dict[str, Any]:
    """{path: factors on the updates}: 0 for what a checkpoint had already, 1 for what is new to this run.

    What is no adapter's, a head or a part of the base that trains, counts as known.
    """
    rates = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        division, known = _division(path, leaf, method), _known(path, old_method)
        axis, parts = division or (None, ())
        if axis is None:
            rates[path] = np.zeros((), np.float32)
        else:
            each = np.repeat([float(name not in known) for name, _ in parts], [n for _, n in parts])
            rates[path] = each.astype(np.float32).reshape((-1,) + (1,) * (-axis - 1))
    return rates


def _division(path: str, leaf: Any, method: Mapping[str, Any]) -> Sequence[Any] | None:
    """[axis, parts] of a leaf, or None for a parameter that is no adapter's."""
    rule = _rule(path, leaf, method)
    return None if rule is None else rule["bank"][_last(path)]


def _rule(path: str, leaf: Any, method: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rule that put a leaf there, or None likewise."""
    found = _rules(path, method)
    return next((rule for rule in found if _fits(rule["bank"][_last(path)], leaf)), None)


def _known(path: str, method: Mapping[str, Any]) -> set[str]:
    banks = (rule["bank"][_last(path)] for rule in _rules(path, method))
    return {module for _, parts in banks for module, _ in parts}


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _rules(path: str, method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Each rule that may have put a leaf there."""
    *layer, name, last = ("", "", *path.split("/"))
    at = "/".join(part for part in layer if part)
    return [
        rule
        for rule in method["rules"]
        if rule["name"] == name and last in rule["bank"]
        # Logits may live above the layers that the pattern names.
        if last == ROUTER_LEAF or re.fullmatch(rule["pattern"], at)
    ]


def _name(path: str, group: str, value: str) -> str:
    """A module is called "group=value"; the logits' rows bear the values alone."""
    return value if path.endswith("/" + ROUTER_LEAF) else f"{group}={value}"


def _is_of(path: str, group: str, module: str, router: Any) -> bool:
    if path.endswith("/" + ROUTER_LEAF):
        return router.routes_by == (group,)
    return module.startswith(f"{group}=")


def _ranges(parts: Sequence[Sequence[Any]]) -> dict[str, range]:
    stops = np.cumsum([size for _, size in parts])
    return {m: range(int(s) - size, int(s)) for (m, size), s in zip(parts, stops, strict=True)}


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
    source, target = _ranges(old_bank), _ranges(new_bank)
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
