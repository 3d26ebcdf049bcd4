"""The processes that a comparison's sides are."""

import sys

import numpy as np
import pytest

from benchmarks import sides

# A side whose loss is the sum of a batch; what it prints must not be taken for an answer.
SIDE = """
import pathlib, sys
from benchmarks import sides

def make():
    print("importing")
    ready = []

    def step(batch):
        print("a step")
        return float(batch["decoder_target_tokens"].sum()) + ready[0]

    return step, lambda: ready.append(0.5)

sides.serve(make, pathlib.Path(sys.argv[1]), cores=0)
"""


@pytest.fixture
def batches(tmp_path):
    """Two batches, of 3 and of 1 targets, in a folder."""
    folder = tmp_path / "rows"
    rows = [np.array([[7, 2, 1, 0]], np.int32), np.array([[4, 0, 0, 0]], np.int32)]
    sides.write(folder, [{"decoder_target_tokens": row} for row in rows])
    return folder


def test_batches_come_back_in_their_order(batches):
    assert [int(batch["decoder_target_tokens"][0, 0]) for batch in sides.read(batches)] == [7, 4]


def test_a_side_answers_with_the_loss_of_the_batch_it_was_asked_for(batches):
    with sides.started({"one": [sys.executable, "-c", SIDE, str(batches)]}) as processes:
        side = processes["one"]
        answers = [side.step(number) for number in range(3)]
    assert side.known == {"batches": 2, "targets": [3, 1]}
    assert [answer["loss"] for answer in answers] == [10.5, 4.5, 10.5]
    assert all(0 <= answer["beyond"] <= answer["peak"] for answer in answers)


def test_a_side_that_fails_ends_the_comparison_and_the_others(batches):
    good, bad = [sys.executable, "-c", SIDE, str(batches)], [sys.executable, "-c", "import nothing"]
    with pytest.raises(SystemExit, match="status 1"):
        with sides.started({"good": good, "bad": bad}):
            pass
