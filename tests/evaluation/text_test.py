"""Text is normalised by rules of its own language and script, not by those of English."""

import pytest

from modjax.evaluation import text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Café", "Cafe\u0301"),  # composed and decomposed
        ("ﬁve ５", "five 5"),  # compatibility forms
        ("STRASSE", "straße"),
        ("5:30", "5 : 30"),
        ("l'heure", "l’ heure"),
        ("  a\u00a0 b\t", "a b"),
        ("¿qué?", "qué"),
        ("「東京 」 へ", "東京へ"),
        ("เทศกาล ดนตรี", "เทศกาลดนตรี"),
        ("कल सुबह।", "कल  सुबह"),
        ("na\u200dme", "name"),
    ],
)
def test_texts_that_differ_in_form_only_are_equal(one, other):
    assert text.normalise(one) == text.normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("inside", "in side"),
        ("5 30", "530"),
        ("resume", "résumé"),
        ("कल", "काल"),
        ("ก", "ข"),
        ("1", "2"),
    ],
)
def test_texts_that_differ_in_letters_or_words_are_not(one, other):
    assert text.normalise(one) != text.normalise(other)


@pytest.mark.parametrize(
    ("answer", "language", "words"),
    [
        ("The cat's hat.", "en", ["cats", "hat"]),
        ("The cat", None, ["the", "cat"]),
        ("a die", "de", ["a"]),
        ("Die Katze", "de", ["katze"]),
        ("la casa de la playa", "es", ["casa", "de", "playa"]),
        ("l’Espagne et la France", "fr", ["espagne", "et", "france"]),
        ("एक the बिल्ली।", "hi", ["एक", "the", "बिल्ली"]),
        ("The The", "en", ["the", "the"]),
        ("", "en", []),
        ("«»", "fr", []),
        ("東京タワー", "ja", list("東京タワー")),
        ("iPhone12を買う", "ja", ["iphone12", "を", "買", "う"]),
        ("ปี 2018", "th", ["ปี", "2018"]),
    ],
)
def test_answers_are_split_by_the_rules_of_their_language(answer, language, words):
    assert text.answer_words(answer, language) == words


def test_a_region_or_script_does_not_hide_the_language():
    assert text.writes_without_spaces("zh_Hans") and text.writes_without_spaces("ja-JP")
    assert not text.writes_without_spaces("en") and not text.writes_without_spaces(None)
    assert text.answer_words("the cat", "en-GB") == ["cat"]
