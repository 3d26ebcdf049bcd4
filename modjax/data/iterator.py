"""TrainIterator: batches with a position that is saved and restored exactly, and what it counts.

A job's batches are defined without its processes: the examples are divided into a fixed number of streams
(`data_shards`), each shuffles, mixes and packs its own, and stream `v` of `V` makes rows `v * B / V` to
`(v + 1) * B / V` of every batch. A process reads the streams that have rows of its own. So any number of processes
trains on the same batches, and a position belongs to a stream and may be read by any process.

Legend: `B` rows of the job's batch, `V` streams, `S` segments of a row, `F` columns of features.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from modjax.data.carry import DATASET_KEY, INPUTS_TOO_LONG, TARGETS_TOO_LONG
from modjax.data.checks import plain
from modjax.data.converters import KeyTable

Batch = dict[str, np.ndarray]
POSITION_VERSION = 1
_SUMS = ("rows", "full_rows", "tokens", "positions")


class TrainIterator(Iterator[Batch]):
    """A process's rows of every batch, with a position that can be saved and restored exactly.

    Made by `train_iterator`. Not to be read by two threads. Batches are prefetched; the position
    is that of the batches handed out, so nothing is lost or repeated by saving it.

    Attributes:
      position: how many batches were handed out.
      settings: what determines the batches; JSON-able.
      streams: the numbers of the streams that this process reads.
    """

    def __init__(
        self,
        make_dataset: Callable[[int], tf.data.Dataset],
        table: KeyTable,
        settings: dict[str, Any],
        *,
        shares: Sequence[Sequence[int]],
        process: int,
        on_too_long: Literal["count", "error"],
    ):
        self.settings = json.loads(json.dumps(settings))
        self._on_too_long = on_too_long
        count = settings["data_shards"]
        height = settings["batch_size"] // count
        # The first process that has rows of a stream writes its position.
        readers = [{int(row) // height for row in share} for share in shares]
        earlier = set().union(*readers[:process])
        mine = np.asarray(shares[process], np.int64)
        self._parts: list[tuple[_Stream, np.ndarray | None, bool]] = []
        for number in sorted(readers[process]):
            stream = _Stream(number, count, height, make_dataset, table)
            rows = mine[mine // height == number] - number * height
            self._parts.append(
                (stream, rows if len(rows) < height else None, number not in earlier)
            )
        self._start()

    def _start(self) -> None:
        for stream, _, _ in self._parts:
            stream.start()
        self.position = 0

    @property
    def streams(self) -> list[int]:
        return [stream.number for stream, _, _ in self._parts]

    def __next__(self) -> Batch:
        """The rows of the next batch.

        Raises:
          ValueError: an example is invalid (its task is named), or too long and `on_too_long` is
            "error".
        """
        found = []
        for stream, rows, _ in self._parts:
            batch = next(stream)
            if self._on_too_long == "error" and stream.counts[1:, 1:].any():
                raise ValueError(self._too_long_message())
            found.append(
                batch if rows is None else {name: value[rows] for name, value in batch.items()}
            )
        self.position += 1
        if len(found) == 1:
            return found[0]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def _too_long_message(self) -> str:
        parts = [
            f"{kind} of {n} example(s) of task {task!r} over the limit of "
            f"{self.settings['task_feature_lengths'][kind]} tokens"
            for kind in ("inputs", "targets")
            for task, counts in self.stats["too_long"].items()
            if (n := counts[kind])
        ]
        return f"{'; '.join(parts)}. Raise task_feature_lengths, or allow trimming."

    @property
    def stats(self) -> dict[str, Any]:
        """What was read since the start of the run, of the streams that this process reads: with one data shard, the
        whole job's.

        Returns:
          `batches`; `examples`, their number by task; `too_long`, by task the number of examples
          of which `inputs` or `targets` were trimmed, tasks without any left out; `padding`, the
          share of encoder and decoder positions that hold padding; `full_rows`, the share of
          packed rows that had as many segments as a row may have.
        """
        names = self._parts[0][0].table.names
        counts = np.sum([stream.counts for stream, _, _ in self._parts], axis=0)
        sums = {name: sum(stream.sums[name] for stream, _, _ in self._parts) for name in _SUMS}
        too_long = {
            n: {"inputs": int(counts[1, i]), "targets": int(counts[2, i])}
            for i, n in enumerate(names, 1)
            if counts[1:, i].any()
        }
        return {
            "batches": self.position,
            "examples": dict(sorted(zip(names, counts[0, 1:].tolist(), strict=True))),
            "too_long": too_long,
            "padding": 1 - sums["tokens"] / max(1, sums["positions"]),
            "full_rows": sums["full_rows"] / max(1, sums["rows"]),
        }

    def save(self, directory: str) -> None:
        """Writes the positions of this process's streams into a directory, which all processes share; of a stream
        that several read, the first of them does.

        The whole state of the input is stored (shuffle buffers too: about a megabyte per task), so
        that restoring costs no reading; where it cannot be, as with a Python generator in a
        source, the number of batches is, and restoring reads that many.
        """
        tf.io.gfile.makedirs(directory)
        for stream, _, writes in self._parts:
            if writes:
                stream.save(directory, self.position, self.settings)

    def restore(self, directory: str, *, strict: bool = True) -> Literal["exact", "skipped"]:
        """Moves to the position that `save` wrote, in however many processes.

        Args:
          directory: the one given to `save`.
          strict: refuse a position of an input with other settings; otherwise skip as many batches.

        Returns:
          "exact" if the stored state was read; "skipped" if as many batches were read and thrown
          away, which gives the same batches unless settings changed.

        Raises:
          ValueError: there is no position, it is damaged, or it is of an input with other settings.
        """
        stored = [_read_position(directory, stream) for stream, _, _ in self._parts]
        for data, _ in stored:
            self._check_settings(data["settings"], directory, strict)
        positions = sorted({data["position"] for data, _ in stored})
        if len(positions) > 1:
            raise ValueError(
                f"The data positions in {directory} are damaged: their streams are at {positions}."
            )
        how: Literal["exact", "skipped"] = "exact"
        for (stream, _, _), (data, stem) in zip(self._parts, stored, strict=True):
            same = data["settings"] == self.settings
            if stem is None or not same or not stream.read_state(stem, data):
                stream.skip(positions[0], directory)
                how = "skipped"
        self.position = positions[0]
        return how

    def _check_settings(self, old: dict[str, Any], directory: str, strict: bool) -> None:
        new = self.settings
        differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if differing and strict:
            what = "; ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in differing)
            keep = (
                ". A run keeps its data_shards, in any number of processes"
                if "data_shards" in differing
                else ""
            )
            raise ValueError(f"The data position in {directory} is of another input: {what}{keep}.")


class _Stream(Iterator[Batch]):
    """One of the streams of a job's batches: its rows `[height, ...]` of each, and what it counts.

    Attributes:
      number, count: which stream it is, of how many.
      table: of the tasks.
      counts: int64 `[3, tasks + 1]`: examples, those with inputs too long, those with targets too long.
      sums: of rows, and of positions.
    """

    def __init__(
        self,
        number: int,
        count: int,
        height: int,
        make_dataset: Callable[[int], tf.data.Dataset],
        table: KeyTable,
    ):
        self.number, self.count, self.table = number, count, table
        self._height, self._make_dataset = height, make_dataset

    def start(self) -> None:
        # A dataset made anew: a second iterator over the same one would be shuffled differently.
        self._iterator = iter(self._make_dataset(self.number))
        self._untouched = True
        self.counts = np.zeros((3, len(self.table.names) + 1), np.int64)
        self.sums = dict.fromkeys(_SUMS, 0)

    def __next__(self) -> Batch:
        self._untouched = False
        try:
            pulled = next(self._iterator)
        except tf.errors.OpError as e:
            raise ValueError(plain(e)) from e
        batch = {k: v.numpy() for k, v in pulled.items()}
        missing = self._height - len(batch[DATASET_KEY])
        if missing:
            batch = {k: np.pad(v, [(0, missing), (0, 0)]) for k, v in batch.items()}
        carried = batch.pop(DATASET_KEY)
        rows = self.table.rows(carried)
        self._count(batch, carried, rows)
        return {**batch, "features": self.table.features[rows], "tasks": self.table.tasks[rows]}

    def _count(self, batch: Batch, carried: np.ndarray, rows: np.ndarray) -> None:
        number = len(self.table.names) + 1
        for i, flag in enumerate((0, INPUTS_TOO_LONG, TARGETS_TOO_LONG)):
            found = rows[(carried & flag) == flag]
            self.counts[i] += np.bincount(found, minlength=number)
        full = np.count_nonzero(np.all(carried, axis=1)) if carried.shape[1] > 1 else 0
        self.sums["rows"] += int(np.any(carried, axis=1).sum())
        self.sums["full_rows"] += int(full)
        for name in {"encoder_input_tokens", "decoder_target_tokens"} & set(batch):
            self.sums["tokens"] += int(np.count_nonzero(batch[name]))
            self.sums["positions"] += batch[name].size

    def skip(self, batches: int, directory: str) -> None:
        """Reads and throws away as many batches from the start."""
        if not self._untouched:
            self.start()
        for done in range(batches):
            if next(self, None) is None:
                raise ValueError(
                    f"The data position in {directory} is {batches} batches from the "
                    f"start, but the input ends after {done}."
                )

    def save(self, directory: str, position: int, settings: dict[str, Any]) -> None:
        stem = stems(directory, self.number, self.count)[0]
        stored = True
        try:
            tf.train.Checkpoint(iterator=self._iterator).write(f"{stem}.iterator")
        except tf.errors.OpError as e:
            stored = False
            logging.info("The input's state cannot be stored, only its position: %s", plain(e))
        data = {
            "version": POSITION_VERSION,
            "position": position,
            "settings": settings,
            "iterator_stored": stored,
            "names": self.table.names,
            "counts": self.counts.tolist(),
            "sums": self.sums,
        }
        with tf.io.gfile.GFile(f"{stem}.json.part", "w") as f:
            f.write(json.dumps(data))
        tf.io.gfile.rename(f"{stem}.json.part", f"{stem}.json", overwrite=True)

    def read_state(self, stem: str, data: dict[str, Any]) -> bool:
        """Goes on where the state was stored; false if there is none that can be read."""
        if not data["iterator_stored"]:
            return False
        self._untouched = False
        try:
            status = tf.train.Checkpoint(iterator=self._iterator).read(f"{stem}.iterator")
            status.assert_existing_objects_matched()
        except Exception as e:
            # A lost or damaged file, another version of tensorflow or of a preprocessor, reported
            # by exceptions of many kinds; whatever it is, the seeds lead to the same place.
            logging.warning("Reading batches again, as the input's state was refused: %s", e)
            return False
        order = [data["names"].index(n) + 1 for n in self.table.names]
        self.counts = np.array(data["counts"], np.int64)[:, [0, *order]]
        self.sums = data["sums"]
        return True


def stems(directory: str, number: int, count: int) -> tuple[str, str]:
    """Where the position of a stream lies: today, and as process `number` of `count` once wrote that of its own
    shard, which is the same.
    """
    name, folder = f"position_{number}_of_{count}", directory.rstrip("/")
    return f"{folder}/{name}", f"{folder}/process_{number}_of_{count}/{name}"


def _read_position(directory: str, stream: _Stream) -> tuple[dict[str, Any], str | None]:
    """What `save` wrote, and the stem of its files if it was for this very stream."""
    own = [
        stem
        for stem in stems(directory, stream.number, stream.count)
        if tf.io.gfile.exists(f"{stem}.json")
    ]
    folder = directory.rstrip("/")
    pattern = "position_*_of_*.json"
    others = [
        path
        for glob in (f"{folder}/{pattern}", f"{folder}/process_*_of_*/{pattern}")
        for path in sorted(tf.io.gfile.glob(glob))
    ]
    if not own and not others:
        raise ValueError(f"There is no data position in {directory}.")
    path = f"{own[0]}.json" if own else others[0]
    try:
        with tf.io.gfile.GFile(path) as f:
            data = json.loads(f.read())
        if data["version"] != POSITION_VERSION:
            raise ValueError(f"version {data['version']}, not {POSITION_VERSION}")
        needed = ("position", "settings", "iterator_stored", "names", "counts", "sums")
        data = {k: data[k] for k in needed}
        # When every process had a shard of its own, their number was not among the settings.
        count = int(path.removesuffix(".json").rpartition("_of_")[2])
        data["settings"] = {"data_shards": count, **data["settings"]}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"The data position {path} is damaged: {e!r}.") from e
    if not own and data["settings"]["data_shards"] == stream.count:
        raise ValueError(
            f"The data position in {directory} lacks stream {stream.number} of {stream.count}."
        )
    return data, own[0] if own else None
