"""Bracketed parses are read in every published spacing; nothing a model writes crashes them."""

import random

import pytest

from modjax.evaluation import parses
from modjax.evaluation.parses import Malformed, Node

NESTED = "[IN:REMIND [SL:PERSON me ] [SL:TODO [IN:CALL [SL:CONTACT Ana Li ] ] ] ]"


def test_a_parse_becomes_a_tree():
    assert parses.read(NESTED) == Node(
        "IN:REMIND",
        (
            Node("SL:PERSON", ("me",)),
            Node("SL:TODO", (Node("IN:CALL", (Node("SL:CONTACT", ("Ana Li",)),)),)),
        ),
    )


@pytest.mark.parametrize(
    "text",
    [
        "[IN:REMIND [SL:PERSON me][SL:TODO[IN:CALL[SL:CONTACT Ana Li]]]]",
        "  [ IN:REMIND\t[SL:PERSON  me ]\n[SL:TODO [IN:CALL [ SL:CONTACT Ana   Li ]]] ] ",
    ],
)
def test_spacing_around_brackets_and_words_does_not_matter(text):
    assert parses.read(text) == parses.read(NESTED)


def test_words_of_an_intent_are_kept_as_in_the_older_form():
    tree = parses.read("[IN:REMIND Remind [SL:PERSON me ] please now ]")
    assert tree == Node("IN:REMIND", ("Remind", Node("SL:PERSON", ("me",)), "please now"))


@pytest.mark.parametrize(
    "text", [NESTED, "[IN:STOP ]", "[IN:A go [SL:B x : 5 ] on ]", "[IN:ก [SL:B เทศกาล ดนตรี ] ]"]
)
def test_a_tree_written_in_the_published_form_is_the_text_it_came_from(text):
    assert parses.write(parses.read(text)) == text


@pytest.mark.parametrize(
    ("text", "reason", "position"),
    [
        ("", "empty", 0),
        ("   ", "empty", 0),
        ("hello", "words outside", 0),
        ("[IN:A ] x", "words outside", 7),
        ("[IN:A", "1 brackets are not closed", 5),
        ("[IN:A [SL:B x ]", "1 brackets are not closed", 15),
        ("]", "without an opening", 0),
        ("[IN:A ] ]", "without an opening", 8),
        ("[IN:A ] [IN:B ]", "second tree", 8),
        ("[A b ]", "expected a label", 0),
        ("[ ]", "expected a label", 0),
        ("[IN: ]", "expected a label", 0),
        ("[IN:A [[SL:B ] ]", "expected a label", 6),
        ("[IN:A " * 5000 + "]" * 5000, "nested deeper than 100", 600),
    ],
)
def test_what_is_no_tree_says_why_and_where(text, reason, position):
    result = parses.read(text)
    assert isinstance(result, Malformed)
    assert reason in result.reason
    assert result.position == position


def test_any_text_is_read_without_an_exception_and_every_tree_can_be_compared():
    rng = random.Random(0)
    pieces = [
        "[",
        "]",
        "[IN:A",
        "[SL:B",
        " ",
        " ] ",
        "x",
        "|",
        "\x00",
        "\ud800",
        "ก",
        "IN:",
        "[in:a ",
    ]
    trees = 0
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        result = parses.read(text)
        if isinstance(result, Node):
            trees += 1
            assert parses.read(parses.write(result)) == result
            assert parses.canonical(result) and parses.skeleton(result)
    assert trees > 20


def test_canonical_forms_ignore_order_of_siblings_but_not_nesting_or_the_owner_of_words():
    def form(text):
        return parses.canonical(parses.read(text))

    assert form("[IN:A [SL:B x ] [SL:C y ] ]") == form("[IN:A [SL:C y ] [SL:B x ] ]")
    assert form("[IN:A [SL:B x ] [SL:C y ] ]") != form("[IN:A [SL:B y ] [SL:C x ] ]")
    assert form("[IN:A [SL:B [IN:C ] ] ]") != form("[IN:A [SL:B ] [IN:C ] ]")
    assert form("[IN:A [SL:B x ] [SL:B x ] ]") != form("[IN:A [SL:B x ] ]")
    assert form("[IN:A b ]") != form("[IN:A|b ]")


def test_skeletons_keep_labels_and_nesting_only():
    def form(text):
        return parses.skeleton(parses.read(text))

    assert form("[IN:A [SL:B x ] [SL:C y ] ]") == form("[IN:A [SL:C z w ] [SL:B ] ]")
    assert form("[IN:A [SL:B x ] ]") != form("[IN:A [SL:b x ] ]")
    assert form("[IN:A [SL:B x ] [SL:B y ] ]") != form("[IN:A [SL:B x ] ]")
