"""Babel in words: every text is known pieces, and comes back as it was."""

import itertools

import pytest

from modjax.data import registry
from tasks import babel, babel_words
from tasks.babel_examples import SPLITS, Babel
from tasks.babel_world import TASKS, BabelConfig

WORLD = Babel(BabelConfig(eval_examples=20, train_examples=40, pretrain_examples=60))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    babel_words.write_tokenizer(WORLD, path)
    return babel_words.vocabulary(path)


def texts():
    for code, split in itertools.product(WORLD.languages, SPLITS):
        for task in TASKS:
            yield from WORLD.examples(task, code, split)
        for kind in ("translate", "fill"):
            yield from WORLD.pretrain_examples(kind, code, split)
    for split in SPLITS:
        yield from babel_words.copy_examples(WORLD, split)


def test_every_text_is_known_pieces_and_comes_back(vocabulary):
    number = 0
    for example in texts():
        for field in ("inputs", "targets"):
            tokens = vocabulary.encode(example[field])
            assert vocabulary.unk_id not in tokens, example
            assert vocabulary.decode(tokens) == example[field]
            number += 1
    assert number > 10_000


def test_a_word_and_its_tag_are_two_pieces(vocabulary):
    tokens = vocabulary.encode("kot|PER mala|O")
    assert len(tokens) == 4
    assert vocabulary.decode(tokens[2:]) == "mala|O"


def test_a_word_of_another_world_is_unknown(vocabulary):
    assert vocabulary.encode("parse: xylophone")[1:] == [vocabulary.unk_id]


def test_what_is_copied_has_every_kind_of_piece():
    copied = " ".join(
        example["targets"] for example in babel_words.copy_examples(Babel(), "validation")
    )
    assert all(piece in copied for piece in ("[SL:", "[IN:", "|", "]", ">ta"))
    assert not any(word.startswith("|") for word in copied.split(" "))


def test_a_world_in_words_is_registered_with_its_vocabulary(vocabulary):
    babel.register(WORLD.config, "inwords", vocabulary)
    try:
        feature = babel.seqio.TaskRegistry.get("inwords_parse_ta").output_features["targets"]
        assert feature.vocabulary == vocabulary and feature.add_eos
        assert len(registry.tasks_of("inwords_train")) == 39
    finally:
        babel.unregister("inwords")
