"""Decoder-only models: an example is one sequence, its inputs followed by its targets."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from modjax.models.base import Array, Batch, as_ids
from modjax.models.generation import GeneratingModel, Prompted, repeat


@dataclasses.dataclass(frozen=True)
class DecoderOnlyModel(GeneratingModel):
    """A decoder-only network with its loss and its decoder.

    A row of a batch is `inputs + targets`, shifted right behind a first token; the loss is on the targets. A packed row
    holds several, each with its own features and positions. For prediction a batch has the inputs alone,
    `decoder_prompt_tokens`, or says by `decoder_causal_attention` which tokens they are.

    `module` is a network as `networks.decoder.Transformer`. The other attributes are those of `Model` and
    `GeneratingModel`, and:

    Attributes:
      bos_id: the token in front of every example; `eos_id` if None, as bases without one are trained.
      prefix: let the inputs see each other in both directions (prefix LM, arXiv 1910.10683, section 3.2.1). Bases are
        causal as a rule, and then this must be learned.
    """

    bos_id: int | None = None
    prefix: bool = False

    STREAMS: ClassVar[tuple[str, ...]] = ("decoder",)
    INPUTS: ClassVar[tuple[str, ...]] = ("decoder_input_tokens", "decoder_target_tokens")

    def _arguments(self, batch: Batch) -> tuple[list[Array], dict[str, Array]]:
        given: list[Any] = [as_ids(batch[name]) for name in self.INPUTS]
        if "decoder_segment_ids" not in batch:
            given[1] = None  # padding is on the right, where no token sees it
        names = ["decoder_segment_ids", "decoder_positions"]
        names += ["decoder_causal_attention"] if self.prefix else []
        return given, {name: as_ids(batch[name]) for name in names if name in batch}

    @property
    def first_id(self) -> int:
        """The token in front of every example."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def converter(self) -> Any:
        """Inputs and targets in one sequence."""
        from modjax.data import converters

        return converters.DecoderOnlyFeatureConverter.starting_with(self.first_id)

    def _shapes(self, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        names = ("input_tokens", "target_tokens", "loss_weights", "causal_attention")
        length = lengths["inputs"] + lengths["targets"]
        config: Any = getattr(self.network, "config", None)
        if getattr(config, "positions", None) == "learned" and length > config.max_positions:
            raise ValueError(
                f"inputs and targets of {length} tokens together are more than the {config.max_positions} positions "
                "that the base has learned: shorten TASK_FEATURE_LENGTHS."
            )
        return {f"decoder_{name}": (length,) for name in names}

    def _counted(self, batch: Batch) -> list[Array]:
        return [as_ids(batch["decoder_target_tokens"])]

    def answer_length(self, batch: Batch) -> int:
        """The length of the targets alone."""
        name = "decoder_answer_tokens"
        return batch[name if name in batch else "decoder_input_tokens"].shape[1]

    def with_answers(
        self, arrays: Mapping[str, np.ndarray], answers: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See `GeneratingModel.with_answers`; the arrays hold `decoder_prompt_tokens`."""
        prompts = arrays["decoder_prompt_tokens"]
        asked = np.sum(prompts > 0, axis=1)[:, None]
        told = np.sum(answers > 0, axis=1)[:, None]
        # Column i of a row is token i of the prompt, then token i - asked of the answer.
        column = np.arange(prompts.shape[1] + answers.shape[1])[None]
        of_prompt = np.take_along_axis(prompts, np.minimum(column, prompts.shape[1] - 1), axis=1)
        place = np.clip(column - asked, 0, answers.shape[1] - 1)
        of_answer = np.take_along_axis(answers, place, axis=1)
        whole = np.where(column < asked, of_prompt, of_answer) * (column < asked + told)
        return {
            **{k: v for k, v in arrays.items() if not k.startswith("decoder_")},
            "decoder_input_tokens": whole[:, :-1],
            "decoder_target_tokens": whole[:, 1:],
            "decoder_loss_weights": (
                (column[:, 1:] >= asked) & (column[:, 1:] < asked + told)
            ).astype(np.int32),
            "decoder_causal_attention": np.broadcast_to(
                column[:, :-1] < asked, whole[:, 1:].shape
            ).astype(np.int32),
        }

    def prompt(self, params: Any, batch: Batch, num_decodes: int, max_decode_len: int) -> Prompted:
        """Computes the keys and values of the prompts, each but for its last token, which is the first to be fed."""
        tokens = _prompts(batch)
        lengths = jnp.sum(tokens > 0, axis=1)
        there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        mix = self._mix(batch, train=False)
        options: dict[str, Any] = {
            "decode": True,
            "max_decode_length": max_decode_len,
            "mutable": ["cache"],
        }
        # A prefix sees its last token, which a causal prompt does not need yet.
        prefix = {"decoder_causal_attention": there.astype(jnp.int32)} if self.prefix else {}
        _, cache = self._apply(
            {"params": params},
            "__call__",
            tokens if self.prefix else tokens[:, :-1],
            prompt_lengths=jnp.maximum(lengths - 1, 0),
            mix=mix,
            **prefix,
            **options,
        )
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
        last, row_mix = repeat(last, num_decodes), mix.repeat(num_decodes)

        def step(cache: Any, tokens: Array, first: Array) -> tuple[Array, Any]:
            fed = jnp.where(first, last, tokens)
            variables = {"params": params, "cache": cache}
            logits, new = self._apply(variables, "__call__", fed, mix=row_mix, **options)
            return logits, new["cache"]

        return Prompted(tokens.shape[0], cache["cache"], step)


def _prompts(batch: Batch) -> Array:
    """The inputs behind their first token, int32 `[B, L]`, 0 after them."""
    if "decoder_prompt_tokens" in batch:
        return as_ids(batch["decoder_prompt_tokens"])
    if "decoder_causal_attention" not in batch:
        raise ValueError(
            "To predict, a decoder-only model needs decoder_prompt_tokens, or decoder_causal_attention beside "
            "decoder_input_tokens: where does the prompt end?"
        )
    return as_ids(batch["decoder_input_tokens"]) * as_ids(batch["decoder_causal_attention"])
