"""Any module with any router on any kind of network: what holds for one method holds for all.

Pair by pair on an unrolled network, operation by operation, which costs no compilation. Then all routers of a module
at once, each at a layer of its own, in a scanned and rematerialised network on packed rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from modjax import adapters, hub, optimizers, partitioning, trainer
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
    Stochastic,
    Uniform,
)
from modjax.losses import cross_entropy

MODULES = {
    "low_rank": LowRank(2, alpha=3.0),
    "low_rank_shared": LowRank(2, share_up=True),
    "bottleneck": Bottleneck(3),
    "scale_output": Scale("output"),
    "scale_input": Scale("input"),
}
ROUTERS = {
    "single": Single(),
    "features": Features(),
    "dataset": Features(("dataset",)),
    "skills": Skills(3),
    "skills_2_heads": Skills(3, heads=2),
    "skills_by_language": Skills(3, by="language"),
    "uniform": Uniform(3),
    "stochastic": Stochastic(5),
}
DRAWING = {"skills", "skills_2_heads", "skills_by_language", "stochastic"}
KINDS = ("encoder_decoder", "decoder_only", "encoder")
# The examples of conftest's batch as datasets.
DATASETS = (
    dict(dataset="parse_en", task="parse", language="sw"),
    dict(dataset="tag_sw", task="tag"),
    dict(dataset="parse_yo", task="parse", language="yo"),
)


def makes_sense(module, router):
    if module == "low_rank_shared":
        return ROUTERS[router].composition == "average"
    return (module, router) != ("bottleneck", "skills_2_heads")


PAIRS = [(m, r) for m in MODULES for r in ROUTERS if makes_sense(m, r)]


def fresh_adapters(model, batch):
    """The adapters as a run starts with them; the base's are compiled away."""
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
    params = jax.jit(lambda key: adapters.split(model.init(key, batch)["params"], model.module)[0])
    return params(key)


def cost_per_token(model, logits, batch):
    targets = jnp.maximum(batch["decoder_target_tokens"] - model.token_offset, 0)
    return np.asarray(cross_entropy(logits, targets)[0])


def apart(one, other):
    """The largest difference in each example."""
    return np.abs(one - other).reshape(len(one), -1).max(1)


@pytest.fixture(scope="module", params=KINDS)
def small(request, kinds):
    """(kind, network, its parameters, its jitted logits) with one layer in each stack."""
    kind = kinds[request.param]
    network = kind.make(**kind.shallow)
    model = kind.model(network)
    init = jax.jit(model.init)
    return kind, network, init(jax.random.key(5), kind.batch)["params"], jax.jit(model.logits)


@pytest.mark.parametrize("module, router", PAIRS)
def test_a_pair_starts_as_the_base_draws_in_training_only_and_composes(
    module, router, small, space, scatter
):
    kind, network, base, plain_logits = small
    batch = kind.batch
    mixture = Mixture("mix", MODULES[module], ROUTERS[router])
    model = kind.model(Adapted(network, (Rule(kind.pair, mixture),), space))
    fresh = fresh_adapters(model, batch)
    moved = scatter(fresh)

    def logits(tree, *key, model=model):
        return np.asarray(model.logits(adapters.join(base, tree), batch, *key))

    # Step 0 is the base, in evaluation and in training.
    without = np.asarray(kind.model(network).logits(base, batch))
    np.testing.assert_array_equal(logits(fresh), without)
    np.testing.assert_array_equal(logits(fresh, jax.random.key(1)), without)

    # Evaluation draws nothing, training does, if the router does.
    mixed = logits(moved)
    np.testing.assert_array_equal(mixed, logits(moved))
    assert (apart(mixed, without) > 0.01).all()
    first, second = (logits(moved, jax.random.key(k)) for k in (1, 2))
    if router in DRAWING:
        draws = [True, router != "skills_by_language", True]  # a task without a row does not draw
        assert ((apart(first, second) > 1e-3) == draws).all(), apart(first, second)
    else:
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, mixed)

    # One dataset's composition gives what the mixture gives for it, and so does its merge.
    others = []
    for row, features in enumerate(DATASETS):
        single, leaves = adapters.compose(model.module, moved, **features)
        composed = logits(leaves, model=kind.model(single))
        np.testing.assert_allclose(composed[row], mixed[row], atol=1e-5)
        others.append(np.abs(composed[row - 1] - mixed[row - 1]).max() > 1e-3)
        if module == "bottleneck":
            with pytest.raises(ValueError, match="does not merge into a linear layer"):
                adapters.merge(model.module, moved, base, **features)
        else:
            merged = adapters.merge(model.module, moved, base, **features)
            np.testing.assert_allclose(plain_logits(merged, batch)[row], mixed[row], atol=1e-5)
    # Another dataset's composition gives something else, where datasets differ at all.
    assert all(others) == (router not in ("single", "uniform", "stochastic"))


# Modules that share a network, the second kind's routers two layers on.
NETWORKS = (("low_rank", "low_rank_shared"), ("bottleneck",), ("scale_output", "scale_input"))


def rules_for(modules, sites):
    """All routers of these modules, at one layer after the other; a mixture is named as its pair."""
    rules = []
    for number, (module, router) in enumerate(pair for pair in PAIRS if pair[0] in modules):
        site = sites[(number + 2 * (module != modules[0])) % len(sites)]
        mixture = Mixture(f"{module}_{router}", MODULES[module], ROUTERS[router])
        rules.append(Rule(site, mixture))
    return tuple(rules)


@pytest.fixture(
    scope="module",
    params=[(kind, modules) for kind in KINDS for modules in NETWORKS],
    ids=[f"{kind}-{modules[0]}" for kind in KINDS for modules in NETWORKS],
)
def together(request, kinds, space, scatter):
    """(kind, model in a scanned network, base, fresh adapters, moved ones)."""
    name, modules = request.param
    kind = kinds[name]
    network = kind.make(scan_layers=True, remat_policy="full")
    model = kind.model(Adapted(network, rules_for(modules, kind.sites), space))
    key = jax.random.key(5, impl="unsafe_rbg")  # compiles faster
    params = jax.jit(model.init)(key, kind.batch)["params"]
    fresh, base = adapters.split(params, model.module)
    return kind, model, base, fresh, scatter(fresh)


def rows_of(kind, pack_rows):
    """The kind's examples two to a row, where it packs."""
    return pack_rows(kind.batch, [[2, 0], [1]]) if kind.model.PACKS else kind.batch


def test_packed_rows_in_a_scanned_network_cost_what_examples_cost_in_an_unrolled_one(
    together, pack_rows
):
    kind, model, base, fresh, moved = together
    batch = kind.batch
    unrolled = kind.model(model.module.clone(network=kind.make()))

    def alone(model, *trees):
        params = hub.unstack_layers(adapters.join(*trees))
        return cost_per_token(model, model.logits(params, batch), batch)

    shapes = jax.eval_shape(unrolled.init, jax.random.key(0), batch)["params"]
    paths = flatten_dict(hub.unstack_layers(fresh), sep="/")
    assert set(paths) == set(flatten_dict(adapters.split(shapes, unrolled.module)[0], sep="/"))

    rows = [[2, 0], [1]]
    packed = rows_of(kind, pack_rows)
    logits = jax.jit(lambda tree: model.logits(adapters.join(base, tree), packed))
    for tree, plain, trees in (
        (fresh, kind.model(unrolled.network), (base,)),
        (moved, unrolled, (base, moved)),
    ):
        if not kind.model.PACKS:
            expected = plain.logits(hub.unstack_layers(adapters.join(*trees)), batch)
            np.testing.assert_allclose(logits(tree), expected, atol=1e-5)
            continue
        expected = alone(plain, *trees)
        found = cost_per_token(model, logits(tree), packed)
        segments = np.asarray(packed["decoder_segment_ids"])
        for r, row in enumerate(rows):
            for segment, i in enumerate(row, 1):
                own = found[r][segments[r] == segment]
                np.testing.assert_allclose(own, expected[i][: len(own)], atol=1e-5)


def test_a_training_step_on_packed_rows_moves_every_adapter_and_nothing_else(together, pack_rows):
    kind, model, base, _, moved = together
    packed = jax.tree.map(np.asarray, rows_of(kind, pack_rows))
    params = adapters.join(base, moved)
    trained, frozen = optimizers.select(params, (), list(flatten_dict(moved, sep="/")))
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    optimizer = optimizers.Optimizer(optax.identity(), 0.1)
    made = trainer.Trainer(model, optimizer, mesh, trained, frozen)
    kept = jax.tree.map(np.asarray, frozen)
    frozen = partitioning.place(frozen, made.frozen_sharding)
    rows = partitioning.place_batch(packed, mesh)
    start = jax.device_get(made.init_state(trained, 1))

    def step(seed):
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        state = dataclasses.replace(start, rng=key)
        state, scalars = made.train_step(state, frozen, rows, jnp.zeros(1, jnp.int32))
        return jax.device_get(state.trained), float(scalars["loss"])

    after, loss = step(1)
    again, same_loss = step(1)
    jax.tree.map(np.testing.assert_array_equal, after, again)
    assert loss == same_loss != step(2)[1]
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    # A head, which no base has trained, moves as well.
    head = {p: x for p, x in flatten_dict(base, sep="/").items() if p.startswith("classifier/")}
    assert flatten_dict(kept).keys() == flatten_dict(base).keys() - {
        tuple(p.split("/")) for p in head
    }
    before = flatten_dict(moved, sep="/")
    assert {path.split("/")[-2] for path in before} == set(model.module.names)
    for path, leaf in flatten_dict(after, sep="/").items():
        moves = np.abs(leaf - np.asarray((before | head)[path]))
        layers = moves.reshape(1 if path in head else 2, -1).max(-1)
        assert np.isfinite(leaf).all() and (layers > 1e-6).all(), (path, layers)


def test_an_example_in_a_mixed_batch_is_predicted_as_it_is_alone(together):
    kind, model, base, _, moved = together
    asked = dict(kind.batch)
    for name in ("decoder_target_tokens", "decoder_loss_weights", "labels"):
        asked.pop(name, None)
    decode = jax.jit(lambda batch: model.predict_batch_with_aux(params, batch))
    params = adapters.join(base, moved)
    mixed, aux = decode(asked)
    for i in range(3):
        alone, alone_aux = decode({name: ids[i : i + 1] for name, ids in asked.items()})
        np.testing.assert_array_equal(alone[0], mixed[i])
        np.testing.assert_allclose(alone_aux["scores"][0], aux["scores"][i], atol=1e-5)
    turned = asked | {name: asked[name][::-1] for name in ("features", "tasks")}
    assert np.abs(decode(turned)[1]["scores"] - aux["scores"])[0] > 1e-3
