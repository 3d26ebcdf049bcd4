"""mtop6: parsing, tagging, translation and question answering in en de es fr hi th, real text.

The zero-shot question: parsing is trained in en, de and fr, and asked in es, hi and th, which
training saw in the other tasks only; in a second split it is trained in en, es and hi. The folder
`files.data_dir()` holds the data as described in `benchmarks/mtop6/README.md`; it is read when it
is asked for, so importing this module needs none.

Parallel data is split by id in all languages at once, or the meaning of a test sentence would be
known from another language:
  parse      parallel MTOP: the first 700 entries of `dev` train, the rest validation; `test` test
  tag        PUD: by document, see `xling.split_of`
  translate  PUD, the same split: English into the language and back, as one dataset
  qa         MLQA dev: one question in ten validation, by its id, the rest train; XQuAD: test
  fill, restore, letters, quote  pretraining on the text of the training splits, without labels or pairs
Scores on these splits cannot be compared with published ones: the splits are others, and contexts
are cut to a window around the answer.

Mixtures: mtop6_pretrain; mtop6_train, mtop6_train_second of the second split, and mtop6_train_more
with the larger English training set; mtop6_validation, mtop6_eval, and mtop6_parse with the parses
of mtop6_eval alone. Tokens are bytes; `tasks.mtop6_pieces` registers the same in pieces of words.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import gin
import seqio
import tensorflow as tf

from modjax.data import registry
from tasks import byte_tasks, denoise, files, mtop, xling

LANGUAGES = mtop.LANGUAGES
PARSE_TRAINED = ("en", "de", "fr")
PARSE_HELD_OUT = ("es", "hi", "th")
# The second split.
PARSE_TRAINED_SECOND = ("en", "es", "hi")
MLQA_LANGUAGES = ("en", "de", "es", "hi")
XQUAD_LANGUAGES = ("en", "de", "es", "hi", "th")
SPLITS = ("train", "validation", "test")
TRAIN_ENTRIES = 700
# As many tokens as the shipped base has, from which pretraining starts; the spare ids mark gaps.
VOCABULARY = seqio.ByteVocabulary(extra_ids=13)

Examples = list[dict[str, str]]
T = TypeVar("T")


@gin.configurable
def limits(
    input_bytes: int = 255, target_bytes: int = 159, text_bytes: int = 127
) -> tuple[int, int, int]:
    """The longest input, target and pretraining text in bytes, without the end mark.

    Sentences to translate are left out beyond it, those to tag keep their first words, contexts are
    cut to a window that fits, pretraining text is cut into pieces. Parses are all kept: what does
    not fit is cut by the input pipeline, which counts it.
    """
    return input_bytes, target_bytes, text_bytes


def parse_examples(language: str, split: str) -> Examples:
    """Parallel MTOP in one language."""
    return [mtop.example(row) for row in utterances(split)[language]]


def english_examples(split: str) -> Examples:
    """The larger English training set, without other splits' utterances (`mtop.without`)."""
    if split != "train":
        raise ValueError(f"There is only a train split, not {split!r}.")
    return [mtop.example(row) for row in _more_english()]


def tag_examples(language: str, split: str) -> Examples:
    """Universal part-of-speech tags of the words of a sentence."""
    input_bytes, target_bytes, _ = limits()
    made = (
        xling.tag_example(sentence, input_bytes, target_bytes)
        for sentence in _sentences(language, split)
    )
    return [example for example in made if example]


def translate_examples(language: str, split: str) -> Examples:
    """English into `language` and back; both directions are one dataset, of that language."""
    english, other = _sentences("en", split), _sentences(language, split)
    return _short(xling.translation_examples(language, english, other))


def qa_examples(language: str, split: str) -> Examples:
    """Questions on a window of their context; the few too long by themselves are left out."""
    input_bytes, _, _ = limits()
    made = (xling.qa_example(question, input_bytes) for question in _questions(language, split))
    return _short(example for example in made if example)


def text_examples(language: str, split: str) -> Examples:
    """Text of a split without its labels: utterances, sentences, questions and whole contexts.

    As `inputs` and `targets` alike; `denoise` makes lessons of it.
    """
    texts = [row.text for row in utterances(split)[language]]
    if language == "en" and split == "train":
        texts += [row.text for row in _more_english()]
    texts += [sentence.text for sentence in _sentences(language, split)]
    if language in MLQA_LANGUAGES:
        questions = _questions(language, split)
        texts += [question.question for question in questions]
        texts += dict.fromkeys(question.context for question in questions)
    _, _, text_bytes = limits()
    parts = itertools.chain.from_iterable(xling.pieces(text, text_bytes) for text in texts)
    # Shorter than this there is nothing to cut out and give back.
    return [{"inputs": part, "targets": part} for part in parts if len(part.encode()) >= 8]


def utterances(split: str) -> dict[str, list[mtop.Utterance]]:
    """The utterances of parallel MTOP that a split has, by language, in the same order in all."""
    name = "test" if split == "test" else "dev"
    rows = _cached(mtop.read_parallel, f"semantic_parsing/mtop/{name}.json", mtop.PARALLEL_SOURCE)
    part = {"train": slice(TRAIN_ENTRIES), "validation": slice(TRAIN_ENTRIES, None)}
    return {language: rows[language][part.get(split, slice(None))] for language in LANGUAGES}


def _more_english() -> list[mtop.Utterance]:
    name = "semantic_parsing/mtop_en/train.json"
    rows = _cached(mtop.read_english, name, mtop.ENGLISH_SOURCE)
    return mtop.without(rows, [row for split in SPLITS[1:] for row in utterances(split)["en"]])


def _sentences(language: str, split: str) -> list[xling.Sentence]:
    name = f"pos_mt/ud_pud/{language}_pud-ud-test.conllu"
    rows = _cached(xling.read_conllu, name, xling.PUD_SOURCE)
    return [row for row in rows if xling.split_of(row.id) == split]


def _questions(language: str, split: str) -> list[xling.Question]:
    if split == "test":
        return _cached(xling.read_squad, f"qa/xquad/xquad.{language}.json", xling.XQUAD_SOURCE)
    name = f"qa/mlqa_dev/dev-context-{language}-question-{language}.json"
    rows = _cached(xling.read_squad, name, xling.MLQA_SOURCE)
    return [row for row in rows if (zlib.crc32(row.id.encode()) % 10 == 0) == (split != "train")]


def _cached(read: Callable[[str], T], name: str, source: str) -> T:
    return _read_once(read, files.find(files.data_dir(), name, source=source))


@functools.lru_cache(maxsize=32)
def _read_once(read: Callable[[str], T], path: str) -> T:
    return read(path)


def _short(examples: Iterable[dict[str, str]]) -> Examples:
    input_bytes, target_bytes, _ = limits()
    return [
        example
        for example in examples
        if len(example["inputs"].encode()) <= input_bytes
        and len(example["targets"].encode()) <= target_bytes
    ]


def register(
    prefix: str,
    vocabulary: seqio.Vocabulary,
    lessons: Mapping[str, Callable[[tf.data.Dataset], tf.data.Dataset]],
) -> None:
    """Registers the datasets and the mixtures, each name of them with `prefix` and `_` before it.

    Args:
      prefix: "mtop6" is registered when this module is imported.
      vocabulary: of all inputs and targets.
      lessons: of pretraining on text, name -> preprocessor of tokens.
    """

    def add(
        kind: str,
        languages: Iterable[str],
        examples: Callable[[str, str], Examples],
        metrics: Sequence[str],
        splits: Callable[[str], Sequence[str]] = lambda language: SPLITS,
        preprocessors: Sequence[Callable] = (),
    ) -> None:
        for language in languages:
            byte_tasks.add_task(
                f"{prefix}_{kind}_{language}",
                functools.partial(examples, language),
                splits(language),
                {"task": kind, "language": language},
                metrics,
                preprocessors,
                vocabulary,
            )

    def names(kind: str, languages: Iterable[str]) -> list[str]:
        return [f"{prefix}_{kind}_{language}" for language in languages]

    others = LANGUAGES[1:]
    add("parse", LANGUAGES, parse_examples, byte_tasks.PARSE)
    add("tag", LANGUAGES, tag_examples, byte_tasks.TAG)
    add("translate", others, translate_examples, byte_tasks.TRANSLATE)
    add(
        "qa",
        XQUAD_LANGUAGES,
        qa_examples,
        byte_tasks.QA,
        lambda language: SPLITS if language in MLQA_LANGUAGES else ("test",),
    )
    for kind, make in lessons.items():
        add(kind, LANGUAGES, text_examples, ("chrf",), lambda language: SPLITS[:2], [make])
    byte_tasks.add_task(
        f"{prefix}_parse_en_more",
        english_examples,
        ("train",),
        {"task": "parse", "language": "en"},
        byte_tasks.PARSE,
        vocabulary=vocabulary,
    )

    # Every language and every lesson equally often: the small languages are repeated more.
    registry.add_mixture(
        f"{prefix}_pretrain", [name for kind in lessons for name in names(kind, LANGUAGES)]
    )
    companions = names("tag", LANGUAGES) + names("translate", others)
    questions = names("qa", MLQA_LANGUAGES)

    # Parsing is three datasets of eighteen, the shortest ones, and what the benchmark is about.
    def train(languages: Iterable[str]) -> list[str | tuple[str, float]]:
        parses = ((name, 24.0) for name in names("parse", languages))
        return [*parses, *companions, *questions]

    registry.add_mixture(f"{prefix}_train", train(PARSE_TRAINED))
    registry.add_mixture(f"{prefix}_train_second", train(PARSE_TRAINED_SECOND))
    more = (f"{prefix}_parse_en_more", 24.0)
    registry.add_mixture(f"{prefix}_train_more", [*train(PARSE_TRAINED), more])
    parses = names("parse", LANGUAGES)
    registry.add_mixture(f"{prefix}_validation", parses + companions + questions)
    registry.add_mixture(f"{prefix}_eval", parses + companions + names("qa", XQUAD_LANGUAGES))
    registry.add_mixture(f"{prefix}_parse", parses)


register(
    "mtop6",
    VOCABULARY,
    {
        "fill": denoise.fill(VOCABULARY),
        "restore": denoise.restore(VOCABULARY),
        "letters": denoise.letters(VOCABULARY),
        "quote": denoise.quote(VOCABULARY),
    },
)
