"""What trains, at which rate; every parameter is spoken for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modjax import optimizers
from modjax.optimizers import Group, Optimizer, schedule

PARAMS = {
    "encoder": {
        "query": {"kernel": np.full((4, 4), 2.0, np.float32), "flix": {"a": np.ones((4, 2))}},
        "norm": {"scale": np.ones(4, np.float32)},
    }
}
ADAPTERS = ("encoder/query/flix/a",)


def paths(tree):
    return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def updates(optimizer, trained, grads=None, steps=1):
    transform = optimizer.build(trained)
    state = transform.init(trained)
    grads = jax.tree.map(jnp.ones_like, trained) if grads is None else grads
    for _ in range(steps):
        update, state = transform.update(grads, state, trained)
    return update


def test_by_default_the_adapters_train_and_nothing_else():
    trained, frozen = optimizers.select(PARAMS, (), ADAPTERS)
    assert paths(trained) == set(ADAPTERS)
    assert paths(frozen) == {"encoder/query/kernel", "encoder/norm/scale"}
    trained, frozen = optimizers.select(PARAMS)
    assert paths(trained) == paths(PARAMS) and frozen == {}


def test_the_two_parts_combine_to_the_whole():
    groups = (Group(".*/flix/.*"), Group(".*/scale"), Group(".*", train=False))
    trained, frozen = optimizers.select(PARAMS, groups)
    assert paths(trained) == {"encoder/query/flix/a", "encoder/norm/scale"}
    whole = optimizers.combine(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, whole, PARAMS)


def test_the_first_group_that_matches_decides():
    groups = (Group("encoder/query/kernel", train=False), Group("encoder/query/.*"), Group(".*"))
    assert optimizers.assign(groups, sorted(paths(PARAMS))) == {
        "encoder/query/kernel": 0,
        "encoder/query/flix/a": 1,
        "encoder/norm/scale": 2,
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [Group(".*/flx/.*"), Group(".*")],
            r"group 0: the pattern '\.\*/flx/\.\*' matches no param",
        ),
        ([Group("query"), Group(".*")], "must match a whole path"),
        ([Group(".*/flix/.*")], r"2 parameters are in no group.*encoder/query/kernel"),
        ([Group(".*"), Group(".*/flix/.*")], "group 1.*earlier groups take all it matches"),
        ([Group("(")], "not a regular expression"),
        ([Group(".*", train=False)], "nothing would train"),
    ],
)
def test_groups_that_do_not_fit_the_parameters_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        optimizers.select(PARAMS, groups)


def test_a_closing_group_for_the_rest_may_be_empty():
    trained, _ = optimizers.select(PARAMS, (Group("encoder/.*"), Group(".*", train=False)))
    assert paths(trained) == paths(PARAMS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1, 50: 1}),
        ({"warmup": 10}, {0: 0, 5: 0.5, 10: 1, 99: 1}),
        ({"warmup": 0.1, "decay": "linear", "total_steps": 110}, {0: 0, 11: 1, 110: 0, 200: 0}),
        ({"decay": "linear", "total_steps": 100, "final": 0.6}, {0: 1, 50: 0.6, 100: 0.2}),
        ({"decay": "cosine", "total_steps": 100}, {0: 1, 25: 0.853553, 50: 0.5, 100: 0}),
        ({"warmup": 4, "decay": "rsqrt"}, {2: 0.5, 4: 1, 16: 0.5, 64: 0.25}),
        ({"decay": "linear", "total_steps": 100, "hold": 0.5}, {49: 1, 75: 0.5, 100: 0}),
    ],
)
def test_schedules(options, expected):
    rate = schedule(3.0, **options)
    for step, share in expected.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), 3.0 * share, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "linaer"}, "Did you mean 'linear'"),
        ({"decay": "cosine"}, "needs total_steps"),
        ({"warmup": 0.1}, "needs total_steps"),
        ({"warmup": 20, "decay": "linear", "total_steps": 10}, "does not fit in 10 steps"),
        ({"decay": "linear", "total_steps": 10, "hold": 10}, "nothing is left for the decay"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        schedule(1.0, **options)


def test_adamw_is_optax_adamw():
    trained, _ = optimizers.select(PARAMS)
    ours = Optimizer(learning_rate=schedule(0.1, warmup=2), weight_decay=0.3, clip_norm=0.5)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            schedule(0.1, warmup=2),
            weight_decay=0.3,
            mask={
                "encoder": {
                    "query": {"kernel": True, "flix": {"a": True}},
                    "norm": {"scale": False},
                }
            },
        ),
    )
    state = theirs.init(trained)
    grads = jax.tree.map(jnp.ones_like, trained)
    for _ in range(3):
        expected, state = theirs.update(grads, state, trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        updates(ours, trained, steps=3),
        expected,
    )


def test_adafactor_is_optax_adafactor():
    trained = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    ours = Optimizer(optimizers.adafactor(min_dim_size_to_factor=2), learning_rate=0.1)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=2)
    grads = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
    expected, _ = theirs.update(grads, theirs.init(trained), trained)
    np.testing.assert_allclose(updates(ours, trained, grads)["w"], expected["w"], rtol=1e-5)
    plain = Optimizer(optimizers.adafactor(multiply_by_parameter_scale=False), learning_rate=0.1)
    zero = {"w": jnp.zeros((8, 4))}
    np.testing.assert_allclose(np.abs(updates(plain, zero, grads)["w"]), 0.1, rtol=1e-3)


def test_groups_have_rates_and_decays_of_their_own():
    groups = (
        Group(".*/flix/.*", multiplier=10.0),
        Group(".*/scale", learning_rate=schedule(0.5)),
        Group(".*/kernel", weight_decay=1.0),
    )
    trained, _ = optimizers.select(PARAMS, groups)
    update = updates(Optimizer(learning_rate=0.01, groups=groups), trained)["encoder"]
    # Adam's first step is one learning rate; decay adds rate * decay * value.
    np.testing.assert_allclose(update["query"]["flix"]["a"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(update["norm"]["scale"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(update["query"]["kernel"], -0.01 - 0.01 * 2.0, rtol=1e-5)


def test_a_pattern_must_match_the_whole_path():
    params = {"a": np.ones(2, np.float32), "ab": np.ones(2, np.float32)}
    groups = (Group("a", multiplier=10.0), Group(".*"))
    update = updates(Optimizer(learning_rate=0.01, groups=groups), params)
    np.testing.assert_allclose(update["a"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(update["ab"], -0.01, rtol=1e-5)


def test_the_rates_that_are_logged_are_those_of_the_trained_groups():
    groups = (
        Group("a", train=False),
        Group("z", learning_rate=0.5, name="logits"),
        Group("head", optional=True),
        Group("b", multiplier=2.0),
        Group("c", multiplier=3.0),
    )
    optimizer = Optimizer(learning_rate=schedule(0.1, warmup=10), groups=groups)
    rates = optimizer.rates(jnp.int32(5), ["b", "c", "z"])
    assert {k: round(float(v), 6) for k, v in rates.items()} == {
        "learning_rate/logits": 0.5,
        "learning_rate": 0.1,
        "learning_rate/2": 0.15,
    }


def test_clipping_must_be_positive():
    for clip in (0.0, "1"):
        with pytest.raises(ValueError, match="clip_norm must be a number above 0"):
            Optimizer(clip_norm=clip)


def test_a_head_trains_with_the_adapters_and_an_optional_group_may_be_empty():
    params = {"encoder": {"lora": {"a": 1}}, "head": {"kernel": 2}, "base": {"kernel": 3}}
    trained, frozen = optimizers.select(params, adapter_paths=["encoder/lora/a"])
    assert set(trained) == {"encoder", "head"} and set(frozen) == {"base"}
    del params["head"]
    groups = [Group("head/.*", optional=True), Group(".*/lora/.*"), Group(".*", train=False)]
    assert set(optimizers.select(params, groups)[0]) == {"encoder"}
    with pytest.raises(ValueError, match="matches no parameter"):
        optimizers.select(params, [Group("head/.*"), *groups[1:]])


def test_routers_logits_do_not_decay_whatever_they_route():
    still = {"layer": {"ia3": {"logits": jnp.ones((2, 1, 3)), "kernel": jnp.ones(3)}}}
    update = Optimizer(learning_rate=1.0, weight_decay=0.1).build(still)
    moved, _ = update.update(jax.tree.map(jnp.zeros_like, still), update.init(still), still)
    found = moved["layer"]["ia3"]
    assert not found["logits"].any()
    np.testing.assert_allclose(found["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Optimizer(weight_decay="0.1"), "Optimizer.weight_decay must be a number"),
        (lambda: Optimizer(weight_decay=-1.0), "Optimizer.weight_decay must be a number"),
        (lambda: Group(".*", multiplier="3"), r"Group\('.*'\).multiplier must be a number"),
        (lambda: Group(".*", learning_rate=-1.0), r"Group\('.*'\).learning_rate must be"),
        (lambda: schedule(float("inf")), "schedule.peak must be a number of at least 0, got inf"),
    ],
)
def test_a_rate_that_is_no_number_is_refused_where_it_is_set(make, message):
    with pytest.raises(ValueError, match=message):
        make()
