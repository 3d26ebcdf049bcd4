"""Rank classification: of an example's possible answers, the one that the model finds most probable.

T0 (arXiv 2110.08207) and the multiple choice of GPT-3 (2005.14165, section 2.4) are evaluated so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modjax.data import pipeline, registry, seqio
from modjax.evaluation import predict

SUMMARIES = ("sum", "mean")


def of_example(text: pipeline.Example) -> tuple[str, ...]:
    """The possible answers to an example, as texts.

    Raises:
      ValueError: the example has fewer than two, or the same one twice.
    """
    said = registry.choices_of(text.task)
    found: Any = text.get(said, ()) if isinstance(said, str) else said or ()
    if isinstance(found, str) or len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(
            f"task {text.task!r}, example {text.index}: choices must be two texts or more, all different, not "
            f"{found!r}."
        )
    return tuple(found)


def choose(
    model: Any,
    score_fn: predict.PredictFn,
    arrays: Mapping[str, np.ndarray],
    texts: Sequence[pipeline.Example],
    batch_size: int,
    summary: str = "sum",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The best answer to each example.

    Args:
      model: puts answers into batches, see `with_answers`.
      score_fn: see `predict.scorer`.
      arrays: model features by name, `[N, ...]`.
      texts: the examples.
      batch_size: rows of the whole job's batch.
      summary: what is compared: the answers' log probabilities ("sum"), or those per token ("mean").
      progress: told after each batch how many answers are scored, of how many.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"choice_scores is one of {', '.join(SUMMARIES)}, not {summary!r}.")
    options = [of_example(text) for text in texts]
    rows = np.repeat(np.arange(len(texts)), [len(option) for option in options])
    answers = [
        _tokens(text.task, answer)
        for text, option in zip(texts, options, strict=True)
        for answer in option
    ]
    lengths = np.array([len(answer) for answer in answers])
    padded = np.stack([np.pad(a, (0, lengths.max() - len(a))) for a in answers])
    asked = model.with_answers({k: v[rows] for k, v in arrays.items()}, padded)
    scores = np.array(predict.run_all(score_fn, asked, batch_size, progress))
    if summary == "mean":
        scores = scores / lengths
    chosen, at = [], 0
    for option in options:
        chosen.append(option[int(np.argmax(scores[at : at + len(option)]))])
        at += len(option)
    return chosen


def _tokens(dataset: str, answer: str) -> np.ndarray:
    feature = seqio.TaskRegistry.get(dataset).output_features["targets"]
    tokens = list(feature.vocabulary.encode(answer))
    if not tokens and not feature.add_eos:
        raise ValueError(
            f"task {dataset!r}: the choice {answer!r} has no token, and would always be the most probable one."
        )
    return np.array(tokens + [feature.vocabulary.eos_id] * feature.add_eos, np.int32)
