"""Vocabularies: text in twelve scripts there and back, the library's own numbers, padding that stays padding."""

import copy
import json
import pickle
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tokenizers

from modjax import hub
from modjax.data import checks, pipeline, registry, vocabularies
from modjax.data.sources import ExamplesSource
from modjax.features import FeatureSpace
from modjax.hub import tokenizers as tokenizer_files
from tests.testdata import tokenizer_folders
from tests.testdata.tokenizer_folders import TEXTS

# Kinds of folders, and whether all of a text survives in them.
FAST = ("byte_level", "roberta", "llama", "unigram", "word_piece")
LOSSLESS = ("byte_level", "roberta", "llama", "unigram", "sentence_piece", "byt5")
ALL = (*LOSSLESS, "word_piece")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")

    def get(kind):
        path = root / kind
        return path if path.exists() else tokenizer_folders.make(kind, path)

    return get


@pytest.fixture(scope="module")
def vocabulary(folder):
    return lambda kind: vocabularies.vocabulary_of(folder(kind))


def theirs(path):
    """The library's tokenizer, without the truncation and padding that the file asks for."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.mark.parametrize("kind", ALL)
def test_a_vocabulary_that_is_saved_is_that_of_the_folder(folder, vocabulary, tmp_path, kind):
    before = vocabulary(kind)
    vocabularies.save(before, tmp_path)
    after = vocabularies.vocabulary_of(tmp_path)
    assert tokenizer_files.describe(tmp_path) == tokenizer_files.describe(folder(kind))
    assert after.encode(TEXTS["greek"]) == before.encode(TEXTS["greek"])
    vocabularies.save(after, tmp_path)  # onto itself
    assert tokenizer_files.describe(tmp_path) == tokenizer_files.describe(folder(kind))
    vocabularies.save(seqio.PassThroughVocabulary(9), tmp_path / "absent")  # says nothing


def test_the_base_that_is_shipped_has_a_vocabulary_as_large_as_its_embedding():
    shipped = Path(__file__).parents[2] / "tasks" / "assets" / "babel_base"
    found = vocabularies.vocabulary_of(shipped)
    assert found == seqio.ByteVocabulary(extra_ids=13)
    assert found.vocab_size == hub.config_of(shipped).vocab_size


# There and back.


@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_in_twelve_scripts_comes_back_as_it_was(vocabulary, kind):
    vocab = vocabulary(kind)
    for script, text in TEXTS.items():
        ids = list(vocab.encode(text))
        assert ids and 0 < min(ids) and max(ids) < vocab.vocab_size, script
        assert vocab.unk_id not in ids and vocab.eos_id not in ids, script
        assert vocab.decode(ids) == text
        assert vocab.decode([*ids, vocab.eos_id, 0, 0]) == text
        assert vocab.decode([*ids, vocab.eos_id, *ids]) == text


def test_a_lower_casing_tokenizer_gives_back_what_it_keeps(folder, vocabulary):
    vocab, tokenizer = vocabulary("word_piece"), theirs(folder("word_piece"))
    for text in TEXTS.values():
        ids = vocab.encode(text)
        assert 0 not in ids and vocab.unk_id not in ids
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        kept = " ".join(word for word, _ in words)
        assert vocab.decode([*ids, vocab.eos_id]) == kept
        assert vocab.encode(kept) == ids


@pytest.mark.parametrize("kind", ALL)
def test_tensorflow_gives_what_python_gives(vocabulary, kind):
    vocab = vocabulary(kind)
    ds = tf.data.Dataset.from_tensor_slices(list(TEXTS.values())).map(
        vocab.encode_tf, num_parallel_calls=4
    )
    assert ds.element_spec == tf.TensorSpec([None], tf.int32)
    rows = list(ds.as_numpy_iterator())
    for text, row in zip(TEXTS.values(), rows, strict=True):
        assert row.tolist() == list(vocab.encode(text))
    width = max(map(len, rows)) + 2
    batch = np.stack([np.pad([*r, vocab.eos_id, 5], (0, width - len(r) - 2)) for r in rows])
    (decoded,) = (
        tf.data.Dataset.from_tensors(batch.astype(np.int32)).map(vocab.decode_tf)
    ).as_numpy_iterator()
    expected = [vocab.decode(row.tolist()) for row in batch]
    # seqio's byte and SentencePiece vocabularies write padding as they like.
    if kind in FAST:
        assert [text.decode() for text in decoded] == expected
        one = vocab.decode_tf(tf.constant(batch[0], tf.int32))
        assert one.shape == () and one.numpy().decode() == expected[0]
        assert vocab.decode_tf(tf.zeros([2, 0], tf.int32)).numpy().tolist() == [b"", b""]


# Numbers.


@pytest.mark.parametrize("kind", FAST)
def test_numbers_are_hugging_faces_plus_the_offset(folder, vocabulary, kind):
    vocab, tokenizer = vocabulary(kind), theirs(folder(kind))
    assert vocab.token_offset == (0 if kind in ("unigram", "word_piece") else 1)
    for text in (*TEXTS.values(), "", " ", "a  b\n\tc"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert vocab.encode(text) == [i + vocab.token_offset for i in expected]
    assert vocab.vocab_size - vocab.token_offset == tokenizer.get_vocab_size()


def test_a_file_that_asks_for_truncation_and_padding_gets_neither(vocabulary):
    vocab = vocabulary("word_piece")  # 16 tokens
    assert len(vocab.encode(TEXTS["han"])) > 20 and len(vocab.encode("ab")) < 3
    assert len(vocab.encode_pair(TEXTS["han"])[0]) > 22


def test_gpt2s_token_0_is_a_word(folder, vocabulary):
    vocab = vocabulary("byte_level")
    assert theirs(folder("byte_level")).token_to_id("!") == 0
    assert vocab.encode("!") == [1] and vocab.decode([1, 1, 0]) == "!!"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte_level", {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": None}),
        ("roberta", {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>"}),
        ("llama", {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": None, "cls": None}),
        ("unigram", {"bos": None, "eos": "</s>", "unk": "<unk>"}),
        ("word_piece", {"eos": "[SEP]", "unk": "[UNK]", "sep": "[SEP]", "cls": "[CLS]"}),
    ],
)
def test_special_tokens_are_in_our_numbering_and_not_in_texts(folder, vocabulary, kind, expected):
    vocab, tokenizer = vocabulary(kind), theirs(folder(kind))
    for name, token in expected.items():
        ours = getattr(vocab, f"{name}_id")
        assert ours == (
            None if token is None else tokenizer.token_to_id(token) + vocab.token_offset
        )
    ids = vocab.encode("ab")
    marks = {vocab.bos_id, vocab.cls_id} - {None, vocab.eos_id}
    assert vocab.decode([*marks, *ids, 0, vocab.eos_id]) == "ab"


def test_padding_spelt_out_in_a_text_is_not_padding(folder, vocabulary):
    for kind, pad in (("unigram", "<pad>"), ("word_piece", "[PAD]")):
        vocab = vocabulary(kind)
        text = f"ab {pad} ab"
        assert 0 in theirs(folder(kind)).encode(text, add_special_tokens=False).ids
        ids = vocab.encode(text)
        assert 0 not in ids and ids.count(vocab.unk_id) == 1
        file = folder(kind) / "tokenizer.json"
        without = vocabularies.HuggingFaceVocabulary(file, eos_id=1)
        assert without.encode(text) == [i for i in ids if i != vocab.unk_id]
        tokens, kinds = without.encode_pair(text)
        assert 0 not in tokens and len(tokens) == len(kinds)


def test_sentinels_are_the_highest_ids_in_falling_order(vocabulary):
    vocab = vocabulary("unigram")
    assert vocab.extra_ids == 3
    top = vocab.vocab_size - 1
    assert vocab.encode("<extra_id_0>")[-1] == top and vocab.encode("<extra_id_2>")[-1] == top - 2
    assert vocab.decode([top, top - 1, 1]) == "<extra_id_0><extra_id_1>"
    assert vocab.decode([*vocab.encode("ab"), top + 50]) == "ab<unk>"
    old = vocabulary("sentence_piece")
    assert old.extra_ids == 100 and old.vocab_size == 500
    assert old.decode([499]) == "<extra_id_0>"
    assert vocabulary("byt5").extra_ids == 125 and vocabulary("byt5").vocab_size == 384


def test_ids_beyond_the_last_are_dropped_where_there_is_no_unknown(vocabulary):
    vocab = vocabulary("byte_level")
    assert vocab.decode([*vocab.encode("ab"), vocab.vocab_size + 7]) == "ab"


# Templates.


def test_pairs_stand_in_the_tokenizers_template_with_token_types(folder, vocabulary):
    for kind in ("word_piece", "roberta", "unigram", "llama"):
        vocab, tokenizer = vocabulary(kind), theirs(folder(kind))
        for pair in ((TEXTS["latin"],), (TEXTS["greek"], TEXTS["thai"]), ("", "ab")):
            expected = tokenizer.encode(*pair)
            tokens, kinds = vocab.encode_pair(*pair)
            assert tokens == [i + vocab.token_offset for i in expected.ids]
            assert kinds == expected.type_ids
    bert = vocabulary("word_piece")
    a, b = bert.encode("ab"), bert.encode("ba ba")
    tokens, kinds = bert.encode_pair("ab", "ba ba")
    assert tokens == [bert.cls_id, *a, bert.sep_id, *b, bert.sep_id]
    assert kinds == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    roberta = vocabulary("roberta")
    a, b = roberta.encode("ab"), roberta.encode("ba")
    tokens, kinds = roberta.encode_pair("ab", "ba")
    assert tokens == [1, *a, 3, 3, *b, 3] and set(kinds) == {0}


def test_pairs_are_cut_as_the_library_cuts_them(folder, vocabulary):
    for kind in ("word_piece", "roberta"):
        vocab, tokenizer = vocabulary(kind), theirs(folder(kind))
        texts = ["ab", TEXTS["han"][:9], TEXTS["latin"], TEXTS["emoji"]]
        pairs = [(a,) for a in texts] + [(a, b) for a in texts for b in texts]
        for length in (4, 5, 8, 13, 30, 200):
            tokenizer.enable_truncation(length)
            for pair in pairs:
                expected = tokenizer.encode(*pair)
                tokens, kinds = vocab.encode_pair(*pair, max_length=length)
                assert tokens == [i + vocab.token_offset for i in expected.ids]
                assert kinds == expected.type_ids


def test_pairs_in_tensorflow(vocabulary):
    vocab = vocabulary("word_piece")
    first, second = TEXTS["kana"], TEXTS["hebrew"]
    ds = tf.data.Dataset.from_tensors((first, second)).map(
        lambda a, b: (vocab.encode_pair_tf(a, b, max_length=20), vocab.encode_pair_tf(a))
    )
    assert ds.element_spec == ((tf.TensorSpec([None], tf.int32),) * 2,) * 2
    (both, one), *_ = ds.as_numpy_iterator()
    assert [x.tolist() for x in both] == list(vocab.encode_pair(first, second, max_length=20))
    assert [x.tolist() for x in one] == list(vocab.encode_pair(first))


def test_a_template_that_is_not_there_or_does_not_fit_is_an_error(vocabulary):
    with pytest.raises(ValueError, match="no template with special tokens; use `encode`"):
        vocabulary("byte_level").encode_pair("a", "b")
    with pytest.raises(ValueError, match="max_length=2 leaves no room for the template's 3 tokens"):
        vocabulary("word_piece").encode_pair("a", "b", max_length=2)


# Objects.


def test_vocabularies_are_equal_by_content(folder, vocabulary, tmp_path):
    vocab = vocabulary("llama")
    tokenizer_files.copy(folder("llama"), tmp_path / "base")
    again = vocabularies.vocabulary_of(tmp_path / "base")
    assert again == vocab and again.file != vocab.file and str(again) != str(vocab)
    assert not again != vocab
    assert pickle.loads(pickle.dumps(vocab)) == vocab == copy.deepcopy(vocab)
    assert pickle.loads(pickle.dumps(vocab)).encode("ab") == vocab.encode("ab")
    assert len(pickle.dumps(vocab)) < 2000
    settings = dict(token_offset=1, bos_id=2, eos_id=3, unk_id=1)
    make = vocabularies.HuggingFaceVocabulary
    assert make(vocab.file, **settings) == vocab
    for change in ({"token_offset": 0}, {"eos_id": 2}, {"extra_ids": 1}):
        assert make(vocab.file, **{**settings, **change}) != vocab
    assert make(folder("roberta") / "tokenizer.json", **settings) != vocab
    assert vocab != seqio.ByteVocabulary()
    # The same path, written anew, is another vocabulary.
    other = (folder("roberta") / "tokenizer.json").read_bytes()
    (tmp_path / "base" / "tokenizer.json").write_bytes(other)
    assert make(tmp_path / "base" / "tokenizer.json", **settings) != vocab
    assert again == vocab


def test_threads_share_a_vocabulary(folder):
    file = folder("llama") / "tokenizer.json"
    vocab = vocabularies.HuggingFaceVocabulary(file, token_offset=1, eos_id=3)
    texts = list(TEXTS.values()) * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: vocab.decode(vocab.encode(text)), texts))
    assert found == texts


def test_what_cannot_be_a_vocabulary_is_refused(folder, tmp_path):
    make, file = vocabularies.HuggingFaceVocabulary, folder("llama") / "tokenizer.json"
    with pytest.raises(ValueError, match="token_offset must be 0 or 1, got 2"):
        make(file, token_offset=2)
    with pytest.raises(ValueError, match="eos_id must be above 0, got 0"):
        make(file, eos_id=0)
    with pytest.raises(hub.HubError, match="nowhere.json is not a file"):
        make(tmp_path / "nowhere.json")
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(hub.HubError, match="holds no tokenizer.json, .* but: weights.txt"):
        vocabularies.vocabulary_of(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(hub.HubError, match="older kind of tokenizer, transformers writes"):
        vocabularies.vocabulary_of(tmp_path)
    with pytest.raises(hub.HubError, match="is not a folder"):
        vocabularies.vocabulary_of(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ALL)
def test_a_copied_folder_gives_the_same_vocabulary(folder, vocabulary, tmp_path, kind):
    tokenizer_files.copy(folder(kind), tmp_path)
    ours = vocabularies.vocabulary_of(tmp_path)
    assert type(ours) is type(vocabulary(kind))
    for text in TEXTS.values():
        assert list(ours.encode(text)) == list(vocabulary(kind).encode(text))
    for name in ("eos_id", "unk_id", "extra_ids", "vocab_size"):
        assert getattr(ours, name) == getattr(vocabulary(kind), name)


def test_gin_files_may_name_a_folder(folder):
    gin.parse_config(
        f"""
        from __gin__ import dynamic_registration
        from modjax.data import vocabularies
        vocabularies.vocabulary_of.path = {str(folder("llama"))!r}
        """
    )
    made = gin.get_configurable("vocabularies.vocabulary_of")()
    assert made == vocabularies.vocabulary_of(folder("llama"))


# With networks and batches.


def test_a_vocabulary_that_does_not_fit_the_network_is_an_error(vocabulary):
    llama, unigram, size = vocabulary("llama"), vocabulary("unigram"), types.SimpleNamespace
    rows = llama.vocab_size - 1
    vocabularies.check_fits(llama, size(vocab_size=rows, token_offset=1), "task 't'")
    vocabularies.check_fits(unigram, size(vocab_size=unigram.vocab_size), "task 't'")
    vocabularies.check_fits(llama, size(), "task 't'")
    with pytest.raises(
        ValueError, match=f"task 't': .* has {rows} tokens, the base {rows - 1} emb"
    ):
        vocabularies.check_fits(llama, size(vocab_size=rows - 1, token_offset=1), "task 't'")
    for vocab, config in (
        (llama, size(vocab_size=9999)),
        (unigram, size(vocab_size=9999, token_offset=1)),
        (seqio.ByteVocabulary(), size(vocab_size=9999, token_offset=1)),
    ):
        with pytest.raises(ValueError, match="task 't': token t of the vocabulary stands for row"):
            vocabularies.check_fits(vocab, config, "task 't'")


@pytest.mark.parametrize("kind", ALL)
def test_a_vocabulary_is_that_of_the_base_wherever_it_was_read_from(
    folder, vocabulary, tmp_path, kind
):
    shutil.copytree(folder(kind), tmp_path / "copy")
    base = vocabularies.of_base(tmp_path / "copy")
    vocabularies.check_same(vocabulary(kind), base, "task 't'")
    for other in set(ALL) - {kind}:
        with pytest.raises(ValueError, match="task 't' is in another vocabulary than its base: "):
            vocabularies.check_same(vocabulary(other), base, "task 't'")


def test_two_libraries_may_read_one_tokenizer(folder, vocabulary, tmp_path):
    pieces = vocabulary("sentence_piece")
    model = pieces.tf_tokenizer and pieces.tokenizer
    known = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(known, model.unk_id()))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fast = vocabularies.HuggingFaceVocabulary(tmp_path / "tokenizer.json", eos_id=1)
    for one, other in ((fast, pieces), (pieces, fast)):
        assert one != other
        vocabularies.check_same(one, other, "task 't'")


def test_sentinels_make_no_other_vocabulary_and_an_unknown_base_refuses_none(tmp_path):
    bytes_alone = seqio.ByteVocabulary(extra_ids=0)
    vocabularies.check_same(bytes_alone, seqio.ByteVocabulary(extra_ids=125), "task 't'")
    for unknown in (None, tmp_path, tmp_path / "nowhere", "random"):
        assert vocabularies.of_base(unknown) is None
    vocabularies.check_same(bytes_alone, None, "task 't'")


def test_a_batch_with_tokens_that_have_no_embedding_is_refused_by_name():
    space = FeatureSpace((), ("fine", "odd"))
    batch = {
        "encoder_input_tokens": np.array([[5, 9, 0], [1, 10, 0]]),
        "encoder_positions": np.full((2, 3), 99),
        "tasks": np.array([[1], [2]]),
    }
    config = types.SimpleNamespace(vocab_size=10, token_offset=1)
    checks.check_ids(batch, config, space)  # token 10 is row 9
    checks.check_ids(batch, types.SimpleNamespace(), space)  # nothing is known
    message = "encoder_input_tokens holds token 10 in a row of odd.*tokens 0 to 9: a preprocessor"
    with pytest.raises(ValueError, match=message):
        checks.check_ids(batch, types.SimpleNamespace(vocab_size=10), space)
    batch["encoder_input_tokens"][0, 0] = -1
    with pytest.raises(ValueError, match="holds token -1 in a row of fine"):
        checks.check_ids(batch, config, space)


@pytest.fixture(params=["byte_level", "unigram", "sentence_piece"])
def task(request, vocabulary):
    vocab, name = vocabulary(request.param), f"vocab_{request.param}"
    features = {key: seqio.Feature(vocab, add_eos=True) for key in ("inputs", "targets")}
    rows = [{"inputs": f"! {text}", "targets": text} for text in TEXTS.values()]
    registry.add_task(
        name,
        ExamplesSource({"train": rows}),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        features,
        metadata={"task": "copy", "language": "all"},
    )
    yield name, vocab
    registry.remove(name)


def test_examples_go_through_packed_and_plain_batches_and_back_to_text(task):
    name, vocab = task
    lengths = {"inputs": 300, "targets": 300}
    packed, plain, where = pipeline.packed_and_not(
        name,
        "train",
        registry.feature_space(name),
        task_feature_lengths=lengths,
        num_examples=len(TEXTS),
    )
    assert len(packed["tasks"]) < len(TEXTS) == len(plain["tasks"])
    found = set()
    for i, (row, segment) in enumerate(where):
        for stream in ("encoder_input", "decoder_target"):
            half = stream.split("_")[0]
            here = packed[f"{half}_segment_ids"][row] == segment
            one = packed[f"{stream}_tokens"][row][here]
            other = plain[f"{stream}_tokens"][i]
            assert vocab.decode(one.tolist()) == vocab.decode(other.tolist())
        found.add(vocab.decode(plain["decoder_target_tokens"][i].tolist()))
        assert vocab.decode(plain["encoder_input_tokens"][i].tolist()).startswith("! ")
    assert found == set(TEXTS.values())


@pytest.mark.parametrize("task", ["llama"], indirect=True)
def test_the_position_of_an_input_with_such_a_vocabulary_is_stored(task, tmp_path):
    name, _ = task

    def iterate():
        return pipeline.train_iterator(
            name,
            "train",
            registry.feature_space(name),
            task_feature_lengths={"inputs": 150, "targets": 150},
            batch_size=2,
            seed=0,
        )

    one, two = iterate(), iterate()
    next(one)
    one.save(str(tmp_path))
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["iterator_stored"]
    assert two.restore(str(tmp_path)) == "exact"
    expected, restored = next(one), next(two)
    for key, value in expected.items():
        np.testing.assert_array_equal(restored[key], value, err_msg=key)
