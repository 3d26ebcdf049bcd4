"""Attention as one kernel of the device: cuDNN's on NVIDIA GPUs, by `jax.nn.dot_product_attention`.

Written out, attention's logits travel through the device's memory several times, which takes longer than its products
once rows are a few hundred tokens long (`benchmarks/gpu.py`). The networks write it out wherever `fits` says no: on
other devices, in float32, with dropout, with a bound on the logits, and in decoding.

Shapes: `B` batch, `Q` query and `L` key positions, `H` heads of queries, `G` of keys and values, `K` their width.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from modjax import partitioning

Array = jax.Array

CHOICES = ("auto", "plain")
# The primitives of the kernel and of its gradient.
FORWARD, BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
KERNEL: Literal["cudnn", "xla"] = "cudnn"
LEAST_CAPABILITY = (8, 0)
MOST_WIDTH = 128
# What hides a key: finite, so that a query that sees nothing has a mean, and of few digits, as cuDNN wants it.
HIDDEN = -(2.0**41)


def fits(
    choice: str, dtype: Any, width: int, lengths: tuple[int, int], dropout: bool = False
) -> bool:
    """Whether `attend` may be used, in the step that is being traced.

    Args:
      choice: of `CHOICES`.
      dtype: of queries and keys.
      width: K.
      lengths: (Q, L).
      dropout: attention weights are dropped.
    """
    if choice == "plain" or dropout or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    parts = str(getattr(partitioning.device(), "compute_capability", "")).split(".")
    if not all(part.isdecimal() for part in parts) or tuple(map(int, parts)) < LEAST_CAPABILITY:
        return False
    return width <= MOST_WIDTH and width % 8 == 0 and all(length % 2 == 0 for length in lengths)


def added(mask: Array, lengths: tuple[int, int], dtype: Any, bias: Array | None = None) -> Array:
    """What `attend` adds to the logits: the bias where a query sees the key, what hides it elsewhere.

    Args:
      mask: bool `[B, 1, Q, L]`, or 1 for B and Q.
      lengths: (Q, L).
      dtype: of the result.
      bias: `[1, H, Q, L]`.

    Returns:
      `[B, H, Q, L]`, or 1 for H without a bias, and for B as the mask has it.
    """
    hidden = jnp.where(mask, 0.0, HIDDEN).astype(dtype)
    hidden = jnp.broadcast_to(hidden, (mask.shape[0], 1, *lengths))
    found = hidden if bias is None else bias.astype(dtype) + hidden
    # As queries are divided, which the kernel asks for.
    names = ("batch" if len(found) > 1 else None, "heads" if found.shape[1] > 1 else None)
    return partitioning.constrain(found, (*names, None, None))


def attend(
    query: Array,
    key: Array,
    value: Array,
    added: Array | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Array:
    """`softmax(scale * query @ key.T + added) @ value`, `[B, Q, H, K]`.

    Args:
      query: `[B, Q, H, K]`, bfloat16.
      key, value: `[B, L, G, K]`; each serves `H / G` heads of queries.
      added: see the function of that name; None for nothing.
      causal: no query sees a later key. Where that is so anyway, by `added`, what is hidden is not computed.
    """
    return jax.nn.dot_product_attention(
        query, key, value, added, scale=scale, is_causal=causal, implementation=KERNEL
    )
