"""Losses per token, from logits. Legend: `V` vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def cross_entropy(
    logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Cross entropy per token in nats, and the part of it that is z-loss.

    With label smoothing e the target distribution is 1 - e on the target and e / (V - 1) elsewhere, and its
    entropy is subtracted, so that a perfect prediction costs 0. The z-loss `z * log(Z)^2` keeps the logits'
    normaliser near 1 (arXiv 2204.02311, section 5).

    Args:
      logits: float `[..., V]`; computed in float32.
      targets: int `[...]`.

    Returns:
      (loss including z-loss, z-loss), float32 `[...]`.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target_logits
    if label_smoothing:
        rest = label_smoothing / (logits.shape[-1] - 1)
        confidence = 1.0 - label_smoothing
        loss = log_z - (confidence - rest) * target_logits - rest * jnp.sum(logits, axis=-1)
        entropy = -confidence * jnp.log(confidence) - label_smoothing * jnp.log(rest)
        loss = loss - entropy
    z = z_loss * jnp.square(log_z)
    return loss + z, z


def predicted(logits: Array, targets: Array) -> Array:
    """Whether the target is what `argmax` would choose, float32 `[...]`, of logits `[..., V]` and targets int `[...]`.

    It asks whether another entry comes before the target, for which CPUs have fast instructions; for argmax XLA makes
    a loop that took 8 % of a training step with a vocabulary of 32128.
    """
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    before = (logits > own) | ((logits == own) & (places < targets[..., None]))
    # Where something is not a number, nothing is predicted.
    return (~jnp.any(before, axis=-1) & ~jnp.isnan(own[..., 0])).astype(jnp.float32)


def symmetric_kl(logits: Array, other: Array) -> Array:
    """`KL(stop(q) || p) + KL(stop(p) || q)` of two categorical distributions, in nats.

    Each term moves only its second distribution (AdaMix, arXiv 2205.12410).

    Args:
      logits, other: unnormalised log probabilities `[..., V]` of p and q.

    Returns:
      float32 `[...]`.
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, other))

    def divergence(target: Array, moved: Array) -> Array:
        target = jax.lax.stop_gradient(target)
        return jnp.sum(jnp.exp(target) * (target - moved), axis=-1)

    return divergence(q, p) + divergence(p, q)


def chunked_cross_entropy(
    project: Callable[[Any, Array], Array],
    params: Any,
    hidden: Array,
    targets: Array,
    chunk: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array, Array]:
    """`cross_entropy` and `predicted` of `project(params, hidden)`, with the logits of `chunk` positions at a time.

    The gradient with respect to `hidden` is made beside the loss, while a chunk's logits are there, so that nothing of
    the size of all logits is ever kept, and none are made twice. Where a gradient with respect to `params` is wanted,
    the backward pass makes each chunk's logits again. The z-loss and what is predicted are told, and have no gradient
    of their own; the loss includes the z-loss.

    Args:
      project: gives logits `[B, C, V]` of `[B, C, D]`, each position by itself.
      params: its parameters.
      hidden: `[B, L, D]`.
      targets: int `[B, L]`.
      chunk: C.
      label_smoothing, z_loss: as in `cross_entropy`.

    Returns:
      (loss including z-loss, z-loss, whether the target is predicted), float32 `[B, L]`.
    """
    if chunk < 1:
        raise ValueError(f"A chunk has at least one position, not {chunk}.")

    def told(params: Any, y: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = project(params, y)
        loss, z = cross_entropy(logits, t, label_smoothing, z_loss)
        return loss, (z, predicted(logits, t))

    @jax.custom_vjp
    def whole(params: Any, hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
            loss, rest = told(params, *part)
            return None, (loss, *rest)

        parts = (_chunks(hidden, chunk), _chunks(targets, chunk))
        loss, z, right = jax.lax.scan(one, None, parts)[1]
        length = hidden.shape[1]
        return _joined(loss, length), _joined(z, length), _joined(right, length)

    def forward(params: Any, hidden: Array, targets: Array) -> tuple[Any, Any]:
        def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
            y, t = part
            loss, pull, rest = jax.vjp(lambda y: told(params, y, t), y, has_aux=True)
            return None, (loss, *rest, pull(jnp.ones_like(loss))[0])

        parts = (_chunks(hidden, chunk), _chunks(targets, chunk))
        found = jax.lax.scan(one, None, parts)[1]
        loss, z, right, slope = (_joined(x, hidden.shape[1]) for x in found)
        return (loss, z, right), (params, hidden, targets, slope)

    def backward(kept: Any, gradients: tuple[Array, Array, Array]) -> tuple[Any, Array, Any]:
        params, hidden, targets, slope = kept
        weight = gradients[0]
        nothing = np.zeros(targets.shape, jax.dtypes.float0)
        along = slope * weight[..., None].astype(slope.dtype)
        if not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(params)):
            # Quantised, and so never trained.
            return jax.tree.map(_no_gradient, params), along, nothing

        def one(total: Any, part: tuple[Array, Array, Array]) -> tuple[Any, None]:
            y, t, w = part
            found = jax.grad(lambda p: jnp.sum(w * told(p, y, t)[0]))(params)
            return jax.tree.map(jnp.add, total, found), None

        parts = (_chunks(hidden, chunk), _chunks(targets, chunk), _chunks(weight, chunk))
        moved = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)[0]
        return moved, along, nothing

    whole.defvjp(forward, backward)
    return whole(params, hidden, targets)


def _no_gradient(x: Array) -> Any:
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)


def _chunks(x: Array, chunk: int) -> Array:
    """`[B, L, ...]` as `[N, B, C, ...]`, with zeros after the end."""
    count = -(-x.shape[1] // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)


def _joined(x: Array, length: int) -> Array:
    """`_chunks` undone."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
