"""The parts of the networks' layers as plain Flax: projections, norms, embedding, T5's attention, feed-forward.

Each part takes the sizes that it needs and nothing else; `t5.py`, `decoder.py` and `encoder.py` put them together.
Parameter names and logical axes are T5X's. Shapes: `B` batch, `Q` query and `L` key positions, `D` width, `H` heads,
`V` vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax import partitioning, quantization
from modjax.networks import fused
from modjax.parameters import parameter

Array = jax.Array

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
    "silu": nn.silu,
    "linear": lambda x: x,
}
MASKED = -1e10
CACHE_AXES = ("batch", "heads", "kv", None)
FEW_TOKENS = 32  # up to which the logits of a step are made by `_few_logits`


class Dense(nn.Module):
    """`x [..., D] -> x @ kernel [..., K]`, plus a bias `[K]` where there is one; the kernel is 2-D as in T5X."""

    features: int
    kernel_axes: tuple[str, str]
    dtype: str = "float32"
    scale: float = 1.0  # variance of the initial kernel, over fan-in
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
        shape = (x.shape[-1], self.features)
        # Boxed, for a quantised kernel is one that is multiplied as it is.
        kernel = parameter(self, "kernel", init, shape, self.kernel_axes, unbox=False)
        y = quantization.product(x, kernel, self.dtype)
        if self.use_bias:
            zeros, axes = nn.initializers.zeros, self.kernel_axes[1:]
            bias = parameter(self, "bias", zeros, (self.features,), axes)
            y = y + bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root mean square norm without mean or bias, computed in float32: `x / rms(x) * (offset + scale)`."""

    dtype: str = "float32"
    epsilon: float = 1e-6
    offset: float = 0.0
    axis: str = "embed"  # what the last axis is

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = parameter(self, "scale", init, (x.shape[-1],), (self.axis,))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with scale and bias, computed in float32."""

    dtype: str = "float32"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = (x.shape[-1],), ("embed",)
        scale = parameter(self, "scale", nn.initializers.ones, shape, axes)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, axes)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class Embed(nn.Module):
    """Token embedding `[V, D]`, also used as the output layer where it is tied."""

    vocab_size: int
    emb_dim: int
    dtype: str = "float32"
    stddev: float = 1.0  # of the initial values

    def setup(self) -> None:
        init, shape = nn.initializers.normal(self.stddev), (self.vocab_size, self.emb_dim)
        self.embedding = parameter(self, "embedding", init, shape, ("vocab", "embed"), unbox=False)

    def __call__(self, tokens: Array) -> Array:
        # Each device looks up its slice of the width for all rows that share the table, and then hands rows out: left
        # to itself, XLA makes the rows of all devices whole on each of them.
        x = quantization.rows(self.embedding, tokens, self.dtype)
        for rows in ("lookup", "batch"):
            x = partitioning.constrain_forward(x, (rows, "length", "embed"))
        return x

    def attend(self, x: Array, scaled: bool = True) -> Array:
        """`[..., D] -> [..., V]` in float32, scaled by 1/sqrt(D) unless told otherwise."""
        if x.size <= FEW_TOKENS * x.shape[-1] and not quantization.is_quantized(self.embedding):
            logits = _few_logits(x, self.embedding)
        else:
            logits = quantization.product(x, self.embedding.T, jnp.float32)
        return logits / jnp.sqrt(jnp.float32(x.shape[-1])) if scaled else logits


def _few_logits(x: Array, embedding: Array) -> Array:
    """`x [..., D] @ embedding.T`, made as `[V, tokens]`: an embedding that is the right operand is transposed by XLA's
    CPU compiler at every call, which for a step of decoding takes longer than the product.
    """
    tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    # Without the barrier, the compiler turns the product around again.
    columns = jax.lax.optimization_barrier(embedding.astype(jnp.float32) @ tokens.T)
    return columns.T.reshape(*x.shape[:-1], len(embedding))


def position_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every relative position, as a table over `key - query` in [-max_distance, max_distance].

    Half of the buckets hold exact distances, the others grow logarithmically up to `max_distance`; farther
    positions share the last one. (T5, section 2.1.)

    Returns:
      int32 `[2 * max_distance + 1]`; index it with `clip(key - query, -max_distance, max_distance) + max_distance`.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    offset = np.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0) * num_buckets
        distance = np.abs(relative)
    else:
        distance = np.maximum(-relative, 0)
    exact = num_buckets // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / exact
    # The epsilon keeps exact powers from falling one bucket short by rounding.
    growth = np.log(ratio + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    large = np.minimum(exact + (growth * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, large)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Learned bias of attention logits by bucketed distance: float `[1, H, Q, L]`."""

    num_heads: int
    bidirectional: bool
    buckets: int
    max_distance: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        table = parameter(
            self,
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.buckets),
            ("heads", "relpos_buckets"),
        )
        far = self.max_distance
        buckets = jnp.asarray(position_buckets(self.bidirectional, self.buckets, far))
        relative = jnp.clip(key_positions[None, :] - query_positions[:, None], -far, far) + far
        return jnp.take(table.astype(self.dtype), buckets[relative], axis=1)[None]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a stack's layers share besides arrays: flags that are fixed when the program is traced."""

    deterministic: bool
    decode: bool = False
    max_decode_length: int = 0
    attention: str = "auto"  # see `fused.fits`
    causal: bool = False  # in self-attention, no token sees a later one,
    whole: bool = False  # and each sees all the others


def split_heads(x: Array, num_heads: int) -> Array:
    """`[B, L, H * head_dim]` to `[B, L, H, head_dim]`, heads divided over the mesh as the rules in force say."""
    heads = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)
    return partitioning.constrain(heads, ("batch", None, "heads", "kv"))


def side_by_side(heads: Array, beams: int) -> Array:
    """Keys or values `[B * beams, Q, H, head_dim]` as columns of a cache, `[B, H, head_dim, Q * beams]`."""
    rows, length, num_heads, head_dim = heads.shape
    heads = heads.reshape(rows // beams, beams, length, num_heads, head_dim)
    heads = jnp.transpose(heads, (0, 3, 4, 2, 1))
    return heads.reshape(rows // beams, num_heads, head_dim, length * beams)


class Attention(nn.Module):
    """Multi-head attention without logit scaling (T5 folds it into the query's initial kernel).

    In decoding, self-attention appends its keys and values to the cache, and cross-attention computes its own
    from the encoder's output once. Cached arrays are `[B, H, head_dim, L]`, length last, and may have fewer rows than
    `x`: rows that lie next to each other (an example's beams) then share one, and all their queries meet all its keys
    in one product of matrices. What self-attention has cached for E beams is `[B, H, head_dim, L * E]`: slot t of beam
    e is column `t * E + e`, and the mask says whose keys a beam sees.
    """

    num_heads: int
    head_dim: int
    step: Step
    cross: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Array, keys_from: Array | None, mask: Any, bias: Array | None, index: Array
    ) -> Array:
        step, joined = self.step, self.num_heads * self.head_dim
        batch, length, width = x.shape

        def project(name: str, source: Array, scale: float = 1.0) -> Array:
            dense = Dense(joined, ("embed", "joined_kv"), self.dtype, scale, name=name)
            return split_heads(dense(source), self.num_heads)

        def to_cache(heads: Array) -> Array:
            return jnp.transpose(heads, (0, 2, 3, 1))

        out = Dense(width, ("joined_kv", "embed"), self.dtype, name="out")
        query = project("query", x, 1.0 / self.head_dim)
        if not step.decode:
            source = x if keys_from is None else keys_from
            key, value = project("key", source), project("value", source)
            drops = self.dropout_rate > 0 and not step.deterministic
            lengths = (length, key.shape[1])
            if fused.fits(step.attention, query.dtype, self.head_dim, lengths, drops):
                # Without a mask, the bias has it in it.
                added = bias if mask is None else fused.added(mask, lengths, query.dtype, bias)
                causal = step.causal and not self.cross
                mixed = fused.attend(query, key, value, added, scale=1.0, causal=causal)
                return out(mixed.reshape(batch, length, joined))
            key, value = to_cache(key), to_cache(value)
        elif self.cross:
            # Computed at the first call only: the encoder's output does not change while decoding.
            source = x if keys_from is None else keys_from
            key, value = (
                self.variable(
                    "cache", f"shared_{name}", lambda name=name: to_cache(project(name, source))
                ).value
                for name in ("key", "value")
            )
            mask = mask[:: batch // len(key)]
        else:
            shape = (batch, self.num_heads, self.head_dim, step.max_decode_length)
            caches = []
            for name in ("key", "value"):
                cached = self.variable("cache", f"joint_{name}", jnp.zeros, shape, self.dtype)
                beams = batch // len(cached.value)
                if length:
                    cached.value = jax.lax.dynamic_update_slice_in_dim(
                        cached.value,
                        side_by_side(project(name, x), beams).astype(cached.value.dtype),
                        index * beams,
                        axis=3,
                    )
                cached.value = partitioning.constrain(cached.value, CACHE_AXES)
                caches.append(cached.value)
            key, value = caches
        # The queries of rows that share keys are a matrix, and the keys are read once for all of them.
        query = query.reshape(len(key), -1, self.num_heads, self.head_dim)

        logits = jnp.einsum("bqhd,bhdk->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, logits, MASKED)).astype(self.dtype)
        weights = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            weights, deterministic=step.deterministic
        )
        mixed = jnp.einsum("bhqk,bhdk->bqhd", weights, value)
        return out(mixed.reshape(batch, length, joined))


class MLP(nn.Module):
    """Feed-forward block; several activations are multiplied (gated units)."""

    mlp_dim: int
    activations: tuple[str, ...]
    deterministic: bool
    dropout_rate: float = 0.0
    dtype: str = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(width: int, axes: tuple[str, str], name: str) -> Dense:
            return Dense(width, axes, self.dtype, use_bias=self.use_bias, name=name)

        gated = len(self.activations) > 1
        hidden: Any = None
        for i, activation in enumerate(self.activations):
            name = f"wi_{i}" if gated else "wi"
            unit = ACTIVATIONS[activation](dense(self.mlp_dim, ("embed", "mlp"), name)(x))
            hidden = unit if hidden is None else hidden * unit
        hidden = partitioning.constrain(hidden, ("batch", None, "mlp"))
        hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            hidden, deterministic=self.deterministic
        )
        return dense(x.shape[-1], ("mlp", "embed"), "wo")(hidden)


class CachePosition(nn.Module):
    """Counts the tokens in the cache, and knows whose keys a row sees; all rows are decoded in step.

    The mask is part of the cache: where beams are picked, a row takes over what another one sees, and the keys stay
    where they are.

    Attributes:
      stacked: the layers' caches have a leading layer axis, and so the mask gets one, of length 1: whoever repeats or
        picks rows finds them on the same axis everywhere.
    """

    stacked: bool

    @nn.compact
    def __call__(self, rows: int, length: int, slots: int) -> tuple[Array, Array]:
        """Takes the next slots for tokens `[rows, length]`, of a cache of so many slots.

        Returns:
          The first slot int32 `[]`, and which columns the tokens see, bool `[rows, length, slots * E]` for E beams of
          an example: column `t * E + e` is slot t of beam e.
        """
        lead = (1,) if self.stacked else ()
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        seen = self.variable("cache", "joint_mask", jnp.zeros, (*lead, rows, slots), bool)
        now = index.value
        check_room(now, length, slots)
        index.value = now + length
        before = seen.value.reshape(rows, 1, -1)
        beams = before.shape[2] // slots
        mask = before | own_columns(rows, beams, slots, now, length)
        if length:
            seen.value = mask[:, -1].reshape(seen.value.shape)
        return now, mask


def own_columns(rows: int, beams: int, slots: int, first: Array, length: int) -> Array:
    """Which columns hold the tokens `[rows, length]` that go into slots from `first` on, as far as each token sees.

    Returns:
      bool `[rows, length, slots * beams]`: column `t * beams + e` is slot t of beam e, and row r is beam `r % beams`.
    """
    slot, beam = jnp.divmod(jnp.arange(slots * beams, dtype=jnp.int32), beams)
    own = (beam == jnp.arange(rows, dtype=jnp.int32)[:, None] % beams)[:, None]
    until = first + jnp.arange(length, dtype=jnp.int32)[:, None]
    return own & (first <= slot) & (slot <= until)


def check_room(taken: Array, new: int, slots: int) -> None:
    """Refuses tokens that a cache has no slots for, as far as is known: inside jit, how many are taken is not.

    Raises:
      ValueError: they do not fit. They would be written over the last ones.
    """
    known = 0 if isinstance(taken, jax.core.Tracer) else int(taken)
    if known + new > slots:
        raise ValueError(
            f"The cache has {slots} slots, {known} of them taken: {new} more token(s) do not fit. Make a longer cache "
            "(max_decode_length), or decode less."
        )
