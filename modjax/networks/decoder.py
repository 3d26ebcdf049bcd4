"""Decoder-only networks as plain Flax: GPT-2, Llama, Mistral, Qwen2 and 3, Gemma 2 and 3, by configuration.

The parts of a layer are in `layers.py` and `decoder_attention.py`. Shapes: `B` batch, `Q` query and `L` key positions,
`D` width, `H` heads, `V` vocabulary.

Tokens: 0 is padding, and token t > 0 is row `t - token_offset` of the embedding. The offset is 0 where the model itself
pads with its token 0 (Gemma), else 1: GPT-2's and Llama's token 0 is a word like any other. Logits are over the rows.

Decoding works through the `cache` collection; all rows decode in step. The first call with `decode=True` takes the
prompts `[B, P]`, padded on the right to a common length (`P` may be 0), and makes a cache of `P + max_decode_length`
slots: prompts lie in the first P, and what later calls bring is appended for all rows at the same slot. The cache knows
the position of each slot's token (-1 where there is none), so that a row goes on at the position where its own prompt
ends, and never sees padding. Later calls may have E rows for each row of the first (beams, samples): all of them read
the one copy of their prompt's keys and values.

Sources: GPT-2 (Radford et al. 2019), Llama (arXiv 2302.13971, 2407.21783), Mistral (2310.06825), Qwen2 (2407.10671),
Qwen3 (2505.09388), Gemma 2 (2408.00118), Gemma 3 (2503.19786). A prefix is seen in both directions as in arXiv
1910.10683, section 3.2.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax import partitioning
from modjax.networks import configuration, layers
from modjax.networks.decoder_attention import GroupedAttention, Slots, soft_cap
from modjax.networks.rope import Rope
from modjax.networks.stacking import stack

Array = jax.Array

NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a decoder-only network.

    Attributes:
      vocab_size: rows of the embedding, `V`.
      token_offset: 0 or 1, see the top of this file.
      emb_dim: width, `D`.
      num_heads, num_kv_heads, head_dim: attention; each of the `num_kv_heads` keys and values serves
        `num_heads / num_kv_heads` queries.
      mlp_dim: width of the feed-forward block.
      num_layers: depth.
      mlp_activations: one, or two for a gated block: that of the gate, and "linear".
      norm: "rms", or "layer" (with mean and bias).
      norm_epsilon: of every norm.
      norm_offset: is added to the scale of rms norms (Gemma's is 1).
      post_norms: a norm also on what each block adds to the stream.
      qk_norm: an rms norm on each head of queries and keys, before they are rotated.
      qkv_bias, out_bias, mlp_bias: biases of the projections.
      positions: "rope", or "learned" (an embedding added to that of the tokens).
      max_positions: rows of the learned position embedding.
      rope: the rotary embedding; a dictionary of its fields will do.
      local_rope: that of layers with a window, where it differs.
      windows: of how many positions a layer sees the last, its own included; 0 for all. Layer i has
        `windows[i % len(windows)]`. It bounds how far back a query sees, not how far ahead within a prefix.
      attention_softcap, logits_softcap: c bounds attention logits, or logits, x by `c tanh(x / c)`; None for none.
      query_scale: factor of attention logits; None for `head_dim ** -0.5`.
      embedding_scale: factor of the embedded tokens.
      logits_via_embedding: the output layer is the embedding, not a kernel of its own.
      dropout_rate: of embeddings, attention weights and block outputs.
      scan_layers: one `nn.scan` over stacked layers (leading layer axis) instead of unrolled ones.
      remat_policy: "none", "full" (recompute everything) or "minimal" (keep products with weights).
      attention: "auto", one kernel where the device has one that fits (`fused`), or "plain", always written out.
      dtype: of activations, "float32" or "bfloat16"; parameters are created in float32.
    """

    vocab_size: int
    token_offset: int = 1
    emb_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    num_layers: int = 8
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    positions: str = "rope"
    max_positions: int = 0
    rope: Rope = Rope()
    local_rope: Rope | None = None
    windows: tuple[int, ...] = (0,)
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    query_scale: float | None = None
    embedding_scale: float = 1.0
    logits_via_embedding: bool = True
    dropout_rate: float = 0.0
    scan_layers: bool = False
    remat_policy: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))
        for name in ("rope", "local_rope"):
            value: Any = getattr(self, name)
            if value is not None and not isinstance(value, Rope):
                object.__setattr__(self, name, Rope(**value))
        sizes = ("vocab_size", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        configuration.check(self, (*sizes, "num_layers"))
        require = functools.partial(configuration.require, self)
        configuration.require_known(self, "norm", NORMS)
        configuration.require_known(self, "positions", POSITIONS)
        heads = f"must divide num_heads {self.num_heads}"
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", heads)
        require(self.token_offset in (0, 1), "token_offset", "must be 0 or 1")
        fits = 0 < len(self.windows) <= self.num_layers and min(self.windows) >= 0
        require(fits, "windows", "must be numbers from 0, one per layer or a pattern of them")
        if self.positions == "learned":
            require(self.max_positions >= 1, "max_positions", "must be at least 1")
        else:
            require(self.head_dim % 2 == 0, "head_dim", "must be even for rope")

    def layer_windows(self) -> np.ndarray:
        """Each layer's window, int32 `[num_layers]`; 0 for none."""
        return np.resize(np.array(self.windows, np.int32), self.num_layers)


class Layer(nn.Module):
    """One layer: norm and block, twice, with residual connections."""

    config: DecoderConfig
    step: layers.Step

    @nn.compact
    def __call__(self, x: Array, seen: Any, index: Array, own: Any) -> tuple[Array, None]:
        """The stream `[B, Q, D]` after this layer.

        Args:
          x: the stream before it.
          seen: for all layers: mask `[B, 1, Q, L]`, distance of each query from each key `[B, Q, L]` (None where no
            layer has a window), rope tables `[N, 2, B, Q, head_dim / 2]` (None without rope).
          index: the first slot of the cache to write.
          own: this layer's window, and which rope table it uses.
        """
        cfg, step = self.config, self.step
        x = partitioning.constrain(x, ("batch", "length", "embed"))
        mask, distance, tables = seen
        window, table = own
        if distance is not None:
            mask = mask & ((window == 0) | (distance < window))[:, None]
        turns = None if tables is None else tables[table]

        def add(block: Array, name: str) -> Array:
            if cfg.post_norms:
                block = _norm(cfg, f"post_{name}_layer_norm")(block)
            dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
            return x + dropout(block, deterministic=step.deterministic)

        y = _norm(cfg, "pre_self_attention_layer_norm")(x)
        attention = GroupedAttention(
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            step,
            scale=cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale,
            softcap=cfg.attention_softcap,
            qkv_bias=cfg.qkv_bias,
            out_bias=cfg.out_bias,
            head_norm=(cfg.norm_epsilon, cfg.norm_offset) if cfg.qk_norm else None,
            dropout_rate=cfg.dropout_rate,
            dtype=cfg.dtype,
            name="self_attention",
        )
        x = add(attention(y, mask, turns, index), "self_attention")
        y = _norm(cfg, "pre_mlp_layer_norm")(x)
        mlp = layers.MLP(
            cfg.mlp_dim,
            cfg.mlp_activations,
            step.deterministic,
            dtype=cfg.dtype,
            use_bias=cfg.mlp_bias,
            name="mlp",
        )
        x = add(mlp(y), "mlp")
        return partitioning.constrain(x, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """The layers, from embedded tokens to the last norm's output."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, places: tuple[Array, Array], index: Array, step: layers.Step
    ) -> Array:
        """The last norm's output `[B, Q, D]`.

        Args:
          x: embedded tokens `[B, Q, D]`.
          mask: bool `[B, 1, Q, L]` (B may be 1).
          places: positions int `[B, Q]` of the queries and `[B, L]` of the keys (B may be 1).
          index: the first slot of the cache to write.
          step: how the layers run.
        """
        cfg = self.config
        here, there = places
        if cfg.positions == "learned":
            stddev = cfg.emb_dim**-0.5
            embed = layers.Embed(
                cfg.max_positions, cfg.emb_dim, cfg.dtype, stddev, name="position_embedder"
            )
            x = x + embed(jnp.maximum(here, 0))
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        x = dropout(x, deterministic=step.deterministic).astype(cfg.dtype)
        windows, tables, distance = cfg.layer_windows(), None, None
        if windows.any():
            distance = here[:, :, None] - there[:, None, :]
        if cfg.positions == "rope":
            ropes = [cfg.rope] if cfg.local_rope is None else [cfg.rope, cfg.local_rope]
            tables = jnp.stack([rope.table(here, cfg.head_dim) for rope in ropes])
        local = (windows > 0) & (cfg.local_rope is not None)
        own = (windows, local.astype(np.int32))
        seen = (mask, distance, tables)
        shared = (seen, index)
        x = stack(Layer, (cfg, step), cfg.num_layers, cfg, x, shared, (own,), remat=not step.decode)
        return _norm(cfg, "decoder_norm")(x)


class Decoder(nn.Module):
    """The layers and the output layer, if it is one of its own."""

    config: DecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.stack = Stack(cfg)
        nn.share_scope(self, self.stack)
        if not cfg.logits_via_embedding:
            self.logits_dense = layers.Dense(cfg.vocab_size, ("embed", "vocab"), "float32")

    def __call__(self, *args: Any) -> Array:
        return self.stack(*args)

    def logits(self, y: Array) -> Array:
        return self.logits_dense(y)


class Transformer(nn.Module):
    """A decoder-only network; see the top of this file for its tokens and its cache."""

    config: DecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embed(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.emb_dim**-0.5
        )
        self.decoder = Decoder(cfg)
        self.slots = Slots(cfg.scan_layers)

    def __call__(
        self,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        decoder_causal_attention: Array | None = None,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        max_decode_length: int = 0,
        prompt_lengths: Array | None = None,
        hidden: bool = False,
    ) -> Array:
        """Logits float32 `[B, Q, V]` over the embedding's rows: column v is token `v + token_offset`.

        Args:
          decoder_input_tokens: `[B, Q]`; in training shifted by the caller; the new tokens when `decode`.
          decoder_target_tokens: `[B, Q]`, for the padding mask: nothing attends where they are 0. Not needed with
            segment ids, nor where padding is on the right.
          decoder_segment_ids: `[B, Q]`, 0 for padding: tokens attend within their segment.
          decoder_positions: `[B, Q]`; each row's 0, 1, 2, ... unless given.
          decoder_causal_attention: `[B, Q]`, 1 on a prefix that is seen in both directions (T5X's name); when
            `decode`, of the first call's tokens, those beyond prompt_lengths included, so that a prompt's last
            token can be seen by the others and be fed again by the next call.
          enable_dropout: draw dropout from the rng stream "dropout".
          decode: use the cache (make the collection "cache" mutable).
          max_decode_length: slots of the cache beyond the prompt's, needed in the first call.
          prompt_lengths: int `[B]`, how many of the first call's tokens are each row's prompt; all unless given.
          hidden: give what `project` makes logits of instead, `[B, Q, D]`.

        Raises:
          ValueError: arguments that do not go together, or more positions than have been learned.
        """
        cfg, tokens = self.config, decoder_input_tokens
        prefix = decoder_causal_attention
        if decode:
            if decoder_segment_ids is not None or decoder_positions is not None:
                raise ValueError(
                    "Decoding works on one example per row, whose positions follow from "
                    "prompt_lengths: leave segment ids and positions out."
                )
            if prefix is not None and self.slots.has_variable("cache", "shared_positions"):
                raise ValueError(
                    "decoder_causal_attention belongs to the first call, the prompt's."
                )
            taken = self.slots(tokens.shape, max_decode_length, prompt_lengths)
            index, here, there, slots = taken.first, taken.here, taken.there, taken.slots
            mask = (there >= 0)[:, None] & (there[:, None] <= here[:, :, None])
            if taken.own is not None:
                mask = mask & taken.own
            if prefix is not None:
                # It sees itself whole, also a last token that is not kept because it will be fed again.
                mask = mask | ((prefix > 0)[:, :, None] & (prefix > 0)[:, None])
                there = here
        else:
            if prompt_lengths is not None:
                raise ValueError("prompt_lengths are for decode=True.")
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            here = there = steps if decoder_positions is None else decoder_positions
            index, slots = jnp.int32(0), there.shape[1]
            mask = steps[:, None] <= steps[:, :, None]
            if prefix is not None:
                mask = mask | ((prefix > 0)[:, :, None] & (prefix > 0)[:, None])
            if decoder_segment_ids is not None:
                mask = mask & (decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None])
            elif decoder_target_tokens is not None:
                mask = mask & (decoder_target_tokens > 0)[:, None]
        if cfg.positions == "learned" and slots > cfg.max_positions:
            if decoder_positions is None:
                raise ValueError(
                    f"{slots} positions (prompt and decoded tokens together) are more "
                    f"than the {cfg.max_positions} that this network has learned."
                )
        x = self.token_embedder(jnp.maximum(tokens - cfg.token_offset, 0))
        x = x * jnp.asarray(cfg.embedding_scale, x.dtype)
        hides = (decoder_target_tokens, decoder_segment_ids, prefix)
        step = layers.Step(
            not enable_dropout,
            decode,
            max_decode_length,
            cfg.attention,
            causal=prefix is None,
            whole=all(given is None for given in hides) and not cfg.layer_windows().any(),
        )
        y = self.decoder(x, mask[:, None], (here, there), index, step)
        return y if hidden else self.project(y)

    @property
    def projection(self) -> tuple[str, ...]:
        """Where the parameters of `project` are."""
        tied = self.config.logits_via_embedding
        return ("token_embedder",) if tied else ("decoder", "logits_dense")

    def project(self, y: Array) -> Array:
        """Logits float32 `[B, Q, V]` of the last norm's output `[B, Q, D]`."""
        tied = self.config.logits_via_embedding
        logits = self.token_embedder.attend(y, scaled=False) if tied else self.decoder.logits(y)
        logits = partitioning.constrain(logits, ("batch", None, "vocab"))
        return soft_cap(logits, self.config.logits_softcap)


def _norm(config: DecoderConfig, name: str) -> nn.Module:
    if config.norm == "layer":
        return layers.LayerNorm(config.dtype, config.norm_epsilon, name=name)
    return layers.RMSNorm(config.dtype, config.norm_epsilon, config.norm_offset, name=name)
