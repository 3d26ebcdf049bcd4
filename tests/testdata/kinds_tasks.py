"""Toy datasets for a decoder-only base and an encoder; the folders of their bases come from the environment."""

import os

import numpy as np
import seqio

from modjax.data import classification, registry, sources, vocabularies
from tests.testdata import tokenizer_folders

LANGUAGES = {"el": "greek", "ru": "cyrillic", "ko": "hangul"}


def words(language, split, count=24):
    draw = np.random.default_rng([len(language), ord(language[0]), len(split)])
    known = tokenizer_folders.TEXTS[LANGUAGES[language]].split()
    return [" ".join(draw.choice(known, 2)) for _ in range(count)]


decoder = vocabularies.vocabulary_of(os.environ["KINDS_DECODER"])
encoder = vocabularies.vocabulary_of(os.environ["KINDS_ENCODER"])
SPLITS = ("train", "validation", "test")

TOKENS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
TEXTS = {"inputs": seqio.Feature(decoder, add_eos=False), "targets": seqio.Feature(decoder)}


def add(name, task, languages, row, steps, features, **options):
    """A task whose example for a text of a language is `row(language, text)`."""
    splits = {
        split: [row(language, text) for language in languages for text in words(language, split)]
        for split in SPLITS
    }
    metadata = {"task": task, "language": languages}
    registry.add_task(
        name, sources.ExamplesSource(splits), steps, features, metadata=metadata, **options
    )


for _language in LANGUAGES:
    add(
        f"kinds_copy_{_language}",
        "copy",
        (_language,),
        lambda language, text: {"inputs": f"copy {text}:", "targets": text},
        TOKENS,
        TEXTS,
    )
    add(
        f"kinds_say_{_language}",
        "say",
        (_language,),
        lambda language, text: {"inputs": f"{text}?", "targets": language},
        TOKENS,
        TEXTS,
        choices=tuple(LANGUAGES),
    )
    add(
        f"kinds_name_{_language}",
        "name",
        (_language,),
        lambda language, text: {"first": text, "second": "copy", "targets": language},
        [classification.in_template(("first", "second")), classification.tokenize_target],
        classification.features(encoder, tuple(LANGUAGES)),
        metric_names=("exact_match", "matthews"),
    )
# Which language a text is in, as a number.
add(
    "kinds_measure",
    "measure",
    tuple(LANGUAGES),
    lambda language, text: {
        "inputs": text,
        "targets": f"{2 * list(LANGUAGES).index(language) - 1.5}",
    },
    [classification.in_template(), classification.tokenize_target],
    classification.features(encoder, None),
    metric_names=("pearson",),
)
registry.add_mixture("kinds_copy", [f"kinds_copy_{name}" for name in LANGUAGES])
registry.add_mixture("kinds_say", [f"kinds_say_{name}" for name in LANGUAGES])
registry.add_mixture("kinds_name", [f"kinds_name_{name}" for name in LANGUAGES])
