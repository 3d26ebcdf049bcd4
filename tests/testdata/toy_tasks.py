"""Four datasets of two features, small enough to train on in a test."""

import numpy as np
import seqio

from modjax.data import registry, sources

_VOCABULARY = seqio.ByteVocabulary()


def _rows(task, language, split):
    draw = np.random.default_rng([ord(task[0]), ord(language[0]), len(split)])
    words = ["".join(draw.choice(list("abcdefgh"), draw.integers(2, 6))) for _ in range(64)]
    mark = {"en": "", "sw": "~"}[language]
    answer = {"copy": lambda w: w, "turn": lambda w: w[::-1]}[task]
    return [{"inputs": f"{task} {mark}{word}", "targets": answer(word)} for word in words]


for _task in ("copy", "turn"):
    for _language in ("en", "sw"):
        registry.add_task(
            f"toy_{_task}_{_language}",
            sources.ExamplesSource(
                {s: _rows(_task, _language, s) for s in ("train", "validation", "test")}
            ),
            [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            {k: seqio.Feature(_VOCABULARY, add_eos=True) for k in ("inputs", "targets")},
            metadata={"task": _task, "language": _language},
        )

registry.add_mixture("toy_copy", ["toy_copy_en"])
registry.add_mixture("toy", [f"toy_{t}_{c}" for t in ("copy", "turn") for c in ("en", "sw")])
registry.add_mixture("toy_without_turn_sw", ["toy_copy_en", "toy_copy_sw", "toy_turn_en"])
registry.add_mixture("toy_turn", ["toy_turn_en", "toy_turn_sw"])
