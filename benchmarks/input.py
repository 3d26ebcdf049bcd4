"""Whether a consumer five times as fast as the training step would wait for the input.

    python -m benchmarks.input [--step SECONDS] [--batches 200]

The consumer takes a packed batch of 8 rows of 64/64 tokens of the generated babel mixture, as train.py makes them,
and is then busy for a fifth of a step (waiting, so that the input may work meanwhile as it does while an accelerator
computes). The share is the time spent in `next(iterator)` over all the time. The step is one of FLix on a T5 of width
512, 6+6 layers and 32128 tokens; its seconds are given, since a step on this machine's cores and the input would
share them. Also told: what a batch costs on the processor, which is the time the input needs of the host, wherever
the steps run.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks import measure

LENGTHS = {"inputs": 64, "targets": 64}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, default=1.0, help="seconds of a step")
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args(argv)
    import tasks.babel  # noqa: F401  # registers the mixture
    from modjax.data import pipeline, registry

    space = registry.feature_space("babel_train", None)
    iterator = pipeline.train_iterator(
        "babel_train", "train", space, task_feature_lengths=LENGTHS, batch_size=8, seed=0
    )
    for _ in range(10):  # fills the shuffle buffers
        next(iterator)
    busy, waits = args.step / 5, []
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(args.batches):
        asked = time.perf_counter()
        next(iterator)
        waits.append(time.perf_counter() - asked)
        time.sleep(busy)
    whole = time.perf_counter() - began
    processor = (time.process_time() - processor) / args.batches
    print(
        f"{measure.machine()}; {args.batches} batches, busy {1000 * busy:.0f} ms after each: waited "
        f"{measure.spread(waits, 1000)} ms for a batch, which costs {1000 * processor:.2f} ms of a core"
    )
    goal = "input: share of time waiting, at five times the step's speed"
    measure.report([measure.goal(goal, sum(waits) / whole, 0.02)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
