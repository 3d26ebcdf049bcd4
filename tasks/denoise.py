"""Pretraining on plain text: give back what was cut out of it, the whole of it, or a jumble.

`fill` is span corruption (T5, arXiv 1910.10683; over bytes as in ByT5, arXiv 2105.13626): random
spans are cut out, a sentinel marks each gap, and the target is each sentinel with what was cut, and
one more sentinel where the text goes on after the last gap.
`restore` cuts in the same way and asks for the whole text (as BART, arXiv 1910.13461): a model that
does nothing but fill gaps never learns to copy, and parses, tags and answers are mostly copies.
`letters` and `shuffled` ask for a copy of a jumble, which no knowledge of a language helps to write. `quote` asks
for marked spans of the text and nothing between them: to jump from one to the next, as parses do.
"""

from collections.abc import Callable

import seqio
import tensorflow as tf

# Padding, the end mark and the unknown come before the bytes of a ByteVocabulary, and before other tokens.
_SPECIAL = 3


def fill(
    vocabulary: seqio.Vocabulary, density: float = 0.15, mean_span: float = 12.0
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor: `fill: text with gaps` to the sentinels and what stood in the gaps.

    Args:
      vocabulary: its highest ids serve as sentinels, downward from the last.
      density: share of the tokens that is cut.
      mean_span: mean length of what is cut at one place, in tokens.
    """
    return _preprocessor(vocabulary, "fill: ", density, mean_span, whole=False)


def restore(
    vocabulary: seqio.Vocabulary, density: float = 0.2, mean_span: float = 6.0
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor: `restore: text with gaps` to the whole text. Arguments as for `fill`."""
    return _preprocessor(vocabulary, "restore: ", density, mean_span, whole=True)


def letters(vocabulary: seqio.Vocabulary) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor: `copy: the text's characters in random order` to the same.

    The bytes of a character stay together, so that a script's bytes are copied as they occur in it.
    The vocabulary must be a `seqio.ByteVocabulary`: byte `b` is token `b + 3`.
    """
    prompt_ids = vocabulary.encode("copy: ")

    @seqio.map_over_dataset(num_seeds=1)
    def jumble(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = tf.cast(example["targets"], tf.int32)
        byte = tokens - _SPECIAL
        begins = tf.logical_or(byte < 0x80, byte >= 0xC0)
        character = tf.maximum(tf.cumsum(tf.cast(begins, tf.int32)) - 1, 0)
        place = tf.random.experimental.stateless_shuffle(tf.range(tf.size(tokens)), tf.stack(seed))
        order = tf.argsort(tf.gather(place, character), stable=True)
        targets = tf.gather(tokens, order)
        return _lesson(example, tf.concat([prompt_ids, targets], axis=0), targets)

    return jumble


def shuffled(
    vocabulary: seqio.Vocabulary, foreign: float = 0.5, most: int = 12
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor: `copy: some of the text's tokens in random order, with others among them` to the same.

    Args:
      vocabulary: its ids from 3 up to the sentinels are what is drawn from, so that every one of them is read and
        written in time.
      foreign: the probability that a token is replaced by a drawn one.
      most: how many there are at most. A model finds out how to copy on short texts, if at all.
    """
    prompt_ids = vocabulary.encode("copy:")
    size = vocabulary.vocab_size - vocabulary.extra_ids

    @seqio.map_over_dataset(num_seeds=3)
    def shuffle(example: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        order, which, drawn = tf.unstack(seeds)
        tokens = tf.cast(example["targets"], tf.int32)
        tokens = tf.random.experimental.stateless_shuffle(tokens, order)[:most]
        others = tf.random.stateless_uniform(tf.shape(tokens), drawn, _SPECIAL, size, tf.int32)
        replaced = tf.random.stateless_uniform(tf.shape(tokens), which) < foreign
        targets = tf.where(replaced, others, tokens)
        return _lesson(example, tf.concat([prompt_ids, targets], axis=0), targets)

    return shuffle


def quote(
    vocabulary: seqio.Vocabulary, density: float = 0.4, mean_span: float = 8.0
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor: `quote: text with marked spans` to the marked spans, marks included.

    A mark of its own begins each span and one common mark ends them all.

    Args:
      vocabulary: its highest ids serve as marks, downward from the last; the lowest is the end.
      density: share of the tokens that is marked.
      mean_span: mean length of a marked span, in tokens.
    """
    prompt_ids = vocabulary.encode("quote: ")
    top, most = _sentinels(vocabulary)

    @seqio.map_over_dataset(num_seeds=1)
    def mark(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = tf.cast(example["targets"], tf.int32)
        inside = gaps(tf.size(tokens), density, mean_span, most - 1, tf.stack(seed))
        begins = tf.logical_and(inside, tf.logical_not(tf.concat([[False], inside[:-1]], axis=0)))
        ends = tf.logical_and(inside, tf.logical_not(tf.concat([inside[1:], [False]], axis=0)))
        begin = top + 1 - tf.cumsum(tf.cast(begins, tf.int32))
        end = tf.fill(tf.shape(tokens), top + 1 - most)
        marked = tf.stack([begin, tokens, end], axis=1)
        shown = tf.stack([begins, tf.ones_like(begins), ends], axis=1)
        targets = tf.boolean_mask(marked, tf.logical_and(shown, inside[:, None]))
        inputs = tf.concat([prompt_ids, tf.boolean_mask(marked, shown)], axis=0)
        return _lesson(example, inputs, targets)

    return mark


def gaps(
    length: tf.Tensor, density: float, mean_span: float, most: int, seed: tf.Tensor
) -> tf.Tensor:
    """Draws which of `length` tokens are cut: bool [length].

    Spans of random lengths that are at least 1 and `mean_span` on average, `density` of the tokens
    in all, at random places. What stays is one piece more than the spans, of which the last may be
    empty: without it the only span of a short text would always be its end. The text begins with a
    token that stays. Texts of one token keep it.

    Args:
      length: number of tokens.
      density: share of tokens to cut.
      mean_span: mean length of a span.
      most: how many spans there may be.
      seed: int [2], for a stateless draw.
    """
    count = tf.cast(tf.round(tf.cast(length, tf.float32) * density), tf.int32)
    count = tf.clip_by_value(count, 1, tf.maximum(length - 1, 1))
    spans = tf.cast(tf.round(tf.cast(count, tf.float32) / mean_span), tf.int32)
    room = tf.minimum(tf.minimum(count, length - count), most)
    spans = tf.clip_by_value(spans, 1, tf.maximum(room, 1))
    cut = _random_lengths(count, spans, seed)
    kept = _random_lengths(tf.maximum(length - count, 1) + 1, spans + 1, seed + 1)
    lengths = tf.reshape(tf.stack([kept, tf.concat([cut, [0]], axis=0)], axis=1), [-1])
    return tf.cast(tf.repeat(tf.range(2 * spans + 2) % 2, lengths), tf.bool)[:length]


def _random_lengths(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """`parts` random numbers >= 1 that add up to `total`, int32 [parts]."""
    starts = tf.range(1, total)
    chosen = tf.random.experimental.stateless_shuffle(starts, seed)[: parts - 1]
    edges = tf.concat([[0], tf.sort(chosen), [total]], axis=0)
    return edges[1:] - edges[:-1]


def _sentinels(vocabulary: seqio.Vocabulary) -> tuple[int, int]:
    """The highest id, and how many there are from it downward."""
    if vocabulary.extra_ids < 2:
        raise ValueError("Cutting spans needs a vocabulary with extra_ids: they mark the gaps.")
    return vocabulary.vocab_size - 1, vocabulary.extra_ids


def _preprocessor(
    vocabulary: seqio.Vocabulary, prompt: str, density: float, mean_span: float, whole: bool
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    prompt_ids = vocabulary.encode(prompt)
    top, most = _sentinels(vocabulary)

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = tf.cast(example["targets"], tf.int32)
        cut = gaps(tf.size(tokens), density, mean_span, most - 1, tf.stack(seed))
        inputs = _with_sentinels(tokens, cut, top)
        targets = tokens if whole else _with_sentinels(tokens, tf.logical_not(cut), top)
        return _lesson(example, tf.concat([prompt_ids, inputs], axis=0), targets, whole)

    return corrupt


def _lesson(
    example: dict[str, tf.Tensor], inputs: tf.Tensor, targets: tf.Tensor, whole: bool = False
) -> dict[str, tf.Tensor]:
    """The example with others as its tokens; the text that stood for them stays where it still does."""
    gone = {"inputs_pretokenized"} | (set() if whole else {"targets_pretokenized"})
    kept = {name: value for name, value in example.items() if name not in gone}
    return {**kept, "inputs": inputs, "targets": targets}


def _with_sentinels(tokens: tf.Tensor, removed: tf.Tensor, top: int) -> tf.Tensor:
    """`tokens` with a sentinel for each run of removed ones: `top`, `top - 1`, and so on."""
    before = tf.concat([[False], removed[:-1]], axis=0)
    begins = tf.logical_and(removed, tf.logical_not(before))
    sentinels = top + 1 - tf.cumsum(tf.cast(begins, tf.int32))
    marked = tf.where(begins, sentinels, tokens)
    return tf.boolean_mask(marked, tf.logical_or(begins, tf.logical_not(removed)))
