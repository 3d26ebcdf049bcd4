"""A dataset's composition, merging, growing a bank, and what is told about adapters: all by names."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modjax import adapters, initialize
from modjax.adapters import (
    Adapted,
    Bottleneck,
    Features,
    LowRank,
    Mixture,
    Rule,
    Scale,
    Single,
    Skills,
    trees,
)
from modjax.features import FeatureSpace
from modjax.hub import export
from modjax.models import EncoderDecoderModel

LAYERS = ".*/(query|value|wi_0|wo)"


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def flix(request, make_t5, space, batch, move_adapters):
    """(model, parameters) of a FLix with ragged ranks, scales and a shared module."""
    module = LowRank({"task": 3, "language": 2, "language=yo": 1, "shared": 2}, alpha=4.0)
    rules = (Rule(LAYERS, Mixture("flix", module, Features(shared=True))),)
    model = EncoderDecoderModel(Adapted(make_t5(scan_layers=request.param), rules, space))
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    return model, move_adapters(params)


def logits(model, params, batch, features=None):
    if features is not None:
        batch = batch | {"features": jnp.tile(jnp.array(features, jnp.int32), (3, 1, 1))}
    return jax.jit(lambda p: model.logits(p, batch))(params)


@pytest.mark.parametrize(
    "features, ids",
    [
        (dict(task="parse", language="sw"), [1, 2]),
        (dict(task="tag", language="yo"), [2, 3]),
        (dict(task="parse"), [1, 0]),
    ],
)
def test_composed_and_merged_equal_mixed(flix, batch, features, ids):
    model, params = flix
    added, base = adapters.split(params, model.module)
    mixed = logits(model, params, batch, ids)
    lora, pairs = adapters.compose(model.module, added, **features)
    composed = logits(EncoderDecoderModel(lora), adapters.join(base, pairs), batch)
    np.testing.assert_allclose(composed, mixed, atol=1e-5)
    merged = adapters.merge(model.module, added, base, **features)
    np.testing.assert_allclose(
        logits(EncoderDecoderModel(model.network), merged, batch), mixed, atol=1e-5
    )
    base_logits = logits(EncoderDecoderModel(model.network), base, batch)
    assert np.abs(mixed - base_logits).max() > 0.05  # else nothing was compared
    rank = {2: 3 + 2 + 2, 3: 3 + 1 + 2, 0: 3 + 2}[ids[1]]
    assert {leaf.shape[-1] for k, leaf in flatten_dict(pairs, sep="/").items() if k[-1] == "a"} == {
        rank
    }


def test_values_are_mixed_by_weights(flix):
    model, params = flix
    added, base = adapters.split(params, model.module)

    def kernels(language):
        return adapters.merge(model.module, added, base, task="parse", language=language)

    each = [kernels("sw"), kernels("yo")]
    expected = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, *each)
    mixed = kernels({"sw": 0.25, "yo": 0.75})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), mixed, expected)
    apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *each)
    assert max(jax.tree.leaves(apart)) > 1e-2


def test_compositions_that_mean_nothing_are_refused(flix):
    model, params = flix
    added, _ = adapters.split(params, model.module)
    with pytest.raises(ValueError, match="unknown value 'sv' of feature 'language'"):
        adapters.compose(model.module, added, language="sv")
    for base in ({"kernel": jnp.ones(2)}, {"query": {"kernel": jnp.ones(2)}}):
        with pytest.raises(ValueError, match="kernel' is no adapter's parameter.* Known: flix"):
            adapters.compose(model.module, {**added, **base}, language="sw")
    rules = (Rule(LAYERS, Mixture("flix", LowRank(2), Features())),)
    with pytest.raises(ValueError, match="No module is active"):
        adapters.compose(Adapted(model.network, rules, model.module.space), added)


def test_a_bank_grows_by_new_values_and_old_ones_keep_their_parameters(flix, batch):
    model, params = flix
    added, base = adapters.split(params, model.module)
    space = model.module.space.extend({"language": ["xh"], "task": ["qa"]})
    larger = model.with_space(space)
    fresh, _ = adapters.split(
        jax.jit(larger.init)(jax.random.key(9), batch)["params"], larger.module
    )
    old_method = json.loads(json.dumps(adapters.describe_method(model.module)))
    new_method = adapters.describe_method(larger.module)
    grown = adapters.extend(added, old_method, fresh, new_method)
    for features in (dict(task="parse", language="yo"), dict(task="tag", language="en")):
        jax.tree.map(
            np.testing.assert_array_equal,
            adapters.compose(larger.module, grown, **features)[1],
            adapters.compose(model.module, added, **features)[1],
        )
    # The new values' modules are as fresh as in a new run: xh adds nothing yet.
    np.testing.assert_allclose(
        logits(larger, adapters.join(base, grown), batch, [1, 4]),
        logits(model, params, batch, [1, 0]),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="a module 'task=qa' that this run's feature space lacks"):
        adapters.extend(grown, new_method, added, old_method)


def test_a_bank_of_another_rank_or_place_is_refused(flix, batch, space):
    model, params = flix
    added, _ = adapters.split(params, model.module)
    method = adapters.describe_method(model.module)

    def other(pattern, module):
        rules = (Rule(pattern, Mixture("flix", module, Features(shared=True))),)
        changed = EncoderDecoderModel(Adapted(model.network, rules, space))
        shapes = jax.eval_shape(changed.init, jax.random.key(0), batch)["params"]
        fresh = jax.tree.map(
            lambda s: jnp.zeros(s.shape), adapters.split(shapes, changed.module)[0]
        )
        return fresh, adapters.describe_method(changed.module)

    with pytest.raises(ValueError, match="module 'task=parse' has rank 3 in the checkpoint and 5"):
        adapters.extend(added, method, *other(LAYERS, LowRank(5)))
    with pytest.raises(ValueError, match="Only in the run: .*key/flix"):
        adapters.extend(added, method, *other(".*/(query|key)", LowRank(3)))


def test_a_bank_is_carried_by_the_rule_that_put_it_there():
    """Two rules under one name, whose banks have as many columns but divide them otherwise."""
    ranks = ({"task": 1, "language": 3}, {"task": 3, "language": 1})
    rules = tuple(
        Rule(layer, Mixture("flix", LowRank(rank), Features()))
        for layer, rank in zip(("one", "two"), ranks, strict=True)
    )
    methods = [
        adapters.describe_method(Adapted(None, rules, FeatureSpace(features)))
        for features in (
            (("task", ("parse",)), ("language", ("en",))),
            (("language", ("en",)), ("task", ("parse",))),
        )
    ]
    old = {layer: {"flix": {"a": np.arange(8.0).reshape(2, 4)}} for layer in ("one", "two")}
    new = jax.tree.map(np.zeros_like, old)
    grown = adapters.extend(old, methods[0], new, methods[1])
    assert grown["one"]["flix"]["a"][0].tolist() == [1, 2, 3, 0]
    assert grown["two"]["flix"]["a"][0].tolist() == [3, 0, 1, 2]


def test_what_trains_beside_the_adapters_is_carried_as_it_is(flix):
    model, params = flix
    added, _ = adapters.split(params, model.module)
    method = adapters.describe_method(model.module)
    head = {"head": {"kernel": np.ones((2, 3))}}
    grown = adapters.extend(
        added | head, method, added | {"head": {"kernel": np.zeros((2, 3))}}, method
    )
    assert (grown["head"]["kernel"] == 1).all()


def test_a_part_that_the_package_does_not_name_is_told_where_it_has_to_be():
    class Mine(Single):
        pass

    adapted = Adapted(None, (Rule(".*", Mixture("some", LowRank(2), Mine())),))
    with pytest.raises(ValueError) as error:
        adapters.rules_of(adapters.describe_method(adapted))
    assert str(error.value) == (
        "The checkpoint's method has a part 'Mine' that modjax/adapters/__init__.py does not name: a method's routers "
        "and modules must be named there. Did you mean 'Single'? Known: Bottleneck, LowRank, Features, Single, Scale, "
        "Skills, Stochastic, Uniform."
    )


def test_a_misspelt_feature_is_refused_by_every_router(make_t5, batch, space):
    for router in (Single(), Skills(2), Features()):
        rules = (Rule(LAYERS, Mixture("some", LowRank(2), router)),)
        model = EncoderDecoderModel(Adapted(make_t5(), rules, space))
        shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
        added, _ = adapters.split(shapes, model.module)
        with pytest.raises(ValueError, match="Unknown feature 'langauge'. Did you mean 'language'"):
            adapters.compose(model.module, added, langauge="sw")
        with pytest.raises(ValueError, match="unknown value 'swa' of .* Did you mean 'sw'"):
            adapters.compose(model.module, added, language="swa")
        with pytest.raises(ValueError, match="Unknown dataset 'zz'"):
            adapters.compose(model.module, added, dataset="zz")


def test_adapter_axes_are_those_of_the_kernels_they_adapt(flix, batch):
    model, _ = flix
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    added, base = adapters.split(shapes["params"], model.module)
    axes = adapters.logical_axes(added, model.module, base, shapes["params_axes"])
    flat = flatten_dict(axes, sep="/")
    assert set(flat) == set(flatten_dict(added, sep="/"))
    scanned = model.network.config.scan_layers
    layers, lead = ("layers", ("layers",)) if scanned else ("layers_0", ())
    assert flat[f"encoder/{layers}/mlp/wo/flix/a"] == (*lead, "mlp", "rank")
    assert flat[f"encoder/{layers}/mlp/wo/flix/b"] == (*lead, "rank", "embed")
    assert flat[f"decoder/{layers}/self_attention/query/flix/b"] == (*lead, "rank", "joined_kv")


def test_the_table_counts_what_trains_and_what_is_frozen(flix):
    model, params = flix
    added, base = adapters.split(params, model.module)
    text = adapters.table(added, model.module, base)
    trained = sum(x.size for x in jax.tree.leaves(added))
    frozen = sum(x.size for x in jax.tree.leaves(base))
    assert f"trained {trained:,}  frozen {frozen:,}" in text
    assert "language=yo:1" in text and "a 16 x 13, b 13 x 32" in text


def test_the_table_names_no_more_than_100_modules(flix):
    model, _ = flix
    languages = tuple(f"l{i}" for i in range(200))
    grown = model.with_space(model.module.space.extend({"language": languages}))
    tokens = grown.example_batch({"inputs": 2, "targets": 2}, grown.module.space)
    params = jax.eval_shape(grown.init, jax.random.key(0), tokens)["params"]
    added, base = adapters.split(params, grown.module)
    line = next(x for x in adapters.table(added, grown.module, base).splitlines() if "name:" in x)
    assert line.count("=") == 100 and re.search(r": 20\d modules .*, and 10\d more$", line)


def test_a_banks_names_are_made_once_however_many_layers_it_is_at(flix, monkeypatch, request):
    model, _ = flix
    made, modules = [], adapters.Features.modules
    monkeypatch.setattr(
        adapters.Features, "modules", lambda self, space: made.append(space) or modules(self, space)
    )
    grown = model.with_space(model.module.space.extend({"language": [request.node.name]}))
    tokens = grown.example_batch({"inputs": 2, "targets": 2}, grown.module.space)
    layout = initialize.layout(grown, tokens)
    assert len(layout.trained) > 1 and made == [grown.module.space]


def test_update_rates_follow_the_columns_owners(flix, space, batch):
    model, params = flix
    added, _ = adapters.split(params, model.module)
    assert adapters.update_rates(added, model.module) is None
    slow = LowRank(
        {"task": 3, "language": 2, "language=yo": 1, "shared": 2},
        alpha=4.0,
        learning_rate={"language": 0.25},
    )
    rules = (Rule(LAYERS, Mixture("flix", slow, Features(shared=True))),)
    rates = adapters.update_rates(added, Adapted(model.network, rules, space))
    expected = np.array([1.0] * 6 + [0.25] * 5 + [1.0] * 2)
    for path, rate in flatten_dict(rates, sep="/").items():
        np.testing.assert_array_equal(rate.ravel(), expected)
        leaf = flatten_dict(added, sep="/")[path]
        assert np.broadcast_shapes(rate.shape, leaf.shape) == leaf.shape


def test_join_refuses_a_leaf_that_two_trees_have():
    with pytest.raises(ValueError, match="'x/y' is in two"):
        adapters.join({"x": {"y": 1}}, {"x": {"y": 2}})


@pytest.fixture(scope="module")
def copies(make_t5, space, batch, move_adapters):
    """(model, parameters) of a FLix with two copies of each module, and of a shared one."""
    rules = (Rule(LAYERS, Mixture("flix", LowRank(2), Features(shared=True, copies=2))),)
    model = EncoderDecoderModel(Adapted(make_t5(), rules, space))
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    return model, move_adapters(params)


def test_the_copies_of_a_module_are_composed_and_merged_as_their_mean(copies, batch):
    model, params = copies
    added, base = adapters.split(params, model.module)
    mixed = logits(model, params, batch, [1, 2])
    named = {"task": "parse", "language": "sw"}
    lora, pairs = adapters.compose(model.module, added, **named)
    composed = logits(EncoderDecoderModel(lora), adapters.join(base, pairs), batch)
    np.testing.assert_allclose(composed, mixed, atol=1e-5)
    merged = adapters.merge(model.module, added, base, **named)
    plain = EncoderDecoderModel(model.network)
    np.testing.assert_allclose(logits(plain, merged, batch), mixed, atol=1e-5)
    assert np.abs(mixed - logits(plain, base, batch)).max() > 0.05


def test_a_pass_trains_one_copy_of_each_feature_in_each_layer(copies, batch):
    model, params = copies
    batch = batch | {"features": jnp.tile(jnp.array([1, 2], jnp.int32), (3, 1, 1))}

    @jax.jit
    def gradient(key):
        def loss(added):
            joined = adapters.join(base, added)
            return jnp.sum(model.logits(joined, batch, key) ** 2)

        return jax.grad(loss)(added)

    added, base = adapters.split(params, model.module)
    drawn = {}
    for seed in range(4):
        for path, leaf in flatten_dict(gradient(jax.random.key(seed)), sep="/").items():
            if path.endswith("/a"):
                used = np.asarray(leaf).reshape(-1, leaf.shape[-1] // 4, 2, 2).any((0, 3))
                # parse, sw and the shared module, one copy of each.
                assert used.sum() == 3 and used.any(-1).sum() == 3, path
                drawn.setdefault(path, []).append(tuple(used.argmax(-1)[used.any(-1)]))
    assert len(set(map(tuple, drawn.values()))) > 1, "layers draw apart"
    assert all(len(set(which)) > 1 for which in drawn.values())


def test_copies_that_a_step_did_not_draw_rest(copies):
    model, params = copies
    added, _ = adapters.split(params, model.module)
    parts = adapters.lazy_parts(added, model.module)
    assert set(parts) == set(flatten_dict(added, sep="/"))
    assert parts["encoder/layers_0/attention/query/flix/a"].parts[:2] == (
        ("task=parse#0", 2),
        ("task=parse#1", 2),
    )


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))


PAIR = LowRank({"task": 2, "language": 1})


@pytest.mark.parametrize(
    "named",
    [
        {"lora": PAIR, "ia3": Scale("output")},
        {"ia3": Scale("output"), "lora": PAIR},
        {"ia3": Scale("input"), "lora": PAIR},
        {"lora": PAIR, "ia3": Scale("input"), "also": Scale("output")},
        {"z": PAIR, "m": Scale("output"), "a": PAIR},
        {"z": PAIR, "a": Bottleneck(3)},
        {"z": Bottleneck(3), "m": PAIR, "a": Bottleneck(2)},
    ],
    ids=lambda named: "-".join(f"{name}:{type(m).__name__}" for name, m in named.items()),
)
def test_a_layers_mixtures_are_composed_and_merged_in_the_order_of_their_rules(named, space):
    rng = jax.random.key(0)
    rules = tuple(Rule("out|hidden", Mixture(n, m, Features())) for n, m in named.items())
    model, x = Adapted(Two(), rules, space), jax.random.normal(rng, (2, 3, 5))
    features = jnp.tile(jnp.array([1, 2], jnp.int32), (2, 1, 1))
    # Under jit, as in a run, parameters come out by the names' order in the alphabet.
    params = jax.jit(lambda key: model.init(key, x, mix=adapters.Mix(features)))(rng)["params"]
    params = jax.tree.map(
        lambda p, key: p + 0.5 * jax.random.normal(key, p.shape), params, keys(rng, params)
    )
    mixed = model.apply({"params": params}, x, mix=adapters.Mix(features))
    added, base = adapters.split(params, model)
    chosen = dict(task="parse", language="sw")
    one, leaves = adapters.compose(model, added, **chosen)
    composed = one.apply({"params": adapters.join(base, leaves)}, x)
    np.testing.assert_allclose(composed, mixed, rtol=1e-4, atol=1e-4)
    if not any(isinstance(module, Bottleneck) for module in named.values()):
        merged = adapters.merge(model, added, base, **chosen)
        np.testing.assert_allclose(Two().apply({"params": merged}, x), mixed, rtol=1e-4, atol=1e-4)
        layers = {}
        for (path, name), bank in trees.banks(leaves, one).items():
            layers.setdefault(path, []).append((one.rule_for(path, name).mixture.module, bank))
        flat = flatten_dict(base, sep="/")
        for path, found in layers.items():
            for leaf, value in export._merge(flat, path, found).items():
                np.testing.assert_allclose(value, merged[path][leaf], rtol=1e-5, atol=1e-5)


def keys(key, tree):
    leaves, shape = jax.tree.flatten(tree)
    return jax.tree.unflatten(shape, list(jax.random.split(key, len(leaves))))
