"""Greedy decoding and sampling with temperature, top-k and top-p."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modjax.decoding import checks, largest, masks
from modjax.decoding.beams import (
    DecodingState,
    as_before,
    expand_cache,
    flat_batch_beam_expand,
    unflatten_beam_dim,
)

Array = jax.Array
TokensToLogits = Callable[[DecodingState], tuple[Array, Any]]

# Temperatures up to this one mean greedy: logits divided by less would overflow.
MIN_TEMPERATURE = 1e-4


@flax.struct.dataclass
class SamplingLoopState:
    """The loop's state, as callbacks see it; fields and shapes as in T5X.

    Attributes (rows are `B * num_decodes`):
      step: int32 scalar, steps taken.
      cur_index: int32 `[rows]`, where the token to feed stands in `sequences`.
      sequences: int32 `[rows, L + 2]`: start token, L decoded tokens, and a place where rows that
        are done write.
      cache: the decoder's cache.
      cur_token: int32 `[rows, 1]`, the token to feed.
      ended: bool `[rows, 1]`.
      rng: random key for the steps to come.
      log_prob: float32 `[rows]`, the sum so far over generated tokens.
    """

    step: Array
    cur_index: Array
    sequences: Array
    cache: Any
    cur_token: Array
    ended: Array
    rng: Array
    log_prob: Array


def temperature_sample(
    inputs: Array,
    cache: Any,
    tokens_to_logits: TokensToLogits,
    eos_id: int,
    decode_rng: Array | None = None,
    num_decodes: int = 1,
    temperature: float | Array = 1.0,
    topk: int | Array = 1,
    topp: float | Array = 0.0,
    cache_offset: int = 0,
    initial_index: Array | None = None,
    max_decode_steps: int | Array | None = None,
    max_decode_steps_hard_limit: int | None = None,
    rescale_log_probs: bool = True,
    state_callback_fn: Callable[[SamplingLoopState], SamplingLoopState] | None = None,
    logit_callback_fn: Callable[[Array, SamplingLoopState], Array] | None = None,
) -> tuple[Array, Array]:
    """Samples `num_decodes` continuations of every example; call-compatible with T5X.

    `inputs` are shifted right: position 0 is the start token, fed as 0 whatever stands there, and
    output `j` is the token at position `j + 1`. Non-zero inputs are prompts: they are fed,
    returned, and add nothing to the score. A row ends with the first `eos_id` that is generated
    (one in its prompt does not count) and is 0 from there on; the loop stops when all rows have
    ended.

    Args:
      inputs: int32 `[B, L]`, right-shifted prompts; all 0 to decode from the start.
      cache: the decoder's cache for B examples.
      tokens_to_logits: gives logits `[B * num_decodes, V]`, computed on as float32, and the new
        cache.
      eos_id: the token that ends a sequence.
      decode_rng: random key; `PRNGKey(0)` if absent.
      num_decodes: samples per example.
      temperature: divides the logits; at most 1e-4 means greedy. One number, or one per example
        `[B]`.
      topk: draw among so many likeliest tokens; 0 for no limit. The default of 1 is greedy.
      topp: draw among the likeliest tokens whose probabilities reach this sum; 0 for no limit.
        Not with `topk`.
      cache_offset: axis of the examples in the cache; 1 for a scanned network.
      initial_index: int32 `[B]`, position of each prompt's last token, when the cache already
        holds what comes before it. Decoding starts by feeding that token. The cache's index is
        then a vector, one per example.
      max_decode_steps: generate at most so many tokens after each prompt. The prompt's length is
        the number of its non-zero tokens.
      max_decode_steps_hard_limit: `max_decode_steps`, which may be traced, is cut to this if
        positive.
      rescale_log_probs: whether scores are the log probabilities of the distribution drawn from,
        so that greedy decodes score 0; otherwise those of the network.
      state_callback_fn: maps the state before every step and after the last.
      logit_callback_fn: maps `(logits, state)` to the logits used.

    Returns:
      Tokens int32 `[B, num_decodes, L]` and scores float32 `[B, num_decodes]`: the sums of log
      probabilities of the generated tokens, ascending.

    Raises:
      ValueError: an argument out of range, or logits or cache of a wrong shape.
    """
    num_decodes = checks.at_least("num_decodes", num_decodes, 1, "samples per example")
    checks.prompts(inputs, initial_index)
    inputs = jnp.asarray(inputs).astype(jnp.int32)
    batch_size, length = inputs.shape
    checks.temperatures(temperature, batch_size)
    checks.cutoffs(topk, topp)
    checks.number("eos_id", eos_id, -math.inf, math.inf, "the token that ends a sequence")

    inputs = flat_batch_beam_expand(inputs, num_decodes)
    rows = inputs.shape[0]
    limit = _last_position(inputs, max_decode_steps, max_decode_steps_hard_limit)
    sequences = jnp.pad(inputs, ((0, 0), (0, 2)))
    if initial_index is None:
        start = jnp.zeros((rows,), jnp.int32)
        first_token = jnp.zeros((rows, 1), jnp.int32)
    else:
        index = jnp.asarray(initial_index).astype(jnp.int32)
        start = flat_batch_beam_expand(index, num_decodes)
        first_token = jnp.take_along_axis(sequences, start[:, None], axis=1)
    prompt_ends = jnp.sum(sequences == eos_id, axis=1)
    choose = functools.partial(
        _choose,
        temperature=temperature,
        topk=topk,
        topp=topp,
        num_decodes=num_decodes,
        rescale=rescale_log_probs,
    )

    def step(state: SamplingLoopState) -> SamplingLoopState:
        if state_callback_fn is not None:
            state = state_callback_fn(state)
        draw_rng, next_rng = jax.random.split(state.rng)
        logits, new_cache = tokens_to_logits(
            DecodingState(
                cur_index=state.cur_index,
                sequences=state.sequences[:, :length],
                cur_token=state.cur_token,
                cache=state.cache,
            )
        )
        checks.logits_of(logits, rows)
        logits = logits.astype(jnp.float32)
        if logit_callback_fn is not None:
            logits = logit_callback_fn(logits, state)
        token, log_prob = choose(draw_rng, logits)

        # Rows wait at their limit until the last one has ended.
        position = jnp.minimum(state.cur_index, limit)
        prompt = jnp.take_along_axis(state.sequences, position[:, None] + 1, axis=1)[:, 0]
        ended = state.ended[:, 0]
        generated = prompt == 0
        token = jnp.where(ended, 0, jnp.where(generated, token, prompt))
        written = jnp.arange(length + 2) == position[:, None] + 1
        sequences = jnp.where(written, token[:, None], state.sequences)
        # Counted, not compared with the last token: prompts may hold the end token, and a
        # callback may write one.
        reached_end = jnp.sum(sequences == eos_id, axis=1) > prompt_ends
        return SamplingLoopState(
            step=state.step + 1,
            cur_index=position + 1,
            sequences=sequences,
            cache=as_before(new_cache, state.cache),
            cur_token=token[:, None],
            ended=(ended | reached_end | (position >= limit - 1))[:, None],
            rng=next_rng,
            log_prob=state.log_prob + jnp.where(generated & ~ended, log_prob, 0.0),
        )

    state = SamplingLoopState(
        step=jnp.zeros((), jnp.int32),
        cur_index=start,
        sequences=sequences,
        cache=expand_cache(cache, batch_size, num_decodes, cache_offset),
        cur_token=first_token,
        ended=jnp.zeros((rows, 1), bool),
        rng=jax.random.PRNGKey(0) if decode_rng is None else decode_rng,
        log_prob=jnp.zeros((rows,), jnp.float32),
    )
    state = lax.while_loop(lambda state: ~jnp.all(state.ended), step, state)
    if state_callback_fn is not None:
        state = state_callback_fn(state)

    tokens = unflatten_beam_dim(state.sequences[:, 1 : length + 1], batch_size, num_decodes)
    scores = unflatten_beam_dim(state.log_prob, batch_size, num_decodes)
    order = jnp.argsort(scores, axis=1)
    return (
        jnp.take_along_axis(tokens, order[..., None], axis=1),
        jnp.take_along_axis(scores, order, axis=1),
    )


def greedy_decode(
    inputs: Array,
    cache: Any,
    tokens_to_logits: TokensToLogits,
    eos_id: int,
    cache_offset: int = 0,
    initial_index: Array | None = None,
    max_decode_steps: int | Array | None = None,
) -> tuple[Array, Array]:
    """Takes the likeliest token, the first of equals; arguments as in `temperature_sample`.

    Returns:
      Tokens int32 `[B, 1, L]` and the network's log probabilities of what was generated, float32
      `[B, 1]`.
    """
    return temperature_sample(
        inputs,
        cache,
        tokens_to_logits,
        eos_id,
        temperature=0.0,
        cache_offset=cache_offset,
        initial_index=initial_index,
        max_decode_steps=max_decode_steps,
        rescale_log_probs=False,
    )


def _last_position(inputs: Array, steps: Any, hard_limit: int | None) -> Array:
    """The position of the last token that may be generated: a scalar, or one per row."""
    length = inputs.shape[1]
    if steps is None:
        return jnp.asarray(length, jnp.int32)
    if hard_limit is not None and hard_limit > 0:
        steps = jnp.minimum(steps, hard_limit)
    checks.number("max_decode_steps", steps, 0, length, "at most the length of inputs")
    prompt_lengths = jnp.sum(inputs != 0, axis=1)
    return jnp.minimum(length, prompt_lengths + steps).astype(jnp.int32)


def _choose(
    rng: Array,
    logits: Array,
    *,
    temperature: Any,
    topk: Any,
    topp: Any,
    num_decodes: int,
    rescale: bool,
) -> tuple[Array, Array]:
    """One token per row of logits `[rows, V]`, and its log probability as the score counts it."""

    def log_prob_of(token: Array, scores: Array) -> Array:
        log_probs = jax.nn.log_softmax(scores)
        return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]

    def greedy() -> tuple[Array, Array]:
        token = _likeliest(logits)
        certain = jnp.zeros(token.shape, jnp.float32)
        return token, certain if rescale else log_prob_of(token, logits)

    def sampled(divisor: Array) -> tuple[Array, Array]:
        scaled = logits / jnp.maximum(divisor, MIN_TEMPERATURE)
        scaled = masks.keep_topp(masks.keep_topk(scaled, topk), topp)
        if divisor.ndim:
            token = _draw_per_example(rng, scaled, num_decodes)
        else:
            token = jax.random.categorical(rng, scaled)
        token = token.astype(jnp.int32)
        return token, log_prob_of(token, scaled if rescale else logits)

    if np.ndim(temperature):
        per_row = flat_batch_beam_expand(jnp.asarray(temperature, jnp.float32), num_decodes)
        warm = per_row > MIN_TEMPERATURE
        return jax.tree.map(lambda a, b: jnp.where(warm, a, b), sampled(per_row[:, None]), greedy())
    value = jnp.asarray(temperature, jnp.float32)
    if checks.is_dynamic(temperature):
        return lax.cond(value > MIN_TEMPERATURE, lambda: sampled(value), greedy)
    return sampled(value) if temperature > MIN_TEMPERATURE else greedy()


def _likeliest(logits: Array) -> Array:
    """Index int32 `[rows]` of each row's largest logit, the first of equals.

    As argmax, which XLA's CPU compiler does not vectorise: it takes ten times as long, a tenth of a step of a small T5.
    """
    return largest.top_k(logits, 1)[1][:, 0]


def _draw_per_example(rng: Array, logits: Array, num_decodes: int) -> Array:
    """Draws when every example has its own temperature.

    T5X then draws all rows with the same noise, which makes the decodes of one example equal.
    Here each example's first draw is T5X's, and the others have noise of their own.
    """
    grouped = unflatten_beam_dim(logits, -1, num_decodes)
    first = jax.vmap(lambda example: jax.random.categorical(rng, example))(grouped[:, :1])
    others = jax.random.categorical(jax.random.fold_in(rng, 1), grouped[:, 1:])
    return jnp.concatenate([first, others], axis=1).reshape(-1)
