"""What a run says of its cost: operations by hand, memory, time lost, and a trace."""

import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import launch, loop, profiling

sys.path.insert(0, str(pathlib.Path(__file__).parent / "testdata"))
from tower import Batches, make  # noqa: E402

X, W = jax.ShapeDtypeStruct((6, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
ONE = 2 * 6 * 8 * 8  # x @ w


def flops(function, *args):
    return profiling.product_flops(jax.jit(function).trace(*args).jaxpr)


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_operations_are_those_counted_by_hand():
    assert flops(lambda x, w: x @ w[0], X, W) == ONE
    assert flops(lambda x, w: jnp.einsum("bd,ldk->lbk", x, w), X, W) == 5 * ONE
    assert flops(lambda x, w: x + w[0, 0], X, W) == 0


def test_a_loop_counts_as_often_as_it_runs_forwards_and_backwards():
    assert flops(scanned, X, W) == 5 * ONE
    # The gradients of x and of w, and the forward pass.
    assert flops(jax.grad(lambda x, w: scanned(x, w).sum(), (0, 1)), X, W) == 15 * ONE
    # What rematerialisation computes again is computed.
    again = jax.grad(lambda x, w: jax.checkpoint(scanned)(x, w).sum(), (0, 1))
    assert flops(again, X, W) > 15 * ONE


def test_of_a_conditions_branches_the_dearest_counts():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x @ w[0] @ w[1])

    assert flops(either, X, W) == 2 * ONE


def test_a_program_computes_what_the_function_does_and_knows_its_memory():
    function = jax.jit(scanned)
    draw = np.random.default_rng(0)
    args = [jnp.asarray(draw.normal(size=s.shape), jnp.float32) for s in (X, W)]
    program = profiling.compile_program(function, *args)
    np.testing.assert_array_equal(program.call(*args), function(*args))
    assert (program.arguments, program.output) == (4 * (6 * 8 + 5 * 8 * 8), 4 * 6 * 8)
    assert f"{5 * ONE:.3g} FLOPs" in program.describe() and "1.47 kB" in program.describe()


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_kind_or_not_at_all(kind, peak):
    assert profiling.peak_flops(kind) == peak


def test_mfu_is_of_the_time_spent_training():
    spent = profiling.Spent()
    spent.steps, spent.tokens = 10, 500.0
    spent._began = time.monotonic() - 25.0
    spent.seconds |= dict(compilation=10.0, checkpoints=3.0, evaluation=2.0, input=1.0)
    chips = [types.SimpleNamespace(device_kind="TPU v4")] * 2
    text = spent.describe(
        275e12, chips
    )  # ten steps in ten seconds, each half of what two chips can
    assert "MFU 50.0 %" in text and "50 tokens/s" in text
    assert "compilation 10.0s (40.0 %)" in text and "input 1.0s (4.0 %)" in text
    unknown = [types.SimpleNamespace(device_kind="cpu")]
    assert "MFU unknown" in spent.describe(1.0, unknown)


def test_the_loop_tells_the_step_before_it_runs_and_where_its_time_went():
    made, state, frozen, _ = make()
    told, spent = [], profiling.Spent()

    class Slow(Batches):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    loop.fit(
        made,
        state,
        frozen,
        Slow(),
        4,
        begin=lambda program: told.append((program, spent.steps)),
        spent=spent,
        save=lambda *_: time.sleep(0.1),
        save_every=2,
        evaluate=lambda *_: time.sleep(0.2),
        eval_every=4,
    )
    ((program, steps),) = told
    assert steps == 0 and program.flops > 0 and spent.steps == 4
    assert spent.seconds["input"] >= 0.15  # of steps this small the devices wait for every batch
    assert spent.seconds["checkpoints"] >= 0.2 and spent.seconds["evaluation"] >= 0.2
    assert spent.seconds["compilation"] > 0 and spent.total >= sum(spent.seconds.values())


def test_input_that_comes_while_a_step_is_in_flight_costs_nothing(monkeypatch):
    made, state, frozen, _ = make()
    clock = [0.0]  # only the input takes time
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop._Reader, "idle", property(lambda reader: not reader._pending))

    class Slow(Batches):
        def __next__(self):
            clock[0] += 1.0
            return super().__next__()

    spent = profiling.Spent()
    loop.fit(made, state, frozen, Slow(), 4, spent=spent)
    assert spent.seconds["input"] == 1.0  # the first batch, which no step hides


@pytest.mark.parametrize("steps, expected", [(10, [3, 5]), (4, [2, 4]), (1, [0, 1])])
def test_a_trace_is_of_the_steps_asked_for_or_the_last_ones(tmp_path, steps, expected):
    trace = profiling.Trace(tmp_path, 3, 2, steps)
    assert [done for done in range(steps + 1) if trace.due(done)] == expected


def test_a_trace_of_no_steps_is_refused(tmp_path):
    for first, count in ((-1, 2), (3, 0)):
        with pytest.raises(ValueError, match=r"profile_steps=.*must be"):
            profiling.Trace(tmp_path, first, count, 10)


def test_the_trace_holds_its_steps_and_no_others(tmp_path):
    made, state, frozen, _ = make()
    trace = profiling.Trace(tmp_path, 2, 3, 8)
    loop.fit(made, state, frozen, Batches(), 8, trace=trace)
    (file,) = tmp_path.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    found = [
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(found) == [2, 3, 4]


def test_the_flag_is_refused_where_nothing_is_trained(capsys):
    assert launch.run(["--profile"], "test", "eval", lambda **_: None) == 2
    assert "--profile is a flag of train.py" in capsys.readouterr().err


def test_freed_memory_is_given_back_where_the_c_library_can(monkeypatch):
    trimmed = []
    libraries = [types.SimpleNamespace(malloc_trim=trimmed.append), types.SimpleNamespace()]
    monkeypatch.setattr(profiling.ctypes, "CDLL", lambda name: libraries.pop(0))
    profiling.release_freed_memory()
    profiling.release_freed_memory()
    assert trimmed == [0] and not libraries
