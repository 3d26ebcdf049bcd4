"""The T5 family as plain Flax: T5 1.0, 1.1, mT5, ByT5, Flan-T5 and umT5, with T5X's parameter names and logical axes.

Shapes: `B` batch, `Q` query and `L` key positions, `D` width, `H` heads, `V` vocabulary.

Decoding works through the `cache` collection. The first call of `decode(..., decode=True)` creates it, projects the
encoder's output to cross-attention keys and values once, and consumes the tokens it is given (a prompt, or none: an
array `[B, 0]`); each later call appends its tokens. A call may hold any number of tokens, so prefill and single steps
are one code path.

Sources: T5 (arXiv 1910.10683), T5 1.1 and mT5 (2010.11934), ByT5 (2105.13626), umT5 (2304.09151). Names as in T5X's
minimal T5 example.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning
from flax.linen.partitioning import param_with_axes

from modjax.errors import nearest

Array = jax.Array

_REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}
_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}
_MASKED = -1e10


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and variants of a T5.

    Attributes:
      vocab_size: rows of the embedding, `V`.
      emb_dim: width, `D`.
      num_heads, head_dim: attention; `num_heads * head_dim` need not equal `emb_dim`.
      mlp_dim: width of the feed-forward block.
      num_encoder_layers, num_decoder_layers: depths.
      mlp_activations: ("relu",) for T5 1.0; ("gelu", "linear") for the gated 1.1, mT5, ByT5, umT5.
      dropout_rate: of embeddings, attention weights, feed-forward hidden units and block outputs.
      logits_via_embedding: tied output layer with logits scaled by 1/sqrt(D) (T5 1.0).
      relpos_per_layer: each layer has a position bias of its own (umT5) instead of one per stack.
      relpos_buckets, relpos_max_distance: relative position buckets.
      scan_layers: one `nn.scan` over stacked layers (leading layer axis) instead of unrolled ones.
      remat_policy: "none", "full" (recompute everything) or "minimal" (keep products with weights).
      dtype: of activations, "float32" or "bfloat16"; parameters are created in float32.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    relpos_per_layer: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    scan_layers: bool = False
    remat_policy: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "num_encoder_layers",
            "num_decoder_layers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"T5Config.{name} must be at least 1, got {getattr(self, name)}.")
        for name in self.mlp_activations:
            if name not in _ACTIVATIONS:
                raise ValueError(
                    f"T5Config.mlp_activations: unknown {name!r}." + nearest(name, _ACTIVATIONS)
                )
        if self.remat_policy not in _REMAT_POLICIES:
            raise ValueError(
                f"T5Config.remat_policy: unknown {self.remat_policy!r}."
                + nearest(self.remat_policy, _REMAT_POLICIES)
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}.")


class Dense(nn.Module):
    """`x [..., D] -> x @ kernel [..., K]`, without bias; the kernel is 2-D as in T5X."""

    features: int
    kernel_axes: tuple[str, str]
    dtype: str = "float32"
    scale: float = 1.0  # variance of the initial kernel, over fan-in

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
        shape = (x.shape[-1], self.features)
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=self.kernel_axes)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """Root mean square norm without mean or bias, computed in float32."""

    dtype: str = "float32"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class Embed(nn.Module):
    """Token embedding `[V, D]`, also used as the output layer where it is tied."""

    config: T5Config

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.emb_dim)
        self.embedding = param_with_axes(
            "embedding", nn.initializers.normal(1.0), shape, jnp.float32, axes=("vocab", "embed")
        )

    def __call__(self, tokens: Array) -> Array:
        return jnp.take(self.embedding.astype(self.config.dtype), tokens, axis=0)

    def attend(self, x: Array) -> Array:
        """`[..., D] -> [..., V]` in float32, scaled by 1/sqrt(D)."""
        logits = jnp.dot(x.astype(jnp.float32), self.embedding.astype(jnp.float32).T)
        return logits / jnp.sqrt(jnp.float32(x.shape[-1]))


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

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        cfg = self.config
        table = param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relpos_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        far = cfg.relpos_max_distance
        buckets = jnp.asarray(position_buckets(self.bidirectional, cfg.relpos_buckets, far))
        relative = jnp.clip(key_positions[None, :] - query_positions[:, None], -far, far) + far
        return jnp.take(table.astype(cfg.dtype), buckets[relative], axis=1)[None]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a stack's layers share besides arrays: flags that are fixed when the program is traced."""

    deterministic: bool
    decode: bool = False
    max_decode_length: int = 0


class Attention(nn.Module):
    """Multi-head attention without logit scaling (T5 folds it into the query's initial kernel).

    In decoding, self-attention appends its keys and values to the cache, and cross-attention computes its own
    from the encoder's output once. Cached arrays are `[B, H, head_dim, L]`, length last.
    """

    config: T5Config
    step: _Step
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: Array, keys_from: Array | None, mask: Array, bias: Array | None, index: Array
    ) -> Array:
        cfg, step = self.config, self.step
        batch, length = x.shape[:2]

        def project(name: str, source: Array, scale: float = 1.0) -> Array:
            dense = Dense(
                cfg.num_heads * cfg.head_dim, ("embed", "joined_kv"), cfg.dtype, scale, name=name
            )
            return dense(source).reshape(batch, -1, cfg.num_heads, cfg.head_dim)

        def to_cache(heads: Array) -> Array:
            return jnp.transpose(heads, (0, 2, 3, 1))

        query = project("query", x, 1.0 / cfg.head_dim)
        if not step.decode:
            source = x if keys_from is None else keys_from
            key, value = to_cache(project("key", source)), to_cache(project("value", source))
        elif self.cross:
            # Computed at the first call only: the encoder's output does not change while decoding.
            source = x if keys_from is None else keys_from
            key, value = (
                self.variable(
                    "cache", f"cached_{name}", lambda name=name: to_cache(project(name, source))
                ).value
                for name in ("key", "value")
            )
        else:
            shape = (batch, cfg.num_heads, cfg.head_dim, step.max_decode_length)
            caches = []
            for name in ("key", "value"):
                cached = self.variable("cache", f"cached_{name}", jnp.zeros, shape, cfg.dtype)
                new = to_cache(project(name, x))
                if length:
                    cached.value = jax.lax.dynamic_update_slice_in_dim(
                        cached.value, new.astype(cached.value.dtype), index, axis=3
                    )
                caches.append(cached.value)
            key, value = caches

        logits = jnp.einsum("bqhd,bhdk->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED)).astype(cfg.dtype)
        weights = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            weights, deterministic=step.deterministic
        )
        mixed = jnp.einsum("bhqk,bhdk->bqhd", weights, value)
        return Dense(cfg.emb_dim, ("joined_kv", "embed"), cfg.dtype, name="out")(
            mixed.reshape(batch, length, cfg.num_heads * cfg.head_dim)
        )


class MLP(nn.Module):
    """Feed-forward block; several activations are multiplied (gated units)."""

    config: T5Config
    step: _Step

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        gated = len(cfg.mlp_activations) > 1
        hidden = None
        for i, activation in enumerate(cfg.mlp_activations):
            name = f"wi_{i}" if gated else "wi"
            unit = _ACTIVATIONS[activation](
                Dense(cfg.mlp_dim, ("embed", "mlp"), cfg.dtype, name=name)(x)
            )
            hidden = unit if hidden is None else hidden * unit
        hidden = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            hidden, deterministic=self.step.deterministic
        )
        return Dense(cfg.emb_dim, ("mlp", "embed"), cfg.dtype, name="wo")(hidden)


class Layer(nn.Module):
    """One layer of the encoder or the decoder: pre-norm blocks with residual connections."""

    config: T5Config
    step: _Step
    decoder: bool

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array | None, masks: Any, bias: Array | None, positions: Any
    ) -> tuple[Array, None]:
        cfg, step = self.config, self.step
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        if bias is None:
            bias = RelativePositionBias(cfg, not self.decoder, name="relpos_bias")(*positions)
        self_mask, cross_mask = masks
        index = positions[0][0] if positions[0].size else jnp.int32(0)

        def add(block: Array, to: Array) -> Array:
            dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
            return to + dropout(block, deterministic=step.deterministic)

        name = "self_attention" if self.decoder else "attention"
        y = RMSNorm(cfg.dtype, name=f"pre_{name}_layer_norm")(x)
        x = add(Attention(cfg, step, name=name)(y, None, self_mask, bias, index), x)
        if self.decoder:
            y = RMSNorm(cfg.dtype, name="pre_cross_attention_layer_norm")(x)
            cross = Attention(cfg, step, cross=True, name="encoder_decoder_attention")
            x = add(cross(y, encoded, cross_mask, None, index), x)
        y = RMSNorm(cfg.dtype, name="pre_mlp_layer_norm")(x)
        x = add(MLP(cfg, step, name="mlp")(y), x)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """The encoder or the decoder between embedding and logits."""

    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array | None, masks: Any, positions: Any, step: _Step
    ) -> Array:
        cfg = self.config
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        x = dropout(x, deterministic=step.deterministic).astype(cfg.dtype)
        bias = None
        if not cfg.relpos_per_layer:
            bias = RelativePositionBias(cfg, not self.decoder, name="relpos_bias")(*positions)
        layer: Any = Layer
        if cfg.remat_policy != "none" and not step.decode:
            # Inside a scan the loop already keeps XLA from undoing the recomputation.
            layer = nn.remat(
                layer, policy=_REMAT_POLICIES[cfg.remat_policy], prevent_cse=not cfg.scan_layers
            )
        depth = cfg.num_decoder_layers if self.decoder else cfg.num_encoder_layers
        if cfg.scan_layers:
            layers = partitioning.scan_with_axes(
                layer,
                variable_axes={"params": 0, "cache": 0, "intermediates": 0},
                split_rngs={True: True},  # every stream, also those that only an adapter draws from
                in_axes=(nn.broadcast,) * 4,
                length=depth,
            )
            x, _ = layers(cfg, step, self.decoder, name="layers")(
                x, encoded, masks, bias, positions
            )
        else:
            for i in range(depth):
                x, _ = layer(cfg, step, self.decoder, name=f"layers_{i}")(
                    x, encoded, masks, bias, positions
                )
        x = RMSNorm(cfg.dtype, name="decoder_norm" if self.decoder else "encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            x, deterministic=step.deterministic
        )


class Transformer(nn.Module):
    """An encoder-decoder T5. Token 0 is padding; packed rows carry segment ids from 1 (0 = padding).

    Positions are accepted for T5X's sake and not needed: T5 sees distances only, and those within a packed
    segment are the same as those within its row.
    """

    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = Embed(cfg)
        self.encoder = Stack(cfg, decoder=False)
        self.decoder = Decoder(cfg)

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """Encoder output `[B, L, D]` of tokens int `[B, L]`."""
        del encoder_positions
        if encoder_segment_ids is None:
            mask = (encoder_input_tokens > 0)[:, None, None, :]
        else:
            mask = _same_segment(encoder_segment_ids, encoder_segment_ids)
        positions = jnp.arange(encoder_input_tokens.shape[1], dtype=jnp.int32)
        return self.encoder(
            self.token_embedder(encoder_input_tokens),
            None,
            (mask, None),
            (positions, positions),
            _Step(deterministic=not enable_dropout),
        )

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array | None = None,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        max_decode_length: int = 0,
    ) -> Array:
        """Logits float32 `[B, Q, V]`.

        Args:
          encoded: `[B, L, D]`; read at the first cached call only.
          encoder_input_tokens: `[B, L]`, for the padding mask.
          decoder_input_tokens: `[B, Q]`, shifted right in training; the new tokens when `decode`.
          decoder_target_tokens: `[B, Q]`, for the padding mask; not needed when `decode`.
          encoder_segment_ids, decoder_segment_ids: of packed rows; not with `decode`.
          decoder_positions: not needed (see the class).
          enable_dropout: draw dropout from the rng stream "dropout".
          decode: use the cache (make the collection "cache" mutable).
          max_decode_length: length of the cache, needed with `decode`.
        """
        del decoder_positions
        if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
            raise ValueError("Decoding works on one example per row: leave the segment ids out.")
        if decode and max_decode_length < 1:
            raise ValueError(
                f"decode=True needs max_decode_length >= 1, the cache's length; got {max_decode_length}."
            )
        length = decoder_input_tokens.shape[1]
        cross_mask = (encoder_input_tokens > 0)[:, None, None, :]
        query_positions = key_positions = jnp.arange(length, dtype=jnp.int32)
        if decode:
            cache_index = self.decoder.position(length)
            query_positions = cache_index + query_positions
            key_positions = jnp.arange(max_decode_length, dtype=jnp.int32)
        mask = (key_positions[None, :] <= query_positions[:, None])[None, None]
        if not decode and decoder_segment_ids is not None and encoder_segment_ids is not None:
            mask = mask & _same_segment(decoder_segment_ids, decoder_segment_ids)
            cross_mask = _same_segment(decoder_segment_ids, encoder_segment_ids)
        elif not decode and decoder_target_tokens is not None:
            mask = mask & (decoder_target_tokens > 0)[:, None, None, :]
        y = self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded,
            (mask, cross_mask),
            (query_positions, key_positions),
            _Step(not enable_dropout, decode, max_decode_length),
        )
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(y)
        return self.decoder.logits(y)

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array | None = None,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """Teacher-forced logits float32 `[B, Q, V]`; arguments as in `encode` and `decode`."""
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids,
            encoder_positions,
            enable_dropout=enable_dropout,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout=enable_dropout,
        )


class CachePosition(nn.Module):
    """Counts the tokens in the cache; all rows are decoded in step, so one number serves the batch."""

    @nn.compact
    def __call__(self, length: int) -> Array:
        """The number of tokens so far, int32 `[]`; advances it by `length`."""
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        now = index.value
        index.value = now + length
        return now


class Decoder(nn.Module):
    """The decoder stack with its cache position and its output layer."""

    config: T5Config

    def setup(self) -> None:
        self.position = CachePosition()
        self.stack = Stack(self.config, decoder=True)
        nn.share_scope(self, self.stack)
        if not self.config.logits_via_embedding:
            self.logits_dense = Dense(self.config.vocab_size, ("embed", "vocab"), "float32")

    def __call__(self, *args: Any) -> Array:
        return self.stack(*args)

    def logits(self, y: Array) -> Array:
        return self.logits_dense(y)


def _same_segment(query_segments: Array, key_segments: Array) -> Array:
    """Mask bool `[B, 1, Q, L]`: a query sees the keys of its own segment."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
