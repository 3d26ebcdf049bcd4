"""Decoder-only models write, from unequal prompts, what transformers' generate writes with the same weights."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.models import DecoderOnlyModel  # noqa: E402
from modjax.networks import decoder  # noqa: E402

VARIANTS = ("gpt2", "llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
NEW, END = 10, 7
LENGTHS = np.array([14, 3, 9, 1, 14, 6])


@pytest.fixture
def pair(hf_decoder, request):
    """(transformers model, our model, our parameters)."""
    theirs, folder = hf_decoder(request.param)
    scan = request.param in ("gpt2", "qwen2", "gemma3")
    fields, params = hub.load_base(folder, scan_layers=scan)
    model = DecoderOnlyModel(decoder.Transformer(decoder.DecoderConfig(**fields)))
    return theirs, model, params


def prompts():
    return np.random.default_rng(8).integers(8, 67, (len(LENGTHS), LENGTHS.max()))


def generated(theirs, ends, **options):
    """The new tokens of transformers, whose prompts are padded on the left, and their scores."""
    ids, width = prompts(), LENGTHS.max()
    there = np.arange(width)[None] >= width - LENGTHS[:, None]
    padded = np.stack([np.roll(row, width - n) for row, n in zip(ids, LENGTHS, strict=True)])
    with torch.no_grad():
        found = theirs.generate(
            input_ids=torch.tensor(np.where(there, padded, 0)),
            attention_mask=torch.tensor(there.astype(np.int64)),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=END if ends else None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return found.sequences.numpy()[:, width:], getattr(found, "sequences_scores", None)


def written(model, params, ends, **options):
    """Our new tokens as transformers numbers them, and their scores."""
    there = np.arange(LENGTHS.max())[None] < LENGTHS[:, None]
    batch = {"decoder_prompt_tokens": np.where(there, prompts() + model.token_offset, 0)}
    model = DecoderOnlyModel(model.module, eos_id=END + model.token_offset if ends else -1)
    predict = functools.partial(model.predict_batch_with_aux, max_decode_len=NEW, **options)
    tokens, aux = jax.jit(predict)(params, batch)
    return np.maximum(np.asarray(tokens) - model.token_offset, 0), np.asarray(aux["scores"])


@pytest.mark.parametrize("pair", VARIANTS, indirect=True)
def test_greedy_decoding_equals_generate_token_by_token(pair):
    theirs, model, params = pair
    for ends in (False, True):
        expected, _ = generated(theirs, ends, num_beams=1)
        expected = np.pad(expected, ((0, 0), (0, NEW - expected.shape[1])))
        np.testing.assert_array_equal(written(model, params, ends)[0], expected)
        assert len({tuple(row) for row in expected}) >= 4, "decodes that do not differ show nothing"


@pytest.mark.parametrize("pair", VARIANTS, indirect=True)
def test_four_beams_equal_generate_token_by_token_where_nothing_ends_early(pair):
    """Of equal length there is one rule; where beams end, T5X's search and generate choose differently by design."""
    theirs, model, params = pair
    expected, scores = generated(theirs, False, num_beams=4, length_penalty=0.0)
    tokens, ours = written(model, params, False, decoder="beam", num_decodes=4, alpha=0.0)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(ours, scores, atol=1e-4)
    greedy, _ = generated(theirs, False, num_beams=1)
    assert (tokens != greedy).any(), "the best beam is never another one"
