"""RTE and CoLA of GLUE (arXiv 1804.07461) for an encoder with a classification head.

The folder `files.data_dir()` holds them as published, each file as it is or with `.gz`:
  glue/RTE/{train,dev}.tsv   index, two sentences, entailment or not_entailment (PASCAL RTE 1, 2, 3 and 5)
  glue/CoLA/{train,dev}.tsv  source, 1 for acceptable or 0, the linguist's mark, a sentence (arXiv 1805.12471)
Some copies have cut a val.tsv from train.tsv; it is read as a part of it, so that all copies give the same splits.

GLUE's test labels are not public. So `test` is the official dev set, and `validation`, to choose by, one eighth of the
training set: the examples whose first sentence has a CRC-32 that 8 divides, which keeps a premise on one side.

Texts are tokens of the base that `tokenizer.vocabulary` names when this module is imported.
"""

import functools
import zlib
from collections.abc import Callable, Sequence

import seqio

from modjax.data import classification, registry
from modjax.data.sources import ExamplesSource
from tasks import files, tokenizer

SOURCE = "https://gluebenchmark.com/tasks"
SPLITS = ("train", "validation", "test")
RTE_LABELS = ("entailment", "not_entailment")
COLA_LABELS = ("unacceptable", "acceptable")
METRICS = ("exact_match", "matthews")
# One of so many training examples is for validation.
VALIDATION = 8

_RTE_HEADER = ["index", "sentence1", "sentence2", "label"]

Examples = list[dict[str, str]]


def read_rte(path: str) -> Examples:
    """Reads RTE: `{"premise", "hypothesis", "targets"}`, the target one of RTE_LABELS. The header may be missing.

    Raises:
      files.RowError: another number of columns, an empty sentence, an unknown label or no row, with file and line.
    """
    examples = []
    for place, cells in _rows(path, _RTE_HEADER):
        _, premise, hypothesis, label = cells
        if label not in RTE_LABELS:
            raise files.RowError(f"{place}: the label is {label!r}, not one of {RTE_LABELS}.")
        examples.append(_example(place, premise=premise, hypothesis=hypothesis, targets=label))
    return examples


def read_cola(path: str) -> Examples:
    """Reads CoLA: `{"sentence", "targets"}`, the target one of COLA_LABELS.

    Raises:
      files.RowError: as `read_rte`.
    """
    examples = []
    for place, cells in _rows(path, ["source", "label", "mark", "sentence"]):
        _, label, _, sentence = cells
        if label not in ("0", "1"):
            raise files.RowError(f"{place}: the label is {label!r}, not 0 or 1.")
        examples.append(_example(place, sentence=sentence, targets=COLA_LABELS[int(label)]))
    return examples


def split_of(example: dict[str, str]) -> str:
    """Whether an example of the training set is for "train" or "validation"."""
    first = example.get("premise", example.get("sentence", ""))
    return "train" if zlib.crc32(first.encode()) % VALIDATION else "validation"


def examples(folder: str, read: Callable[[str], Examples], split: str) -> Examples:
    """The examples of a split of the task whose files lie in `folder` of the data folder.

    Raises:
      files.MissingDataError: there is no such file.
      files.RowError: as `read`.
    """
    data = files.data_dir()

    def all_of(name: str) -> Examples:
        return read(files.find(data, f"glue/{folder}/{name}.tsv", source=SOURCE))

    if split == "test":
        return all_of("dev")
    found = all_of("train")
    try:
        found += all_of("val")
    except files.MissingDataError:
        pass
    return [example for example in found if split_of(example) == split]


def register(vocabulary: seqio.Vocabulary) -> None:
    """Registers `glue_rte` and `glue_cola` in the tokens of a vocabulary, in place of those there are."""
    _add("rte", "RTE", read_rte, ("premise", "hypothesis"), RTE_LABELS, vocabulary)
    _add("cola", "CoLA", read_cola, ("sentence",), COLA_LABELS, vocabulary)


def _add(
    task: str,
    folder: str,
    read: Callable[[str], Examples],
    texts: Sequence[str],
    labels: Sequence[str],
    vocabulary: seqio.Vocabulary,
) -> None:
    registry.remove(f"glue_{task}")
    registry.add_task(
        f"glue_{task}",
        ExamplesSource({s: functools.partial(examples, folder, read, s) for s in SPLITS}),
        [classification.in_template(texts), classification.tokenize_target],
        classification.features(vocabulary, labels),
        metadata={"task": task},
        metric_names=METRICS,
    )


def _rows(path: str, header: Sequence[str]) -> list[tuple[str, list[str]]]:
    rows = []
    for place, line in files.read_lines(path):
        cells = line.split("\t")
        if cells == header or not line.strip():
            continue
        if len(cells) != len(header):
            raise files.RowError(
                f"{place}: {len(cells)} columns where there are {len(header)}: {', '.join(header)}."
            )
        rows.append((place, cells))
    if not rows:
        raise files.RowError(f"{path}: there is no row.")
    return rows


def _example(place: str, **parts: str) -> dict[str, str]:
    found = {name: files.squeeze(text) for name, text in parts.items()}
    for name, text in found.items():
        if not text:
            raise files.RowError(f"{place}: the {name} is empty.")
    return found


register(tokenizer.vocabulary())
