"""TrainIterator: batches with a position that is saved and restored exactly, and what it counts.

Legend: `B` rows of a batch that this process reads, `S` segments of a row, `F` columns of features.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import seqio
import tensorflow as tf

from modjax.data.carry import DATASET_KEY, INPUTS_TOO_LONG, TARGETS_TOO_LONG
from modjax.data.checks import plain
from modjax.data.converters import KeyTable

Batch = dict[str, np.ndarray]
POSITION_VERSION = 1


class TrainIterator(Iterator[Batch]):
    """Batches of this process, with a position that can be saved and restored exactly.

    Made by `train_iterator`. Not to be read by two threads. Batches are prefetched; the position
    is that of the batches handed out, so nothing is lost or repeated by saving it.

    Attributes:
      position: how many batches were handed out.
      settings: what determines the batches; JSON-able.
      shard: which part of the data this is.
    """

    def __init__(
        self,
        make_dataset: Callable[[], tf.data.Dataset],
        table: KeyTable,
        settings: dict[str, Any],
        *,
        shard: seqio.ShardInfo,
        rows: int,
        on_too_long: Literal["count", "error"],
    ):
        self.settings, self.shard = json.loads(json.dumps(settings)), shard
        self._make_dataset, self._table, self._rows = make_dataset, table, rows
        self._on_too_long = on_too_long
        self._start()

    def _start(self) -> None:
        # A dataset made anew: a second iterator over the same one would be shuffled differently.
        self._iterator = iter(self._make_dataset())
        self._untouched = True
        self.position = 0
        self._counts = np.zeros((3, len(self._table.names) + 1), np.int64)
        self._sums = dict.fromkeys(("rows", "full_rows", "tokens", "positions"), 0)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          ValueError: an example is invalid (its task is named), or too long and `on_too_long` is
            "error".
        """
        batch = {k: v.numpy() for k, v in self._pull().items()}
        missing = self._rows - len(batch[DATASET_KEY])
        if missing:
            batch = {k: np.pad(v, [(0, missing), (0, 0)]) for k, v in batch.items()}
        self.position += 1
        carried = batch.pop(DATASET_KEY)
        rows = self._table.rows(carried)
        self._count(batch, carried, rows)
        return {**batch, "features": self._table.features[rows], "tasks": self._table.tasks[rows]}

    def _pull(self) -> dict[str, tf.Tensor]:
        self._untouched = False
        try:
            return next(self._iterator)
        except tf.errors.OpError as e:
            raise ValueError(plain(e)) from e

    def _count(self, batch: Batch, carried: np.ndarray, rows: np.ndarray) -> None:
        number = len(self._table.names) + 1
        for i, flag in enumerate((0, INPUTS_TOO_LONG, TARGETS_TOO_LONG)):
            found = rows[(carried & flag) == flag]
            self._counts[i] += np.bincount(found, minlength=number)
        if self._on_too_long == "error" and self._counts[1:, 1:].any():
            raise ValueError(self._too_long_message())
        full = np.count_nonzero(np.all(carried, axis=1)) if carried.shape[1] > 1 else 0
        self._sums["rows"] += int(np.any(carried, axis=1).sum())
        self._sums["full_rows"] += int(full)
        for name in {"encoder_input_tokens", "decoder_target_tokens"} & set(batch):
            self._sums["tokens"] += int(np.count_nonzero(batch[name]))
            self._sums["positions"] += batch[name].size

    def _too_long_message(self) -> str:
        parts = [
            f"{kind} of {n} example(s) of task {self._table.names[i - 1]!r} over the limit of "
            f"{self.settings['task_feature_lengths'][kind]} tokens"
            for kind, row in zip(("inputs", "targets"), self._counts[1:], strict=True)
            for i, n in enumerate(row)
            if i and n
        ]
        return f"{'; '.join(parts)}. Raise task_feature_lengths, or allow trimming."

    @property
    def stats(self) -> dict[str, Any]:
        """What this process has read since the start of the run.

        Returns:
          `batches`; `examples`, their number by task; `too_long`, by task the number of examples
          of which `inputs` or `targets` were trimmed, tasks without any left out; `padding`, the
          share of encoder and decoder positions that hold padding; `full_rows`, the share of
          packed rows that had as many segments as a row may have.
        """
        names = self._table.names
        too_long = {
            n: {"inputs": int(self._counts[1, i]), "targets": int(self._counts[2, i])}
            for i, n in enumerate(names, 1)
            if self._counts[1:, i].any()
        }
        sums = self._sums
        return {
            "batches": self.position,
            "examples": dict(sorted(zip(names, self._counts[0, 1:].tolist(), strict=True))),
            "too_long": too_long,
            "padding": 1 - sums["tokens"] / max(1, sums["positions"]),
            "full_rows": sums["full_rows"] / max(1, sums["rows"]),
        }

    def save(self, directory: str) -> None:
        """Writes this process's position into a directory, which all processes may share.

        The whole state of the input is stored (shuffle buffers too: about a megabyte per task), so
        that restoring costs no reading; where it cannot be, as with a Python generator in a
        source, the number of batches is, and restoring reads that many.
        """
        tf.io.gfile.makedirs(directory)
        stem = _join(directory, _stem(self.shard))
        stored = True
        try:
            tf.train.Checkpoint(iterator=self._iterator).write(f"{stem}.iterator")
        except tf.errors.OpError as e:
            stored = False
            logging.info("The input's state cannot be stored, only its position: %s", plain(e))
        data = {
            "version": POSITION_VERSION,
            "position": self.position,
            "settings": self.settings,
            "iterator_stored": stored,
            "names": self._table.names,
            "counts": self._counts.tolist(),
            "sums": self._sums,
        }
        with tf.io.gfile.GFile(f"{stem}.json.part", "w") as f:
            f.write(json.dumps(data))
        tf.io.gfile.rename(f"{stem}.json.part", f"{stem}.json", overwrite=True)

    def restore(self, directory: str, *, strict: bool = True) -> Literal["exact", "skipped"]:
        """Moves to the position that `save` wrote.

        Args:
          directory: the one given to `save`.
          strict: refuse a position of an input with other settings; otherwise skip as many batches.

        Returns:
          "exact" if the stored state was read; "skipped" if as many batches were read and thrown
          away, which gives the same batches unless the number of processes, or settings, changed.

        Raises:
          ValueError: there is no position, it is damaged, or it is of an input with other settings.
        """
        data, own = self._read_position(directory)
        old, new = data["settings"], self.settings
        differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if differing and strict:
            what = "; ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in differing)
            raise ValueError(f"The data position in {directory} is of another input: {what}.")
        if own and not differing and data["iterator_stored"] and self._read_state(directory):
            order = [data["names"].index(n) + 1 for n in self._table.names]
            self._counts = np.array(data["counts"], np.int64)[:, [0, *order]]
            self._sums, self.position = data["sums"], data["position"]
            return "exact"
        if not self._untouched:
            self._start()
        for done in range(data["position"]):
            if next(self, None) is None:
                raise ValueError(
                    f"The data position in {directory} is {data['position']} batches from the "
                    f"start, but the input ends after {done}."
                )
        return "skipped"

    def _read_position(self, directory: str) -> tuple[dict[str, Any], bool]:
        """What `save` wrote, and whether it was for this very shard."""
        path = _join(directory, f"{_stem(self.shard)}.json")
        own = tf.io.gfile.exists(path)
        others = sorted(tf.io.gfile.glob(_join(directory, "position_*_of_*.json")))
        if not own and not others:
            raise ValueError(f"There is no data position in {directory}.")
        path = path if own else others[0]
        try:
            with tf.io.gfile.GFile(path) as f:
                data = json.loads(f.read())
            if data["version"] != POSITION_VERSION:
                raise ValueError(f"version {data['version']}, not {POSITION_VERSION}")
            needed = ("position", "settings", "iterator_stored", "names", "counts", "sums")
            return {k: data[k] for k in needed}, own
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"The data position {path} is damaged: {e!r}.") from e

    def _read_state(self, directory: str) -> bool:
        self._untouched = False
        stem = _join(directory, _stem(self.shard))
        try:
            status = tf.train.Checkpoint(iterator=self._iterator).read(f"{stem}.iterator")
            status.assert_existing_objects_matched()
        except Exception as e:
            # A lost or damaged file, another version of tensorflow or of a preprocessor, reported
            # by exceptions of many kinds; whatever it is, the seeds lead to the same place.
            logging.warning("Reading batches again, as the input's state was refused: %s", e)
            return False
        return True


def _stem(shard: seqio.ShardInfo) -> str:
    return f"position_{shard.index}_of_{shard.num_shards}"


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
