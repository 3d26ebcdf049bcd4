"""Tags and spans are read as their scorers read them, and mistakes in them are kept."""

import pytest

from modjax.evaluation import tags


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("O O", set()),
        ("B-A I-A O B-A", {("A", 0, 1), ("A", 3, 3)}),
        ("B-A B-A", {("A", 0, 0), ("A", 1, 1)}),
        ("I-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("B-A O I-A", {("A", 0, 0), ("A", 2, 2)}),
        ("B-A E-A I-A S-B S-B", {("A", 0, 1), ("A", 2, 2), ("B", 3, 3), ("B", 4, 4)}),
        ("NOUN NOUN O VERB", {("NOUN", 0, 1), ("VERB", 3, 3)}),
        ("", set()),
    ],
)
def test_spans_are_read_as_the_conll_scorer_reads_them(text, spans):
    assert tags.spans(text.split()) == spans


def test_a_word_before_the_bar_is_not_part_of_the_tag():
    assert tags.read("New|B-LOC  York|I-LOC a|b|O") == ["B-LOC", "I-LOC", "O"]
    assert tags.read("B-LOC I-LOC O") == ["B-LOC", "I-LOC", "O"]
