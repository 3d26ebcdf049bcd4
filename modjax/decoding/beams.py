"""Several decodes per example: giving arrays and caches a beam axis, and picking beams from them.

Shapes: B batch, E decodes per example (beams). *Flat* arrays have one axis of `B * E` rows in
which the decodes of one example are neighbours: row `b * E + e` is decode `e` of example `b`.
"""

from collections.abc import Callable
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Leaves that T5X's layers keep once for the whole batch although they have a leading axis: never
# expanded, never picked. And how the names begin of what our layers keep once for all beams of an example.
_SHARED_LEAVES = ("cached_bias", "position_embedder_index")
_SHARED = "shared_"
# What our layers keep for an example's beams side by side, in columns `t * E + e` of the last axis, and who sees which
# column: picking beams picks rows of the mask, and leaves keys and values where they are.
_JOINT_LEAVES = ("joint_key", "joint_value")
_JOINT_MASK = "joint_mask"
# T5X's name for the layer that attends to the encoder. What it caches is the same in all beams of
# an example: it is expanded, but picking beams would copy it onto itself at every step.
_BEAM_INVARIANT_LAYER = "encoder_decoder_attention"


@flax.struct.dataclass
class DecodingState:
    """What `tokens_to_logits` is given at each step; fields as in T5X.

    Attributes:
      cur_index: the loop's position, int32: `[B * E]` in sampling, a scalar in beam search. In
        beam search with an `initial_index` it counts from the end of the prompts.
      sequences: int32 `[B * E, length]`, what has been written so far, 0 elsewhere. In beam
        search the length is one more than the decodes', for the start token.
      cur_token: int32 `[B * E, 1]`, the token to feed.
      cache: the decoder's cache, with `B * E` rows.
    """

    cur_index: Array
    sequences: Array
    cur_token: Array
    cache: Any


def add_beam_dim(x: Array, beam_size: int, offset: int = 0) -> Array:
    """Repeats `x [..., B, ...]` into `[..., B, beam_size, ...]`, B being axis `offset`."""
    return jnp.repeat(jnp.expand_dims(x, offset + 1), beam_size, axis=offset + 1)


def flatten_beam_dim(x: Array, offset: int = 0) -> Array:
    """`[..., B, E, ...]` to `[..., B * E, ...]`, B being axis `offset`."""
    return x.reshape(*x.shape[:offset], -1, *x.shape[offset + 2 :])


def unflatten_beam_dim(x: Array, batch_size: int, beam_size: int, offset: int = 0) -> Array:
    """`[..., B * E, ...]` to `[..., B, E, ...]`, the flat axis being axis `offset`."""
    return x.reshape(*x.shape[:offset], batch_size, beam_size, *x.shape[offset + 1 :])


def flat_batch_beam_expand(x: Array, beam_size: int, offset: int = 0) -> Array:
    """Repeats each example in place: `[..., B, ...]` to `[..., B * beam_size, ...]`.

    This is what a caller does to everything the network reads per example beside the cache: the
    encoder's output `[B, L, D]`, its tokens `[B, L]`, `features [B, S, F]`.
    """
    return jnp.repeat(x, beam_size, axis=offset)


def gather_beams(tree: Any, beams: Array, offset: int = 0) -> Any:
    """Picks beams, for each example its own.

    A gather with a batch axis, not a product with one-hot rows: it moves bytes instead of
    multiplying, is exact in every dtype and on every matrix unit, and XLA partitions it along the
    batch.

    Args:
      tree: arrays `[B, E, ...]`, or `[layers, B, E, ...]` with `offset=1`.
      beams: int32 `[B, N]`, values in `[0, E)`.
      offset: which axis B is.

    Returns:
      The tree with arrays `[B, N, ...]` (or `[layers, B, N, ...]`).
    """

    def pick(x: Array, index: Array) -> Array:
        return x.at[index].get(mode="promise_in_bounds")

    gather: Callable[[Array, Array], Array] = jax.vmap(pick)
    for _ in range(offset):
        gather = jax.vmap(gather, in_axes=(0, None))
    return jax.tree.map(lambda x: gather(x, beams), tree)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]


def _has_rows(names: list[str], leaf: Any, offset: int) -> bool:
    # A scalar position, or one per scanned layer, has no axis of examples: it serves all rows.
    shared = names[-1] in _SHARED_LEAVES or names[-1].startswith(_SHARED)
    return jnp.ndim(leaf) > offset and not shared


def expand_cache(
    cache: Any, batch_size: int, beam_size: int, offset: int = 0, picked: bool = False
) -> Any:
    """A cache of B examples as the flat cache of `B * beam_size` rows.

    Left as they are: leaves with at most `offset` axes (`cache_index` when it is one number),
    T5X's `cached_bias` and `position_embedder_index`, and leaves whose names begin with `shared_`,
    which all beams of an example read as they are. If beams will be picked, `joint_key` and
    `joint_value` keep B rows and get columns for every beam instead: slot t of beam e is column
    `t * E + e` of the last axis. What is there already is beam 0's, and the rows of `joint_mask`,
    which get the same columns, see it there.

    Args:
      cache: nested dictionary of arrays `[B, ...]`, or `[layers, B, ...]` with `offset=1` (a
        scanned network).
      batch_size: B.
      beam_size: decodes per example.
      offset: which axis B is.
      picked: whether `gather_cache` will be called, as in beam search. Else all rows are kept for themselves, which
        takes less arithmetic.

    Raises:
      ValueError: a leaf whose axis `offset` is not B.
    """

    def expand(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _names(path)
        if not _has_rows(names, leaf, offset):
            return leaf
        if leaf.shape[offset] != batch_size:
            raise ValueError(
                f"Cache leaf {'/'.join(names)} of shape {leaf.shape} does not have the "
                f"{batch_size} examples of inputs on axis cache_offset={offset}. The cache must "
                "be that of the unexpanded batch; cache_offset is 1 for a scanned network, else 0."
            )
        if picked and names[-1] in (*_JOINT_LEAVES, _JOINT_MASK):
            columns = (0, beam_size - 1, beam_size - 1)
            nothing = jnp.zeros((), leaf.dtype)
            leaf = lax.pad(leaf, nothing, [*((0, 0, 0),) * (leaf.ndim - 1), columns])
            if names[-1] in _JOINT_LEAVES:
                return leaf
        return flat_batch_beam_expand(leaf, beam_size, offset)

    return jax.tree_util.tree_map_with_path(expand, cache) if beam_size > 1 else cache


def gather_cache(cache: Any, beams: Array, beam_size: int, offset: int = 0) -> Any:
    """Picks beams in a flat cache; what all beams of an example share is not touched.

    Args:
      cache: flat cache of `B * beam_size` rows.
      beams: int32 `[B, beam_size]`: for each place, the beam whose cache goes there.
      beam_size: E.
      offset: which axis the rows are.
    """
    if beam_size == 1:  # one beam per example can only stay where it is
        return cache

    def pick(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _names(path)
        stays = names[-1] in _JOINT_LEAVES or _BEAM_INVARIANT_LAYER in "/".join(names)
        if stays or not _has_rows(names, leaf, offset):
            return leaf
        leaf = unflatten_beam_dim(leaf, beams.shape[0], beam_size, offset)
        return flatten_beam_dim(gather_beams(leaf, beams, offset), offset)

    return jax.tree_util.tree_map_with_path(pick, cache)


def as_before(new_cache: Any, cache: Any) -> Any:
    """The new cache, frozen if the old one was: a loop may not change the type of its state."""
    if isinstance(cache, flax.core.FrozenDict):
        return flax.core.freeze(new_cache)
    if isinstance(new_cache, flax.core.FrozenDict):
        return flax.core.unfreeze(new_cache)
    return new_cache
