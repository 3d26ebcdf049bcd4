"""Rank classification: the answer whose tokens the model finds most probable, one example and one choice at a time."""

import functools

import jax
import numpy as np
import pytest
import seqio

from modjax import models
from modjax.data import pipeline, registry
from modjax.data.sources import ExamplesSource
from modjax.evaluation import choices, predict, runner

VOCABULARY = seqio.ByteVocabulary()
LENGTHS = {"inputs": 10, "targets": 12}
FIXED = ("yes", "no way")
ROWS = [
    {"inputs": "aa", "targets": "red", "choices": ["red", "green", "a long answer"]},
    {"inputs": "bcd", "targets": "x", "choices": ["x", "yy"]},
    {"inputs": "efghij", "targets": "c", "choices": ["a", "b", "c", "d"]},
]


@pytest.fixture(scope="module", autouse=True)
def tasks():
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    features = {k: seqio.Feature(VOCABULARY) for k in ("inputs", "targets")}
    own = ExamplesSource({"test": ROWS})
    fixed = ExamplesSource({"test": [{"inputs": t, "targets": "yes"} for t in ("p", "qrs")]})
    registry.add_task("rank_own", own, steps, features, choices="choices")
    registry.add_task("rank_fixed", fixed, steps, features, choices=FIXED)
    registry.add_mixture("rank", ["rank_own", "rank_fixed"])
    yield
    for name in ("rank", "rank_own", "rank_fixed"):
        registry.remove(name)


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def made(request, make_t5, make_decoder, space):
    """(model with random weights, parameters, the tasks' examples)."""
    if request.param == "encoder_decoder":
        model = models.EncoderDecoderModel(make_t5(vocab_size=260))
    else:
        model = models.DecoderOnlyModel(make_decoder(vocab_size=260, token_offset=0), bos_id=2)
    batch = model.example_batch(LENGTHS, space)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    params = jax.jit(model.init)(jax.random.key(0), zeros)["params"]
    # Away from a uniform distribution over answers.
    params = jax.tree.map(lambda x: 2 * x, params)
    examples = runner.read(
        "rank", "test", None, task_feature_lengths=LENGTHS, converter=model.converter
    )
    return model, params, examples


@pytest.fixture(scope="module")
def known(made):
    """(its log probability, its tokens) of each (text, answer) that a test asked for."""
    model, params, _ = made

    @functools.cache
    def ask(asked, answer):
        return log_prob(model, params, asked, answer)

    return ask


def log_prob(model, params, asked, answer):
    """Of one answer to one text, from the logits of an unpadded row."""
    tokens = [*VOCABULARY.encode(answer), 1]
    text = [*VOCABULARY.encode(asked), 1]
    if isinstance(model, models.EncoderDecoderModel):
        rows = {"encoder_input_tokens": text, "decoder_input_tokens": [0, *tokens[:-1]]}
        rows["decoder_target_tokens"] = tokens
    else:
        whole = [2, *text, *tokens]
        rows = {"decoder_input_tokens": whole[:-1], "decoder_target_tokens": whole[1:]}
    logits = model.logits(params, {k: np.array([v]) for k, v in rows.items()})[0]
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[-len(tokens) :]
    return sum(row[token] for row, token in zip(log_probs, tokens, strict=True)), len(tokens)


@pytest.mark.parametrize("summary", ["sum", "mean"])
def test_the_most_probable_choice_is_the_prediction(made, known, summary):
    model, params, examples = made
    choose = functools.partial(
        choices.choose, model, predict.scorer(model, params), summary=summary
    )
    found = runner.evaluate(
        None,  # nothing is to be written
        examples,
        dict.fromkeys(examples.datasets, "seen"),
        method="m",
        seed=0,
        batch_size=4,
        choose_fn=choose,
    )
    expected = {"rank_own": [], "rank_fixed": []}
    for text in examples.texts:
        options = FIXED if text.task == "rank_fixed" else ROWS[text.index]["choices"]
        scores = []
        for option in options:
            total, length = known(text["inputs_pretokenized"], option)
            scores.append(total / length if summary == "mean" else total)
        expected[text.task].append(options[int(np.argmax(scores))])
    said = {task: [p["prediction"] for p in rows] for task, rows in found.predictions.items()}
    assert said == expected
    flat = [answer for answers in expected.values() for answer in answers]
    assert len(set(flat)) > 2


def test_choices_that_are_none_are_refused(made):
    model, params, examples = made
    text = pipeline.Example("rank_own", 7, [])
    text["choices"] = ["one"]
    texts = [text]
    with pytest.raises(ValueError, match="'rank_own', example 7: choices must be two texts"):
        choices.choose(model, predict.scorer(model, params), {}, texts, 4)
    with pytest.raises(ValueError, match="choice_scores is one of sum, mean, not 'max'"):
        choices.choose(model, predict.scorer(model, params), {}, texts, 4, "max")


def test_a_choice_without_a_token_is_refused(made):
    model, params, _ = made
    features = {k: seqio.Feature(VOCABULARY, add_eos=False) for k in ("inputs", "targets")}
    source = ExamplesSource({"test": ROWS})
    registry.add_task("rank_none", source, [], features, choices=("yes", ""))
    try:
        texts = [pipeline.Example("rank_none", 0, [])]
        with pytest.raises(ValueError, match="'rank_none': the choice '' has no token"):
            choices.choose(model, predict.scorer(model, params), {}, texts, 4)
    finally:
        registry.remove("rank_none")
