"""Our cached decoding finds what transformers' generate finds with the same weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.models import EncoderDecoderModel  # noqa: E402
from modjax.networks import t5  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*scales umT5's logits")

LENGTH = 12


@pytest.fixture
def pair(hf_t5, request):
    """(transformers model, our model, our parameters, encoder inputs with padding)."""
    variant, scan_layers = request.param
    theirs, folder = hf_t5(variant, gain=2.0)
    overrides, params = hub.load_base(folder, scan_layers=scan_layers)
    model = EncoderDecoderModel(t5.Transformer(t5.T5Config(**overrides)))
    rng = np.random.default_rng(5)
    inputs = rng.integers(2, 67, (8, 14)).astype(np.int32)
    inputs[np.arange(14)[None] >= rng.integers(3, 15, (8, 1))] = 0
    return theirs, model, params, inputs


def _generate(model, inputs, **options):
    options = {"do_sample": False, "max_new_tokens": LENGTH, **options}
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(inputs > 0).long(),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def _padded(sequences):
    """Without the start token, 0 after the end (where generate repeats the end token)."""
    tokens = sequences.numpy()[:, 1:]
    after_end = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    tokens = np.where(after_end, 0, tokens)
    return np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))


def _predict(model, params, inputs, **options):
    batch = {"encoder_input_tokens": inputs}
    predict = functools.partial(model.predict_batch_with_aux, max_decode_len=LENGTH, **options)
    tokens, aux = jax.jit(predict)(params, batch)
    return np.asarray(tokens), np.asarray(aux["scores"])


@pytest.mark.parametrize(
    "pair",
    [("t5", False), ("mt5", False), ("byt5", True), ("umt5", False)],
    indirect=True,
    ids=str,
)
def test_greedy_decoding_equals_generate(pair):
    theirs, model, params, inputs = pair
    ours, _ = _predict(model, params, inputs, decoder="greedy")
    expected = _padded(_generate(theirs, inputs, num_beams=1).sequences)
    np.testing.assert_array_equal(ours, expected)
    assert len({tuple(row) for row in expected}) >= 6, "decodes that do not differ show nothing"


@pytest.mark.parametrize(
    "pair",
    [("t5", False), ("t5_1_1", False), ("mt5", True), ("byt5", False), ("umt5", True)],
    indirect=True,
    ids=str,
)
def test_four_beams_equal_generate_token_by_token_where_nothing_ends_early(pair):
    theirs, model, params, inputs = pair
    options = {"length_penalty": 0.0, "eos_token_id": None, "pad_token_id": 0}
    found = _generate(theirs, inputs, num_beams=4, **options)
    endless = dataclasses.replace(model, eos_id=-1)
    ours, scores = _predict(endless, params, inputs, decoder="beam", num_decodes=4, alpha=0.0)
    np.testing.assert_array_equal(ours, found.sequences.numpy()[:, 1:])
    np.testing.assert_allclose(scores, found.sequences_scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("pair", [("mt5", False), ("byt5", True)], indirect=True, ids=str)
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_generate_where_their_rules_agree(pair, beams):
    """Without length penalty, and apart from two rules that differ.

    T5X's search (ours) takes an ending among the best 2 * beams candidates, generate only among
    the best `beams`: then ours scores higher. At the length limit generate counts what has not
    ended, ours only if nothing has.
    """
    theirs, model, params, inputs = pair
    found = _generate(theirs, inputs, num_beams=beams, length_penalty=0.0, early_stopping="never")
    expected, expected_scores = _padded(found.sequences), found.sequences_scores.numpy()
    ours, scores = _predict(model, params, inputs, decoder="beam", num_decodes=beams, alpha=0.0)

    same = (ours == expected).all(axis=1)
    ended, ours_ended = (expected == 1).any(axis=1), (ours == 1).any(axis=1)
    print(f"{same.sum()} of {len(same)} the same, {ended.sum()} ended")
    np.testing.assert_allclose(scores[same], expected_scores[same], atol=1e-4)
    for row in np.flatnonzero(~same):
        assert ours_ended[row]
        assert not ended[row] or scores[row] > expected_scores[row] + 1e-4
    assert same.sum() >= len(same) // 2
    assert (same & ended).any() and len({tuple(row) for row in expected}) >= 6
