"""Layers as `layers_0 ... layers_{n-1}`, and as `layers` with a leading axis."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from modjax.hub.errors import HubError, listed

_LAYER = re.compile(r"layers_(\d+)")


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an unrolled network as those of a scanned one.

        encoder/layers_0/mlp/wo/kernel [R, K], encoder/layers_1/...  ->
        encoder/layers/mlp/wo/kernel [2, R, K]

    Args:
      tree: nested parameters, at any depth, of base or adapters; numpy leaves stay numpy, jax
        leaves jax.

    Raises:
      HubError: layers that are not numbered 0 to n-1, or that do not have the same parameters with
        the same shapes (adapters of some layers only, position biases in the first layer only).
    """
    out: dict[str, Any] = {}
    layers: dict[int, Mapping[str, Any]] = {}
    for name, value in tree.items():
        match = _LAYER.fullmatch(name)
        if match and isinstance(value, Mapping):
            layers[int(match[1])] = value
        else:
            out[name] = stack_layers(value) if isinstance(value, Mapping) else value
    if layers:
        if sorted(layers) != list(range(len(layers))):
            have = listed([f"layers_{i}" for i in layers])
            raise HubError(
                f"layers must be numbered from 0 without gaps to be stacked; there are {have}."
            )
        if "layers" in out:
            raise HubError("a tree holds both 'layers' and 'layers_0': it is stacked in part.")
        out["layers"] = _stack([layers[i] for i in range(len(layers))], "layers")
    return out


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`: `layers` with a leading axis becomes `layers_0 ...`.

    Numpy leaves become views, not copies.

    Raises:
      HubError: leaves under one `layers` with different leading axes.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "layers" and isinstance(value, Mapping):
            lengths = {np.shape(leaf)[:1] for leaf in flatten(value).values()}
            if len(lengths) != 1 or () in lengths:
                raise HubError(
                    f"leaves under 'layers' have different leading axes: {sorted(lengths)}."
                )
            for i in range(next(iter(lengths))[0]):
                out[f"layers_{i}"] = _take(value, i)
        else:
            out[name] = unstack_layers(value) if isinstance(value, Mapping) else value
    return out


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined with "/", sorted by name at each level."""
    out: dict[str, Any] = {}
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = value
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        at = out
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return out


def _stack(layers: list[Any], where: str) -> Any:
    if isinstance(layers[0], Mapping):
        names = set().union(*layers)
        for i, layer in enumerate(layers):
            if names - set(layer):
                raise HubError(
                    f"{where}: layer {i} lacks {listed(list(names - set(layer)))}, which another "
                    "layer has; layers that differ cannot be stacked."
                )
        return {n: _stack([layer[n] for layer in layers], f"{where}/{n}") for n in layers[0]}
    shapes = {np.shape(leaf) for leaf in layers}
    if len(shapes) > 1:
        raise HubError(f"{where}: layers have different shapes {sorted(shapes)}.")
    if all(isinstance(leaf, np.ndarray) for leaf in layers):
        return np.stack(layers)
    return jnp.stack(layers)


def _take(tree: Any, i: int) -> Any:
    if isinstance(tree, Mapping):
        return {name: _take(value, i) for name, value in tree.items()}
    return tree[i]
