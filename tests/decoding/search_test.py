"""Beam search against enumeration and against a plain Python search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import decoding

EOS = 1


def _penalty(alpha: float, length: int) -> float:
    return ((5 + length) / 6) ** alpha


def _padded(tokens, length: int) -> list[int]:
    return [int(t) for t in tokens] + [0] * (length - len(tokens))


def _enumerate(toy, length: int, alpha: float) -> list[tuple[float, list[int]]]:
    """All decodes of at most `length` tokens that end, best first."""
    others = [t for t in range(toy.vocab) if t != EOS]
    found = []
    for n in range(length):
        for body in itertools.product(others, repeat=n):
            tokens = [*body, EOS]
            found.append((toy.score(tokens) / _penalty(alpha, n + 1), _padded(tokens, length)))
    return sorted(found, reverse=True)


def _python_search(toy, length: int, beams: int, alpha: float) -> list[tuple[float, list[int]]]:
    """The same search with lists and without cache, best first."""
    live, done = [(0.0, [])], []
    for n in range(1, length + 1):
        bound = max(live)[0] / _penalty(alpha, length + 1)
        if len(done) == beams and min(done)[0] > bound:
            break
        candidates = [
            (score + log_prob, [*tokens, token])
            for score, tokens in live
            for token, log_prob in enumerate(toy.log_probs([0, *tokens]))
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        done += [(s / _penalty(alpha, n), t) for s, t in candidates if t[-1] == EOS]
        done = sorted(done, reverse=True)[:beams]
        live = [c for c in candidates if c[1][-1] != EOS][:beams]
    return [(score, _padded(tokens, length)) for score, tokens in (done or live)]


def _compiled(toy, batch_size: int, length: int, beams: int, **options):
    return jax.jit(
        lambda alpha: decoding.beam_search(
            np.zeros((batch_size, length), np.int32),
            toy.empty(batch_size),
            toy.step,
            EOS,
            beams,
            alpha,
            **options,
        )
    )


def test_enough_beams_find_the_best_of_all_decodes(make_toy):
    toy, length = make_toy(3, vocab=4), 4
    search = _compiled(toy, 1, length, 54)
    for alpha in (0.0, 0.6, 2.0):
        tokens, scores = search(alpha)
        best = _enumerate(toy, length, alpha)  # 40 decodes
        got = list(zip(np.asarray(scores[0, ::-1]), np.asarray(tokens[0, ::-1]), strict=True))
        for (score, decode), (want_score, want) in zip(got, best, strict=False):
            np.testing.assert_allclose(score, want_score, atol=1e-4)
            assert decode.tolist() == want


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_few_beams_search_as_plain_python_does(seed, make_toy):
    toy, length, beams = make_toy(seed), 7, 3
    search = _compiled(toy, 2, length, beams)
    for alpha in (0.0, 0.6, 1.2):
        tokens, scores = search(alpha)
        want = _python_search(toy, length, beams, alpha)
        for row in range(2):
            assert tokens[row, ::-1][: len(want)].tolist() == [t for _, t in want]
            np.testing.assert_allclose(
                scores[row, ::-1][: len(want)], [s for s, _ in want], atol=1e-4
            )


def test_the_cache_follows_its_beams_in_a_scanned_network(make_toy):
    toy, length = make_toy(5, layers=2), 7
    tokens, scores = _compiled(toy, 2, length, 4, cache_offset=1)(0.6)
    for decode, score in zip(np.asarray(tokens[0]), np.asarray(scores[0]), strict=True):
        ended = decode.tolist().index(EOS) + 1
        np.testing.assert_allclose(score, toy.score(decode) / _penalty(0.6, ended), atol=1e-4)


def test_one_beam_on_peaked_logits_is_greedy(make_toy):
    toy = make_toy(0, scale=8.0)
    tokens, scores = _compiled(toy, 2, 7, 1)(0.0)
    inputs = np.zeros((2, 7), np.int32)
    want, log_probs = jax.jit(lambda: decoding.greedy_decode(inputs, toy.empty(2), toy.step, EOS))()
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(scores, log_probs, atol=1e-4)


def test_examples_of_a_mixed_batch_decode_as_they_do_alone(make_toy):
    """Each example has its own shift of the logits, expanded with the beams as features are."""
    toy, beams = make_toy(1), 3
    features = np.random.RandomState(0).normal(size=(3, 6)).astype(np.float32)

    @jax.jit
    def search(features):
        rows = decoding.flat_batch_beam_expand(features, beams)

        def step(state):
            logits, cache = toy.step(state)
            return logits + rows, cache

        inputs = jnp.zeros((len(features), 6), jnp.int32)
        return decoding.beam_search(inputs, toy.empty(len(features)), step, EOS, beams)

    tokens, scores = search(features)
    assert len({str(t) for t in tokens.tolist()}) == 3
    for row in range(3):
        alone, score = search(np.repeat(features[row : row + 1], 3, axis=0))
        np.testing.assert_array_equal(tokens[row], alone[0])
        np.testing.assert_allclose(scores[row], score[0], atol=1e-5)


PROMPTS = np.array([[0, 3, 4, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0], [0, 5, 3, 2, 0, 0, 0]], np.int32)
INDEX = np.array([2, 1, 3], np.int32)


def test_prompts_are_returned_and_cost_nothing_forced_or_prefilled(make_toy):
    toy = make_toy(0)
    prefill = toy.prefilled(PROMPTS, INDEX)

    @jax.jit
    def search(index):
        return (
            decoding.beam_search(PROMPTS, toy.empty(3), toy.step, EOS, 3),
            decoding.beam_search(PROMPTS, prefill, toy.step, EOS, 3, initial_index=index),
        )

    forced, prefilled = search(INDEX)
    for tokens, scores in (forced, prefilled):
        for row, n in enumerate(INDEX):
            found = np.asarray(tokens[row][scores[row] > -1e6])
            assert found[:, :n].tolist() == [PROMPTS[row, 1 : n + 1].tolist()] * len(found)
            best = np.asarray(tokens[row, -1])
            ended = best.tolist().index(EOS) + 1
            want = toy.score(best, n) / _penalty(0.6, ended)
            np.testing.assert_allclose(scores[row, -1], want, atol=1e-4)
    np.testing.assert_array_equal(forced[0][:, -1], prefilled[0][:, -1])


def test_the_place_behind_a_full_prompt_is_free(make_toy):
    toy = make_toy(0)
    inputs = np.array([[0, 3, 4]], np.int32)
    tokens, scores = jax.jit(
        lambda: decoding.beam_search(inputs, toy.empty(1), toy.step, EOS, 2, alpha=0.0)
    )()
    log_probs = toy.log_probs([0, 3, 4])
    likeliest = np.argsort(log_probs)[-2:]
    assert EOS not in likeliest  # so both decodes are live beams
    assert tokens[0].tolist() == [[3, 4, token] for token in likeliest]
    np.testing.assert_allclose(scores[0], log_probs[likeliest], atol=1e-5)


def test_impossible_ends_leave_the_live_beams_with_their_log_probabilities(make_toy):
    toy = make_toy(2)

    def endless(state):
        logits, cache = toy.step(state)
        return logits.at[:, EOS].set(-jnp.inf), cache

    inputs = np.zeros((1, 4), np.int32)
    tokens, scores = jax.jit(
        lambda: decoding.beam_search(inputs, toy.empty(1), endless, EOS, 2, max_decode_len=6)
    )()
    assert tokens.shape == (1, 2, 6) and EOS not in np.asarray(tokens)
    assert np.all(np.isfinite(scores)) and scores[0, 0] < scores[0, 1]

    def without_end(tokens):
        p = [np.exp(toy.log_probs([0, *tokens[:j]])) for j in range(6)]
        return sum(np.log(p[j][t] / (1 - p[j][EOS])) for j, t in enumerate(tokens))

    for decode, score in zip(np.asarray(tokens[0]), np.asarray(scores[0]), strict=True):
        np.testing.assert_allclose(score, without_end(decode.tolist()), atol=1e-4)


def _ending_at(step: int):
    """A network nearly sure of token 3, and of the end from a step on; it records its calls."""
    calls = []

    def logits(state):
        jax.debug.callback(lambda *call: calls.append(call), state.cur_token, state.sequences)
        sure = jnp.where(state.cur_index >= step, EOS, 3)
        rows = state.cur_token.shape[0]
        return jnp.tile(12.0 * jax.nn.one_hot(sure, 5) + jnp.arange(5) / 10, (rows, 1)), state.cache

    return logits, calls


def test_the_search_stops_when_no_live_beam_can_win():
    step, calls = _ending_at(2)
    tokens, _ = jax.jit(
        lambda: decoding.beam_search(np.zeros((1, 12), np.int32), {}, step, EOS, 1)
    )()
    jax.effects_barrier()
    assert tokens[0, 0].tolist() == [3, 3, EOS] + [0] * 9
    assert len(calls) == 3
    token, sequences = calls[2]
    assert token.tolist() == [[3]]
    assert sequences.tolist() == [[0, 3, 3] + [0] * 10]


@pytest.mark.parametrize(
    "stop, steps", [({"max_decode_step": 2}, 2), ({"min_log_prob": -1e-9}, 1), ({}, 6)]
)
def test_max_decode_step_and_min_log_prob_stop_the_search(stop, steps):
    step, calls = _ending_at(5)
    jax.jit(lambda: decoding.beam_search(np.zeros((1, 9), np.int32), {}, step, EOS, 1, **stop))()
    jax.effects_barrier()
    assert len(calls) == steps


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_decodes": 0}, "num_decodes .* >= 1; got 0"),
        ({"num_decodes": True}, "num_decodes .* integer"),
        ({"alpha": "0.6"}, "alpha .* must be one number; got '0.6'"),
        ({"alpha": None}, "alpha .*got None"),
        ({"alpha": np.ones(2)}, "alpha .* must be one number"),
        ({"alpha": float("inf")}, "alpha .* must be finite"),
        ({"max_decode_len": 0}, "max_decode_len .* >= 1; got 0"),
        ({"max_decode_len": 4.5}, "max_decode_len .* integer"),
        ({"eos_id": None}, "eos_id .*got None"),
        ({"initial_index": np.int32(1)}, r"initial_index .*\(3,\); got shape \(\)"),
        ({"inputs": np.zeros((2, 3, 4), int)}, r"inputs .*got shape \(2, 3, 4\)"),
        ({"inputs": np.zeros((4, 3), int)}, "cached_key of shape .* 4 examples"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message, make_toy):
    toy = make_toy(0)
    call = dict(inputs=PROMPTS, cache=toy.empty(3), tokens_to_logits=toy.step, eos_id=EOS)
    with pytest.raises(ValueError, match=message):
        decoding.beam_search(**(call | arguments))


def test_a_vocabulary_of_one_is_refused():
    with pytest.raises(ValueError, match="vocabulary of at least 2"):
        decoding.beam_search(
            np.zeros((1, 3), np.int32), {}, lambda s: (jnp.zeros((4, 1)), s.cache), EOS
        )
