"""Self-attention of decoder-only networks: grouped queries, rotary positions, and a cache of keys and values.

Shapes: `B` batch, `Q` query and `L` key positions, `D` width, `H` heads of queries, `G` of keys and values.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax import partitioning
from modjax.networks import fused, layers
from modjax.networks.rope import rotate

Array = jax.Array


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`, or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class GroupedAttention(nn.Module):
    """Attention whose queries share keys and values in groups (arXiv 2305.13245).

    In decoding, keys (rotated) and values are kept with their length last: those of the first call, the prompts', as
    `[B, G, head_dim, P]`, which all beams of an example read; those of later calls as `[B, G, head_dim, M * E]`, where
    slot t of beam e is column `t * E + e` (see `decoding.expand_cache`).

    Attributes:
      num_heads, num_kv_heads: H and G.
      scale: factor of the logits.
      softcap: bound of the logits, see `soft_cap`.
      head_norm: (epsilon, offset) of an rms norm of each head's query and key, or None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    step: layers.Step
    scale: float
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    head_norm: tuple[float, float] | None = None
    dropout_rate: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, mask: Array, table: Array | None, index: Array) -> Array:
        """`[B, Q, D]` to `[B, Q, D]`.

        Args:
          x: the stream, normed; in decoding `[B * E, Q, D]`, the beams of an example side by side.
          mask: bool `[B, 1, Q, L]` (B may be 1), the keys that each query sees: of a later call in decoding, the
            prompts' and then the columns of what was written.
          table: cosines and sines of the queries' positions, or None without rope; see `rope.rotate`.
          index: int32 `[]`, the slot behind the prompts' where the first of these tokens goes.
        """
        rows, length, width = x.shape
        groups, each = self.num_kv_heads, self.num_heads // self.num_kv_heads

        def project(name: str, heads: int) -> Array:
            dense = layers.Dense(
                heads * self.head_dim,
                ("embed", "joined_kv"),
                self.dtype,
                use_bias=self.qkv_bias,
                name=name,
            )
            return layers.split_heads(dense(x), heads)

        def place(heads: Array, name: str) -> Array:
            if self.head_norm is not None:
                norm = layers.RMSNorm(self.dtype, *self.head_norm, axis="kv", name=f"{name}_norm")
                heads = norm(heads)
            return heads if table is None else rotate(heads, table)

        out = layers.Dense(
            width, ("joined_kv", "embed"), self.dtype, use_bias=self.out_bias, name="out"
        )
        step, joined = self.step, self.num_heads * self.head_dim
        query = place(project("query", self.num_heads), "query")
        key, value = place(project("key", groups), "key"), project("value", groups)
        drops = self.dropout_rate > 0 and not step.deterministic
        written_out = step.decode or self.softcap is not None
        lengths = (length, length)
        if not written_out and fused.fits(
            step.attention, query.dtype, self.head_dim, lengths, drops
        ):
            added = None if step.whole else fused.added(mask, lengths, query.dtype)
            heads = fused.attend(query, key, value, added, scale=self.scale, causal=step.causal)
            return out(heads.reshape(rows, length, joined))
        keys, values = self._keep("key", key, index), self._keep("value", value, index)
        examples = len(keys[0])
        beams = rows // examples
        # An example's beams, and the queries of a group, are rows of one matrix, which meets the keys at once: a dot
        # with two free axes is beyond XLA's bfloat16 on CPUs.
        query = query.reshape(examples, beams, length, groups, each, self.head_dim)
        query = jnp.transpose(query, (0, 3, 1, 4, 2, 5))

        def product(left: Array, right: Array, what: str, dtype: Any) -> Array:
            """Rows `[B, G, E, each, Q, _]` with the keys or values of their example, or of their beam."""
            lead, last = left.shape[:5], left.shape[5]
            if len(right) == examples:
                left = left.reshape(examples, groups, beams * each * length, last)
                out = jnp.einsum(what, left, right, preferred_element_type=dtype)
                return out.reshape(*lead, out.shape[-1])
            left = jnp.swapaxes(left, 1, 2).reshape(rows, groups, each * length, last)
            out = jnp.einsum(what, left, right, preferred_element_type=dtype)
            out = out.reshape(examples, beams, groups, each, length, out.shape[-1])
            return jnp.swapaxes(out, 1, 2)

        logits = [product(query, key, "bgnd,bgdk->bgnk", jnp.float32) for key in keys]
        scores = soft_cap(jnp.concatenate(logits, -1) * self.scale, self.softcap)
        of_each = beams if len(mask) > 1 else 1
        mask = mask.reshape(len(mask) // of_each, 1, of_each, 1, *mask.shape[2:])
        weights = jax.nn.softmax(jnp.where(mask, scores, layers.MASKED))
        weights = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            weights.astype(self.dtype), deterministic=step.deterministic
        )
        parts = jnp.split(weights, np.cumsum([key.shape[-1] for key in keys])[:-1], -1)
        mixed: Any = sum(
            product(part, value, "bgnk,bgdk->bgnd", None)
            for part, value in zip(parts, values, strict=True)
        )
        mixed = jnp.transpose(mixed, (0, 2, 4, 1, 3, 5))
        return out(mixed.reshape(rows, length, joined))

    def _keep(self, name: str, heads: Array, index: Array) -> list[Array]:
        """All keys or values so far, `[B, G, head_dim, _]`: those at hand, or the prompts' and what came later."""
        if not self.step.decode:
            return [jnp.transpose(heads, (0, 2, 3, 1))]
        first = not self.has_variable("cache", f"shared_{name}")
        rows, length, groups, _ = heads.shape
        prompts = self.variable(
            "cache",
            f"shared_{name}",
            lambda: jnp.transpose(heads, (0, 2, 3, 1)).astype(self.dtype),
        )
        shape = (rows, groups, self.head_dim, self.step.max_decode_length)
        later = self.variable("cache", f"joint_{name}", jnp.zeros, shape, self.dtype)
        if not first and length:
            beams = rows // len(later.value)
            new = layers.side_by_side(heads, beams).astype(later.value.dtype)
            later.value = jax.lax.dynamic_update_slice_in_dim(
                later.value, new, index * beams, axis=3
            )
        kept = [prompts] if first else [prompts, later]
        return [partitioning.constrain(part.value, layers.CACHE_AXES) for part in kept]


class Taken(NamedTuple):
    """What the cache's slots hold, for the tokens `[B, Q]` of a call.

    Attributes:
      first: int32 `[]`, the slot behind the prompts' where the first token goes.
      here: int32 `[B, Q]`, the tokens' positions.
      there: int32 `[B, L]`, those of the tokens in the columns of keys, -1 where there is none.
      own: bool `[B, Q, L]`, the columns of the row's prompt and of its beam; None in the first call, where all are.
      slots: P + M, how many positions there can be.
    """

    first: Array
    here: Array
    there: Array
    own: Array | None
    slots: int


class Slots(nn.Module):
    """The cache's slots: the position of the token in each (-1: no token), and whose it is.

    The mask is part of the cache: where beams are picked, a row takes over what another one sees, and keys and values
    stay where they are. Positions are the same for all beams of an example.

    Attributes:
      stacked: the layers' caches have a leading layer axis, and so the mask gets one, of length 1: whoever repeats or
        picks rows finds them on the same axis everywhere.
    """

    stacked: bool

    @nn.compact
    def __call__(self, shape: tuple[int, ...], more: int, lengths: Array | None) -> Taken:
        """Takes the next slots for tokens `[B, Q]`: the prompts' slots in the first call, those behind them later.

        Args:
          shape: (B, Q).
          more: slots beyond the first call's Q; later calls do not need it.
          lengths: int `[B]`, how many of the tokens are no padding; None for all. For the first call.
        """
        rows, length = shape
        first = not self.has_variable("cache", "shared_positions")
        if first and more < 1:
            raise ValueError(
                f"decode=True needs max_decode_length >= 1, the slots beyond the prompt's; got {more}."
            )
        if not first and lengths is not None:
            raise ValueError(
                "prompt_lengths belong to the first call, which makes the cache: later tokens are "
                "appended for every row."
            )
        lead = (1,) if self.stacked else ()
        steps = jnp.arange(length, dtype=jnp.int32)[None]

        def asked() -> Array:
            known = jnp.full((rows, 1), length) if lengths is None else lengths[:, None]
            return jnp.where(steps < known, steps, -1)

        taken = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        prompts = self.variable("cache", "shared_positions", asked).value
        later = self.variable("cache", "shared_later", jnp.full, (rows, more), -1, jnp.int32)
        seen = self.variable("cache", "joint_mask", jnp.zeros, (*lead, rows, more), bool)
        if first:
            here = jnp.broadcast_to(steps, shape)
            return Taken(taken.value, here, prompts, None, length + more)
        index, slots = taken.value, later.value.shape[1]
        layers.check_room(index, length, slots)
        end = jnp.max(prompts, axis=1, keepdims=True, initial=-1)
        if length:
            later.value = jax.lax.dynamic_update_slice_in_dim(
                later.value, end + 1 + index + steps, index, axis=1
            )
        before = seen.value.reshape(rows, 1, -1)
        beams = before.shape[2] // slots
        mine = before | layers.own_columns(rows, beams, slots, index, length)
        if length:
            seen.value = mine[:, -1].reshape(seen.value.shape)
        taken.value = index + length
        there = jnp.concatenate([prompts, jnp.repeat(later.value, beams, axis=1)], axis=1)
        here = jnp.repeat(end + 1 + index + steps, rows // len(prompts), axis=0)
        there = jnp.repeat(there, rows // len(prompts), axis=0)
        every = jnp.ones((rows, length, prompts.shape[1]), bool)
        own = jnp.concatenate([every, jnp.broadcast_to(mine, (rows, length, mine.shape[2]))], 2)
        return Taken(index, here, there, own, prompts.shape[1] + slots)
