"""Models that write: decoding through a cache, for batches that may mix datasets."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modjax import decoding
from modjax.errors import nearest
from modjax.models.base import Array, Batch, Model

DECODERS = ("greedy", "sample", "beam")


class Prompted(NamedTuple):
    """A batch that is ready to be continued.

    Attributes:
      rows: how many examples.
      cache: of one row for each example, with all that comes before the first new token.
      step: `(cache, tokens int32 [rows, 1], is_first bool [rows, 1]) -> (logits [rows, 1, V], new cache)`, for rows
        that are repeated `num_decodes` times each; `is_first` marks the start token of the decoding loop.
    """

    rows: int
    cache: Any
    step: Callable[[Any, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class GeneratingModel(Model):
    """A model that writes its targets token by token.

    Attributes:
      eos_id: the token that ends a target.
      decoder: how `predict_batch` decodes unless told otherwise: "greedy", "sample" or "beam".
      num_decodes: beams, or samples of which the most probable is returned.
      alpha: length penalty of beam search.
      temperature, topk, topp: of sampling.
    """

    eos_id: int = 1
    decoder: str = "greedy"
    num_decodes: int = 1
    alpha: float = 0.6
    temperature: float = 1.0
    topk: int = 0
    topp: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self.decoder)

    @abc.abstractmethod
    def prompt(self, params: Any, batch: Batch, num_decodes: int, max_decode_len: int) -> Prompted:
        """Computes what is computed once for a batch: the encoder, or the prompts' keys and values."""

    @abc.abstractmethod
    def answer_length(self, batch: Batch) -> int:
        """How many tokens an answer may have, by the shapes of a batch."""

    @abc.abstractmethod
    def with_answers(
        self, arrays: Mapping[str, np.ndarray], answers: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The arrays of unpacked examples (numpy, `[N, ...]`) with other targets, int32 `[N, L]`, to be scored."""

    def predict_batch_with_aux(  # type: ignore[override]  # it names its options
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
          batch: unpacked: the model's inputs, and `features` and `tasks` where adapters want them.
          rng: needed to sample.
          decoder, num_decodes, alpha, temperature, topk, topp: instead of the model's own.
          max_decode_len: steps; the length of the batch's targets unless given.
          return_all_decodes: return `[B, num_decodes, L]`, in ascending order of score.

        Returns:
          (tokens int32 `[B, L]`, {"scores": float32 `[B`]}). Scores are log probabilities in nats: of the decoder's
          own distribution when sampling, divided by the length penalty in beam search.
        """

        def pick(value: Any, default: Any) -> Any:
            return default if value is None else value

        decoder = _check_decoder(pick(decoder, self.decoder))
        num_decodes = pick(num_decodes, self.num_decodes)
        if decoder == "greedy":
            num_decodes = 1
        if any(f"{stream}_segment_ids" in batch for stream in self.STREAMS):
            raise ValueError("Prediction works on one example per row: give an unpacked batch.")
        if decoder == "sample" and rng is None:
            raise ValueError("decoder='sample' draws at random: give an rng.")
        steps = self.answer_length(batch) if max_decode_len is None else max_decode_len
        prompted = self.prompt(params, batch, num_decodes, steps)

        def tokens_to_logits(state: decoding.DecodingState) -> tuple[Array, Any]:
            # A scalar in beam search, one for each row in sampling.
            first = jnp.broadcast_to(
                jnp.reshape(state.cur_index == 0, (-1, 1)), state.cur_token.shape
            )
            logits, cache = prompted.step(state.cache, state.cur_token, first)
            # Tokens are counted from the padding, which is never written.
            return _from_padding(jnp.squeeze(logits, axis=1), self.token_offset), cache

        scanned = bool(getattr(getattr(self.network, "config", None), "scan_layers", False))
        offset = 1 if scanned else 0
        empty = jnp.zeros((prompted.rows, steps), jnp.int32)
        start = (empty, prompted.cache, tokens_to_logits, self.eos_id)
        if decoder == "greedy":
            decodes, scores = decoding.greedy_decode(*start, cache_offset=offset)
        elif decoder == "beam":
            decodes, scores = decoding.beam_search(
                *start,
                num_decodes=num_decodes,
                alpha=pick(alpha, self.alpha),
                max_decode_len=steps,
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


def _from_padding(logits: Array, offset: int) -> Array:
    """Logits whose column t is token t: with columns for tokens that no embedding stands for."""
    if not offset:
        return logits
    return jnp.pad(logits, ((0, 0), (offset, 0)), constant_values=-jnp.inf)


def _check_decoder(name: str) -> str:
    if name not in DECODERS:
        raise ValueError(f"Unknown decoder {name!r}." + nearest(name, DECODERS))
    return name


def repeat(x: jax.Array, times: int) -> jax.Array:
    """Every row `times` times in a row, as beams are laid out."""
    return jnp.repeat(x, times, axis=0)
