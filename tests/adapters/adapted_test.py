"""Adapted attaches to networks that know nothing of it, and refuses rules that do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modjax import adapters
from modjax.adapters import Adapted, Features, LowRank, Mix, Mixture, Rule, RuleError
from modjax.features import FeatureSpace
from modjax.models import EncoderDecoderModel

FLIX = Mixture("flix", LowRank({"task": 3, "language": 2}), Features())
MIX = Mix(features=jnp.array([[[1, 2]], [[2, 0]]], jnp.int32))


class Plain(nn.Module):
    """Somebody's network: kernels over several axes, and a layer that is used twice."""

    def setup(self):
        self.first = nn.Dense(6)
        self.twice = nn.Dense(6, use_bias=False)
        self.heads = nn.DenseGeneral((2, 4))
        self.out = nn.DenseGeneral(5, axis=(-2, -1))
        self.norm = nn.LayerNorm()

    def __call__(self, x):
        x = self.twice(nn.relu(self.twice(self.first(x))))
        return self.out(self.heads(self.norm(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="dense")(nn.tanh(x)), None


class Scanned(nn.Module):
    """Somebody's network under nn.scan and nn.remat, whose scan passes only what it knows of."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


# Made with parts that were made before it, to two levels.
GIVEN = nn.Sequential([nn.Dense(6), nn.relu, nn.Sequential([nn.Dense(6), nn.Dense(5)])])


def expected(params, x, features):
    """`Plain` with FLix on `first`, in numpy, one example at a time."""
    p = jax.tree.map(np.asarray, params)
    outputs = []
    for row, (task, language) in zip(np.asarray(x), features, strict=True):
        kernel = p["first"]["kernel"].copy()
        a, b = p["first"]["flix"]["a"], p["first"]["flix"]["b"]
        if task:
            columns = slice(3 * (task - 1), 3 * task)
            kernel += a[:, columns] @ b[columns]
        if language:
            columns = slice(6 + 2 * (language - 1), 6 + 2 * language)
            kernel += a[:, columns] @ b[columns]
        y = row @ kernel + p["first"]["bias"]
        y = np.maximum(y @ p["twice"]["kernel"], 0) @ p["twice"]["kernel"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        y = np.einsum("ld,dhk->lhk", y, p["heads"]["kernel"]) + p["heads"]["bias"]
        outputs.append(np.einsum("lhk,hkd->ld", y, p["out"]["kernel"]) + p["out"]["bias"])
    return np.stack(outputs)


def test_flix_on_somebody_elses_network_equals_the_formula(space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    adapted = Adapted(Plain(), (Rule("first", FLIX),), space)
    params = move_adapters(adapted.init(jax.random.key(0), x, mix=MIX)["params"], size=1.0)
    found = adapted.apply({"params": params}, x, mix=MIX)
    np.testing.assert_allclose(found, expected(params, x, [(1, 2), (2, 0)]), atol=1e-5)


@pytest.mark.parametrize(
    "network", [Plain(), Scanned(), GIVEN], ids=["plain", "scanned_remat", "given_parts"]
)
def test_the_base_keeps_its_paths_and_values_and_step_0_is_the_base(network, space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    adapted = Adapted(network, (Rule(".*", FLIX),), space)
    params = jax.jit(adapted.init)(jax.random.key(0), x, mix=MIX)["params"]
    base_alone = jax.jit(network.init)(jax.random.key(0), x)["params"]
    added, base = adapters.split(params, adapted)
    jax.tree.map(np.testing.assert_array_equal, base, base_alone)
    layers = {path.rsplit("/", 1)[0] for path in flatten_dict(base, sep="/") if "kernel" in path}
    assert set(flatten_dict(added, sep="/")) == {
        f"{layer}/flix/{leaf}" for layer in layers for leaf in "ab"
    }
    plain = network.apply({"params": base_alone}, x)
    np.testing.assert_array_equal(adapted.apply({"params": params}, x, mix=MIX), plain)
    moved = move_adapters(params)
    assert not np.allclose(adapted.apply({"params": moved}, x, mix=MIX), plain, atol=1e-3)


def test_a_scanned_rematerialised_network_adapts_as_the_unrolled_one(space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    adapted = Adapted(Scanned(), (Rule("layers/dense", FLIX),), space)
    params = move_adapters(adapted.init(jax.random.key(0), x, mix=MIX)["params"], size=1.0)

    def unrolled(params):
        y = x
        for i in range(3):
            layer = jax.tree.map(lambda leaf: leaf[i], params["layers"]["dense"])  # noqa: B023
            one = Adapted(nn.Dense(6, name="dense"), (Rule("", FLIX),), space)
            y = y + one.apply({"params": layer}, nn.tanh(y), mix=MIX)
        return y

    def scanned(params):
        return adapted.apply({"params": params}, x, mix=MIX)

    np.testing.assert_allclose(scanned(params), unrolled(params), atol=1e-5)
    grads = [
        jax.jit(jax.grad(lambda p, h=h: jnp.sum(h(p) ** 2)))(params) for h in (scanned, unrolled)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *grads)


def test_parts_that_a_network_was_made_with_are_named_as_their_parameters_are(space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    mix = Mix(features=jnp.array([[[1, 2]], [[1, 2]]], jnp.int32))
    adapted = Adapted(GIVEN, (Rule("layers_0|layers_2/layers_1", FLIX),), space)
    params = move_adapters(adapted.init(jax.random.key(0), x, mix=mix)["params"])
    added, base = adapters.split(params, adapted)
    assert {path.rsplit("/", 1)[0] for path in flatten_dict(added, sep="/")} == {
        "layers_0/flix",
        "layers_2/layers_1/flix",
    }
    merged = adapters.merge(adapted, added, base, task="parse", language="sw")
    mixed = adapted.apply({"params": params}, x, mix=mix)
    np.testing.assert_allclose(GIVEN.apply({"params": merged}, x), mixed, atol=1e-5)
    assert not np.allclose(GIVEN.apply({"params": base}, x), mixed, atol=1e-3)


def test_two_mixtures_on_one_layer_add_up(space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    network = nn.Dense(5, use_bias=False, name="dense")
    flix, lora = Rule("", FLIX), Rule("", Mixture("lora", LowRank(2)))
    both = Adapted(network, (flix, lora), space)
    params = move_adapters(both.init(jax.random.key(0), x, mix=MIX)["params"])
    base = network.apply({"params": {"kernel": params["kernel"]}}, x)

    def update(rule, name):
        part = {k: params[k] for k in ("kernel", name)}
        return Adapted(network, (rule,), space).apply({"params": part}, x, mix=MIX) - base

    total = both.apply({"params": params}, x, mix=MIX) - base
    np.testing.assert_allclose(total, update(flix, "flix") + update(lora, "lora"), atol=1e-5)
    assert np.abs(update(flix, "flix")).max() > 1e-2 and np.abs(update(lora, "lora")).max() > 1e-2


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("encoder/.*/qeury", "flix")], r"matches no linear layer. Linear layers: .*query"),
        ([("encoder", "flix")], "'encoder', which is not linear"),
        ([(".*query", "flix"), ("encoder.*", "flix")], "put a mixture named 'flix' at layer"),
        ([(".*", "mlp")], "'mlp' is also the name of a part of the network"),
        ([], "has no rules"),
    ],
)
def test_rules_that_do_not_fit_are_refused_with_the_paths_there_are(
    rules, message, make_t5, batch, space
):
    rules = tuple(Rule(pattern, Mixture(name, FLIX.module, FLIX.router)) for pattern, name in rules)
    model = EncoderDecoderModel(Adapted(make_t5(), rules, space))
    with pytest.raises(RuleError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), batch)


@pytest.mark.parametrize(
    "network, there",
    [(nn.Dense(5, name="dense"), r"'' \(the whole network\)"), (nn.LayerNorm(), "none")],
)
def test_a_network_of_one_layer_or_of_none_that_is_linear_is_told_as_such(network, there, space):
    adapted = Adapted(network, (Rule("dense", FLIX),), space)
    with pytest.raises(RuleError, match=f"'dense' matches no linear layer. Linear layers: {there}"):
        adapted.init(jax.random.key(0), jnp.ones((2, 4, 6)), mix=MIX)


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(RuleError, match="no regular expression"):
        Rule("layers_(", FLIX)


def test_features_of_another_number_of_examples_are_refused(space):
    x = jnp.ones((3, 4, 6))
    adapted = Adapted(Plain(), (Rule("first", FLIX),), space)
    with pytest.raises(ValueError, match="'first' computes 3 rows, .* features for 2 examples"):
        adapted.init(jax.random.key(0), x, mix=MIX)


def test_packed_input_needs_a_stream_for_every_adapted_layer(space):
    x = jnp.ones((2, 4, 6))
    adapted = Adapted(Plain(), (Rule("first", FLIX),), space)
    segments = {"encoder": jnp.ones((2, 4), int), "decoder": jnp.ones((2, 3), int)}
    with pytest.raises(ValueError, match="'first' belongs to stream ''.*Adapted.streams"):
        adapted.init(jax.random.key(0), x, mix=MIX.replace(segments=segments))
    named = adapted.clone(streams=((".*", "decoder"),))
    with pytest.raises(ValueError, match="has 4 tokens a row and its stream 'decoder' 3"):
        named.init(jax.random.key(0), x, mix=MIX.replace(segments=segments))


def test_one_stream_alone_serves_a_network_without_stream_names(space, move_adapters):
    x = jax.random.normal(jax.random.key(3), (2, 4, 6))
    adapted = Adapted(Plain(), (Rule("first", FLIX),), space)
    params = move_adapters(adapted.init(jax.random.key(0), x, mix=MIX)["params"], size=1.0)
    packed_mix = Mix(
        features=jnp.array([[[1, 2], [2, 0]]], jnp.int32),
        segments={"tokens": jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]])},
    )
    packed = adapted.apply({"params": params}, x.reshape(1, 8, 6), mix=packed_mix)
    alone = adapted.apply({"params": params}, x, mix=MIX)
    np.testing.assert_allclose(packed.reshape(2, 4, 5), alone, atol=1e-5)


def test_it_says_by_which_features_its_modules_are_looked_up():
    space = FeatureSpace((("task", ("a",)), ("language", ("b",))))
    rules = (Rule("first", FLIX), Rule("out", Mixture("lora", LowRank(2), adapters.Single())))
    assert Adapted(Plain(), rules, space).routes_by == ("task", "language")
    assert Adapted(Plain(), rules[1:], space).routes_by == ()
    by_dataset = Mixture("own", LowRank(2), Features(("dataset", "task")))
    assert Adapted(Plain(), (Rule("out", by_dataset),), space).routes_by == ("dataset", "task")
