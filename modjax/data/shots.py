"""Few-shot tasks: a task with a handful of its training examples, and all of its other splits."""

from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.data import registry
from modjax.data.sources import ExamplesSource


def few_shot_task(task: str, shots: int, seed: int, split: str = "train") -> str:
    """Registers a task that has `shots` of a task's training examples, drawn by a seed, in its split "train".

    It is the same dataset otherwise: to feature spaces, checkpoints and results it has the original's name.

    Args:
      task: a registered task. Its preprocessors, features and metrics are taken over.
      shots: how many examples.
      seed: the same seed draws the same examples, in every process.
      split: which split they are drawn from.

    Returns:
      The new task's name, `<task>_<shots>shots_<seed>`, with `_<split>` unless that is "train"; the same arguments give
      the same task.

    Raises:
      ValueError: a mixture, fewer examples than shots, or no shots.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}.")
    if registry.tasks_of(task) != [task]:
        raise ValueError(f"{task!r} is a mixture; its tasks: {registry.tasks_of(task)}.")
    name = f"{task}_{shots}shots_{seed}" + (f"_{split}" if split != "train" else "")
    if name in seqio.TaskRegistry.names():
        return name
    original = seqio.TaskRegistry.get(task)
    if split not in original.splits:
        raise ValueError(f"Task {task!r} has no split {split!r}, but {sorted(original.splits)}.")
    registry.add_copy(task, name, _Shots(original.source, task, split, shots, seed))
    return name


class _Shots(seqio.DataSource):
    """A source like another one, but for one split, which has some of the other's examples."""

    def __init__(self, source: Any, task: str, split: str, shots: int, seed: int):
        super().__init__(splits=tuple(dict.fromkeys(("train", *source.splits))))
        self._source, self._split = source, split
        self._task, self._shots, self._seed = task, shots, seed
        self._drawn: ExamplesSource | None = None

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return self._source.supports_arbitrary_sharding

    def _some(self) -> ExamplesSource:
        if self._drawn is None:
            rows = list(self._source.get_dataset(self._split, shuffle=False).as_numpy_iterator())
            if len(rows) < self._shots:
                raise ValueError(
                    f"Task {self._task!r} has {len(rows)} examples in its split {self._split!r}, and "
                    f"{self._shots} shots were asked for."
                )
            chosen = np.random.default_rng(self._seed).permutation(len(rows))[: self._shots]
            self._drawn = ExamplesSource({"train": [rows[i] for i in sorted(chosen)]})
        return self._drawn

    def list_shards(self, split: str) -> Any:
        source = self._some() if split == "train" else self._source
        return source.list_shards(split)

    def num_input_examples(self, split: str) -> int:
        if split == "train":
            return self._some().num_input_examples(split)
        return self._source.num_input_examples(split)

    def get_dataset(self, split: str = "train", **options: Any) -> tf.data.Dataset:
        """The examples of one split, or of one shard of it."""
        source = self._some() if split == "train" else self._source
        return source.get_dataset(split=split, **options)
