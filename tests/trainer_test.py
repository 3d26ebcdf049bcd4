"""The training step and loop, on a network small enough to see through."""

import dataclasses
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modjax import loop, optimizers, partitioning, trainer

sys.path.insert(0, str(pathlib.Path(__file__).parent / "testdata"))
from tower import Batches, Model, make, run  # noqa: E402


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_only_the_trained_part_changes_and_only_it_has_optimizer_state():
    made, state, frozen, params = make()
    mirrored = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(mirrored) == sorted([(16, 4), (4,)] * 2)
    state, _ = loop.fit(made, state, frozen, Batches(), 3)
    assert_trees_close(frozen["base"], params["base"], rtol=0)
    moved = np.abs(np.asarray(state.trained["adapter"]["kernel"] - params["adapter"]["kernel"]))
    assert moved.min() > 0


def test_no_gradient_is_computed_for_the_frozen_part():
    made, state, frozen, _ = make()
    batch = partitioning.place_batch(next(Batches()), made.mesh)
    text = str(jax.make_jaxpr(made.train_step)(state, frozen, batch, jnp.zeros(1, jnp.int32)))
    assert "f32[16,4]" in text  # the adapter's gradient
    # The base's gradient would be x^T g, a product with the shape of its kernel.
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and not any(":f32[8,16]" in line.split("=")[0] for line in products)


@pytest.mark.parametrize("mean", [True, False])
def test_microbatches_give_the_gradient_of_the_one_big_batch(mean):
    model, batch = Model(mean=mean), next(Batches())
    params = model.init(jax.random.key(0))

    def loss(adapter):
        value, sums = model.loss_sums(params | {"adapter": adapter}, batch, None)
        return value / model.denominator(sums)

    gradient = jax.grad(loss)(params["adapter"])
    for microbatches in (1, 4):
        # Without an algorithm the update is the gradient itself.
        trained, _, _ = run(
            1, model=model, microbatches=microbatches, algorithm=optax.identity(), rate=1.0
        )
        moved = jax.tree.map(lambda old, new: old - new, params["adapter"], trained["adapter"])
        assert_trees_close(moved, gradient, rtol=1e-4, atol=1e-5)


def test_updates_are_scaled_where_rates_say_so():
    made, state, frozen, params = make(algorithm=optax.identity())
    rates = {"adapter": {"kernel": np.array([[0.0, 1.0, 2.0, 1.0]], np.float32)}}
    scaled = trainer.Trainer(
        Model(),
        optimizers.Optimizer(optax.identity(), 1e-2),
        made.mesh,
        {"adapter": params["adapter"]},
        {"base": params["base"]},
        rates=rates,
    )
    other = scaled.init_state({"adapter": params["adapter"]}, seed=1)
    state, _ = loop.fit(made, state, frozen, Batches(), 1)
    other, _ = loop.fit(scaled, other, frozen, Batches(), 1)
    for name, factor in (("kernel", rates["adapter"]["kernel"]), ("bias", 1.0)):
        plain = state.trained["adapter"][name] - params["adapter"][name]
        moved = other.trained["adapter"][name] - params["adapter"][name]
        np.testing.assert_allclose(moved, plain * factor, rtol=1e-4, atol=1e-6)


def test_a_step_moves_nothing_between_host_and_device():
    made, state, frozen, _ = make()
    state, _ = loop.fit(made, state, frozen, Batches(), 1)  # compiles
    program_of = made.program

    def guarded(*args):
        program = program_of(*args)
        with jax.transfer_guard("disallow"):
            return program.call(*args)

    made.program = lambda *args: dataclasses.replace(program_of(*args), call=guarded)
    state, step = loop.fit(made, state, frozen, Batches(), 4, log_every=1, log=lambda *_: 0)
    assert step == 4
    with pytest.raises(Exception, match="Disallowed host-to-device"):
        guarded(state, frozen, next(Batches()), np.zeros(1, np.int32))


def test_the_state_is_donated():
    made, state, frozen, _ = make()
    loop.fit(made, state, frozen, Batches(), 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))


def test_what_a_step_draws_depends_on_the_seed_and_the_step_alone():
    made, state, frozen, _ = make(Model(dropout=True))
    draws = []

    def log(step, sums):
        draws.append(sums["draw"])

    state, _ = loop.fit(made, state, frozen, Batches(), 2, log_every=1, log=log)
    # As after a restart: the state was on the host, and the input is another one.
    state = partitioning.place(jax.device_get(state), made.state_sharding)
    loop.fit(made, state, frozen, Batches(), 4, log_every=1, log=log)
    keys = [jax.random.fold_in(jax.random.key(1), step) for step in range(4)]
    assert draws == [float(jax.random.uniform(key)) for key in keys]


@pytest.mark.parametrize("bad_at", [1, 3, 9])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_at_which_step(bad_at):
    made, state, frozen, _ = make()
    saved = []
    with pytest.raises(loop.NonFiniteLossError, match=f"not finite at step {bad_at};") as error:
        loop.fit(
            made,
            state,
            frozen,
            Batches(bad_at=bad_at),
            12,
            save_every=1,
            save=lambda step, _: saved.append(step),
        )
    assert error.value.step == bad_at
    assert saved == list(range(1, bad_at))


def test_log_lines_sum_exactly_the_steps_since_the_last_one():
    lines = []
    made, state, frozen, _ = make()
    loop.fit(made, state, frozen, Batches(), 7, log_every=3, log=lambda *line: lines.append(line))
    batches = Batches()
    weights = [float(next(batches)["w"].sum()) for _ in range(7)]
    assert [(step, sums["steps"], sums["weight"]) for step, sums in lines] == [
        (3, 3, sum(weights[:3])),
        (6, 3, sum(weights[3:6])),
        (7, 1, weights[6]),
    ]


def test_an_input_that_ends_too_early_is_an_error():
    made, state, frozen, _ = make()
    with pytest.raises(ValueError, match="input ended at step 2 of 5"):
        loop.fit(made, state, frozen, iter([next(Batches()), next(Batches())]), 5)


def test_a_signal_saves_and_stops_after_the_step_it_came_in():
    made, state, frozen, _ = make()
    saved = []

    class Interrupted(Batches):
        def __next__(self):
            if self.position == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    with loop.StopSignal() as stop:
        state, step = loop.fit(
            made,
            state,
            frozen,
            Interrupted(),
            100,
            save_every=3,
            save=lambda step, _: saved.append(step),
            stop=stop,
        )
    assert (step, saved, stop.received) == (5, [3, 5], "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_evaluation_sums_over_batches_without_dropout():
    made, state, frozen, params = make(Model(dropout=True))
    batches = Batches()
    rows = [next(batches) for _ in range(3)]
    sums = made.evaluate(state, frozen, rows)
    expected = sum(float(Model().loss_sums(params, row, None)[0]) for row in rows)
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
