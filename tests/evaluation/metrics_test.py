"""Each metric against values worked out by hand."""

import itertools
import random

import numpy as np
import pytest

from modjax.evaluation import metrics

GOLD = "[IN:REMIND [SL:PERSON me ] [SL:DATE_TIME at 5:30 ] ]"


def value(name, target, prediction, language=None):
    score = metrics.get(name)([target], [prediction], language=language)
    assert score.n == 1
    assert score.per_example == pytest.approx((score.value,))
    return score.value


@pytest.mark.parametrize(
    ("prediction", "exact", "inexact", "structure", "malformed"),
    [
        (GOLD, 100, 100, 100, 0),
        (f" {GOLD}\n", 100, 100, 100, 0),
        ("[IN:REMIND [SL:DATE_TIME At 5 : 30. ] [SL:PERSON ME ] ]", 0, 100, 100, 0),
        ("[IN:REMIND [SL:PERSON me ] [SL:DATE_TIME at six ] ]", 0, 0, 100, 0),
        ("[IN:REMIND [SL:PERSON [SL:DATE_TIME at 5:30 ] me ] ]", 0, 0, 0, 0),
        ("[IN:CALL [SL:PERSON me ] [SL:DATE_TIME at 5:30 ] ]", 0, 0, 0, 0),
        ("[IN:REMIND [SL:PERSON me ] [SL:DATE_TIME at 5:30 ]", 0, 0, 0, 100),
        ("", 0, 0, 0, 100),
    ],
)
def test_parse_metrics_forgive_form_then_words_then_nothing(
    prediction, exact, inexact, structure, malformed
):
    assert value("exact_match", GOLD, prediction) == exact
    assert value("inexact_match", GOLD, prediction) == inexact
    assert value("structure_match", GOLD, prediction) == structure
    assert value("malformed", GOLD, prediction) == malformed


@pytest.mark.parametrize("name", ["inexact_match", "structure_match"])
def test_a_target_that_is_no_parse_is_an_error_that_shows_it(name):
    with pytest.raises(ValueError, match=r"'O B-X' is no bracketed parse: words outside"):
        metrics.get(name)(["O B-X"], ["O"])


def test_values_are_means_and_examples_keep_their_order():
    score = metrics.exact_match(["a", "b", "c", "d"], ["a", "x", "c", "x"])
    assert score == metrics.Score(50.0, 4, (100.0, 0.0, 100.0, 0.0))


@pytest.mark.parametrize(
    ("target", "prediction", "language", "f1", "exact"),
    [
        ("the big cat", "Big cat!", "en", 100, 100),
        ("the big cat", "Big cat!", None, 80, 0),
        ("die Katze", "the Katze", "en", 100 * 2 / 3, 0),
        ("big cat", "cat big", "en", 100, 0),
        ("a b c", "b c d e", None, 100 * 4 / 7, 0),
        ("a a", "a", None, 100 * 2 / 3, 0),
        (["nope", "new york city"], "New York", "en", 80, 0),
        ([], "", "en", 100, 100),
        ([], "something", "en", 0, 0),
        ("東京", "東", "ja", 100 * 2 / 3, 0),
    ],
)
def test_answers_count_by_their_best_gold_answer(target, prediction, language, f1, exact):
    assert value("token_f1", target, prediction, language) == pytest.approx(f1)
    assert value("qa_exact_match", target, prediction, language) == exact


@pytest.mark.parametrize(
    ("target", "prediction", "f1"),
    [
        ("police killed the gunman", "police kill the gunman", 75),  # two examples of Lin 2004
        ("police killed the gunman", "the gunman kill police", 50),
        ("The Cat-sat!", "the cat sat", 100),
        ("a b c d", "a c b d e", 100 * 2 * 3 / 9),
        (["x", "b c"], "b c", 100),
        ("", "", 100),
        ("", "x", 0),
        ("पुलिस ने मारा", "पुलिस मारा", 80),
        ("東京都", "東都", 80),
    ],
)
def test_rouge_l_is_of_words_in_order_in_any_script(target, prediction, f1):
    assert value("rouge_l", target, prediction, None) == pytest.approx(f1)


def test_the_longest_common_subsequence_is_that_of_trying_all():
    draw = random.Random(0)
    for _ in range(200):
        one, other = ([draw.choice("abc") for _ in range(draw.randrange(7))] for _ in range(2))

        def all_of(words):
            return {c for n in range(len(words) + 1) for c in itertools.combinations(words, n)}

        longest = max(map(len, all_of(one) & all_of(other)))
        assert metrics._common_subsequence(one, other) == longest


def test_span_f1_pools_counts_over_examples():
    score = metrics.span_f1(["B-A I-A O B-B", "O O"], ["B-A I-A O O", "B-A O"])
    assert score.value == pytest.approx(100 * 2 * 1 / (2 + 2))
    assert score.per_example == pytest.approx((100 * 2 / 3, 0))
    assert metrics.span_f1(["O O"], ["O"]).value == 100


def test_tag_accuracy_charges_for_missing_and_for_extra_tags():
    score = metrics.tag_accuracy(["N V N", "N", ""], ["N N", "N V V", ""])
    assert score.value == pytest.approx(100 * 2 / 6)
    assert score.per_example == pytest.approx((100 / 3, 100 / 3, 100))


@pytest.mark.parametrize("name", ["span_f1", "tag_accuracy"])
def test_tags_with_several_alternatives_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name} takes one target per example, got 2"):
        metrics.get(name)([["O", "N"]], ["O"])


def test_bleu_and_chrf_agree_with_sacrebleu_and_take_several_references():
    import sacrebleu

    targets = ["the cat sat on the mat today", ["he reads a long book", "he reads a book"]]
    predictions = ["the cat sat on a mat today", "he reads a book"]
    streams = [[targets[0], targets[1][0]], [targets[0], targets[1][1]]]
    bleu, chrf = metrics.bleu(targets, predictions), metrics.chrf(targets, predictions)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    assert bleu.per_example[1] == 100 and bleu.per_example[0] < 100
    assert chrf.per_example[1] == 100 and chrf.per_example[0] < 100


def test_bleu_splits_scripts_without_spaces_into_characters():
    target, prediction = "明日は東京で雨が降ります", "明日は京都で雨が降ります"
    assert metrics.bleu([target], [prediction], language="ja").value > 30
    assert metrics.bleu([target], [prediction]).value == 0


def test_every_metric_takes_empty_predictions_and_stays_between_0_and_100():
    for name, metric in metrics.METRICS.items():
        gold = ["1", "2.5"] if name == "pearson" else [GOLD, GOLD]
        score = metric(gold, ["", gold[1]], language="en")
        assert 0 <= score.value <= 100, name
        assert len(score.per_example) == score.n == 2, name


def test_an_unknown_metric_names_the_nearest_and_who_asked():
    with pytest.raises(metrics.UnknownMetricError, match="task 'x': .*'exact_mach'.*'exact_match'"):
        metrics.get("exact_mach", "task 'x'")


@pytest.mark.parametrize("name", metrics.METRICS)
def test_lists_of_different_or_no_length_are_an_error(name):
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metrics.get(name)(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.get(name)([], [])


def test_correlations_are_those_of_the_formulas():
    # Two classes: true positives 3, negatives 2, false positives 1, negatives 2.
    gold, given = list("aaaaabbb"), list("aaabbabb")
    expected = (3 * 2 - 1 * 2) / ((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2)) ** 0.5
    score = metrics.get("matthews")(gold, given)
    assert score.value == pytest.approx(100 * expected)
    assert score.per_example == (100, 100, 100, 0, 0, 0, 100, 100)
    assert metrics.get("matthews")(gold, ["a"] * 8).value == 0
    assert metrics.get("matthews")(["a", "b"], ["b", "a"]).value == pytest.approx(-100)
    three = metrics.get("matthews")(list("aabbcc"), list("aabbca")).value
    assert three == pytest.approx(100 * (5 * 6 - 12 + 0) / ((36 - 12) * (36 - 14)) ** 0.5)

    numbers, guesses = ["1", "2.5", "4"], ["2", "1", "5.5"]
    expected = np.corrcoef([1, 2.5, 4], [2, 1, 5.5])[0, 1]
    assert metrics.get("pearson")(numbers, guesses).value == pytest.approx(100 * expected)
    assert metrics.get("pearson")(numbers, ["3"] * 3).value == 0
    # 3.7 times three, by three, is another number.
    for targets in (["3.7"] * len(numbers), numbers):
        score = metrics.get("pearson")(targets, ["3.7"] * len(numbers))
        assert score.value == 0 and not any(score.per_example)
    # What is no number is neither above nor below the others.
    some = metrics.get("pearson")(["1", "2", "3"], ["1", "two", "5"])
    assert some.value == pytest.approx(100) and some.per_example[1] == 0
    with pytest.raises(ValueError, match="the target 'two' is none"):
        metrics.get("pearson")(["1", "two"], ["1", "2"])
