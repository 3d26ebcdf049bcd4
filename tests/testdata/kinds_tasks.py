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

for _language in LANGUAGES:
    registry.add_task(
        f"kinds_copy_{_language}",
        sources.ExamplesSource(
            {
                s: [{"inputs": f"copy {w}:", "targets": w} for w in words(_language, s)]
                for s in SPLITS
            }
        ),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        {
            "inputs": seqio.Feature(decoder, add_eos=False),
            "targets": seqio.Feature(decoder, add_eos=True),
        },
        metadata={"task": "copy", "language": _language},
    )
    registry.add_task(
        f"kinds_say_{_language}",
        sources.ExamplesSource(
            {
                s: [{"inputs": f"{w}?", "targets": _language} for w in words(_language, s)]
                for s in SPLITS
            }
        ),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        {
            "inputs": seqio.Feature(decoder, add_eos=False),
            "targets": seqio.Feature(decoder, add_eos=True),
        },
        metadata={"task": "say", "language": _language},
        choices=tuple(LANGUAGES),
    )
    registry.add_task(
        f"kinds_name_{_language}",
        sources.ExamplesSource(
            {
                s: [
                    {"first": w, "second": "copy", "targets": _language}
                    for w in words(_language, s)
                ]
                for s in SPLITS
            }
        ),
        [classification.in_template(("first", "second")), classification.tokenize_target],
        classification.features(encoder, tuple(LANGUAGES)),
        metadata={"task": "name", "language": _language},
        metric_names=("exact_match", "matthews"),
    )

# Which language a text is in, as a number.
registry.add_task(
    "kinds_measure",
    sources.ExamplesSource(
        {
            s: [
                {"inputs": w, "targets": f"{2 * i - 1.5}"}
                for i, language in enumerate(LANGUAGES)
                for w in words(language, s)
            ]
            for s in SPLITS
        }
    ),
    [classification.in_template(), classification.tokenize_target],
    classification.features(encoder, None),
    metadata={"task": "measure", "language": ("el", "ru", "ko")},
    metric_names=("pearson",),
)
registry.add_mixture("kinds_copy", [f"kinds_copy_{name}" for name in LANGUAGES])
registry.add_mixture("kinds_say", [f"kinds_say_{name}" for name in LANGUAGES])
registry.add_mixture("kinds_name", [f"kinds_name_{name}" for name in LANGUAGES])
