"""A penalty that keeps what languages read apart from what tasks read, as an algorithm of `optimizers.Optimizer`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from modjax import optimizers


def adamw(columns: int, strength: float) -> optax.GradientTransformation:
    """`optimizers.adamw()`, and a decay of the part of the languages' `a` that lies in the span of the tasks' `a`.

    The penalty of O-LoRA (arXiv 2310.14152), ||a_task^T a_language||^2, with the tasks' columns made orthonormal first,
    so that its strength does not depend on their norm, and decoupled, as AdamW decouples decay: each step takes
    `strength` times the learning rate of that part away. The tasks' modules are left alone.

    Args:
      columns: how many columns of each layer's `a` `[..., in, columns of all modules]` are the tasks', which are first.
      strength: of the decay.

    Raises:
      ValueError: from `update`, if a layer's `a` has no columns beyond those.
    """

    def decay(path: tuple[Any, ...], update: jax.Array, a: jax.Array) -> jax.Array:
        if path[-1].key != "a":
            return update
        if a.shape[-1] <= columns:
            raise ValueError(f"{jax.tree_util.keystr(path)} has the tasks' columns alone.")
        span, _ = jnp.linalg.qr(a[..., :columns])
        within = span @ (span.mT @ a[..., columns:])
        return update.at[..., columns:].add(strength * within)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(decay, updates, params), state

    return optax.chain(
        optimizers.adamw(), optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    )
