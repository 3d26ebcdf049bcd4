"""What the models have in common: how they call their network, and what a loss is made of.

Legend, here and in the models: `B` batch, `L` length, `V` vocabulary, `S` segments of a packed row, `F` features.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from modjax import partitioning, quantization
from modjax.adapters import Adapted, Mix
from modjax.errors import check_not_negative, is_number, nearest
from modjax.features import FeatureSpace
from modjax.losses import chunked_cross_entropy, cross_entropy, predicted, symmetric_kl

Array = jax.Array
Batch = Mapping[str, Any]
Shapes = dict[str, jax.ShapeDtypeStruct]
Sums = dict[str, Array]
M = TypeVar("M", bound="Model")

# How the kernels of an output layer lie while a loss is made of them: whole but for the vocabulary.
_OUTPUT_AXES = {"embedding": ("vocab", None), "kernel": (None, "vocab")}
NORMALIZERS = ("num_real_target_tokens", "num_total_target_tokens", "average_per_sequence")


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A network with its loss; what is predicted, a subclass says.

    Attributes:
      module: a network, or one in `adapters.Adapted`.
      label_smoothing, z_loss: see `losses.cross_entropy`.
      loss_normalizing_factor: None leaves the loss a sum over the batch's targets (T5X's default); a number divides
        it; "num_real_target_tokens", "num_total_target_tokens" (padding included) or "average_per_sequence" (each
        sequence weighs the same).
      consistency: weight lambda of AdaMix's consistency loss (arXiv 2205.12410): in training a second stochastic pass
        is made, and `lambda / 2 (KL(stop(p2) || p1) + KL(stop(p1) || p2))` is added to each target's loss, where p1
        and p2 are the passes' distributions. 0 for one pass.
      loss_chunk: how many positions of a row have logits at a time; None for all. The loss is the same, and no array of
        the size of all logits is kept (see `losses.chunked_cross_entropy`). Not together with consistency, which
        compares the logits of two passes, nor where the output layer is adapted.
    """

    module: nn.Module
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_normalizing_factor: float | str | None = None
    consistency: float = 0.0
    loss_chunk: int | None = None

    # The streams of tokens of a batch, by the prefix of their names.
    STREAMS: ClassVar[tuple[str, ...]] = ()
    # What the network's `__call__` takes: by position, and by name where a batch has it.
    INPUTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    TARGETS: ClassVar[str] = "decoder_target_tokens"
    PACKS: ClassVar[bool] = True  # whether a row may hold several examples

    def __post_init__(self) -> None:
        if not is_number(self.label_smoothing) or not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}.")
        check_not_negative("z_loss", self.z_loss)
        check_not_negative("consistency", self.consistency)
        if self.loss_chunk is not None:
            self._check_chunk()
        factor = self.loss_normalizing_factor
        if isinstance(factor, str) and factor.lower() not in NORMALIZERS:
            raise ValueError(
                f"Unknown loss_normalizing_factor {factor!r}." + nearest(factor, NORMALIZERS)
            )
        if not isinstance(factor, str | None) and not (is_number(factor) and factor > 0):
            raise ValueError(f"loss_normalizing_factor must be positive, got {factor!r}.")

    def _check_chunk(self) -> None:
        chunk = self.loss_chunk
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ValueError(
                f"loss_chunk must be an integer of at least 1, or None, got {chunk!r}."
            )
        if self.consistency:
            raise ValueError(
                f"loss_chunk={chunk} makes no two passes' logits that consistency={self.consistency} could compare: "
                "leave one of them out."
            )
        if not hasattr(self.network, "project"):
            raise ValueError(
                f"loss_chunk={chunk}: {type(self.network).__name__} has no method `project` from its hidden states to "
                "logits."
            )
        path = "/".join(self.network.projection)
        for rule in self.adapted.rules if self.adapted is not None else ():
            if rule.matches(path):
                raise ValueError(
                    f"loss_chunk={chunk} needs an output layer without adapters, and {rule.mixture.name!r} is at "
                    f"{path!r}: change ADAPTED_LAYERS, or leave LOSS_CHUNK out."
                )

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
    def token_offset(self) -> int:
        """A batch's token t > 0 is row `t - token_offset` of the embedding and of the logits; 0 is padding."""
        return int(getattr(getattr(self.network, "config", None), "token_offset", 0))

    @property
    @abc.abstractmethod
    def converter(self) -> Any:
        """The class of `modjax.data.converters` that makes this model's batches; imports SeqIO."""

    @property
    def FEATURE_CONVERTER_CLS(self) -> Any:  # T5X's name
        """The SeqIO feature converter for this model's batches; imports SeqIO."""
        if self.adapted is None or self.adapted.space is None:
            return self.converter.PLAIN
        return self.converter.bind(self.adapted.space)

    @property
    def looks_up_features(self) -> bool:
        """Whether a router asks for an example's features; its dataset is none."""
        rules = self.adapted.rules if self.adapted is not None else ()
        found = (rule.mixture.router.routes_by for rule in rules)
        return any(names is None or bool(set(names) - {"dataset"}) for names in found)

    def with_space(self: M, space: FeatureSpace) -> M:
        """The same model with its routers bound to the names of `space`."""
        if self.adapted is None:
            return self
        return dataclasses.replace(self, module=self.adapted.clone(space=space))

    def example_batch(
        self,
        lengths: Mapping[str, int],
        space: FeatureSpace,
        segments: int | None = None,
        rows: int = 1,
    ) -> Shapes:
        """The shapes of a batch.

        Args:
          lengths: {"inputs": L, "targets": L}.
          space: gives the number of feature columns.
          segments: of a packed row; None if rows are examples.
          rows: B.
        """
        batch = {name: ids(rows, *shape) for name, shape in self._shapes(lengths).items()}
        batch["features"] = ids(rows, segments or 1, space.num_slots)
        batch["tasks"] = ids(rows, segments or 1)
        for stream in self.STREAMS if segments is not None else ():
            length = batch[f"{stream}_input_tokens"].shape[1]
            batch[f"{stream}_segment_ids"] = ids(rows, length)
            batch[f"{stream}_positions"] = ids(rows, length)
        return batch

    @abc.abstractmethod
    def _shapes(self, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of an example's own arrays, without the rows."""

    # Calls into the network.

    def _apply(
        self, variables: Mapping[str, Any], method: str, *args: Any, mix: Mix, **kwargs: Any
    ) -> Any:
        """Calls a method of the network, adapted if it is; the two differ in how they are told."""
        if self.adapted is None:
            return self.module.apply(variables, *args, method=method, **kwargs)
        return self.module.apply(variables, method, *args, mix=mix, method="call", **kwargs)

    def _arguments(self, batch: Batch) -> tuple[list[Array], dict[str, Array]]:
        given = [as_ids(batch[name]) for name in self.INPUTS]
        return given, {name: as_ids(batch[name]) for name in self.OPTIONAL if name in batch}

    def init(self, rng: Array, batch: Batch) -> dict[str, Any]:
        """Variables {params, params_axes}: the base at random, the adapters as a run starts with them.

        Args:
          rng: key.
          batch: a batch, or its shapes; only shapes matter. Use under `jax.eval_shape` or `jax.jit`.
        """
        given, optional = self._arguments(batch)
        named: dict[str, Any] = dict(optional)
        if self.adapted is not None:
            named["mix"] = self._mix(batch, train=False)
        return dict(self.module.init(rng, *given, **named))

    def logits(self, params: Any, batch: Batch, dropout_rng: Array | None = None) -> Array:
        """What the network computes for a batch with its targets, float32; `dropout_rng=None` means deterministic."""
        return self._forward(params, batch, dropout_rng)

    def _forward(
        self, params: Any, batch: Batch, dropout_rng: Array | None, **options: Any
    ) -> Array:
        train = dropout_rng is not None
        rngs = None
        if dropout_rng is not None:
            dropout, features = jax.random.split(dropout_rng)
            rngs = {"dropout": dropout, "features": features}
        given, optional = self._arguments(batch)
        return self._apply(
            {"params": params},
            "__call__",
            *given,
            **optional,
            mix=self._mix(batch, train),
            enable_dropout=train,
            rngs=rngs,
            **options,
        )

    def _mix(self, batch: Batch, train: bool) -> Mix:
        return make_mix(batch, train, self.STREAMS)

    # Loss.

    def loss_sums(self, params: Any, batch: Batch, dropout_rng: Array | None) -> tuple[Array, Sums]:
        """The loss before it is normalised, and sums that add over microbatches and processes.

        Returns:
          (loss sum, sums): `loss` (z-loss included), `z_loss`, `weight` (targets), `correct`, `sequences`, `tokens`
          (not padding, all streams), `positions` (padding included) and `target_positions`, and `consistency` where
          there is one; all float32 scalars.
        """
        weights = self._weights(batch)
        if self.loss_chunk is None:
            logits = self.logits(params, batch, dropout_rng)
            loss, z, correct = self._per_target(logits, batch)
        else:
            loss, z, correct = self._chunked(params, batch, dropout_rng)
        per_token = weights
        if self._normalizer == "average_per_sequence":
            per_token = weights / jnp.maximum(self._sequence_weights(batch, weights), 1e-9)
        loss_sum = jnp.sum(loss * per_token)
        extra = {}
        if self.consistency and dropout_rng is not None:
            other = self.logits(params, batch, jax.random.fold_in(dropout_rng, 1))
            distance = self.consistency / 2 * self._distance(logits, other)
            loss_sum = loss_sum + jnp.sum(distance * per_token)
            extra["consistency"] = jnp.sum(distance * weights)
        tokens = self._counted(batch)
        sums = extra | {
            "loss": jnp.sum(loss * weights),
            "z_loss": jnp.sum(z * weights),
            "weight": jnp.sum(weights),
            "correct": jnp.sum(correct * weights),
            "sequences": self._count_sequences(batch, weights),
            "tokens": jnp.float32(sum(jnp.sum(t > 0) for t in tokens)),
            "positions": jnp.float32(sum(t.size for t in tokens)),
            "target_positions": jnp.float32(weights.size),
        }
        return loss_sum, sums

    def _per_target(self, logits: Array, batch: Batch) -> tuple[Array, Array, Array]:
        """(loss, z-loss, whether the prediction is right) of each target, float32 `[B, L]`."""
        targets = self._rows(batch)
        loss, z = cross_entropy(logits, targets, self.label_smoothing, self.z_loss)
        return loss, z, predicted(logits, targets)

    def _rows(self, batch: Batch) -> Array:
        """The targets as rows of the embedding."""
        return jnp.maximum(as_ids(batch[self.TARGETS]) - self.token_offset, 0)

    def _chunked(
        self, params: Any, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Array, Array, Array]:
        """`_per_target` without logits of all positions."""
        assert self.loss_chunk is not None
        hidden = self._forward(params, batch, dropout_rng, hidden=True)
        path = self.network.projection
        layer = dict(functools.reduce(lambda tree, name: tree[name], path, params))
        for name, axes in _OUTPUT_AXES.items():
            if name in layer and not quantization.is_quantized(layer[name]):
                # Gathered here, once, and not by every chunk.
                layer[name] = partitioning.constrain_forward(layer[name], axes)

        def project(layer: Any, y: Array) -> Array:
            tree = functools.reduce(lambda tree, name: {name: tree}, reversed(path), layer)
            return self.network.apply({"params": tree}, y, method="project")

        return chunked_cross_entropy(
            project,
            layer,
            hidden,
            self._rows(batch),
            self.loss_chunk,
            self.label_smoothing,
            self.z_loss,
        )

    def _distance(self, logits: Array, other: Array) -> Array:
        """How far apart the predictions of two passes are, for each target."""
        return symmetric_kl(logits, other)

    def _counted(self, batch: Batch) -> list[Array]:
        """The arrays of tokens that stand for a batch's size."""
        return [as_ids(batch[f"{stream}_input_tokens"]) for stream in self.STREAMS]

    def _weights(self, batch: Batch) -> Array:
        weights = batch.get("decoder_loss_weights")
        if weights is None:
            weights = as_ids(batch[self.TARGETS]) > 0
        return jnp.asarray(weights).astype(jnp.float32)

    def _segment_ids(self, batch: Batch) -> Array:
        if "decoder_segment_ids" in batch:
            return as_ids(batch["decoder_segment_ids"])
        return (as_ids(batch[self.TARGETS]) > 0).astype(jnp.int32)

    def _sequence_weights(self, batch: Batch, weights: Array) -> Array:
        """For each target, the total weight of the sequence that it is part of; `[B, L]`."""
        segments = self._segment_ids(batch)
        same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
        return jnp.einsum("bqk,bk->bq", same, weights)

    def _count_sequences(self, batch: Batch, weights: Array) -> Array:
        """The number of sequences that have a target with weight."""
        segments = jnp.where(weights > 0, self._segment_ids(batch), 0)
        first = jnp.concatenate(
            [jnp.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], 1
        )
        return jnp.sum((segments > 0) & (first > 0)).astype(jnp.float32)

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
        """The best prediction of each example, `[B, L]`; see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng, **options)[0]

    @abc.abstractmethod
    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: Array | None = None, **options: Any
    ) -> tuple[Array, dict[str, Array]]:
        """(predictions `[B, L]`, {name: `[B]`})."""

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Array:
        """Log probability of each example's target, in nats, float32 `[B]` (unpacked)."""
        if return_intermediates:
            raise ValueError("This model keeps no intermediates: call it without them.")
        plain = dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)
        loss, _, _ = plain._per_target(self.logits(params, batch), batch)
        return -jnp.sum(loss * self._weights(batch), axis=-1)


def make_mix(batch: Batch, train: bool, streams: tuple[str, ...] = ("encoder", "decoder")) -> Mix:
    """What the adapters need of a batch, integers also where T5X's evaluation hands over floats."""

    def there(name: str) -> Array | None:
        return None if name not in batch else as_ids(batch[name])

    segments = None
    if any(f"{stream}_segment_ids" in batch for stream in streams):
        segments = {stream: as_ids(batch[f"{stream}_segment_ids"]) for stream in streams}
    return Mix(features=there("features"), tasks=there("tasks"), segments=segments, train=train)


def as_ids(values: Any) -> Array:
    """Integers, also where they come as floats."""
    return jnp.asarray(values).astype(jnp.int32)


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array of ids."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
