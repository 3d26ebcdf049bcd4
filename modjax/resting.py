"""Modules that rest: what a step did not use, the optimizer does not touch.

AdaMix draws one module per layer and step. In its reference code (arXiv 2205.12410) the others have no gradient at all,
so that neither momentum nor decay moves them, and each module's Adam counts its own steps. Here they have a gradient of
zeros, and these two wrappers make the same of it.

`parts` is `{path of a parameter: which module owns what of it}`, an `adapters.banks.Leaf` with modules of one size.
Modules of a scanned network's layers are modules of their own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

Parts = Mapping[str, Any]


def per_module(
    algorithm: optax.GradientTransformation, parts: Parts
) -> optax.GradientTransformation:
    """An algorithm that sees each module as a parameter by itself, with a state and a count of its own.

    A module without a gradient keeps its state. Other parameters are treated as ever.
    """
    if not parts:
        return algorithm

    def divide(tree: Any) -> tuple[Any, dict[str, jax.Array]]:
        flat = traverse_util.flatten_dict(dict(tree), sep="/")
        # Under optax's masks, the parameters of other groups are no arrays.
        mine = [path for path in parts if hasattr(flat.get(path), "shape")]
        modules = {path: _stacked(flat.pop(path), parts[path]) for path in mine}
        return traverse_util.unflatten_dict(flat, sep="/"), modules

    def init(params: Any) -> Any:
        rest, modules = divide(params)
        states = {path: jax.vmap(algorithm.init)(x) for path, x in modules.items()}
        return {"others": algorithm.init(rest), "modules": states}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rest, mine = divide(grads)
        values, modules = (None, {}) if params is None else divide(params)
        updates, others = algorithm.update(rest, state["others"], values)
        flat = traverse_util.flatten_dict(dict(updates), sep="/")
        states = {}
        like = traverse_util.flatten_dict(dict(grads), sep="/")
        for path, gradient in mine.items():
            used = jnp.any(gradient != 0, axis=tuple(range(1, gradient.ndim)))
            before = state["modules"][path]
            moved, after = jax.vmap(algorithm.update)(gradient, before, modules.get(path))
            states[path] = jax.tree.map(lambda new, old: _where(used, new, old), after, before)  # noqa: B023
            flat[path] = _unstacked(moved, like[path].shape, parts[path])
        updates = traverse_util.unflatten_dict(flat, sep="/")
        return updates, {"others": others, "modules": states}

    return optax.GradientTransformation(init, update)


def still(transform: optax.GradientTransformation, parts: Parts) -> optax.GradientTransformation:
    """A transformation whose updates are zero for modules without a gradient, decay included."""
    if not parts:
        return transform

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat = traverse_util.flatten_dict(dict(grads), sep="/")
        updates, after = transform.update(grads, state, params)
        moved = traverse_util.flatten_dict(dict(updates), sep="/")
        for path in parts:
            if path in flat:
                gradient = _stacked(flat[path], parts[path])
                used = jnp.any(gradient != 0, axis=tuple(range(1, gradient.ndim)))
                kept = _where(used, _stacked(moved[path], parts[path]), 0.0)
                moved[path] = _unstacked(kept, flat[path].shape, parts[path])
        return traverse_util.unflatten_dict(moved, sep="/"), after

    return optax.GradientTransformation(transform.init, update)


def _stacked(x: jax.Array, leaf: Any) -> jax.Array:
    """A parameter as `[modules, ...]`, the modules of all layers in one axis."""
    sizes = {size for _, size in leaf.parts}
    if len(sizes) != 1:
        raise ValueError(f"modules that rest need one size, got {sorted(sizes)}")
    lead = x.ndim - len(leaf.axes)
    x = jnp.moveaxis(x, leaf.axis, lead)
    return x.reshape(-1, sizes.pop(), *x.shape[lead + 1 :])


def _unstacked(x: jax.Array, shape: tuple[int, ...], leaf: Any) -> jax.Array:
    lead = len(shape) - len(leaf.axes)
    axis = len(shape) + leaf.axis
    others = tuple(np.delete(shape, axis)[lead:])
    return jnp.moveaxis(x.reshape(*shape[:lead], shape[axis], *others), lead, leaf.axis)


def _where(used: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    return jnp.where(used.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
