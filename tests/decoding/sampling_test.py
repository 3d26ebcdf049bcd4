"""Greedy decoding and sampling: what may be drawn, how often, from which prompts, and when it
stops.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import decoding

EOS = 1
PROMPTS = np.array([[0, 3, 4, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0], [0, 5, 1, 2, 0, 0, 0]], np.int32)
INDEX = np.array([2, 1, 3], np.int32)


def _argmax_loop(toy, inputs) -> tuple[list, float]:
    """Decodes one row by calling the network on the whole prefix at every step."""
    fed, out, total = [0], [], 0.0
    for j in range(len(inputs)):
        forced = inputs[j + 1] if j + 1 < len(inputs) else 0
        log_probs = toy.log_probs(fed)
        token = int(forced or np.argmax(log_probs))
        total += 0.0 if forced else log_probs[token]
        fed.append(token)
        out.append(token)
        if token == EOS and not forced:
            break
    return out + [0] * (len(inputs) - len(out)), total


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("prompted", [False, True])
def test_greedy_is_the_argmax_loop(seed, prompted, make_toy):
    toy = make_toy(seed)
    inputs = PROMPTS if prompted else np.zeros((1, 7), np.int32)
    tokens, scores = jax.jit(
        lambda: decoding.greedy_decode(inputs, toy.empty(len(inputs)), toy.step, EOS)
    )()
    for row, prompt in enumerate(inputs):
        want, score = _argmax_loop(toy, prompt)
        assert tokens[row, 0].tolist() == want
        np.testing.assert_allclose(scores[row, 0], score, atol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0, "topk": 0, "topp": 0.5}, {"temperature": 0.0, "topk": 3}, {}]
)
def test_temperature_zero_and_topk_one_are_greedy_and_score_zero(arguments, make_toy):
    toy = make_toy(1)
    want = [_argmax_loop(toy, prompt)[0] for prompt in PROMPTS]
    tokens, scores = jax.jit(
        lambda: decoding.temperature_sample(
            PROMPTS, toy.empty(3), toy.step, EOS, num_decodes=2, **arguments
        )
    )()
    greedy = np.array(want)[:, None]
    np.testing.assert_array_equal(tokens, np.repeat(greedy, 2, axis=1))
    np.testing.assert_array_equal(scores, np.zeros((3, 2)))


def test_a_prefilled_cache_decodes_what_forcing_the_prompt_does(make_toy):
    toy = make_toy(0, layers=2)
    options = dict(num_decodes=2, temperature=0.0, rescale_log_probs=False, cache_offset=1)
    prefill = toy.prefilled(PROMPTS, INDEX)

    @jax.jit
    def sample(index):
        call = functools.partial(
            decoding.temperature_sample, tokens_to_logits=toy.step, eos_id=EOS, **options
        )
        return call(PROMPTS, toy.empty(3)), call(PROMPTS, prefill, initial_index=index)

    forced, prefilled = sample(INDEX)
    np.testing.assert_array_equal(forced[0], prefilled[0])
    np.testing.assert_allclose(forced[1], prefilled[1], rtol=1e-6)


def _scripted(rows):
    """A network that says row b's tokens one after the other, whatever it is fed, and counts its
    calls.
    """
    calls = []

    def step(state):
        jax.debug.callback(lambda *call: calls.append(call), state.cur_token, state.sequences)
        chosen = jnp.asarray(rows)[jnp.arange(len(rows)), jnp.minimum(state.cur_index, 3)]
        return 20.0 * jax.nn.one_hot(chosen, 6), state.cache

    return step, calls


def test_decoding_stops_when_all_rows_have_ended_and_pads_behind_the_end():
    step, calls = _scripted([[4, EOS, 5, 5], [4, 5, EOS, 5]])
    tokens, _ = jax.jit(lambda: decoding.greedy_decode(np.zeros((2, 7), np.int32), {}, step, EOS))()
    jax.effects_barrier()
    assert tokens[:, 0].tolist() == [[4, 1, 0, 0, 0, 0, 0], [4, 5, 1, 0, 0, 0, 0]]
    assert len(calls) == 3
    token, sequences = calls[2]
    assert token.tolist() == [[EOS], [5]]
    assert sequences.tolist() == [[0, 4, 1, 0, 0, 0, 0], [0, 4, 5, 0, 0, 0, 0]]


def test_samples_follow_the_networks_distribution(make_toy):
    toy, draws = make_toy(2), 6000
    sample = jax.jit(
        lambda temperature: decoding.temperature_sample(
            np.zeros((2, 2), np.int32),
            toy.empty(2),
            toy.step,
            EOS,
            jax.random.PRNGKey(5),
            draws,
            temperature,
            topk=0,
        )
    )

    def tempered(fed, temperature):
        p = np.exp(toy.log_probs(fed) / temperature)
        return p / p.sum()

    for temperature in (1.0, 2.5):
        tokens = np.asarray(sample(temperature)[0])
        for row in range(2):
            counts = np.zeros((6, 6))
            np.add.at(counts, tuple(tokens[row].T), 1)
            first = tempered([0], temperature)
            want = np.stack([first[t] * tempered([0, t], temperature) for t in range(6)])
            want[EOS] = [first[EOS], 0, 0, 0, 0, 0]
            deviation = np.sqrt(draws * want * (1 - want))
            assert np.all(np.abs(counts - draws * want) <= 4.5 * deviation)
        assert not np.array_equal(tokens[0], tokens[1])


@pytest.mark.parametrize("cutoff", [{"topk": 3}, {"topk": 0, "topp": 0.6}])
def test_samples_fill_the_cutoffs_support_and_nothing_else(cutoff, make_toy):
    toy = make_toy(1, vocab=12, scale=0.5)
    inputs = np.zeros((1, 1), np.int32)
    tokens, scores = jax.jit(
        lambda: decoding.temperature_sample(
            inputs, toy.empty(1), toy.step, EOS, num_decodes=2000, **cutoff
        )
    )()
    p = np.exp(toy.log_probs([0]))
    order = np.argsort(-p)
    size = cutoff["topk"] or int(np.searchsorted(np.cumsum(p[order]), cutoff["topp"])) + 1
    assert 1 < size < 12
    assert set(np.ravel(tokens).tolist()) == set(order[:size].tolist())
    # By default scores are those of the distribution drawn from.
    want = np.log(p[np.ravel(tokens)] / p[order[:size]].sum())
    np.testing.assert_allclose(np.ravel(scores), want, atol=1e-5)


def test_scores_without_rescaling_are_the_networks_and_ascend(make_toy):
    toy = make_toy(3)
    sample = jax.jit(
        lambda rng: decoding.temperature_sample(
            PROMPTS,
            toy.empty(3),
            toy.step,
            EOS,
            rng,
            num_decodes=3,
            temperature=2.0,
            topk=4,
            rescale_log_probs=False,
        )
    )
    tokens, scores = sample(jax.random.key(1))
    np.testing.assert_array_equal(tokens, sample(jax.random.key(1))[0])
    assert not np.array_equal(tokens, sample(jax.random.key(2))[0])
    assert np.all(np.diff(scores, axis=1) >= 0)
    for row in range(3):
        for decode in range(3):
            want = toy.score(np.asarray(tokens[row, decode]), INDEX[row])
            np.testing.assert_allclose(scores[row, decode], want, atol=1e-4)


def test_each_example_may_have_its_own_temperature_and_its_draws_differ(make_toy):
    toy = make_toy(0, vocab=30, scale=0.2)
    inputs = np.zeros((2, 6), np.int32)

    @jax.jit
    def sample(temperature):
        return decoding.temperature_sample(
            inputs, toy.empty(2), toy.step, EOS, num_decodes=4, temperature=temperature, topk=0
        )[0]

    tokens = sample(np.array([0.0, 5.0], np.float32))
    greedy = sample(np.zeros(2, np.float32))[:, 0]
    np.testing.assert_array_equal(tokens[0], np.repeat(greedy[:1], 4, axis=0))
    assert len({tuple(row) for row in np.asarray(tokens[1]).tolist()}) == 4


def test_cutoffs_known_only_at_run_time_work_and_zero_means_none(make_toy):
    toy = make_toy(2)

    @jax.jit
    def sample(topk, topp):
        return decoding.temperature_sample(
            np.zeros((1, 1), np.int32),
            toy.empty(1),
            toy.step,
            EOS,
            num_decodes=500,
            topk=topk,
            topp=topp,
        )

    p = np.exp(toy.log_probs([0]))
    likeliest = np.argsort(-p)
    drawn = {name: np.ravel(sample(*a)[0]) for name, a in {"k": (2, 0.0), "all": (0, 0.0)}.items()}
    assert set(drawn["k"].tolist()) == set(likeliest[:2].tolist())
    counts = np.bincount(drawn["all"], minlength=6)
    assert np.all(np.abs(counts - 500 * p) <= 4.5 * np.sqrt(500 * p * (1 - p)))


def test_bfloat16_logits_are_scored_in_float32(make_toy):
    toy = make_toy(0)

    def step(state):
        logits, cache = toy.step(state)
        return (logits + 0.01).astype(jnp.bfloat16), cache

    inputs = np.zeros((1, 1), np.int32)
    tokens, scores = jax.jit(lambda: decoding.greedy_decode(inputs, toy.empty(1), step, EOS))()
    rounded = np.asarray(
        step(decoding.DecodingState(0, inputs, jnp.zeros((1, 1), int), toy.empty(1)))[0], np.float64
    )[0]
    assert scores.dtype == jnp.float32
    want = rounded[tokens[0, 0, 0]] - np.log(np.exp(rounded).sum())
    np.testing.assert_allclose(scores[0, 0], want, atol=1e-6)


def test_max_decode_steps_count_from_each_prompts_end(make_toy):
    toy = make_toy(0)

    def never_end(logits, state):
        return logits.at[:, :2].set(-jnp.inf)

    @jax.jit
    def decode(steps):
        return decoding.temperature_sample(
            PROMPTS,
            toy.empty(3),
            toy.step,
            EOS,
            topk=0,
            max_decode_steps=steps,
            max_decode_steps_hard_limit=3,
            logit_callback_fn=never_end,
        )[0]

    for steps, generated in ((0, 0), (2, 2), (7, 3)):
        want = INDEX + generated
        assert np.count_nonzero(decode(steps)[:, 0], axis=1).tolist() == want.tolist()


def test_callbacks_change_logits_and_state(make_toy):
    toy = make_toy(0)

    def only_four(logits, state):
        return jnp.where(jnp.arange(6) == 4, logits, -jnp.inf)

    def stop_after_two(state):
        return state.replace(ended=state.ended | (state.step >= 2))

    tokens, _ = jax.jit(
        lambda: decoding.temperature_sample(
            np.zeros((2, 5), np.int32),
            toy.empty(2),
            toy.step,
            EOS,
            logit_callback_fn=only_four,
            state_callback_fn=stop_after_two,
        )
    )()
    assert tokens[:, 0].tolist() == [[4, 4, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_decodes": 0}, "num_decodes .* >= 1; got 0"),
        ({"num_decodes": 2.0}, "num_decodes .* integer"),
        ({"temperature": -0.5}, "temperature .*got -0.5"),
        ({"temperature": float("nan")}, "temperature .*got nan"),
        ({"temperature": np.array([1.0, -1.0, 1.0])}, "temperature must be finite and >= 0"),
        ({"temperature": np.ones(2)}, r"one per example, shape \(3,\); got shape \(2,\)"),
        ({"topk": -1}, "topk .* >= 0; got -1"),
        ({"topk": 0, "topp": 1.5}, r"topp .* in \[0, 1\]; got 1.5"),
        ({"topk": 0, "topp": -0.1}, r"topp .* in \[0, 1\]; got -0.1"),
        ({"topp": 0.9}, "exclude each other.*topk=0"),
        ({"eos_id": None}, "eos_id .*got None"),
        ({"initial_index": np.zeros((2,), int)}, r"initial_index .*\(3,\); got shape \(2,\)"),
        ({"max_decode_steps": 8}, r"max_decode_steps .*in \[0, 7\]; got 8"),
        ({"max_decode_steps": -1}, "max_decode_steps .*got -1"),
        ({"inputs": np.zeros((3,), int)}, r"inputs .*got shape \(3,\)"),
        ({"inputs": np.zeros((3, 0), int)}, "inputs .*length >= 1"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message, make_toy):
    toy = make_toy(0)
    call = dict(inputs=PROMPTS, cache=toy.empty(3), tokens_to_logits=toy.step, eos_id=EOS)
    with pytest.raises(ValueError, match=message):
        decoding.temperature_sample(**(call | arguments))


def test_logits_of_a_wrong_shape_are_refused(make_toy):
    toy = make_toy(0)

    def unsqueezed(state):
        logits, cache = toy.step(state)
        return logits[:, None], cache

    with pytest.raises(ValueError, match=r"rows.*= 3 .*got shape \(3, 1, 6\)"):
        decoding.greedy_decode(PROMPTS, toy.empty(3), unsqueezed, EOS)
