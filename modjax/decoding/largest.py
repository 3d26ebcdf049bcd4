"""The largest of a row's many values, found in two steps: first the parts of the row where they can be."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# A power of two, so that a vocabulary that is divided over devices is divided between blocks.
BLOCKS = 128


def in_blocks(x: Array) -> Array:
    """`[rows, V]` as `[rows, BLOCKS, ceil(V / BLOCKS)]`, filled up with -inf."""
    rows, size = x.shape
    width = -(-size // BLOCKS)
    x = jnp.pad(x, ((0, 0), (0, BLOCKS * width - size)), constant_values=-jnp.inf)
    return x.reshape(rows, BLOCKS, width)


def row_max(x: Array) -> Array:
    """The largest of each row of `[rows, V]`, `[rows, 1]`; shares its pass over `x` with `top_k`."""
    return jnp.max(jnp.max(in_blocks(x), axis=2), axis=1, keepdims=True)


def top_k(x: Array, k: int, score: Callable[[Array], Array] = lambda x: x) -> tuple[Array, Array]:
    """`lax.top_k(score(x), k)`, reading `x` once: of each block its maximum, then the k blocks with the best.

    No other block can have one of the k best, the first of equals being the better, as in `lax.top_k`.

    Args:
      x: float `[rows, V]`; may hold -inf.
      k: how many, at most V.
      score: of arrays `[rows, N]`, element by element within a row, and nowhere falling.

    Returns:
      Scores `[rows, k]`, falling, and their columns int32 `[rows, k]`.
    """
    blocks = in_blocks(x)
    width = blocks.shape[2]
    _, picked = lax.top_k(score(jnp.max(blocks, axis=2)), min(k, BLOCKS))
    picked = jnp.sort(picked, axis=1)
    candidates = jnp.take_along_axis(blocks, picked[:, :, None], axis=1)
    scores, places = lax.top_k(score(candidates.reshape(len(x), -1)), k)
    return scores, jnp.take_along_axis(picked, places // width, axis=1) * width + places % width
