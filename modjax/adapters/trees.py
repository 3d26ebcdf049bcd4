"""Parameter trees: adapters apart from their base, their axes and rates, and a table of them.

Trees are nested dicts; paths join their keys with "/".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax.adapters.adapted import Adapted
from modjax.adapters.banks import Leaf
from modjax.adapters.interceptor import LEVELS
from modjax.errors import nearest

Tree = Mapping[str, Any]
ROUTER_LEAF = "logits"
LISTED = 100  # modules of a bank that a table names
SCANNED = ("layers",)  # the logical name of a scanned network's leading axis, as T5X has it


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
        *layer, name, leaf_name = path.split("/") if "/" in path else ("", path)
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


def place_of(layer: str, granularity: str) -> str:
    """The path of the part of the network that a layer shares its routing with."""
    level = LEVELS.get(granularity)
    if level is None:
        return ""
    return "/".join(layer.split("/")[:-level]) if level else layer


def routers(adapters: Tree, adapted: Adapted) -> dict[tuple[str, str], Any]:
    """{(path of the place, mixture name): its router's logits}; see `Router.granularity` for places."""
    found = {}
    for (path, name), bank in places(adapters, adapted).items():
        if ROUTER_LEAF in bank:
            found[path, name] = bank[ROUTER_LEAF]
    return found


def banks(adapters: Tree, adapted: Adapted) -> dict[tuple[str, str], dict[str, Any]]:
    """{(layer path, mixture name): the module's leaves}: `places` without the routers' parameters.

    A layer's are in the order in which it applies them: what acts on its input, then the others, each as the rules are.
    """
    found = {}
    for place, leaves in places(adapters, adapted).items():
        own = {name: leaf for name, leaf in leaves.items() if name != ROUTER_LEAF}
        if own:
            found[place] = own

    layers = {path: i for i, path in enumerate(dict.fromkeys(path for path, _ in found))}

    def order(place: tuple[str, str]) -> tuple[int, bool, int]:
        rule = adapted.rule_for(*place)
        last = rule.mixture.module.acts_on != "input"
        return layers[place[0]], last, adapted.rules.index(rule)

    return {place: found[place] for place in sorted(found, key=order)}


def logical_axes(adapters: Tree, adapted: Adapted, base: Tree, base_axes: Tree) -> dict[str, Any]:
    """Logical axis names of every adapter leaf, as the kernel's that it adapts.

    What meets the layer's input or makes its output is named, and so shards, as the kernel's axis; the axis of ranks
    is named "rank", which is replicated unless a rule says otherwise. Where the base says nothing, an axis is None.

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
    for place, logits in routers(adapters, adapted).items():
        lead = logits.ndim - 3
        outer = tuple(SCANNED[-lead:]) if 0 < lead <= len(SCANNED) else (None,) * lead
        axes[place] = {ROUTER_LEAF: (*outer, None, None, None)}
    for (path, name), bank in banks(adapters, adapted).items():
        leaves = leaves_at(adapted, path, name)
        lead = _lead(bank, leaves)
        metadata = named.get(within(path, "kernel_axes"))
        names: tuple[Any, ...] = tuple(getattr(metadata, "names", metadata) or ())
        shape = kernels[within(path, "kernel")].shape
        if len(names) != len(shape):
            names = (None,) * len(shape)
        for leaf, spec in leaves.items():
            # A kernel may spread its input or output over several axes; the first one is the one that shards.
            sides = {"in": lead, "out": _first_output(bank, leaves, shape, lead)}
            own = tuple(names[sides[a]] if a in sides else a for a in spec.axes)
            axes.setdefault((path, name), {})[leaf] = (*names[:lead], *own)
    return from_places(axes)


def leaves_at(adapted: Adapted, path: str, name: str) -> Mapping[str, Leaf]:
    """How the bank at a layer is divided among its modules."""
    return adapted.rule_for(path, name).mixture.leaves(adapted.space)


def _lead(bank: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> int:
    """How many leading axes a scanned network gave the bank."""
    leaf, spec = next(iter(leaves.items()))
    return int(bank[leaf].ndim) - len(spec.axes)


def _first_output(
    bank: Mapping[str, Any], leaves: Mapping[str, Leaf], shape: tuple[int, ...], lead: int
) -> int:
    """The first of a kernel's axes that belongs to its output, found by the widths of the bank."""
    for leaf, spec in leaves.items():
        for side in ("in", "out"):
            if side in spec.axes:
                width = bank[leaf].shape[lead + spec.axes.index(side)]
                total = int(np.prod(shape[lead:]))
                inputs = width if side == "in" else total // width
                for i in range(lead + 1, len(shape) + 1):
                    if np.prod(shape[lead:i]) == inputs:
                        return min(i, len(shape) - 1)
    raise ValueError(f"the bank {sorted(bank)} does not fit a kernel of shape {shape}")


def update_rates(adapters: Tree, adapted: Adapted) -> dict[str, Any] | None:
    """Factors on the optimizer's updates, shaped to broadcast over each leaf; None if all are 1."""
    rates: dict[tuple[str, str], dict[str, Any]] = {}
    for path, name in banks(adapters, adapted):
        mixture = adapted.rule_for(path, name).mixture
        each = mixture.module.rates(mixture.modules(adapted.space))
        if (each == 1.0).all():
            continue
        for leaf, spec in leaves_at(adapted, path, name).items():
            if spec.axis is not None:
                rates.setdefault((path, name), {})[leaf] = spec.spread(each)
            elif len(set(each.tolist())) == 1:  # what all own together goes at the rate of all
                rates.setdefault((path, name), {})[leaf] = np.float32(each[0])
    return from_places(rates) if rates else None


def lazy_parts(adapters: Tree, adapted: Adapted) -> dict[str, Leaf]:
    """{path of a leaf: how modules own it}, for mixtures whose modules rest in a step that does not use them."""
    parts = {}
    for path, name in banks(adapters, adapted):
        if adapted.rule_for(path, name).mixture.router.lazy:
            for leaf, spec in leaves_at(adapted, path, name).items():
                if spec.axis is not None:
                    parts[within(path, f"{name}/{leaf}")] = spec
    return parts


def table(
    adapters: Tree,
    adapted: Adapted,
    base: Tree,
    rates: Mapping[str, Any] | None = None,
    others: Tree | None = None,
) -> str:
    """A table of the adapted layers, and the numbers of trained and frozen parameters, to print at the start.

    Args:
      adapters: their tree.
      adapted: what they belong to.
      base: the other parameters.
      rates: {path: factors on the updates}; where a factor is 0, an adapter's parameter is frozen.
      others: those of `base` that train, too: a head.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}

    def add(path: str, name: str, shape: str, lead: tuple[int, ...], size: int) -> None:
        pattern = "/".join(_numberless(part) for part in path.split("/"))
        row = rows.setdefault((pattern, name, shape), [0, 0])
        row[0] += int(np.prod(lead))
        row[1] += size

    def numbers(shape: tuple[int, ...]) -> str:
        return " x ".join(str(n) for n in shape)

    for (path, name), bank in banks(adapters, adapted).items():
        lead = _lead(bank, leaves_at(adapted, path, name))
        shapes = {leaf: array.shape[lead:] for leaf, array in bank.items()}
        text = ", ".join(f"{leaf} {numbers(shape)}" for leaf, shape in shapes.items())
        lead_shape = next(iter(bank.values())).shape[:lead]
        add(path, name, text, lead_shape, sum(int(np.prod(x.shape)) for x in bank.values()))
    for (path, name), logits in routers(adapters, adapted).items():
        text = f"{ROUTER_LEAF} {numbers(logits.shape[-3:])}"
        add(path, name, text, logits.shape[:-3], int(np.prod(logits.shape)))
    lines = [("adapted layers", "mixture", "parameters each", "layers", "parameters")]
    lines += [(p, n, s, str(c), f"{k:,}") for (p, n, s), (c, k) in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text_lines = [
        "  ".join(
            cell.rjust(w) if i > 2 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    for name in adapted.names:
        rule = next(r for r in adapted.rules if r.mixture.name == name)
        parts = next(iter(rule.mixture.leaves(adapted.space).values())).parts
        listed = ", ".join(f"{module}:{size}" for module, size in parts[:LISTED])
        more = f", and {len(parts) - LISTED:,} more" if len(parts) > LISTED else ""
        text_lines.append(f"{name}: {len(parts)} modules (name:size) {listed}{more}")
    for path, leaf in flatten_dict(others or {}, sep="/").items():
        text_lines.append(f"also trained: {path} {numbers(leaf.shape)}")
    trained = count_moving(adapters, rates or {}) + count_moving(others or {}, rates or {})
    whole = count(base)
    frozen = whole + count(adapters) - trained
    text_lines.append(
        f"trained {trained:,}  frozen {frozen:,}  ({100 * trained / whole:.2f} % of the base)"
    )
    return "\n".join(text_lines)


def _numberless(part: str) -> str:
    head, _, number = part.rpartition("_")
    return f"{head}_<n>" if head == "layers" and number.isdigit() else part


def count(tree: Tree) -> int:
    """The number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(tree, sep="/").values())


def count_moving(tree: Tree, rates: Mapping[str, Any]) -> int:
    """The number of parameters whose factor, `{path: an array that broadcasts}`, is not 0."""
    moving = 0
    for path, leaf in flatten_dict(tree, sep="/").items():
        factor = np.broadcast_to(np.asarray(rates.get(path, 1.0)) != 0, leaf.shape)
        moving += int(np.sum(factor))
    return moving
