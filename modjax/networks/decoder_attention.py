"""Self-attention of decoder-only networks: grouped queries, rotary positions, and a cache of keys and values.

Shapes: `B` batch, `Q` query and `L` key positions, `D` width, `H` heads of queries, `G` of keys and values.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from modjax import partitioning
from modjax.networks import layers
from modjax.networks.rope import rotate

Array = jax.Array


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`, or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class GroupedAttention(nn.Module):
    """Attention whose queries share keys and values in groups (arXiv 2305.13245).

    In decoding, keys (rotated) and values are written to the cache `[B, G, head_dim, L]`, length last.

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
          x: the stream, normed.
          mask: bool `[B, 1, Q, L]` (B may be 1), the keys that each query sees.
          table: cosines and sines of the queries' positions, or None without rope; see `rope.rotate`.
          index: int32 `[]`, the slot of the cache where the first of these tokens goes.
        """
        batch, length, width = x.shape
        groups = self.num_kv_heads

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

        def keep(name: str, heads: Array) -> Array:
            """All keys or values so far, `[B, G, head_dim, L]`."""
            heads = jnp.transpose(heads, (0, 2, 3, 1))
            if not self.step.decode:
                return heads
            shape = (batch, groups, self.head_dim, mask.shape[-1])
            cached = self.variable("cache", f"cached_{name}", jnp.zeros, shape, self.dtype)
            if length:
                cached.value = jax.lax.dynamic_update_slice_in_dim(
                    cached.value, heads.astype(cached.value.dtype), index, axis=3
                )
            cached.value = partitioning.constrain(cached.value, layers.CACHE_AXES)
            return cached.value

        query = place(project("query", self.num_heads), "query")
        key = keep("key", place(project("key", groups), "key"))
        value = keep("value", project("value", groups))
        # The queries of a group as rows of one matrix: a dot with two free axes is beyond XLA's bfloat16 on CPUs.
        each = self.num_heads // groups
        query = jnp.transpose(query, (0, 2, 1, 3)).reshape(
            batch, groups, each * length, self.head_dim
        )
        logits = jnp.einsum("bgnd,bgdk->bgnk", query, key, preferred_element_type=jnp.float32)
        logits = soft_cap(logits * self.scale, self.softcap)
        logits = logits.reshape(batch, groups, each, length, mask.shape[-1])
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, layers.MASKED))
        weights = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            weights.astype(self.dtype), deterministic=self.step.deterministic
        )
        weights = weights.reshape(batch, groups, each * length, mask.shape[-1])
        mixed = jnp.einsum("bgnk,bgdk->bgnd", weights, value)
        mixed = mixed.reshape(batch, self.num_heads, length, self.head_dim)
        mixed = jnp.transpose(mixed, (0, 2, 1, 3))
        out = layers.Dense(
            width, ("joined_kv", "embed"), self.dtype, use_bias=self.out_bias, name="out"
        )
        return out(mixed.reshape(batch, length, self.num_heads * self.head_dim))


class Slots(nn.Module):
    """The cache's slots: how many are taken, and the position of the token in each (-1: no token).

    Attributes:
      stacked: the layers' caches have a leading layer axis, and so the positions get one, of length 1: whoever
        repeats or picks rows finds them on the same axis everywhere.
    """

    stacked: bool

    @nn.compact
    def __call__(
        self, shape: tuple[int, ...], more: int, lengths: Array | None
    ) -> tuple[Array, Array, Array]:
        """Takes the next slots for tokens `[B, Q]`.

        Args:
          shape: (B, Q).
          more: slots beyond the first call's Q; later calls do not need it.
          lengths: int `[B]`, how many of the tokens are no padding; None for all. For the first call.

        Returns:
          The first slot int32 `[]`, the positions of the tokens int32 `[B, Q]` and of all slots int32 `[B, L]`.
        """
        batch, length = shape
        if not self.has_variable("cache", "cached_positions"):
            if more < 1:
                raise ValueError(
                    "decode=True needs max_decode_length >= 1, the slots beyond the prompt's; "
                    f"got {more}."
                )
        elif lengths is not None:
            raise ValueError(
                "prompt_lengths belong to the first call, which makes the cache: later tokens are "
                "appended for every row."
            )
        lead = (1,) if self.stacked else ()
        taken = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        cached = self.variable(
            "cache",
            "cached_positions",
            lambda: jnp.full((*lead, batch, length + more), -1, jnp.int32),
        )
        index = taken.value
        there = cached.value.reshape(cached.value.shape[-2:])
        layers.check_room(index, length, there.shape[1])
        steps = jnp.arange(length, dtype=jnp.int32)[None]
        here = jnp.max(there, axis=1, keepdims=True) + 1 + steps
        new = here if lengths is None else jnp.where(steps < lengths[:, None], here, -1)
        if length:
            there = jax.lax.dynamic_update_slice_in_dim(there, new, index, axis=1)
        taken.value = index + length
        cached.value = there.reshape(cached.value.shape)
        return index, here, there
