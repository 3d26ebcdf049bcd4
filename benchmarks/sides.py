"""The sides of a comparison: processes that do a step when they are asked to. Batches travel in files."""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import measure

Batches = list[dict[str, np.ndarray]]
# What does a step on a batch and returns its loss, and what is to be called once everything is imported.
Made = tuple[Callable[[Any], float], Callable[[], None]]


def write(folder: pathlib.Path, batches: Batches) -> None:
    """One file for each batch."""
    folder.mkdir()
    for number, batch in enumerate(batches):
        np.savez(folder / f"{number:04}.npz", **batch)


def read(folder: pathlib.Path) -> Batches:
    """What `write` wrote, in its order."""
    return [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]


def serve(make: Callable[[], Made], batches: pathlib.Path, cores: int) -> None:
    """A side's process: reads numbers of batches, answers with what a step on each took.

    Args:
      make: imports what the side needs, on the cores it may use.
      batches: their folder.
      cores: see `measure.use_cores`.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    clock = measure.use_cores(cores)
    step, start = make()
    imported = peak_memory()
    start()
    rows = read(batches)
    useful = [int((batch["decoder_target_tokens"] > 0).sum()) for batch in rows]
    print(json.dumps({"batches": len(rows), "targets": useful}), file=answers, flush=True)
    for line in sys.stdin:
        began = clock()
        loss = step(rows[int(line)])
        seconds = clock() - began
        peak = peak_memory()
        found = {"seconds": seconds, "loss": loss, "peak": peak, "beyond": peak - imported}
        print(json.dumps(found), file=answers, flush=True)


def peak_memory() -> float:
    """The largest resident set of this process so far, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Side:
    """A side's process, seen from the parent: a command that ends up in `serve`."""

    def __init__(self, command: Sequence[str]):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.known = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"A side ended with status {self._process.wait()}; see above.")
        return json.loads(line)

    def step(self, number: int) -> dict[str, Any]:
        """Does a step on the batch of that number, counted on beyond the last one."""
        assert self._process.stdin is not None
        print(number % self.known["batches"], file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def started(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Side]]:
    """The process of each command, by name, until the block is left."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(Side(c))) for name, c in commands.items()
        }


def parser(text: str, cases: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The arguments that comparisons share: --serve and --prepare are what they call themselves with."""
    made = argparse.ArgumentParser(description=text.split("\n")[0])
    made.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases))
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--cores", type=int, default=1, help="0 for all")
    made.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    made.add_argument("--prepare", help=argparse.SUPPRESS)
    return made
