"""Encoder-decoder models."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from modjax.models.base import Array, Batch, as_ids
from modjax.models.generation import GeneratingModel, Prompted, repeat


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel(GeneratingModel):
    """An encoder-decoder network with its loss and its decoder.

    `module` has `encode`, `decode` and `__call__` as `networks.t5.Transformer` has them. The other attributes are those
    of `Model` and `GeneratingModel`.
    """

    STREAMS: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    INPUTS: ClassVar[tuple[str, ...]] = (
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",
    )
    OPTIONAL: ClassVar[tuple[str, ...]] = (
        "encoder_segment_ids",
        "decoder_segment_ids",
        "encoder_positions",
        "decoder_positions",
    )

    @property
    def converter(self) -> Any:
        """Inputs for the encoder, targets for the decoder."""
        from modjax.data import converters

        return converters.EncDecFeatureConverter

    def _shapes(self, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
        targets = dict.fromkeys(names, (lengths["targets"],))
        return {"encoder_input_tokens": (lengths["inputs"],), **targets}

    def _counted(self, batch: Batch) -> list[Array]:
        return [as_ids(batch["encoder_input_tokens"]), as_ids(batch["decoder_target_tokens"])]

    def answer_length(self, batch: Batch) -> int:
        """The length of the decoder's inputs."""
        return batch["decoder_input_tokens"].shape[1]

    def with_answers(
        self, arrays: Mapping[str, np.ndarray], answers: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See `GeneratingModel.with_answers`."""
        shifted = np.pad(answers, ((0, 0), (1, 0)))[:, :-1]
        return {
            **{k: v for k, v in arrays.items() if not k.startswith("decoder_")},
            "decoder_input_tokens": shifted,
            "decoder_target_tokens": answers,
            "decoder_loss_weights": (answers > 0).astype(np.int32),
        }

    def prompt(self, params: Any, batch: Batch, num_decodes: int, max_decode_len: int) -> Prompted:
        """Encodes, and projects the encoder's output to the cross-attention's keys and values."""
        inputs = as_ids(batch["encoder_input_tokens"])
        mix = self._mix(batch, train=False)
        options: dict[str, Any] = {
            "decode": True,
            "max_decode_length": max_decode_len,
            "mutable": ["cache"],
        }
        encoded = self._apply({"params": params}, "encode", inputs, mix=mix)
        # The empty prompt makes the cache, with the keys and values of the encoder's output in it.
        nothing = jnp.zeros((inputs.shape[0], 0), jnp.int32)
        _, cache = self._apply(
            {"params": params}, "decode", encoded, inputs, nothing, mix=mix, **options
        )
        rows, row_mix = repeat(inputs, num_decodes), mix.repeat(num_decodes)

        def step(cache: Any, tokens: Array, first: Array) -> tuple[Array, Any]:
            del first  # the start token is 0, as in training
            variables = {"params": params, "cache": cache}
            logits, new = self._apply(
                variables, "decode", None, rows, tokens, mix=row_mix, **options
            )
            return logits, new["cache"]

        return Prompted(inputs.shape[0], cache["cache"], step)
