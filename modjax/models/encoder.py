"""Encoders with a head: a class, or a number, for each example."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from modjax.losses import cross_entropy, predicted
from modjax.models.base import Array, Batch, Model, Shapes, as_ids


@dataclasses.dataclass(frozen=True)
class EncoderModel(Model):
    """An encoder with an output layer of its task's own, trained with it.

    With several outputs the targets are classes, `labels` int32 `[B, 1]` counted from 1 (0 is a row of padding), and
    the loss is their cross entropy. With one output they are numbers, `values` float32 `[B, 1]`, and the loss is the
    squared error. Rows are not packed: an example's output is that of its first token.

    `module` is a network as `networks.encoder.Transformer`. The other attributes are those of `Model`, and:

    Attributes:
      separator_id: the token that ends a text; tokens behind the first one are of type 1 where the network has token
        types. None: all are of type 0.
    """

    separator_id: int | None = None

    STREAMS: ClassVar[tuple[str, ...]] = ("encoder",)
    INPUTS: ClassVar[tuple[str, ...]] = ("encoder_input_tokens",)
    OPTIONAL: ClassVar[tuple[str, ...]] = ("encoder_token_types",)
    TARGETS: ClassVar[str] = "labels"
    PACKS: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_outputs == 1 and (self.label_smoothing or self.z_loss):
            raise ValueError(
                "label_smoothing and z_loss are of classes; this network has one output."
            )
        if self.num_outputs == 1 and self.consistency:
            raise ValueError(
                f"consistency={self.consistency:g} compares the distributions of two passes over classes, and a number "
                "has none: their divergence is 0, for twice the time. Set --gin.CONSISTENCY=0.0."
            )

    @property
    def num_outputs(self) -> int:
        """Classes; 1 for a number."""
        outputs = getattr(getattr(self.network, "config", None), "num_outputs", 0)
        if not outputs:
            raise ValueError(
                "The encoder has no head: set --gin.NUM_OUTPUTS=N, the number of classes (1 for numbers), or its "
                "configuration's head and num_outputs."
            )
        return outputs

    @property
    def converter(self) -> Any:
        """Inputs for the encoder, one target."""
        from modjax.data import converters

        kinds = (
            converters.RegressionFeatureConverter,
            converters.ClassificationFeatureConverter,
        )
        several = getattr(self.network.config, "type_vocab_size", 1) > 1
        return kinds[self.num_outputs > 1].ending_with(self.separator_id if several else None)

    def _shapes(self, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        names = ("encoder_input_tokens", "encoder_token_types")
        config = self.network.config
        learned = config.max_positions - config.position_offset
        if lengths["inputs"] > learned:
            raise ValueError(
                f"inputs of {lengths['inputs']} tokens are more than the {learned} positions that the base "
                "has learned: shorten TASK_FEATURE_LENGTHS."
            )
        return {**dict.fromkeys(names, (lengths["inputs"],)), self._target: (1,)}

    def example_batch(self, *args: Any, **kwargs: Any) -> Shapes:
        """See `Model.example_batch`; rows cannot be packed."""
        batch = super().example_batch(*args, **kwargs)
        if "encoder_segment_ids" in batch:
            raise ValueError("An encoder's examples have a row each: set pack = False.")
        if self.num_outputs == 1:
            batch["values"] = jax.ShapeDtypeStruct(batch["values"].shape, jnp.float32)
        return batch

    @property
    def _target(self) -> str:
        return "values" if self.num_outputs == 1 else "labels"

    def _per_target(self, logits: Array, batch: Batch) -> tuple[Array, Array, Array]:
        if self.num_outputs == 1:
            error = jnp.square(logits - jnp.asarray(batch["values"]).astype(jnp.float32))
            return error, jnp.zeros_like(error), jnp.zeros_like(error)
        labels = jnp.maximum(as_ids(batch["labels"]) - 1, 0)
        loss, z = cross_entropy(logits[:, None], labels, self.label_smoothing, self.z_loss)
        return loss, z, predicted(logits[:, None], labels)

    def _distance(self, logits: Array, other: Array) -> Array:
        return super()._distance(logits[:, None], other[:, None])

    def _weights(self, batch: Batch) -> Array:
        if self.num_outputs == 1:
            return jnp.any(as_ids(batch["encoder_input_tokens"]) > 0, axis=1, keepdims=True).astype(
                jnp.float32
            )
        return (as_ids(batch["labels"]) > 0).astype(jnp.float32)

    def _segment_ids(self, batch: Batch) -> Array:
        return self._weights(batch).astype(jnp.int32)

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: Array | None = None, **options: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Classifies.

        Returns:
          (the likeliest labels int32 `[B, 1]`, counted from 1, or values float32 `[B, 1]`; {"scores": the labels' log
          probabilities `[B]`, "logits": `[B, outputs]`}; values have no scores).

        Raises:
          ValueError: options, which are for models that write.
        """
        del rng
        if options:
            raise ValueError(f"An encoder does not decode, so it takes no {', '.join(options)}.")
        logits = self.logits(params, batch)
        if self.num_outputs == 1:
            return logits, {"logits": logits}
        log_probs = jax.nn.log_softmax(logits)
        best = jnp.argmax(logits, axis=-1)[:, None]
        scores = jnp.take_along_axis(log_probs, best, axis=-1)[:, 0]
        return best.astype(jnp.int32) + 1, {"scores": scores, "logits": logits}

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Array:
        """Log probability of each example's label, in nats, float32 `[B]`; not for values."""
        if self.num_outputs == 1:
            raise ValueError("A network with one output gives values, which have no probability.")
        return super().score_batch(params, batch, return_intermediates)
