"""What a run writes down."""

import io
import json

import numpy as np

from modjax import logging

SUMS = {
    "loss": 30.0,
    "z_loss": 1.0,
    "weight": 20.0,
    "correct": 5.0,
    "tokens": 60.0,
    "positions": 80.0,
    "learning_rate": 0.1,
    "grad_norm": 8.0,
    "seconds": 2.0,
    "steps": 4,
}


def test_sums_become_figures_per_token_step_and_second():
    assert logging.summarize(SUMS) == {
        "learning_rate": 0.1,
        "loss": 1.5,
        "z_loss": 0.05,
        "accuracy": 0.25,
        "grad_norm": 2.0,
        "padding": 0.25,
        "seconds": 2.0,
        "steps_per_second": 2.0,
        "tokens_per_second": 30.0,
    }


def test_figures_without_their_sums_are_left_out():
    assert logging.summarize({"loss": 3.0, "weight": 2.0}) == {"loss": 1.5}


def test_a_resumed_run_has_each_step_once(tmp_path):
    writer = logging.MetricWriter(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        writer.write(step, {"loss": float(step)})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')  # the process was killed here
    writer = logging.MetricWriter(tmp_path, tensorboard=False, resume_step=20)
    writer.write(30, {"loss": 3.5})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 10.0), (20, 20.0), (30, 3.5)]


def test_a_run_that_begins_anew_has_no_lines_of_one_that_died_before_its_first_checkpoint(tmp_path):
    for loss in (9.0, 1.0):
        writer = logging.MetricWriter(tmp_path)
        writer.write(10, {"loss": loss})
        writer.close()
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_other_processes_write_nothing(tmp_path):
    writer = logging.MetricWriter(tmp_path / "train", enabled=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []
    stream = io.StringIO()
    progress = logging.Progress(10, enabled=False, stream=stream)
    progress.say("hello")
    progress.update(5, {"loss": 1.0})
    assert stream.getvalue() == ""


def test_tensorboard_gets_the_same_figures(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import crc32c  # noqa: F401  (the package is complete)

    writer = logging.MetricWriter(tmp_path)
    writer.write(7, {"loss": 0.5})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    data, scalars = events.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[12 + length + 4 :]
    assert scalars == [(7, "loss", 0.5)]


def test_without_a_terminal_progress_is_plain_lines():
    stream = io.StringIO()
    progress = logging.Progress(total=30, start=10, stream=stream)
    progress.update(20, {"loss": 1.25, "accuracy": 0.5})
    progress.say("saved")
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 20/30  loss 1.25  accuracy 0.5  ETA ")
    assert second == "saved"


def test_on_a_terminal_progress_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = logging.Progress(total=30, start=10, stream=stream)
    progress.update(20, {"loss": 1.25})
    progress.close()
    assert "20/30" in stream.getvalue() and "loss=1.25" in stream.getvalue()


def test_durations_are_read_at_a_glance():
    assert [logging.duration(s) for s in (0.2, 59, 185, 7620)] == ["0s", "59s", "3m05s", "2h07m"]


def test_the_table_of_parameters_counts_what_trains():
    trained = {"a/lora/a": np.ones((4, 2), np.float32)}
    frozen = {"a/kernel": np.ones((4, 6), np.float16)}
    lines = logging.parameter_table(trained, frozen).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["a/kernel", "(4,", "6)", "float16", "frozen"],
        ["a/lora/a", "(4,", "2)", "float32", "trained"],
    ]
    assert lines[2] == "trained 8 of 32 parameters (25 %), frozen 24"
