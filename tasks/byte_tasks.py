"""Text-to-text tasks over bytes, from a function that returns the examples of a split.

Every dataset of ours ends the same way: text to bytes, an end mark, a registration that names the
dataset's features and its metrics. Bytes, because a vocabulary made for some scripts has no pieces
for others.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import seqio

from modjax.data import registry
from modjax.data.sources import ExamplesSource
from tasks.files import RowError

# Metrics by kind of task; their names are those of `modjax.evaluation.metrics`.
PARSE = ("exact_match", "inexact_match", "structure_match", "malformed")
TAG = ("tag_accuracy", "span_f1")
TRANSLATE = ("chrf", "bleu")
QA = ("token_f1", "qa_exact_match")

# ByT5's vocabulary (arXiv 2105.13626): 3 special ids, 256 bytes, 125 more, of which the highest
# mark the gaps of span corruption. Its checkpoints fit tasks registered here.
VOCABULARY = seqio.ByteVocabulary(extra_ids=125)

Examples = Sequence[Mapping[str, str]]


def output_features(vocabulary: seqio.Vocabulary = VOCABULARY) -> dict[str, seqio.Feature]:
    """The features `inputs` and `targets`, both ended by EOS."""
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=True),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }


def add_task(
    name: str,
    read: Callable[[str], Examples],
    splits: Iterable[str],
    metadata: Mapping[str, str | Sequence[str]],
    metric_names: Sequence[str],
    preprocessors: Sequence[Callable] = (),
    vocabulary: seqio.Vocabulary = VOCABULARY,
) -> None:
    """Registers a task whose examples `read(split)` returns, as `{"inputs": ..., "targets": ...}`.

    Args:
      name: the task's name, for SeqIO and for the mixtures.
      read: called when a split is first asked for; it is then held in memory.
      splits: the splits there are.
      metadata: the dataset's features by name.
      metric_names: of `modjax.evaluation.metrics.METRICS`.
      preprocessors: run on token ids, before the end mark is added.
      vocabulary: of inputs and targets; bytes are the same tokens in all `seqio.ByteVocabulary`s.

    Reading raises:
      RowError: a split without examples, or an example whose input or target is empty.
    """

    def load(split: str) -> Examples:
        return check(list(read(split)), f"task {name!r}, split {split!r}")

    registry.add_task(
        name,
        source=ExamplesSource({split: functools.partial(load, split) for split in splits}),
        preprocessors=[
            seqio.preprocessors.tokenize,
            # What is drawn at random is drawn anew each time, so it comes after the cache.
            seqio.CacheDatasetPlaceholder(),
            *preprocessors,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=output_features(vocabulary),
        metadata=metadata,
        metric_names=metric_names,
    )


def check(examples: Examples, place: str) -> Examples:
    """The examples; a RowError if there is none, or names one whose input or target is empty."""
    if not examples:
        raise RowError(f"{place}: no examples.")
    for number, example in enumerate(examples, start=1):
        for key in ("inputs", "targets"):
            if not example[key].strip():
                raise RowError(f"{place}, example {number}: `{key}` is empty: {dict(example)}.")
    return examples
