"""The T5 family as plain Flax: T5 1.0, 1.1, mT5, ByT5, Flan-T5 and umT5, with T5X's parameter names and logical axes.

The parts of a layer are in `layers.py`. Shapes: `B` batch, `Q` query and `L` key positions, `D` width, `H` heads,
`V` vocabulary.

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

from modjax import partitioning
from modjax.networks import configuration, fused, layers
from modjax.networks.stacking import stack

Array = jax.Array


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
      attention: "auto", one kernel where the device has one that fits (`fused`), or "plain", always written out.
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
    attention: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim")
        configuration.check(self, (*sizes, "num_encoder_layers", "num_decoder_layers"))


class Layer(nn.Module):
    """One layer of the encoder or the decoder: pre-norm blocks with residual connections."""

    config: T5Config
    step: layers.Step
    decoder: bool

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array | None, masks: Any, bias: Array | None, positions: Any
    ) -> tuple[Array, None]:
        cfg, step = self.config, self.step
        x = partitioning.constrain(x, ("batch", "length", "embed"))
        if bias is None:
            bias = _position_bias(cfg, self.decoder)(*positions)
        self_mask, cross_mask = masks
        index = positions[0][0] if positions[0].size else jnp.int32(0)

        def attention(name: str, cross: bool) -> layers.Attention:
            return layers.Attention(
                cfg.num_heads, cfg.head_dim, step, cross, cfg.dropout_rate, cfg.dtype, name=name
            )

        def add(block: Array, to: Array) -> Array:
            dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
            return to + dropout(block, deterministic=step.deterministic)

        name = "self_attention" if self.decoder else "attention"
        y = layers.RMSNorm(cfg.dtype, name=f"pre_{name}_layer_norm")(x)
        x = add(attention(name, False)(y, None, self_mask, bias, index), x)
        if self.decoder:
            y = layers.RMSNorm(cfg.dtype, name="pre_cross_attention_layer_norm")(x)
            cross = attention("encoder_decoder_attention", True)
            x = add(cross(y, encoded, cross_mask, None, index), x)
        y = layers.RMSNorm(cfg.dtype, name="pre_mlp_layer_norm")(x)
        mlp = layers.MLP(
            cfg.mlp_dim,
            cfg.mlp_activations,
            step.deterministic,
            cfg.dropout_rate,
            cfg.dtype,
            name="mlp",
        )
        x = add(mlp(y), x)
        return partitioning.constrain(x, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """The encoder or the decoder between embedding and logits."""

    config: T5Config
    decoder: bool

    @nn.compact
    def __call__(
        self, x: Array, encoded: Array | None, masks: Any, positions: Any, step: layers.Step
    ) -> Array:
        cfg = self.config
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        x = dropout(x, deterministic=step.deterministic).astype(cfg.dtype)
        bias = None
        if not cfg.relpos_per_layer:
            bias = _position_bias(cfg, self.decoder)(*positions)
            drops = cfg.dropout_rate > 0 and not step.deterministic
            lengths = (x.shape[1], x.shape[1])
            if not step.decode and fused.fits(
                cfg.attention, cfg.dtype, cfg.head_dim, lengths, drops
            ):
                # Once for all layers.
                bias = fused.added(masks[0], lengths, cfg.dtype, bias)
                masks = (None, masks[1])
        depth = cfg.num_decoder_layers if self.decoder else cfg.num_encoder_layers
        settings, shared = (cfg, step, self.decoder), (encoded, masks, bias, positions)
        x = stack(Layer, settings, depth, cfg, x, shared, remat=not step.decode)
        x = layers.RMSNorm(cfg.dtype, name="decoder_norm" if self.decoder else "encoder_norm")(x)
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
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, cfg.dtype)
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
            layers.Step(not enable_dropout, attention=self.config.attention),
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
        hidden: bool = False,
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
          hidden: give what `project` makes logits of instead, `[B, Q, D]`.

        Raises:
          ValueError: arguments that do not go together, or more tokens than the cache has slots (outside jit; inside
            it only those of this call are counted).
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
            rows = decoder_input_tokens.shape[0]
            index, seen = self.decoder.position(rows, length, max_decode_length)
            columns = seen.shape[2]
            beams = columns // max_decode_length
            mask = seen.reshape(rows // beams, 1, beams * length, columns)
            query_positions = jnp.tile(index + query_positions, beams)
            key_positions = jnp.arange(columns, dtype=jnp.int32) // beams
        else:
            mask = (key_positions[None, :] <= query_positions[:, None])[None, None]
        if not decode and decoder_segment_ids is not None and encoder_segment_ids is not None:
            mask = mask & _same_segment(decoder_segment_ids, decoder_segment_ids)
            cross_mask = _same_segment(decoder_segment_ids, encoder_segment_ids)
        elif not decode and decoder_target_tokens is not None:
            mask = mask & (decoder_target_tokens > 0)[:, None, None, :]
        attention = self.config.attention
        step = layers.Step(not enable_dropout, decode, max_decode_length, attention, causal=True)
        y = self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded,
            (mask, cross_mask),
            (query_positions, key_positions),
            step,
        )
        return y if hidden else self.project(y)

    @property
    def projection(self) -> tuple[str, ...]:
        """Where the parameters of `project` are."""
        tied = self.config.logits_via_embedding
        return ("token_embedder",) if tied else ("decoder", "logits_dense")

    def project(self, y: Array) -> Array:
        """Logits float32 `[B, Q, V]` of the decoder's output `[B, Q, D]`."""
        tied = self.config.logits_via_embedding
        logits = self.token_embedder.attend(y) if tied else self.decoder.logits(y)
        return partitioning.constrain(logits, ("batch", None, "vocab"))

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
        hidden: bool = False,
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
            hidden=hidden,
        )


class Decoder(nn.Module):
    """The decoder stack with its cache position and its output layer."""

    config: T5Config

    def setup(self) -> None:
        self.position = layers.CachePosition(self.config.scan_layers)
        self.stack = Stack(self.config, decoder=True)
        nn.share_scope(self, self.stack)
        if not self.config.logits_via_embedding:
            self.logits_dense = layers.Dense(self.config.vocab_size, ("embed", "vocab"), "float32")

    def __call__(self, *args: Any) -> Array:
        return self.stack(*args)

    def logits(self, y: Array) -> Array:
        return self.logits_dense(y)


def _position_bias(config: T5Config, decoder: bool) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        config.num_heads,
        not decoder,
        config.relpos_buckets,
        config.relpos_max_distance,
        config.dtype,
        name="relpos_bias",
    )


def _same_segment(query_segments: Array, key_segments: Array) -> Array:
    """Mask bool `[B, 1, Q, L]`: a query sees the keys of its own segment."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]
