"""Beam search with T5X's length penalty."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from modjax.decoding import checks, largest
from modjax.decoding.beams import (
    DecodingState,
    as_before,
    expand_cache,
    flatten_beam_dim,
    gather_beams,
    gather_cache,
)

Array = jax.Array

# Stands for log 0. Finite, because it is added: sums of it tell empty places from bad candidates
# as T5X's do.
NEG_INF_VALUE = -1.0e7


@flax.struct.dataclass
class _Search:
    """T is the decodes' length plus one for the start token; beams are ordered from worst to best.

    live: sequences that have not ended, with log probabilities. done: ended ones, with penalised
    scores; `done_flags` tells them from empty places. `cache` has `B * E` rows.
    """

    step: Array  # int32 scalar
    live_scores: Array  # float32 [B, E]
    live_sequences: Array  # int32 [B, E, T]
    done_scores: Array  # float32 [B, E]
    done_sequences: Array  # int32 [B, E, T]
    done_flags: Array  # bool [B, E]
    cache: Any


def brevity_penalty(alpha: float | Array, length: int | Array) -> Array:
    """The divisor `((5 + length) / 6) ** alpha` of a log probability (arXiv:1609.08144)."""
    return jnp.power((5.0 + length) / 6.0, alpha)


def beam_search(
    inputs: Array,
    cache: Any,
    tokens_to_logits: Callable[[DecodingState], tuple[Array, Any]],
    eos_id: int,
    num_decodes: int = 4,
    alpha: float = 0.6,
    max_decode_len: int | None = None,
    max_decode_step: int = -1,
    min_log_prob: float = NEG_INF_VALUE,
    decode_rng: Array | None = None,
    cache_offset: int = 0,
    initial_index: Array | None = None,
) -> tuple[Array, Array]:
    """Finds `num_decodes` good continuations with as many beams; call-compatible with T5X.

    Every step extends each live beam by every token and looks at the best `2 * num_decodes` of
    all: those that end compete for the places of finished decodes by `log probability /
    brevity_penalty(alpha, length)`, the best `num_decodes` of the others live on. The search
    stops at `max_decode_len`, or when in no example a live beam could still beat the worst
    finished decode.

    `inputs` are shifted right (position 0 is the start token). Non-zero inputs are prompts: they
    are fed and returned, and add nothing to the score.

    Args:
      inputs: int32 `[B, L]`, right-shifted prompts; all 0 to decode from the start.
      cache: the decoder's cache for B examples. Picking beams copies what is in it at every step,
        so keep what all beams of an example share (the encoder's output) out of it; what layers
        named `encoder_decoder_attention` cache is known to be shared and not copied, and
        `joint_key` and `joint_value` stay where they are (see `expand_cache`).
      tokens_to_logits: gives logits `[B * num_decodes, V]`, computed on as float32, and the new
        cache.
      eos_id: the token that ends a sequence.
      num_decodes: beams, and decodes returned.
      alpha: 0 ranks by log probability; the larger, the longer the decodes.
      max_decode_len: length of the decodes; L if absent.
      max_decode_step: if positive, no more steps than this.
      min_log_prob: stop when in every example all live beams are below this log probability.
      decode_rng: not used; there so that decoders can be exchanged.
      cache_offset: axis of the examples in the cache; 1 for a scanned network.
      initial_index: int32 `[B]`, position of each prompt's last token, when the cache already
        holds what comes before it. The cache's index is then a vector, one per example. Prompts
        may differ in length; a decode that does not fit into `max_decode_len` behind its prompt
        is cut.

    Returns:
      Tokens int32 `[B, num_decodes, max_decode_len]`, 0 after `eos_id`, and scores float32 `[B,
      num_decodes]`, worst first. An example in which nothing ended returns its live beams with
      their log probabilities. Places never filled hold zeros with a score near -1e7.

    Raises:
      ValueError: an argument out of range, or logits or cache of a wrong shape.
    """
    del decode_rng
    beams = checks.at_least("num_decodes", num_decodes, 1, "the number of beams")
    checks.number("alpha", alpha, -math.inf, math.inf, "the exponent of the length penalty")
    checks.number("eos_id", eos_id, -math.inf, math.inf, "the token that ends a sequence")
    checks.prompts(inputs, initial_index)
    inputs = jnp.asarray(inputs).astype(jnp.int32)
    batch_size, width = inputs.shape
    length = width if max_decode_len is None else max_decode_len
    length = checks.at_least("max_decode_len", length, 1, "the length of the decodes")

    starts = jnp.zeros((batch_size,), jnp.int32)
    if initial_index is None:
        offsets = starts
        # Positions behind the inputs are free.
        forced = jnp.pad(inputs, ((0, 0), (0, max(0, length + 1 - width))))[:, : length + 1]
    else:
        offsets = jnp.asarray(initial_index).astype(jnp.int32)
        starts = jnp.take_along_axis(inputs, _last_nonzero(inputs)[:, None], axis=1)[:, 0]
        forced = jnp.zeros((batch_size, length + 1), jnp.int32)

    state = _Search(
        step=jnp.zeros((), jnp.int32),
        # One live beam to begin with: equal beams would find the same continuations.
        live_scores=jnp.full((batch_size, beams), NEG_INF_VALUE, jnp.float32).at[:, 0].set(0.0),
        live_sequences=jnp.zeros((batch_size, beams, length + 1), jnp.int32)
        .at[:, :, 0]
        .set(starts[:, None]),
        done_scores=jnp.full((batch_size, beams), NEG_INF_VALUE, jnp.float32),
        done_sequences=jnp.zeros((batch_size, beams, length + 1), jnp.int32),
        done_flags=jnp.zeros((batch_size, beams), bool),
        cache=expand_cache(cache, batch_size, beams, cache_offset, picked=True),
    )
    # Log probabilities only fall and (for alpha >= 0) no decode is divided by more, so a live beam
    # divided by this is the most it can still reach.
    widest_penalty = brevity_penalty(alpha, length + 1)

    def goes_on(state: _Search) -> Array:
        bound = state.live_scores[:, -1:] / widest_penalty
        worst = jnp.min(state.done_scores, axis=1, keepdims=True)
        settled = jnp.all(jnp.where(state.done_flags, worst, NEG_INF_VALUE) > bound)
        hopeless = jnp.all(bound < min_log_prob / widest_penalty) & (state.step > 0)
        out_of_steps = (max_decode_step > 0) & (state.step >= max_decode_step)
        fits = state.step + jnp.min(offsets) < length
        return fits & ~settled & ~hopeless & ~out_of_steps

    def advance(state: _Search) -> _Search:
        current = lax.dynamic_slice_in_dim(state.live_sequences, state.step, 1, axis=2)
        logits, new_cache = tokens_to_logits(
            DecodingState(
                cur_index=state.step,
                sequences=flatten_beam_dim(state.live_sequences),
                cur_token=flatten_beam_dim(current),
                cache=state.cache,
            )
        )
        checks.logits_of(logits, batch_size * beams)
        scores, origins, tokens = _best_extensions(state.live_scores, logits, 2 * beams)

        # Inside a prompt there is one candidate only, and it costs nothing.
        prompt = lax.dynamic_slice_in_dim(forced, state.step + 1, 1, axis=1)
        free = prompt == 0
        tokens = jnp.where(free, tokens, prompt)
        scores = jnp.where(
            free, scores, jnp.full((2 * beams,), NEG_INF_VALUE, scores.dtype).at[0].set(0.0)
        )
        sequences = lax.dynamic_update_slice_in_dim(
            gather_beams(state.live_sequences, origins), tokens[..., None], state.step + 1, axis=2
        )
        ends = tokens == eos_id

        live_scores = scores + jnp.where(ends, NEG_INF_VALUE, 0.0)
        alive = _best(live_scores, beams)
        live_scores, live_sequences, alive_origins = gather_beams(
            (live_scores, sequences, origins), alive
        )

        lengths = offsets[:, None] + state.step + 1
        done_scores = scores / brevity_penalty(alpha, lengths)
        done_scores = done_scores + jnp.where(ends, 0.0, NEG_INF_VALUE)
        done = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1),
            (state.done_scores, state.done_sequences, state.done_flags),
            (done_scores, sequences, ends),
        )
        done_scores, done_sequences, done_flags = gather_beams(done, _best(done[0], beams))
        return _Search(
            step=state.step + 1,
            live_scores=live_scores,
            live_sequences=live_sequences,
            done_scores=done_scores,
            done_sequences=done_sequences,
            done_flags=done_flags,
            cache=gather_cache(
                as_before(new_cache, state.cache), alive_origins, beams, cache_offset
            ),
        )

    state = lax.while_loop(goes_on, advance, state)
    some_ended = jnp.any(state.done_flags, axis=1, keepdims=True)
    scores = jnp.where(some_ended, state.done_scores, state.live_scores)
    sequences = jnp.where(some_ended[..., None], state.done_sequences, state.live_sequences)
    sequences = sequences[:, :, 1:]
    return (sequences if initial_index is None else _behind_prompts(inputs, sequences)), scores


def _best(scores: Array, number: int) -> Array:
    """Indices int32 `[B, number]` of the largest scores of `[B, N]`, ascending."""
    return jnp.flip(lax.top_k(scores, number)[1], axis=1)


def _best_extensions(live_scores: Array, logits: Array, number: int) -> tuple[Array, Array, Array]:
    """The best candidates of all beams and tokens of each example, from best to worst.

    The best of every beam first, then the best of these: B * E short lists in parallel instead of
    B long ones.

    Args:
      live_scores: float32 `[B, E]`.
      logits: `[B * E, V]`.
      number: how many.

    Returns:
      Log probabilities of the extended sequences, the beams they extend and their tokens, each
      `[B, number]`.
    """
    batch_size, _ = live_scores.shape
    logits = logits.astype(jnp.float32)
    live_scores = live_scores.reshape(-1, 1)
    most = largest.row_max(logits)
    normaliser = jnp.log(jnp.sum(jnp.exp(logits - most), axis=1, keepdims=True))
    of_each = min(number, logits.shape[-1])
    scores, tokens = largest.top_k(
        logits, of_each, lambda logits: logits - most - normaliser + live_scores
    )
    scores, picked = lax.top_k(scores.reshape(batch_size, -1), number)
    tokens = jnp.take_along_axis(tokens.reshape(batch_size, -1), picked, axis=1)
    return scores, picked // of_each, tokens


def _last_nonzero(tokens: Array) -> Array:
    """Index int32 `[B]` of the last non-zero token of `[B, L]`; 0 if there is none."""
    return jnp.max(jnp.where(tokens != 0, jnp.arange(tokens.shape[1]), 0), axis=1)


def _behind_prompts(inputs: Array, continuations: Array) -> Array:
    """Puts continuations `[B, E, T]` behind their prompts (from the first token), cut to T."""
    length = continuations.shape[2]
    first = jnp.argmax(inputs != 0, axis=1)
    prompt_lengths = jnp.where(jnp.any(inputs != 0, axis=1), _last_nonzero(inputs) - first + 1, 0)
    place = jnp.arange(length)
    behind = place - prompt_lengths[:, None]  # [B, T]
    prompts = jnp.take_along_axis(
        inputs, jnp.clip(first[:, None] + place, 0, inputs.shape[1] - 1), axis=1
    )
    shifted = jnp.take_along_axis(continuations, jnp.maximum(behind, 0)[:, None, :], axis=2)
    return jnp.where(behind[:, None, :] < 0, prompts[:, None, :], shifted)
