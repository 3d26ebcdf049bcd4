"""Loss, prediction and scoring for a network, adapted or not: what lies between a batch and a number.

The methods have the names and shapes of T5X's model protocol. Legend: `B` batch, `L` length, `V` vocabulary,
`S` segments of a packed row, `F` features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from modjax import decoding
from modjax.adapters import Adapted, Mix
from modjax.errors import nearest
from modjax.features import FeatureSpace
from modjax.losses import cross_entropy, symmetric_kl

Array = jax.Array
Batch = Mapping[str, Any]
Sums = dict[str, Array]

NORMALIZERS = ("num_real_target_tokens", "num_total_target_tokens", "average_per_sequence")
DECODERS = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
    """An encoder-decoder network with its loss and its decoder.

    Attributes:
      module: a network with `encode`, `decode` and `__call__` as `networks.t5.Transformer` has them, or one in
        `adapters.Adapted`.
      label_smoothing, z_loss: see `losses.cross_entropy`.
      loss_normalizing_factor: None leaves the loss a sum over the batch's target tokens (T5X's default); a number
        divides it; "num_real_target_tokens", "num_total_target_tokens" (padding included) or
        "average_per_sequence" (each sequence weighs the same).
      consistency: weight lambda of AdaMix's consistency loss (arXiv 2205.12410): in training a second stochastic pass
        is made, and `lambda / 2 (KL(stop(p2) || p1) + KL(stop(p1) || p2))` over the vocabulary is added to each
        target token's loss, where p1 and p2 are the passes' distributions. 0 for one pass.
      eos_id: the token that ends a target.
      decoder: how `predict_batch` decodes unless told otherwise: "greedy", "sample" or "beam".
      num_decodes: beams, or samples of which the most probable is returned.
      alpha: length penalty of beam search.
      temperature, topk, topp: of sampling.
    """

    module: nn.Module
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_normalizing_factor: float | str | None = None
    consistency: float = 0.0
    eos_id: int = 1
    decoder: str = "greedy"
    num_decodes: int = 1
    alpha: float = 0.6
    temperature: float = 1.0
    topk: int = 0
    topp: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        if not self.consistency >= 0.0:
            raise ValueError(f"consistency must be at least 0, got {self.consistency}.")
        factor = self.loss_normalizing_factor
        if isinstance(factor, str) and factor.lower() not in NORMALIZERS:
            raise ValueError(
                f"Unknown loss_normalizing_factor {factor!r}." + nearest(factor, NORMALIZERS)
            )
        _check_decoder(self.decoder)

    # What the model is.

    @property
    def adapted(self) -> Adapted | None:
        """The adapted module, or None for a plain network."""
        return self.module if isinstance(self.module, Adapted) else None

    @property
    def network(self) -> Any:
        """The base network."""
        return self.module.network if isinstance(self.module, Adapted) else self.module

    @property
    def FEATURE_CONVERTER_CLS(self) -> Any:  # T5X's name
        """The SeqIO feature converter for this model's batches; imports SeqIO."""
        from modjax.data import converters, seqio

        if self.adapted is None or self.adapted.space is None:
            return seqio.EncDecFeatureConverter
        return converters.EncDecFeatureConverter.bind(self.adapted.space)

    def with_space(self, space: FeatureSpace) -> "EncoderDecoderModel":
        """The same model with its routers bound to the names of `space`."""
        if self.adapted is None:
            return self
        return dataclasses.replace(self, module=self.adapted.clone(space=space))

    # Calls into the network.

    def _apply(
        self, variables: Mapping[str, Any], method: str, *args: Any, mix: Mix, **kwargs: Any
    ) -> Any:
        """Calls a method of the network, adapted if it is; the two differ in how they are told."""
        if self.adapted is None:
            return self.module.apply(variables, *args, method=method, **kwargs)
        return self.module.apply(variables, method, *args, mix=mix, method="call", **kwargs)

    def init(self, rng: Array, batch: Batch) -> dict[str, Any]:
        """Variables {params, params_axes}: the base at random, the adapters as a run starts with them.

        Args:
          rng: key.
          batch: a batch, or its shapes; only shapes matter. Use under `jax.eval_shape` or `jax.jit`.
        """
        mix: dict[str, Any] = {}
        if self.adapted is not None:
            mix["mix"] = make_mix(batch, train=False)
        return dict(self.module.init(rng, *_inputs(batch), **_segments(batch), **mix))

    def logits(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> Array:
        """Teacher-forced logits, float32 `[B, L, V]`; `dropout_rng=None` means deterministic."""
        train = dropout_rng is not None
        rngs = None
        if dropout_rng is not None:
            dropout, features = jax.random.split(dropout_rng)
            rngs = {"dropout": dropout, "features": features}
        return self._apply(
            {"params": params},
            "__call__",
            *_inputs(batch),
            **_segments(batch),
            mix=make_mix(batch, train),
            enable_dropout=train,
            rngs=rngs,
        )

    # Loss.

    def loss_sums(self, params: Any, batch: Batch, dropout_rng: Array | None) -> tuple[Array, Sums]:
        """The loss before it is normalised, and sums that add over microbatches and processes.

        Returns:
          (loss sum, sums): `loss` (z-loss included), `z_loss`, `weight` (target tokens), `correct`, `sequences`,
          `tokens` (not padding, both streams), `positions` (padding included) and `target_positions`, and
          `consistency` where there is one; all float32 scalars.
        """
        logits = self.logits(params, batch, dropout_rng)
        targets = batch["decoder_target_tokens"]
        weights = _weights(batch)
        loss, z = cross_entropy(logits, targets, self.label_smoothing, self.z_loss)
        per_token = weights
        if self._normalizer == "average_per_sequence":
            per_token = weights / jnp.maximum(_sequence_weights(batch, weights), 1e-9)
        loss_sum = jnp.sum(loss * per_token)
        extra = {}
        if self.consistency and dropout_rng is not None:
            other = self.logits(params, batch, jax.random.fold_in(dropout_rng, 1))
            distance = self.consistency / 2 * symmetric_kl(logits, other)
            loss_sum = loss_sum + jnp.sum(distance * per_token)
            extra["consistency"] = jnp.sum(distance * weights)
        tokens = [batch["encoder_input_tokens"], targets]
        sums = extra | {
            "loss": jnp.sum(loss * weights),
            "z_loss": jnp.sum(z * weights),
            "weight": jnp.sum(weights),
            "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights),
            "sequences": _count_sequences(batch, weights),
            "tokens": jnp.float32(sum(jnp.sum(t > 0) for t in tokens)),
            "positions": jnp.float32(sum(t.size for t in tokens)),
            "target_positions": jnp.float32(targets.size),
        }
        return loss_sum, sums

    def denominator(self, sums: Sums) -> Array:
        """What the loss sum of the whole batch is divided by, given the whole batch's sums."""
        if self._normalizer is None:
            return jnp.float32(1.0)
        if self._normalizer == "num_real_target_tokens":
            return jnp.maximum(sums["weight"], 1.0)
        if self._normalizer == "num_total_target_tokens":
            return sums["target_positions"]
        if self._normalizer == "average_per_sequence":
            return jnp.maximum(sums["sequences"], 1.0)
        return jnp.float32(self._normalizer)

    @property
    def _normalizer(self) -> float | str | None:
        factor = self.loss_normalizing_factor
        return factor.lower() if isinstance(factor, str) else factor

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: Array | None) -> tuple[Array, Sums]:
        """(normalised loss, sums of `loss_sums`); `dropout_rng=None` means deterministic."""
        loss_sum, sums = self.loss_sums(params, batch, dropout_rng)
        return loss_sum / self.denominator(sums), sums

    def eval_fn(self, params: Any, batch: Batch) -> tuple[Array, Sums]:
        """`loss_fn` without randomness."""
        return self.loss_fn(params, batch, None)

    # Prediction.

    def predict_batch(
        self, params: Any, batch: Batch, rng: Array | None = None, **options: Any
    ) -> Array:
        """The best prediction of each example, int32 `[B, L]`; see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng, **options)[0]

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Batch,
        rng: Array | None = None,
        *,
        decoder: str | None = None,
        num_decodes: int | None = None,
        alpha: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        topp: float | None = None,
        max_decode_len: int | None = None,
        return_all_decodes: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Decodes a batch that may mix datasets: an example's features follow it into its beams.

        Args:
          params: of the base and the adapters.
          batch: unpacked; `encoder_input_tokens`, and `features` and `tasks` where adapters want them.
          rng: needed to sample.
          decoder, num_decodes, alpha, temperature, topk, topp: instead of the model's own.
          max_decode_len: steps; the length of `decoder_input_tokens` unless given.
          return_all_decodes: return `[B, num_decodes, L]`, in ascending order of score.

        Returns:
          (tokens int32 `[B, L]`, {"scores": float32 `[B]`}). Scores are log probabilities in nats: of the decoder's
          own distribution when sampling, divided by the length penalty in beam search.
        """

        def pick(value: Any, default: Any) -> Any:
            return default if value is None else value

        decoder = _check_decoder(pick(decoder, self.decoder))
        num_decodes = pick(num_decodes, self.num_decodes)
        if decoder == "greedy":
            num_decodes = 1
        if "encoder_segment_ids" in batch:
            raise ValueError("Prediction works on one example per row: give an unpacked batch.")
        if decoder == "sample" and rng is None:
            raise ValueError("decoder='sample' draws at random: give an rng.")
        if max_decode_len is None:
            max_decode_len = batch["decoder_input_tokens"].shape[1]
        inputs = batch["encoder_input_tokens"]
        mix = make_mix(batch, train=False)
        encoded = self._apply({"params": params}, "encode", inputs, mix=mix)
        # The empty prompt makes the cache, with the keys and values of the encoder's output in it.
        cache_options: dict[str, Any] = {
            "decode": True,
            "max_decode_length": max_decode_len,
            "mutable": ["cache"],
        }
        _, cache = self._apply(
            {"params": params},
            "decode",
            encoded,
            inputs,
            jnp.zeros((inputs.shape[0], 0), jnp.int32),
            mix=mix,
            **cache_options,
        )
        expanded_inputs = jnp.repeat(inputs, num_decodes, axis=0)
        expanded_mix = mix.repeat(num_decodes)

        def tokens_to_logits(state: decoding.DecodingState) -> tuple[Array, Any]:
            logits, new = self._apply(
                {"params": params, "cache": state.cache},
                "decode",
                None,
                expanded_inputs,
                state.cur_token,
                mix=expanded_mix,
                **cache_options,
            )
            return jnp.squeeze(logits, axis=1), new["cache"]

        prompt = jnp.zeros((inputs.shape[0], max_decode_len), jnp.int32)
        scanned = bool(getattr(getattr(self.network, "config", None), "scan_layers", False))
        offset = 1 if scanned else 0
        start = (prompt, cache["cache"], tokens_to_logits, self.eos_id)
        if decoder == "greedy":
            decodes, scores = decoding.greedy_decode(*start, cache_offset=offset)
        elif decoder == "beam":
            decodes, scores = decoding.beam_search(
                *start,
                num_decodes=num_decodes,
                alpha=pick(alpha, self.alpha),
                max_decode_len=max_decode_len,
                cache_offset=offset,
            )
        else:
            decodes, scores = decoding.temperature_sample(
                *start,
                decode_rng=rng,
                num_decodes=num_decodes,
                temperature=pick(temperature, self.temperature),
                topk=pick(topk, self.topk),
                topp=pick(topp, self.topp),
                cache_offset=offset,
            )
        if return_all_decodes:
            return decodes, {"scores": scores}
        return decodes[:, -1], {"scores": scores[:, -1]}

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Array:
        """Log probability of each example's target, in nats, float32 `[B]` (unpacked)."""
        if return_intermediates:
            raise ValueError("This model keeps no intermediates: call it without them.")
        loss, _ = cross_entropy(self.logits(params, batch), batch["decoder_target_tokens"])
        return -jnp.sum(loss * _weights(batch), axis=-1)


def make_mix(batch: Batch, train: bool) -> Mix:
    """What the adapters need of a batch, integers also where T5X's evaluation hands over floats."""

    def ids(name: str) -> Array | None:
        return None if name not in batch else jnp.asarray(batch[name]).astype(jnp.int32)

    segments = None
    if "encoder_segment_ids" in batch:
        segments = {
            stream: jnp.asarray(batch[f"{stream}_segment_ids"]).astype(jnp.int32)
            for stream in ("encoder", "decoder")
        }
    return Mix(features=ids("features"), tasks=ids("tasks"), segments=segments, train=train)


def _check_decoder(name: str) -> str:
    if name not in DECODERS:
        raise ValueError(f"Unknown decoder {name!r}." + nearest(name, DECODERS))
    return name


def _inputs(batch: Batch) -> tuple[Any, Any, Any]:
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return tuple(jnp.asarray(batch[name]).astype(jnp.int32) for name in names)  # type: ignore[return-value]


def _segments(batch: Batch) -> dict[str, Any]:
    names = ("encoder_segment_ids", "decoder_segment_ids", "encoder_positions", "decoder_positions")
    return {name: batch[name] for name in names if name in batch}


def _weights(batch: Batch) -> Array:
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] > 0
    return jnp.asarray(weights).astype(jnp.float32)


def _segment_ids(batch: Batch) -> Array:
    if "decoder_segment_ids" in batch:
        return batch["decoder_segment_ids"]
    return (batch["decoder_target_tokens"] > 0).astype(jnp.int32)


def _sequence_weights(batch: Batch, weights: Array) -> Array:
    """For each token, the total weight of the sequence that it is part of; `[B, L]`."""
    segments = _segment_ids(batch)
    same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
    return jnp.einsum("bqk,bk->bq", same, weights)


def _count_sequences(batch: Batch, weights: Array) -> Array:
    """The number of sequences that have a token with weight."""
    segments = jnp.where(weights > 0, _segment_ids(batch), 0)
    first = jnp.concatenate(
        [jnp.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], 1
    )
    return jnp.sum((segments > 0) & (first > 0)).astype(jnp.float32)
