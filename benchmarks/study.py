"""Studies: many trainings, each a cell that is done once, several at a time, in as many sittings as it takes.

A study's results are the lines of one file, a JSON object for each cell that is done: `name`, what it was (`config`),
what it gave, its `seconds`, `processor_seconds`, `commit` and `date`. What is in the file is not done again, so the
same command goes on where the last one was stopped, and the file, which is kept with the code, is all that a report
needs.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

from benchmarks.cells import ROOT, cores

Found = dict[str, Any]


class CellError(RuntimeError):
    """A cell that could not be done."""


class Store:
    """The cells that are done, by name, in a file of JSON lines.

    Args:
      path: of the file, which need not exist yet.

    Raises:
      SystemExit: a line that is no cell; the file and the line are named.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._cells: dict[str, Found] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                cell = json.loads(line)
                self._cells[cell["name"]] = cell
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{path}, line {number}: not a cell of a study ({error!r})"
                ) from None

    def get(self, name: str, config: Mapping[str, Any]) -> Found | None:
        """What a cell gave; None if it is not done.

        Raises:
          SystemExit: it was done with another configuration; what differs is named.
        """
        cell = self._cells.get(name)
        if cell is None:
            return None
        then, now = cell["config"], json.loads(json.dumps(config))
        if then != now:
            keys = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
            raise SystemExit(
                f"{self.path}: cell {name!r} is of another configuration: "
                + "; ".join(f"{k} was {then.get(k)!r} and is {now.get(k)!r}" for k in keys)
                + ". Take its line out to do it again."
            )
        return cell

    def cells(self) -> list[Found]:
        """All that are done."""
        return list(self._cells.values())

    def add(self, cell: Found) -> None:
        """Keeps a cell, on disk before this returns; the file is whole at any moment."""
        self._cells[cell["name"]] = cell
        lines = [json.dumps(self._cells[name]) + "\n" for name in sorted(self._cells)]
        partial = self.path.with_suffix(".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(lines))
        os.replace(partial, self.path)


def commit() -> str:
    """The commit of the working tree, with `-dirty` if it differs."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def do(name: str, config: Mapping[str, Any], job: Callable[[], Found], log: pathlib.Path) -> Found:
    """Does a cell, in a process of the pool; what it says goes to a log.

    Args:
      name, config: see the top.
      job: trains and evaluates; what it returns joins the cell.
      log: a file, made anew or added to.

    Raises:
      CellError: the job failed; the log has the trace.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    wall, processor = time.monotonic(), time.process_time()
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            found = job()
        except Exception as error:
            traceback.print_exc()
            # Not the error itself: gin's cannot be sent to another process.
            raise CellError(f"{name} failed, see {log}: {error}") from None
    return {
        "name": name,
        "config": dict(config),
        **found,
        "seconds": round(time.monotonic() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _start(ready: Any, compiled: str) -> None:
    """What a process of the pool begins with: a core, and where compiled programs are kept."""
    core = ready.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    import jax

    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def work(
    ready: Callable[[], Sequence[Any]],
    job: Callable[[Any], Any],
    keep: Callable[[Any, Any], None],
    parallel: int,
    compiled: pathlib.Path,
    until: float = float("inf"),
) -> bool:
    """Does all cells, `parallel` at a time, each in a process that has a core of its own.

    Args:
      ready: the cells that can be begun now and are not done, the first ones first; what is kept may open more.
      job: does one, in a process of the pool: it and the cell are pickled.
      keep: is told each cell and what `job` gave, here.
      parallel: processes.
      compiled: folder of compiled programs, which the processes share.
      until: no cell is begun after this time (of `time.monotonic`).

    Returns:
      Whether all are done.

    Raises:
      Exception: of the first cell that failed, after all others are done and kept.
    """
    # XLA asks for a step's memory anew each time: from huge pages, for a page fault is dear in a virtual machine. What
    # reads it is the C library of a process that starts.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for core in cores(parallel):
        places.put(core)
    running: dict[futures.Future[Any], Any] = {}
    failed: dict[Any, BaseException] = {}
    with futures.ProcessPoolExecutor(parallel, context, _start, (places, str(compiled))) as pool:
        while True:
            waiting = [
                cell for cell in ready() if cell not in running.values() and cell not in failed
            ]
            if time.monotonic() < until:
                for cell in waiting[: parallel - len(running)]:
                    running[pool.submit(job, cell)] = cell
            if not running and failed:
                raise next(iter(failed.values()))
            if not running:
                return not waiting
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                cell = running.pop(future)
                error = future.exception()
                if error is None:
                    keep(cell, future.result())
                else:
                    failed[cell] = error


def write_rows(rows: Sequence[Mapping[str, Any]], store: pathlib.Path) -> pathlib.Path:
    """Writes results.json beside a store, a row a line, and returns its path."""
    path = store.with_name("results.json")
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.write_text(f"[{lines}]\n")
    return path


def mean(values: Sequence[float], digits: int = 1) -> str:
    """The mean of values, one a seed, with its standard error where there are several; empty for none."""
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}{spread}"
