"""Parameter trees: adapters apart from their base, their axes and rates, a table of them, and how a bank grows.

Trees are nested dicts; paths join their keys with "/".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax.adapters.adapted import Adapted
from modjax.errors import nearest

Tree = Mapping[str, Any]


def split(params: Tree, adapted: Adapted) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, base): the parameters that `adapted` added, and those of its network."""
    flat = flatten_dict(params, sep="/")
    names = set(adapted.names)
    adapters = {k: v for k, v in flat.items() if names & set(k.split("/")[:-1])}
    base = {k: v for k, v in flat.items() if k not in adapters}
    return unflatten_dict(adapters, sep="/"), unflatten_dict(base, sep="/")


def join(*trees: Tree) -> dict[str, Any]:
    """One tree of several that have no leaf in common.

    Raises:
      ValueError: two trees have the same leaf; it is named.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten_dict(tree, sep="/").items():
            if path in flat:
                raise ValueError(f"Parameter {path!r} is in two of the trees to join.")
            flat[path] = leaf
    return unflatten_dict(flat, sep="/")


def places(adapters: Tree, adapted: Adapted) -> dict[tuple[str, str], dict[str, Any]]:
    """{(layer path, mixture name): the leaves of its bank}, in the tree's order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    names = set(adapted.names)
    for path, leaf in flatten_dict(adapters, sep="/").items():
        *layer, name, leaf_name = path.split("/")
        if name not in names:
            raise ValueError(f"{path!r} is no adapter's parameter." + nearest(name, names))
        found.setdefault(("/".join(layer), name), {})[leaf_name] = leaf
    return found


def from_places(banks: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """The tree of `places`."""
    flat = {within(p, f"{n}/{k}"): v for (p, n), bank in banks.items() for k, v in bank.items()}
    return unflatten_dict(flat, sep="/")


def within(layer: str, name: str) -> str:
    """The path of a leaf of a layer; the layer may be the whole network, whose path is empty."""
    return f"{layer}/{name}" if layer else name


def logical_axes(adapters: Tree, adapted: Adapted, base: Tree, base_axes: Tree) -> dict[str, Any]:
    """Logical axis names of every adapter leaf, as the kernel's that it adapts.

    The input axis of `a` and the output axis of `b` are named, and so shard, as the kernel's; the rank's axis is
    named "rank", which is replicated unless a rule says otherwise. Where the base says nothing, an axis is None.

    Args:
      adapters: their tree.
      adapted: what they belong to.
      base: the base's parameters, for the kernels' shapes.
      base_axes: the collection `params_axes` of the base (may be empty).

    Returns:
      A tree like `adapters` with a tuple of names in place of each array.
    """
    kernels = flatten_dict(base, sep="/")
    named = flatten_dict(base_axes, sep="/")
    axes: dict[tuple[str, str], dict[str, Any]] = {}
    for (path, name), bank in places(adapters, adapted).items():
        lead = bank["a"].ndim - 2
        metadata = named.get(within(path, "kernel_axes"))
        names: tuple[Any, ...] = tuple(getattr(metadata, "names", metadata) or ())
        shape = kernels[within(path, "kernel")].shape
        if len(names) != len(shape):
            names = (None,) * len(shape)
        # A kernel may spread its input or output over several axes; the first one is the one that shards.
        inputs = next(
            i
            for i in range(lead + 1, len(shape) + 1)
            if np.prod(shape[lead:i]) == bank["a"].shape[-2]
        )
        outer, a, b = names[:lead], names[lead], names[inputs]
        axes[path, name] = {"a": (*outer, a, "rank"), "b": (*outer, "rank", b)}
    return from_places(axes)


def update_rates(adapters: Tree, adapted: Adapted) -> dict[str, Any] | None:
    """Factors on the optimizer's updates, shaped to broadcast over each leaf; None if all are 1."""
    rates: dict[tuple[str, str], dict[str, Any]] = {}
    for path, name in places(adapters, adapted):
        mixture = adapted.rule_for(path, name).mixture
        columns = mixture.module.column_rates(mixture.modules(adapted.space))
        rates[path, name] = {"a": columns[None, :], "b": columns[:, None]}
    if all((rate == 1.0).all() for bank in rates.values() for rate in bank.values()):
        return None
    return from_places(rates)


def describe_method(adapted: Adapted) -> dict[str, Any]:
    """The method as JSON-able data: the rules, and the modules of each bank with their ranks."""
    rules = []
    for rule in adapted.rules:
        modules = rule.mixture.modules(adapted.space)
        ranks = rule.mixture.module.ranks(modules)
        rules.append(
            {
                "pattern": rule.pattern,
                "name": rule.mixture.name,
                "module": _describe(rule.mixture.module),
                "router": _describe(rule.mixture.router),
                "bank": [[str(m), r] for m, r in zip(modules, ranks, strict=True)],
            }
        )
    return {"rules": rules}


def _describe(part: Any) -> dict[str, Any]:
    # The form of the product is how it is computed, not what: a run may resume under another.
    names = (f.name for f in dataclasses.fields(part) if f.name != "form")
    fields = {name: getattr(part, name) for name in names}
    plain = {k: [list(x) for x in v] if _pairs(v) else v for k, v in fields.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    return {"type": type(part).__name__, **plain}


def _pairs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(x, tuple) for x in value)


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
    old_banks, new_banks = _banks(old_method), _banks(new_method)
    if len(old_banks) != len(new_banks):
        raise ValueError(
            f"The checkpoint has {len(old_banks)} adapter rules, and this run {len(new_banks)}."
        )
    out = {}
    for path, fresh in new_flat.items():
        name, leaf = path.split("/")[-2:]
        candidates = [
            (o, n)
            for (o_name, o), (n_name, n) in zip(old_banks, new_banks, strict=True)
            if o_name == n_name == name
            and sum(r for _, r in n) == fresh.shape[_column_axis(leaf)]
            and sum(r for _, r in o) == old_flat[path].shape[_column_axis(leaf)]
        ]
        if not candidates:
            raise ValueError(f"{path!r}: no rule of the checkpoint and of this run fits its shape.")
        out[path] = _carry(path, old_flat[path], fresh, *candidates[0], axis=_column_axis(leaf))
    return unflatten_dict(out, sep="/")


def _banks(method: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    return [(r["name"], [(m, int(k)) for m, k in r["bank"]]) for r in method["rules"]]


def _column_axis(leaf: str) -> int:
    return {"a": -1, "b": -2}[leaf]


def _carry(
    path: str,
    old: Any,
    fresh: Any,
    old_bank: list[tuple[str, int]],
    new_bank: list[tuple[str, int]],
    axis: int,
) -> Any:
    def ranges(bank: list[tuple[str, int]]) -> dict[str, range]:
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


def table(adapters: Tree, adapted: Adapted, base: Tree) -> str:
    """A table of the adapted layers, and the numbers of trained and frozen parameters, to print at the start."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for (path, name), bank in places(adapters, adapted).items():
        shape = f"{bank['a'].shape[-2]} x {bank['a'].shape[-1]} x {bank['b'].shape[-1]}"
        pattern = "/".join(_numberless(part) for part in path.split("/"))
        lead = int(np.prod(bank["a"].shape[:-2]))
        row = rows.setdefault((pattern, name, shape), [0, 0])
        row[0] += lead
        row[1] += sum(int(np.prod(leaf.shape)) for leaf in bank.values())
    lines = [("adapted layers", "mixture", "in x columns x out", "layers", "parameters")]
    lines += [(p, n, s, str(c), f"{k:,}") for (p, n, s), (c, k) in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = [
        "  ".join(
            cell.rjust(w) if i > 2 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    for name in adapted.names:
        rule = next(r for r in adapted.rules if r.mixture.name == name)
        modules = rule.mixture.modules(adapted.space)
        ranks = rule.mixture.module.ranks(modules)
        listed = ", ".join(f"{m}:{r}" for m, r in zip(modules, ranks, strict=True))
        text.append(f"{name}: {len(modules)} modules (name:rank) {listed}")
    trained, frozen = count(adapters), count(base)
    text.append(
        f"trained {trained:,}  frozen {frozen:,}  ({100 * trained / frozen:.2f} % of the base)"
    )
    return "\n".join(text)


def _numberless(part: str) -> str:
    head, _, number = part.rpartition("_")
    return f"{head}_<n>" if head == "layers" and number.isdigit() else part


def count(tree: Tree) -> int:
    """The number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(tree, sep="/").values())
