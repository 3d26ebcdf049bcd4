"""Our vocabularies give the numbers that transformers' tokenizers give, moved by the offset."""

import pytest

transformers = pytest.importorskip("transformers")

from modjax.data import vocabularies  # noqa: E402
from tests.testdata import tokenizer_folders  # noqa: E402

TEXTS = [*tokenizer_folders.TEXTS.values(), "", "  a  b\n", "x </s> y <s>z [SEP]"]


@pytest.fixture
def both(tmp_path):
    def make(kind):
        folder = tokenizer_folders.make(kind, tmp_path / kind)
        return vocabularies.vocabulary_of(folder), transformers.AutoTokenizer.from_pretrained(
            folder
        )

    return make


@pytest.mark.parametrize("kind", ["byte_level", "roberta", "llama", "unigram", "word_piece"])
def test_tokens_templates_and_special_tokens_are_those_of_transformers(both, kind):
    vocab, theirs = both(kind)
    offset = vocab.token_offset
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        assert vocab.encode(text) == [i + offset for i in ids]
        # transformers puts BERT's punctuation back in its place, whatever the file says.
        if kind != "word_piece" and text in tokenizer_folders.TEXTS.values():
            assert vocab.decode([*vocab.encode(text), vocab.eos_id]) == theirs.decode(
                [*ids, vocab.eos_id - offset], skip_special_tokens=True
            )
    assert vocab.vocab_size == len(theirs) + offset
    for name in ("bos", "eos", "sep", "cls"):
        said = getattr(theirs, f"{name}_token_id")
        if said is not None:  # BERT's have no eos
            assert getattr(vocab, f"{name}_id") == said + offset, name
    if kind != "byte_level":
        found = theirs(TEXTS[0], TEXTS[1], return_token_type_ids=True, truncation=False)
        tokens, kinds = vocab.encode_pair(TEXTS[0], TEXTS[1])
        assert tokens == [i + offset for i in found.input_ids]
        assert kinds == found.token_type_ids
        cut = theirs(TEXTS[0], TEXTS[1], truncation="longest_first", max_length=24)
        assert vocab.encode_pair(TEXTS[0], TEXTS[1], max_length=24)[0] == [
            i + offset for i in cut.input_ids
        ]


def test_sentence_piece_gives_the_numbers_of_transformers(both):
    vocab, theirs = both("sentence_piece")
    for text in tokenizer_folders.TEXTS.values():
        assert list(vocab.encode(text)) == theirs(text, add_special_tokens=False).input_ids
    assert vocab.encode("<extra_id_0>")[-1] == theirs.convert_tokens_to_ids("<extra_id_0>") == 499
    assert (vocab.eos_id, vocab.unk_id) == (theirs.eos_token_id, theirs.unk_token_id)


def test_bytes_are_those_of_byt5(both):
    vocab, theirs = both("byt5")
    for text in tokenizer_folders.TEXTS.values():
        assert list(vocab.encode(text)) == theirs(text, add_special_tokens=False).input_ids
    assert (vocab.vocab_size, vocab.eos_id) == (len(theirs), theirs.eos_token_id)
