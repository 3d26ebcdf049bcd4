"""The low-rank bank: two forms of one function, checked settings, columns with owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.adapters import Features, LowRank, Mix, Single
from modjax.adapters.low_rank import LowRankBank, choose_form
from modjax.features import FeatureSpace

RANKS = {"task": 3, "language": 2, "language=yo": 4, "shared": 1}
PACKED = Mix(
    features=jnp.array([[[1, 2], [2, 3]], [[2, 0], [0, 0]]], jnp.int32),
    segments={"tokens": jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]])},
)
UNPACKED = Mix(features=jnp.array([[[1, 2]], [[2, 3]]], jnp.int32))


def run(form, mix, space, alpha=6.0):
    """Output and gradients (of a, b and the input) of one bank, with dropout's key fixed."""
    module, router = LowRank(RANKS, alpha=alpha, form=form), Features(shared=True)
    modules = router.modules(space)
    routing = router.route(mix, space, lambda: jax.random.key(0))
    segments = mix.segments and mix.segments["tokens"]
    gates = module.prepare(routing, modules, segments, "sum")
    keys = jax.random.split(jax.random.key(1), 3)
    rank = sum(module.ranks(modules))
    params = {
        "a": 0.3 * jax.random.normal(keys[0], (5, rank)),
        "b": 0.3 * jax.random.normal(keys[1], (rank, 7)),
    }
    x = jax.random.normal(keys[2], (2, 6, 5))

    def output(params, x):
        y = jnp.zeros((2, 6, 7))
        return LowRankBank(rank, rank, form=form).apply({"params": params}, x, y, gates, False)

    grads = jax.grad(lambda p, x: jnp.sum(jnp.sin(output(p, x))), argnums=(0, 1))(params, x)
    return output(params, x), grads, params, x, modules


@pytest.mark.parametrize("mix", [UNPACKED, PACKED], ids=["unpacked", "packed"])
def test_dense_and_gathered_are_equal_in_value_and_gradient(mix, space):
    dense, dense_grads, *_ = run("dense", mix, space)
    gathered, gathered_grads, *_ = run("gathered", mix, space)
    np.testing.assert_allclose(dense, gathered, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        dense_grads,
        gathered_grads,
    )


def test_each_token_gets_the_sum_of_its_own_segments_pairs(space):
    found, _, params, x, modules = run("dense", PACKED, space)
    names = [str(m) for m in modules]
    ranks = [3, 3, 2, 2, 4, 1]
    stops = np.cumsum(ranks)
    active = {
        (0, 1): ["task=parse", "language=sw", "shared"],
        (0, 2): ["task=tag", "language=yo", "shared"],
        (1, 1): ["task=tag", "shared"],
    }
    assert names == [
        "task=parse",
        "task=tag",
        "language=en",
        "language=sw",
        "language=yo",
        "shared",
    ]
    for row in range(2):
        for token, segment in enumerate(np.asarray(PACKED.segments["tokens"])[row]):
            expected = np.zeros(7)
            for name in active.get((row, int(segment)), []):
                i = names.index(name)
                columns = slice(stops[i] - ranks[i], stops[i])
                pair = params["a"][:, columns] @ params["b"][columns]
                expected += 6.0 / ranks[i] * np.asarray(x[row, token] @ pair)
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "gathered"])
def test_the_single_router_is_plain_lora_also_packed(form):
    module = LowRank(4, alpha=8.0, form=form)
    routing = Single().route(PACKED, None, lambda: jax.random.key(0))
    modules = Single().modules(None)
    gates = module.prepare(routing, modules, PACKED.segments["tokens"], "sum")
    a = jax.random.normal(jax.random.key(0), (5, 4))
    b = jax.random.normal(jax.random.key(1), (4, 7))
    x = jax.random.normal(jax.random.key(2), (2, 6, 5))
    bank = LowRankBank(4, 4, form=form)
    found = bank.apply({"params": {"a": a, "b": b}}, x, jnp.zeros((2, 6, 7)), gates, False)
    np.testing.assert_allclose(found, 2.0 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


def test_a_bank_starts_at_zero_with_independent_columns_bounded_by_the_width(space):
    module, router = LowRank(4), Features()
    modules = router.modules(space)
    gates = module.prepare(router.route(UNPACKED, space, lambda: None), modules, None, "sum")
    x = jnp.ones((2, 6, 64))
    bank = LowRankBank(20, 20)
    params = bank.init(jax.random.key(0), x, jnp.zeros((2, 6, 7)), gates, False)["params"]
    assert not params["b"].any() and params["a"].shape == (64, 20)
    assert float(jnp.abs(params["a"]).max()) <= 1 / 8
    np.testing.assert_allclose(float(params["a"].std()), 1 / 8 / np.sqrt(3), rtol=0.05)
    assert len(np.unique(np.asarray(params["a"]).T, axis=0)) == 20


def test_input_dropout_acts_in_training_only():
    module = LowRank(4, dropout=0.5)
    gates = module.prepare(
        Single().route(Mix(), None, lambda: None), Single().modules(None), None, "sum"
    )
    bank = LowRankBank(4, 4, dropout=0.5)
    x = jnp.ones((2, 6, 8))
    params = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 3))}
    y = jnp.zeros((2, 6, 3))
    calm = bank.apply({"params": params}, x, y, gates, False)
    drawn = bank.apply({"params": params}, x, y, gates, True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(calm, 32.0)
    assert len(np.unique(np.asarray(drawn))) > 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "LowRank.rank must be an integer of at least 1, got 0"),
        (dict(rank=-3), "got -3"),
        (dict(rank={"task": 0}), r"LowRank.rank\['task'\] must be an integer of at least 1"),
        (dict(rank=1.5), "integer"),
        (dict(alpha=0.0), "LowRank.alpha must be positive"),
        (dict(alpha="x"), "LowRank.alpha must be positive, got 'x'"),
        (dict(form="densse"), "Did you mean 'dense'"),
        (dict(dropout=1.0), "LowRank.dropout"),
        (dict(dropout="0.1"), "LowRank.dropout must be in .*, got '0.1'"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank={"task": 2}), "gives no rank for 'language=en'"),
        (dict(rank={"task": 2, "langauge": 2}), "no module 'langauge'. Did you mean 'language'"),
        (dict(alpha={"language=zz": 2.0}), "no module 'language=zz'"),
    ],
)
def test_settings_of_groups_must_fit_the_router(options, message, space):
    module, modules = LowRank(**options), Features().modules(space)
    with pytest.raises(ValueError, match=message):
        module.check(modules, "sum")
        module.ranks(modules)


def test_rates_scales_and_ranks_may_be_given_by_group_or_by_value(space):
    module = LowRank(
        {"task": 2, "language": 1, "language=yo": 3},
        alpha={"task": 4.0},
        learning_rate={"language": 0.5},
    )
    modules = Features().modules(space)
    assert module.ranks(modules) == (2, 2, 1, 1, 3)
    assert module.scales(modules).tolist() == [2, 2, 1, 1, 1]
    rates = module.leaves(modules)["a"].spread(module.rates(modules))
    assert rates.tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_the_form_is_dense_for_small_banks_and_gathered_for_hundreds_of_languages():
    assert choose_form(16, 8, batch=32, length=512) == "dense"
    assert choose_form(8192, 16, batch=32, length=512) == "gathered"
    # A packed row of many examples opens as many columns as a middling bank has.
    assert choose_form(1024, 64 * 16, batch=32, length=512) == "dense"
    assert choose_form(104, 8, batch=8, length=64) == "dense"
    assert choose_form(104, 8, batch=8, length=64, platform="cpu") == "gathered"
    assert choose_form(60, 80, batch=16, length=80, platform="cpu") == "dense"


def test_a_feature_space_of_hundreds_of_languages_routes(make_t5):
    many = FeatureSpace((("language", tuple(f"l{i}" for i in range(300))),))
    mix = Mix(features=jnp.array([[[300]], [[7]]], jnp.int32))
    routing = Features().route(mix, many, lambda: None)
    weights = routing.weights(300)
    assert weights.shape == (2, 1, 300)
    assert np.argwhere(np.asarray(weights)).tolist() == [[0, 0, 299], [1, 0, 6]]
