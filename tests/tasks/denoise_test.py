"""Cutting spans: what is cut and what is kept together are the text."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import byte_tasks, denoise

TOP = byte_tasks.VOCABULARY.vocab_size - 1
TEXT = "the quick brown fox jumps over the lazy dog and sleeps until the morning"


def lessons(make, texts, seed=7):
    encoded = [byte_tasks.VOCABULARY.encode(t) for t in texts]
    data = tf.data.Dataset.from_generator(
        lambda: ({"inputs": t, "targets": t} for t in encoded),
        output_signature=dict.fromkeys(("inputs", "targets"), tf.TensorSpec([None], tf.int32)),
    )
    with seqio.utils.map_seed_manager(seed):
        data = make(byte_tasks.VOCABULARY)(data)
    return [(list(e["inputs"]), list(e["targets"])) for e in data.as_numpy_iterator()]


@pytest.mark.parametrize("lesson", ["fill", "letters", "quote", "shuffled", "restore"])
def test_text_beside_the_tokens_is_theirs_or_is_not_there(lesson):
    ids = byte_tasks.VOCABULARY.encode(TEXT)
    example = {"inputs": ids, "targets": ids, "note": "kept"}
    example |= {"inputs_pretokenized": TEXT, "targets_pretokenized": TEXT}
    ds = tf.data.Dataset.from_tensors(example)
    with seqio.utils.map_seed_manager(3):
        (found,) = getattr(denoise, lesson)(byte_tasks.VOCABULARY)(ds).as_numpy_iterator()
    texts = {name: found[name] for name in found if name.endswith("pretokenized")}
    assert texts == ({"targets_pretokenized": TEXT.encode()} if lesson == "restore" else {})
    assert found["note"] == b"kept"


def without_prompt(ids, prompt):
    prompt_ids = byte_tasks.VOCABULARY.encode(prompt)
    assert ids[: len(prompt_ids)] == prompt_ids
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("texts", [[TEXT] * 20, ["ab", "नमस्ते दुनिया" * 4, TEXT[:17]]])
def test_filling_the_gaps_gives_the_text_back(texts):
    for text, (inputs, targets) in zip(texts, lessons(denoise.fill, texts), strict=True):
        filled, gap = [], {}
        for token in targets:
            if token > 258:
                gap[token] = []
                current = gap[token]
            else:
                current.append(token)
        for token in without_prompt(inputs, "fill: "):
            filled += gap[token] if token > 258 else [token]
        assert byte_tasks.VOCABULARY.decode(filled) == text
        assert list(gap) == [TOP - i for i in range(len(gap))]
        assert all(gap[token] for token in inputs if token > 258), "no gap is empty"


def test_restore_asks_for_the_whole_text_from_one_with_gaps():
    for inputs, targets in lessons(denoise.restore, [TEXT] * 5):
        assert byte_tasks.VOCABULARY.decode(targets) == TEXT
        kept = without_prompt(inputs, "restore: ")
        assert max(kept) == TOP and len(kept) < len(TEXT)


@pytest.mark.parametrize("text", [TEXT, "नमस्ते दुनिया" * 4, "aéจ🙂"])
def test_jumbled_letters_are_the_characters_of_the_text_in_another_order(text):
    lesson = lessons(denoise.letters, [text] * 20)
    jumbles = set()
    for inputs, targets in lesson:
        assert without_prompt(inputs, "copy: ") == targets
        jumbles.add(bytes(token - 3 for token in targets).decode())
    assert {"".join(sorted(jumble)) for jumble in jumbles} == {"".join(sorted(text))}
    assert len(jumbles) > 5


@pytest.mark.parametrize("text", [TEXT, "नमस्ते दुनिया" * 4, "ab"])
def test_a_quote_is_the_marked_spans_of_the_text(text):
    end = TOP + 1 - byte_tasks.VOCABULARY.extra_ids
    for inputs, targets in lessons(denoise.quote, [text] * 10):
        marked = without_prompt(inputs, "quote: ")
        assert byte_tasks.VOCABULARY.decode([t for t in marked if t < 259]) == text
        spans, inside = [], False
        for token in marked:
            inside = inside or token > 258
            spans += [token] if inside else []
            inside = inside and token != end
        assert targets == spans and targets.count(end) == sum(t > end for t in targets) > 0
        assert [t for t in targets if t > end] == [TOP - i for i in range(targets.count(end))]


def test_same_seed_same_gaps_and_other_examples_other_gaps():
    first, again = (lessons(denoise.fill, [TEXT] * 8) for _ in range(2))
    assert first == again
    assert len({tuple(i) for i, _ in first}) > 1
    assert lessons(denoise.fill, [TEXT] * 8, seed=8) != first


@pytest.mark.parametrize("length", [1, 2, 3, 50, 381])
def test_share_and_number_of_gaps_are_as_asked(length):
    for seed in range(5):
        cut = denoise.gaps(length, 0.2, 6.0, 4, tf.constant([seed, 1])).numpy()
        assert cut.shape == (length,) and not cut[0]
        assert cut.sum() == (min(max(round(0.2 * length), 1), length - 1))
        runs = int(np.sum(cut[1:] & ~cut[:-1]))
        assert runs == min(max(round(cut.sum() / 6), 1), 4, cut.sum())


def test_a_vocabulary_without_spare_ids_is_refused():
    with pytest.raises(ValueError, match="extra_ids"):
        denoise.fill(seqio.ByteVocabulary())


def test_shuffled_tokens_are_copied_and_some_of_them_are_others():
    text = byte_tasks.VOCABULARY.encode(TEXT)
    lesson = lessons(denoise.shuffled, [TEXT] * 40)
    foreign = 0
    for inputs, targets in lesson:
        assert without_prompt(inputs, "copy:") == targets and len(targets) == 12
        assert all(3 <= token <= TOP - byte_tasks.VOCABULARY.extra_ids for token in targets)
        foreign += sum(token not in text for token in targets)
    # Half of the tokens are drawn, nearly all of them letters that the text lacks.
    assert 0.35 < foreign / (12 * 40) < 0.6
    assert len({tuple(targets) for _, targets in lesson}) == 40


def test_without_foreign_tokens_shuffled_tokens_are_the_texts():
    def make(vocabulary):
        return denoise.shuffled(vocabulary, foreign=0.0, most=200)

    for _, targets in lessons(make, [TEXT] * 3):
        assert sorted(targets) == sorted(byte_tasks.VOCABULARY.encode(TEXT))
        assert targets != byte_tasks.VOCABULARY.encode(TEXT)
