"""mtop6 in pieces of words: the datasets of `tasks.mtop6` with a vocabulary made from their training text.

A byte-level example is four times as long (in Thai seven times), and a small model has then to spell what it copies.
The pieces are SentencePiece's (unigram, arXiv 1804.10959), with bytes for what they cannot write. The names of
intents and slots, tags and prompts are tokens of their own, for a base that has seen no task has no other way to know
them; the lesson `copy` has it read and write each of them, without saying what they stand for.
"""

import io
import os
from collections.abc import Callable, Iterator

import sentencepiece
import seqio
import tensorflow as tf

from tasks import denoise, mtop6

PREFIX = "mtop6_pieces"
SIZE = 4096
# Marks of gaps and of quoted spans, above the pieces.
SENTINELS = 16
TAGS = ("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB _").split()
PROMPTS = ("parse:", "tag:", "qa:", "context:", "translate", "fill:", "restore:", "copy:", "quote:")
PROMPTS += tuple(f"{code}:" for code in mtop6.LANGUAGES)
_SPACE = "\u2581"  # stands before a piece that begins a word


def symbols() -> list[str]:
    """The tokens that are not made from text: names in the parses of the training split, tags, prompts."""
    parses = (row.parse for row in mtop6.utterances("train")["en"])
    names = sorted({word for parse in parses for word in parse.split() if word.startswith("[")})
    return [_SPACE + name for name in (*PROMPTS, "]", *TAGS, *names)]


def write_vocabulary(path: str | os.PathLike[str], size: int = SIZE) -> None:
    """Trains a SentencePiece model on the text of the training splits, as much of each language, and writes it.

    Args:
      path: of the file.
      size: of the vocabulary, with the bytes and what is in `symbols`, but without `SENTINELS`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_balanced_text(),
        model_writer=model,
        vocab_size=size,
        model_type="unigram",
        normalization_rule_name="identity",
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=symbols(),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # or sums of counts, and with them the pieces, may differ from run to run
        minloglevel=2,
    )
    with open(path, "wb") as file:
        file.write(model.getvalue())


def vocabulary(path: str | os.PathLike[str]) -> seqio.SentencePieceVocabulary:
    """The vocabulary of a file of `write_vocabulary`."""
    return seqio.SentencePieceVocabulary(os.fspath(path), extra_ids=SENTINELS)


def register(path: str | os.PathLike[str]) -> None:
    """Registers the datasets and mixtures of `tasks.mtop6` under the names `mtop6_pieces_...`.

    Args:
      path: of the vocabulary's file.
    """
    tokens = vocabulary(path)
    lessons = {
        "fill": denoise.fill(tokens, mean_span=3.0),
        "restore": denoise.restore(tokens, mean_span=2.0),
        "copy": denoise.shuffled(tokens),
        "quote": _of_several(denoise.quote(tokens, mean_span=3.0)),
    }
    mtop6.register(PREFIX, tokens, lessons)


def _of_several(
    lesson: Callable[[tf.data.Dataset], tf.data.Dataset],
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """The lesson without texts that are one piece: of them nothing can be quoted."""

    def preprocessor(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return lesson(dataset.filter(lambda example: tf.size(example["targets"]) > 1))

    return preprocessor


def _balanced_text() -> Iterator[str]:
    """Lines of training text, those of smaller languages several times."""
    texts = {
        language: [example["targets"] for example in mtop6.text_examples(language, "train")]
        for language in mtop6.LANGUAGES
    }
    sizes = {language: sum(map(len, lines)) for language, lines in texts.items()}
    for language, lines in texts.items():
        for _ in range(round(max(sizes.values()) / sizes[language])):
            yield from lines
