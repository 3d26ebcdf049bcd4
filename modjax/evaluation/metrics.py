"""What predictions are worth: metrics over lists of targets and predictions.

Every metric is a function `(targets, predictions, *, language=None) -> Score`. A target is a string
or a list of strings that are all right, of which the best counts. Values are percentages of the
whole list (0 to 100; correlations from -100); each example's own value stands in `Score.per_example`.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

from modjax.errors import nearest
from modjax.evaluation import parses, tags
from modjax.evaluation.text import answer_words, words, writes_without_spaces

Target = str | Sequence[str]


class UnknownMetricError(ValueError):
    """A metric name that is not in `METRICS`."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric's result.

    Attributes:
      value: 0 to 100 (correlations from -100), over all examples.
      n: number of examples.
      per_example: one value (0 to 100) each, in order. Their mean is `value`, unless the metric
        pools counts over examples (span_f1, tag_accuracy, bleu, chrf, matthews).
    """

    value: float
    n: int
    per_example: tuple[float, ...]


class Metric(Protocol):
    """The form of a metric; see the module's text."""

    def __call__(
        self, targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
    ) -> Score: ...


def alternatives(target: Target) -> tuple[str, ...]:
    """The strings that are right; an empty list of answers means that nothing is to be answered."""
    return (target,) if isinstance(target, str) else tuple(target) or ("",)


def exact_match(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of predictions equal to the target (white space at both ends does not count)."""
    return _mean_of(targets, predictions, lambda t, p: t.strip() == p.strip())


def inexact_match(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of parses equal to the target but for the form of slot text and the order of siblings.

    That is the same tree after Unicode (NFKC), case, white space and punctuation are normalised in
    slot text, siblings in any order. A malformed prediction is wrong.

    Raises:
      ValueError: a target is no bracketed parse.
    """
    return _parse_match(targets, predictions, parses.canonical)


def structure_match(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of parses with the target's labels (intents and slots) in the same nesting.

    Siblings count in any order: in published parses their order is that of the words, which differs
    from language to language and says nothing about the meaning. Words do not count.

    Raises:
      ValueError: a target is no bracketed parse.
    """
    return _parse_match(targets, predictions, parses.skeleton)


def malformed(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of predictions that are no bracketed parse.

    Lower is better. What can be read is said in `parses.read`.
    """
    return _mean_of(targets, predictions, lambda _, p: isinstance(parses.read(p), parses.Malformed))


def qa_exact_match(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of answers with the words of a gold answer, in order.

    Words as in `text.answer_words`: case, punctuation and the language's articles do not count.
    """
    read = _answer_reader(language)
    return _mean_of(targets, predictions, lambda t, p: read(t) == read(p))


def token_f1(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Mean F1 of the bags of words of answer and best gold answer (SQuAD, arXiv 1606.05250).

    Words as in `text.answer_words`: articles are dropped only in languages known to have them, and
    in scripts without spaces each letter is a word. Two empty answers agree.
    """
    read = _answer_reader(language)

    def f1(target: str, prediction: str) -> float:
        gold, given = collections.Counter(read(target)), collections.Counter(read(prediction))
        return _f1(sum((gold & given).values()), gold.total(), given.total())

    return _mean_of(targets, predictions, f1)


def rouge_l(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Mean F1 of the longest common subsequence of words with the best reference (ROUGE-L, Lin 2004).

    Natural Instructions are scored by it. Words as in `text.words`, of any script, without stemming; the usual scorer
    of English keeps ASCII letters and digits alone. Two empty texts agree.
    """

    def f1(target: str, prediction: str) -> float:
        gold, given = words(target), words(prediction)
        return _f1(_common_subsequence(gold, given), len(gold), len(given))

    return _mean_of(targets, predictions, f1)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest."""
    row = [0] * (len(other) + 1)
    for word in one:
        last = 0  # of the row above, one place to the left
        for i, candidate in enumerate(other, 1):
            above = row[i]
            row[i] = last + 1 if word == candidate else max(above, row[i - 1])
            last = above
    return row[-1]


def tag_accuracy(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Share of tags that are right, compared place by place, pooled over all examples.

    For the text form of tags see `tags`. A missing tag and one too many are both errors: the total
    is the longer of the two sequences.

    Raises:
      ValueError: a target has several alternatives.
    """
    counts = []
    for target, prediction in _pairs(targets, predictions):
        gold, given = tags.read(_only(target, "tag_accuracy")), tags.read(prediction)
        right = sum(a == b for a, b in zip(gold, given, strict=False))
        counts.append((right, max(len(gold), len(given))))
    total = sum(n for _, n in counts)
    value = 100 * sum(c for c, _ in counts) / total if total else 100.0
    return Score(value, len(counts), tuple(100 * c / n if n else 100.0 for c, n in counts))


def span_f1(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """F1 of labelled spans, counts pooled over all examples.

    For the text form see `tags`. A span is (label, first, last word), as CoNLL's scorer reads them:
    an `I-X` after something else begins a span. A prediction of another length keeps its positions.

    Raises:
      ValueError: a target has several alternatives.
    """
    counts = []
    for target, prediction in _pairs(targets, predictions):
        gold = tags.spans(tags.read(_only(target, "span_f1")))
        given = tags.spans(tags.read(prediction))
        counts.append((len(gold & given), len(gold), len(given)))
    pooled = [sum(column) for column in zip(*counts, strict=True)]
    return Score(100 * _f1(*pooled), len(counts), tuple(100 * _f1(*c) for c in counts))


def bleu(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Corpus BLEU-4 by sacrebleu, cased, exponential smoothing (arXiv 1804.08771).

    Tokenizer `13a`, and `char` for languages written without spaces (zh, ja, th, lo, km, my), so
    that nothing has to be downloaded: compare values only within a language. Per example: sentence
    BLEU with the order limited by the sentence's length.
    """
    from sacrebleu.metrics import BLEU

    tokenizer = "char" if writes_without_spaces(language) else "13a"
    return _sacrebleu(
        BLEU(tokenize=tokenizer),
        BLEU(tokenize=tokenizer, effective_order=True),
        targets,
        predictions,
    )


def chrf(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Corpus chrF2 by sacrebleu: character n-grams to 6, white space left out, the same for all.

    (Popovic 2015; recall counts twice as much as precision.)
    """
    from sacrebleu.metrics import CHRF

    return _sacrebleu(CHRF(), CHRF(), targets, predictions)


def matthews(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Matthews' correlation of two classifications, -100 to 100 (for several classes: Gorodkin 2004).

    0 where all targets, or all predictions, are of one class. Each example's own value is 100 where
    it is right.
    """
    pairs = [(_only(t, "matthews").strip(), p.strip()) for t, p in _pairs(targets, predictions)]
    gold, given = (collections.Counter(side) for side in zip(*pairs, strict=True))
    right = tuple(100.0 * (t == p) for t, p in pairs)
    count, hits = len(pairs), sum(t == p for t, p in pairs)
    covariance = hits * count - sum(gold[label] * given[label] for label in gold)
    spread = [count**2 - sum(n**2 for n in side.values()) for side in (gold, given)]
    value = covariance / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0
    return Score(100.0 * value, count, right)


def pearson(
    targets: Sequence[Target], predictions: Sequence[str], *, language: str | None = None
) -> Score:
    """Pearson's correlation of numbers, -100 to 100; 0 where one side does not vary.

    An example's own value is its part of the mean: the product of both standard scores. A
    prediction that is no number stands at the mean of those that are.

    Raises:
      ValueError: a target is no number.
    """
    pairs = _pairs(targets, predictions)
    gold = [_number(_only(target, "pearson")) for target, _ in pairs]
    for (target, _), number in zip(pairs, gold, strict=True):
        if number is None:
            raise ValueError(f"pearson compares numbers, and the target {target!r} is none.")
    sides = [_standard_scores(side) for side in (gold, [_number(p) for _, p in pairs])]
    parts = tuple(100.0 * t * p for t, p in zip(*sides, strict=True))
    return Score(sum(parts) / len(parts), len(parts), parts)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _standard_scores(values: Sequence[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else 0.0
    filled = [mean if value is None else value for value in values]
    if min(filled) == max(filled):  # the mean of equal values may be another number, by a rounding
        return [0.0] * len(filled)
    deviation = statistics.pstdev(filled, mean)
    return [(value - mean) / deviation for value in filled]


# To add a metric, add it here: tasks name their metrics by these keys.
METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "inexact_match": inexact_match,
    "structure_match": structure_match,
    "malformed": malformed,
    "qa_exact_match": qa_exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "tag_accuracy": tag_accuracy,
    "span_f1": span_f1,
    "bleu": bleu,
    "chrf": chrf,
    "matthews": matthews,
    "pearson": pearson,
}

LOWER_IS_BETTER = frozenset({"malformed"})


def get(name: str, where: str = "") -> Metric:
    """The metric of that name.

    Args:
      name: a key of `METRICS`.
      where: what asked for it, for the error, e.g. "task 'parse_sw'".

    Raises:
      UnknownMetricError: it names the nearest metric and all there are.
    """
    if name not in METRICS:
        place = f"{where}: " if where else ""
        raise UnknownMetricError(f"{place}unknown metric {name!r}.{nearest(name, METRICS)}")
    return METRICS[name]


def _pairs(targets: Sequence[Target], predictions: Sequence[str]) -> list[tuple[Target, str]]:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets but {len(predictions)} predictions.")
    if not targets:
        raise ValueError("There is nothing to score: no targets and no predictions.")
    return list(zip(targets, predictions, strict=True))


def _mean_of(
    targets: Sequence[Target],
    predictions: Sequence[str],
    judge: Callable[[str, str], float],
) -> Score:
    """Mean over examples of the best of `judge(target, prediction)` (0 to 1) over alternatives."""
    values = tuple(
        100.0 * max(float(judge(t, prediction)) for t in alternatives(target))
        for target, prediction in _pairs(targets, predictions)
    )
    return Score(sum(values) / len(values), len(values), values)


def _parse_match(
    targets: Sequence[Target],
    predictions: Sequence[str],
    form: Callable[[parses.Node], str],
) -> Score:
    def same(target: str, prediction: str) -> bool:
        gold, given = parses.read(target), parses.read(prediction)
        if isinstance(gold, parses.Malformed):
            raise ValueError(f"The target {target!r} is no bracketed parse: {gold.reason}.")
        return isinstance(given, parses.Node) and form(gold) == form(given)

    return _mean_of(targets, predictions, same)


def _answer_reader(language: str | None) -> Callable[[str], list[str]]:
    return lambda text: answer_words(text, language)


def _f1(common: int, gold: int, given: int) -> float:
    return 2 * common / (gold + given) if gold + given else 1.0


def _only(target: Target, metric: str) -> str:
    strings = alternatives(target)
    if len(strings) > 1:
        raise ValueError(f"{metric} takes one target per example, got {len(strings)}: {strings}.")
    return strings[0]


def _sacrebleu(corpus, sentence, targets: Sequence[Target], predictions: Sequence[str]) -> Score:
    pairs = [(alternatives(t), p) for t, p in _pairs(targets, predictions)]
    # sacrebleu takes streams of references; an example with fewer of them repeats its first.
    width = max(len(refs) for refs, _ in pairs)
    streams = [[refs[i] if i < len(refs) else refs[0] for refs, _ in pairs] for i in range(width)]
    # Its perfect score may exceed 100 by a rounding error.
    value = min(100.0, corpus.corpus_score([p for _, p in pairs], streams).score)
    each = (sentence.sentence_score(p, list(refs)).score for refs, p in pairs)
    return Score(value, len(pairs), tuple(min(100.0, score) for score in each))
