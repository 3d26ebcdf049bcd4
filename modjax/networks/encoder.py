"""Encoders as plain Flax: BERT, RoBERTa and XLM-R, alone or with a classification or regression head.

They are one network: what differs is which token is padding, where positions begin, and the head. Layers are post-norm:
a block's output is added to its input and the sum is normalised. The parts of a layer are in `layers.py`. Shapes: `B`
batch, `L` length, `D` width, `H` heads, `V` vocabulary.

Sources: BERT (arXiv 1810.04805), RoBERTa (1907.11692), XLM-R (1911.02116). Names as in T5X's minimal examples where
those have the part.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from modjax import partitioning
from modjax.networks import configuration, fused, layers
from modjax.networks.stacking import stack

Array = jax.Array

HEADS = ("none", "pooled", "dense")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and variants of an encoder.

    Attributes:
      vocab_size: rows of the embedding, `V`.
      token_offset: a batch's token t > 0 is row t - token_offset of the embedding. 0 where row 0 is the model's own
        padding (BERT), 1 where it is a token like others (RoBERTa, XLM-R).
      emb_dim: width, `D`.
      num_heads, head_dim: attention; `num_heads * head_dim` need not equal `emb_dim`.
      mlp_dim: width of the feed-forward block.
      num_layers: depth.
      mlp_activations: ("gelu_exact",) for BERT and its family.
      norm_epsilon: of the layer norms.
      max_positions: rows of the position embedding.
      position_offset: row of the first token's position; 2 in RoBERTa and XLM-R.
      type_vocab_size: rows of the token type embedding.
      pooler: a dense layer with tanh on the first token.
      head: "none"; "pooled", a linear layer on the pooler's output (BERT); "dense", a dense layer with tanh on the
        first token and a linear one on that (RoBERTa).
      num_outputs: classes; 1 for regression, 0 without a head.
      dropout_rate: of embeddings, attention weights, block outputs and in the head.
      scan_layers: one `nn.scan` over stacked layers (leading layer axis) instead of unrolled ones.
      remat_policy: "none", "full" (recompute everything) or "minimal" (keep products with weights).
      attention: "auto", one kernel where the device has one that fits (`fused`), or "plain", always written out.
      dtype: of activations, "float32" or "bfloat16"; parameters are created in float32.
    """

    vocab_size: int
    token_offset: int = 0
    emb_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 3072
    num_layers: int = 12
    mlp_activations: tuple[str, ...] = ("gelu_exact",)
    norm_epsilon: float = 1e-12
    max_positions: int = 512
    position_offset: int = 0
    type_vocab_size: int = 2
    pooler: bool = True
    head: str = "none"
    num_outputs: int = 0
    dropout_rate: float = 0.0
    scan_layers: bool = False
    remat_policy: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_layers")
        configuration.check(self, (*sizes, "type_vocab_size"))
        require = functools.partial(configuration.require, self)
        require(self.token_offset in (0, 1), "token_offset", "must be 0 or 1")
        within = f"must be in [0, max_positions = {self.max_positions})"
        require(0 <= self.position_offset < self.max_positions, "position_offset", within)
        configuration.require_known(self, "head", HEADS)
        if self.head == "pooled" and not self.pooler:
            raise ValueError("EncoderConfig.head='pooled' needs pooler=True; 'dense' does not.")
        configuration.require_integer(self, "num_outputs")
        if (self.num_outputs > 0) != (self.head != "none") or self.num_outputs < 0:
            raise ValueError(
                f"EncoderConfig.num_outputs is {self.num_outputs} with head={self.head!r}: a head has "
                "at least 1 output (1 is regression), no head has 0."
            )


class SelfAttention(nn.Module):
    """Multi-head attention with biases, logits scaled by 1/sqrt(head_dim)."""

    config: EncoderConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim
        batch, length, width = x.shape

        def project(name: str) -> Array:
            dense = layers.Dense(
                joined, ("embed", "joined_kv"), cfg.dtype, use_bias=True, name=name
            )
            return layers.split_heads(dense(x), cfg.num_heads)

        out = layers.Dense(width, ("joined_kv", "embed"), cfg.dtype, use_bias=True, name="out")
        query, key, value = project("query"), project("key"), project("value")
        scale = cfg.head_dim**-0.5
        drops = cfg.dropout_rate > 0 and not self.deterministic
        lengths = (length, length)
        if fused.fits(cfg.attention, query.dtype, cfg.head_dim, lengths, drops):
            added = fused.added(mask, lengths, query.dtype)
            mixed = fused.attend(query, key, value, added, scale=scale)
            return out(mixed.reshape(batch, length, joined))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(mask, logits * scale, layers.MASKED)
        weights = nn.Dropout(cfg.dropout_rate)(
            jax.nn.softmax(logits).astype(cfg.dtype), deterministic=self.deterministic
        )
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return out(mixed.reshape(batch, length, joined))


class Layer(nn.Module):
    """Attention and feed-forward block, each added to its input and normalised."""

    config: EncoderConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        cfg, deterministic = self.config, self.deterministic
        x = partitioning.constrain(x, ("batch", "length", "embed"))

        def add(block: Array, to: Array, norm: str) -> Array:
            block = nn.Dropout(cfg.dropout_rate)(block, deterministic=deterministic)
            return layers.LayerNorm(cfg.dtype, cfg.norm_epsilon, name=norm)(to + block)

        attention = SelfAttention(cfg, deterministic, name="attention")
        x = add(attention(x, mask), x, "attention_norm")
        mlp = layers.MLP(
            cfg.mlp_dim,
            cfg.mlp_activations,
            deterministic,
            dtype=cfg.dtype,
            use_bias=True,
            name="mlp",
        )
        x = add(mlp(x), x, "mlp_norm")
        return partitioning.constrain(x, ("batch", "length", "embed")), None


class Encoder(nn.Module):
    """From token embeddings to the last hidden states."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Array, token_types: Array, positions: Array, mask: Array, deterministic: bool
    ) -> Array:
        cfg = self.config

        def embed(rows: int, name: str) -> layers.Embed:
            return layers.Embed(rows, cfg.emb_dim, cfg.dtype, name=name)

        x = x + embed(cfg.max_positions, "position_embedder")(positions + cfg.position_offset)
        x = x + embed(cfg.type_vocab_size, "type_embedder")(token_types)
        x = layers.LayerNorm(cfg.dtype, cfg.norm_epsilon, name="embedding_norm")(x)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        return stack(Layer, (cfg, deterministic), cfg.num_layers, cfg, x, (mask,))


class Classifier(nn.Module):
    """The task's own layers: `[B, D] -> float32 [B, num_outputs]`."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        cfg = self.config
        if cfg.head == "dense":
            x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
            dense = layers.Dense(
                cfg.emb_dim, ("embed", "mlp"), cfg.dtype, use_bias=True, name="dense"
            )
            x = jnp.tanh(dense(x))
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        return layers.Dense(
            cfg.num_outputs, ("embed", "vocab"), use_bias=True, name="logits_dense"
        )(x)


class Transformer(nn.Module):
    """An encoder. Token 0 is padding, which nothing attends to; packed rows carry segment ids from 1 (0 = padding)."""

    config: EncoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, cfg.dtype)
        self.encoder = Encoder(cfg)
        if cfg.pooler:
            self.pooler = layers.Dense(cfg.emb_dim, ("embed", "mlp"), cfg.dtype, use_bias=True)
        if cfg.head != "none":
            self.classifier = Classifier(cfg)

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_token_types: Array | None = None,
        encoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """The last hidden states `[B, L, D]`.

        Args:
          encoder_input_tokens: int `[B, L]`; 0 is padding, t > 0 row `t - token_offset` of the embedding.
          encoder_token_types: int `[B, L]`, rows of the type embedding; zeros unless given.
          encoder_segment_ids: int `[B, L]`, of packed rows: a token sees its own segment. They need positions.
          encoder_positions: int `[B, L]` from 0; counted over the tokens that are not padding unless given.
          enable_dropout: draw dropout from the rng stream "dropout".

        Raises:
          ValueError: rows longer than there are positions, or packed rows without positions.
        """
        cfg, tokens = self.config, encoder_input_tokens
        if encoder_segment_ids is None:
            mask = (tokens > 0)[:, None, None, :]
        else:
            mask = (encoder_segment_ids[:, :, None] == encoder_segment_ids[:, None, :])[:, None]
        if encoder_positions is None:
            if encoder_segment_ids is not None:
                raise ValueError(
                    "Packed rows need encoder_positions, which begin anew in each segment."
                )
            length, longest = tokens.shape[1], cfg.max_positions - cfg.position_offset
            if length > longest:
                raise ValueError(
                    f"Rows of {length} tokens are too long: this network has {longest} positions."
                )
            encoder_positions = jnp.maximum(jnp.cumsum(tokens > 0, axis=1) - 1, 0)
        if encoder_token_types is None:
            encoder_token_types = jnp.zeros_like(tokens)
        return self.encoder(
            self.token_embedder(jnp.maximum(tokens - cfg.token_offset, 0)),
            encoder_token_types,
            encoder_positions,
            mask,
            not enable_dropout,
        )

    def __call__(
        self,
        encoder_input_tokens: Array,
        encoder_token_types: Array | None = None,
        encoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """The head's outputs, float32 `[B, num_outputs]`, or without a head what `encode` gives.

        Arguments as in `encode`.

        Raises:
          ValueError: as `encode`, or packed rows for a head, which reads one example per row.
        """
        cfg = self.config
        if encoder_segment_ids is not None and cfg.head != "none":
            raise ValueError("A head reads one example per row: leave the segment ids out.")
        x = self.encode(
            encoder_input_tokens,
            encoder_token_types,
            encoder_segment_ids,
            encoder_positions,
            enable_dropout=enable_dropout,
        )
        first = x[:, 0]
        # A pooler that the head does not read is a part of the base all the same.
        if cfg.head == "pooled" or (cfg.pooler and self.is_initializing()):
            pooled = jnp.tanh(self.pooler(first))
        if cfg.head == "none":
            return x
        return self.classifier(pooled if cfg.head == "pooled" else first, not enable_dropout)
