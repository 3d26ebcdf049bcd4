"""How the input of training grows with the number of datasets.

    python -m benchmarks.growth.inputs --datasets 10 100 300 1000

Packed batches of 8 rows of 64 + 64 tokens of a mixture of small tasks of bytes, as train.py makes them, on one core by
the processor's time: what it takes to build the mixture's graphs up to the first batch, what a batch costs once every
task was read from, and how much of a checkpoint the position is.
"""

import argparse
import functools
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import measure

LENGTHS = {"inputs": 64, "targets": 64}


def rows(number: int) -> list[dict[str, str]]:
    """The examples of a task."""
    return [{"inputs": f"task {number}, example {i}", "targets": f"{i}"} for i in range(100)]


def register(count: int) -> str:
    """Registers so many tasks; the name of the mixture of them."""
    import seqio

    from modjax.data import registry, sources

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
    names = [f"growth{count}_{i}" for i in range(count)]
    for i, name in enumerate(names):
        source = sources.ExamplesSource({"train": functools.partial(rows, i)})
        registry.add_task(
            name,
            source,
            steps,
            {"inputs": feature, "targets": feature},
            metadata={"language": f"language{i}"},
        )
    registry.add_mixture(f"growth{count}", names)
    return f"growth{count}"


def measure_input(count: int, batches: int, clock: Any) -> dict[str, Any]:
    """{"start": seconds to the first batch, "batch": [seconds of each], "position": bytes}."""
    from modjax.data import pipeline, registry

    mixture = register(count)
    began = clock()
    space = registry.feature_space(mixture, None)
    iterator = pipeline.train_iterator(
        mixture, "train", space, task_feature_lengths=LENGTHS, batch_size=8, seed=0
    )
    next(iterator)
    start = clock() - began
    for _ in range(count):  # more examples than tasks: all shuffle buffers are filled
        next(iterator)
    seconds = []
    for _ in range(5):
        began = clock()
        for _ in range(batches):
            next(iterator)
        seconds.append((clock() - began) / batches)
    with tempfile.TemporaryDirectory() as folder:
        iterator.save(folder)
        position = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
    return {"start": start, "batch": seconds, "position": position}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth.inputs", description=__doc__)
    parser.add_argument("--datasets", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--batches", type=int, default=40)
    args = parser.parse_args(argv)
    clock = measure.use_cores(1)
    print(
        f"{measure.machine()}\n\n| datasets | start s | batch ms | position MB |\n|---|---|---|---|"
    )
    found = {}
    for count in sorted(args.datasets):
        found[count] = cell = measure_input(count, args.batches, clock)
        print(
            f"| {count} | {cell['start']:.1f} | {measure.spread(cell['batch'], 1000)} "
            f"| {cell['position'] / 1e6:.1f} |",
            flush=True,
        )
    few, many = (sorted(found[count]["batch"])[2] for count in (min(found), max(found)))
    label = f"a batch of {max(found):,} datasets over one of {min(found):,}"
    measure.report([measure.goal(label, many / few, 1.1)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
