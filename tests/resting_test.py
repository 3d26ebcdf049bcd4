"""Modules that rest: each one's training is that of a parameter by itself, which has a gradient in some steps only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modjax import optimizers
from modjax.adapters.banks import Leaf
from modjax.optimizers import Group, Optimizer

PARTS = (("skill=0", 2), ("skill=1", 2), ("skill=2", 2))
A, B = Leaf(-1, PARTS, ("in", "rank")), Leaf(-2, PARTS, ("rank", "out"))
LAZY = {"x/adamix/a": A, "x/adamix/b": B}
LAYERS, STEPS = 2, 7


def bank(tree, layer, module):
    """One module of one layer, as the parameters of a network of its own."""
    columns = slice(2 * module, 2 * module + 2)
    return {"a": tree["a"][layer][:, columns], "b": tree["b"][layer][columns]}


@pytest.mark.parametrize(
    "algorithm", [optimizers.adamw(), optimizers.adafactor()], ids=["adamw", "adafactor"]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_module_is_trained_as_by_itself_on_the_steps_that_draw_it(algorithm, grouped):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"x": {"adamix": {"a": draw(LAYERS, 3, 6), "b": draw(LAYERS, 6, 4)}}, "y": draw(5)}
    groups = (Group("x/.*"), Group("y", multiplier=0.5)) if grouped else ()
    rate = optimizers.schedule(0.1, decay="linear", total_steps=20)
    optimizer = Optimizer(algorithm, rate, weight_decay=0.3, groups=groups)
    transform = optimizer.build(params, LAZY)
    state, update = transform.init(params), jax.jit(transform.update)
    # Beside it, each module of each layer by itself; a step that does not draw it does not happen to it, but the
    # schedule goes on.
    alone = {}
    for layer in range(LAYERS):
        for module in range(3):
            value = bank(params["x"]["adamix"], layer, module)
            alone[layer, module] = (value, algorithm.init(value))
    for step in range(STEPS):
        drawn = rng.integers(0, 3, LAYERS)
        grads = jax.tree.map(jnp.zeros_like, params)
        for layer, module in enumerate(drawn):
            for leaf, axis in (("a", -1), ("b", -2)):
                columns = np.arange(6) // 2 == module
                shape = (6,) if axis == -1 else (6, 1)
                noise = draw(*params["x"]["adamix"][leaf].shape[1:]) * columns.reshape(shape)
                old = grads["x"]["adamix"][leaf]
                grads["x"]["adamix"][leaf] = old.at[layer].set(noise)
            value, own = alone[layer, module]
            direction, own = algorithm.update(bank(grads["x"]["adamix"], layer, module), own, value)
            moved = jax.tree.map(lambda v, d: v - rate(step) * (d + 0.3 * v), value, direction)  # noqa: B023
            alone[layer, module] = (moved, own)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for (layer, module), (expected, _) in alone.items():
        found = bank(params["x"]["adamix"], layer, module)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
        )


def test_what_is_no_modules_goes_on_with_momentum_and_decay():
    params = {"x": {"adamix": {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 4))}}, "y": jnp.ones(5)}
    transform = Optimizer(learning_rate=0.1, weight_decay=0.5).build(params, LAZY)
    updates, _ = transform.update(
        jax.tree.map(jnp.zeros_like, params), transform.init(params), params
    )
    assert (updates["y"] != 0).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["x"]))


def test_modules_of_several_sizes_cannot_rest():
    ragged = {"a": Leaf(-1, (("one", 1), ("two", 2)), ("in", "rank"))}
    with pytest.raises(ValueError, match=r"one size, got \[1, 2\]"):
        Optimizer().build({"a": jnp.ones((4, 3))}, ragged).init({"a": jnp.ones((4, 3))})
