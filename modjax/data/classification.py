"""Tasks for encoders: one text or two in the tokenizer's template, and a class or a number as the target.

registry.add_task(
    "rte",
    source,  # examples {"premise": text, "hypothesis": text, "targets": "entailment"}
    [classification.in_template(("premise", "hypothesis")), classification.tokenize_target],
    classification.features(vocabulary, ("not_entailment", "entailment")),
    metric_names=("exact_match",),
)
"""

import abc
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from modjax.data.carry import FLAGS, INPUTS_TOO_LONG, PROBLEM, map_plainly
from modjax.data.vocabularies import HuggingFaceVocabulary
from modjax.errors import nearest

_NUMBER = r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"


def features(
    vocabulary: HuggingFaceVocabulary, labels: Sequence[str] | None
) -> dict[str, seqio.Feature]:
    """The features of a task: `inputs` in the vocabulary's tokens, and a label or a number.

    Args:
      vocabulary: of the encoder.
      labels: the classes, in the order of the network's outputs; None for a number.
    """
    inputs = seqio.Feature(vocabulary, add_eos=False)
    if labels is None:
        targets = seqio.Feature(NumberVocabulary(), add_eos=False, dtype=tf.float32)
    else:
        targets = seqio.Feature(LabelVocabulary(labels), add_eos=False)
    return {"inputs": inputs, "targets": targets}


def in_template(texts: Sequence[str] = ("inputs",)) -> Callable[..., tf.data.Dataset]:
    """A preprocessor: `inputs` from one text or two, as `HuggingFaceVocabulary.encode_pair` joins them.

    The longer text is cut where they are too long together, so that the marks remain, and the example says so.
    `inputs_pretokenized` keeps the texts, joined by a line break.

    Args:
      texts: the names of the fields.
    """

    def template_step(
        dataset: tf.data.Dataset,
        output_features: Mapping[str, seqio.Feature],
        sequence_length: Mapping[str, int] | None = None,
    ) -> tf.data.Dataset:
        vocabulary = output_features["inputs"].vocabulary
        limit = (sequence_length or {}).get("inputs")

        def join(ex: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            parts = [ex[name] for name in texts]
            tokens, _ = vocabulary.encode_pair_tf(*parts)
            rest = {name: value for name, value in ex.items() if name not in texts}
            shown = tf.strings.join(parts, separator="\n")
            made = {**rest, "inputs": tokens, "inputs_pretokenized": shown}
            if limit is None:
                return made
            # Cut here, inside the template, where nobody behind could tell any more.
            cut, _ = vocabulary.encode_pair_tf(*parts, max_length=limit)
            long = INPUTS_TOO_LONG * tf.cast(tf.size(tokens) > limit, tf.int32)
            return {**made, "inputs": cut, FLAGS: long}

        return map_plainly(dataset, join)

    if not 1 <= len(texts) <= 2:
        raise ValueError(f"in_template takes the name of one text or two, not {list(texts)}.")
    template_step.keeps_every_example = True  # type: ignore[attr-defined]
    return template_step


def tokenize_target(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """A preprocessor: the text in `targets` as a label or a number; `targets_pretokenized` keeps it.

    A text that is none is an error when the example is read, which names the task.
    """
    vocabulary = output_features["targets"].vocabulary

    def tokenize(ex: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text = ex["targets"]
        if text.dtype != tf.string:
            raise ValueError(
                f"tokenize_target: 'targets' are {text.dtype.name}; write labels and numbers as text, as '1.5'."
            )
        unfit = tf.strings.join(["has the target '", text, f"', which is {vocabulary.none}."])
        return {
            **ex,
            "targets": vocabulary.encode_tf(text),
            "targets_pretokenized": text,
            PROBLEM: tf.where(vocabulary.has_tf(text), "", unfit),
        }

    return map_plainly(dataset, tokenize)


tokenize_target.keeps_every_example = True  # type: ignore[attr-defined]


class _OneTarget(seqio.Vocabulary):
    """What a single target of an encoder has in common with text: it is encoded and decoded.

    Attributes:
      none: what a text is that cannot be encoded, for an error.
    """

    none: str

    def __init__(self) -> None:
        super().__init__(extra_ids=0)

    @abc.abstractmethod
    def has_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Whether a scalar text can be encoded, bool."""

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int | None:
        return None

    @property
    def unk_id(self) -> int | None:
        return None

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        decode = functools.partial(map, self._decode)
        return tf.numpy_function(lambda rows: list(decode(rows.tolist())), [ids], tf.string)


class LabelVocabulary(_OneTarget):
    """Classes as tokens: label i (from 0) is token i + 1.

    Raises:
      ValueError: no label, or one twice; when encoding, a text that is none (no token in TensorFlow).
    """

    def __init__(self, labels: Sequence[str]):
        super().__init__()
        self.labels = tuple(labels)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"Labels must be different texts, at least one, not {labels!r}.")
        self.none = f"no label; the labels are {', '.join(self.labels)}"

    @property
    def _base_vocab_size(self) -> int:
        return len(self.labels) + 1

    def _encode(self, s: str) -> list[int]:
        if s not in self.labels:
            raise ValueError(f"{s!r} is no label.{nearest(s, self.labels)}")
        return [self.labels.index(s) + 1]

    def _decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.labels[i - 1] for i in ids if 0 < i <= len(self.labels))

    def has_tf(self, s: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(tf.equal(tf.constant(self.labels), s))

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        found = tf.where(tf.equal(tf.constant(self.labels), s))[:, 0]
        return tf.cast(found, tf.int32) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelVocabulary) and self.labels == other.labels


class NumberVocabulary(_OneTarget):
    """A number as its own token, float32. In TensorFlow a text that is none is NaN."""

    none = "no number"

    @property
    def _base_vocab_size(self) -> int:
        return 2

    def encode(self, s: str) -> Any:
        """`[number]`. Raises ValueError for a text that is none."""
        return [float(s)]

    def decode(self, ids: Iterable[float]) -> str:
        """The number as text, with four digits."""
        return " ".join(f"{value:.4g}" for value in ids)

    def _encode(self, s: str) -> Any:
        return self.encode(s)

    def _decode(self, ids: Iterable[float]) -> str:
        return self.decode(ids)

    def has_tf(self, s: tf.Tensor) -> tf.Tensor:
        return tf.strings.regex_full_match(s, _NUMBER)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.strings.to_number(tf.where(self.has_tf(s), s, "nan"), tf.float32), [1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberVocabulary)
