"""Routers over interchangeable modules: Polytropon's and Poly-S's draws and averages, AdaMix's one module a pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax import adapters, partitioning
from modjax.adapters import (
    Adapted,
    Bottleneck,
    LowRank,
    Mix,
    Mixture,
    Rule,
    Scale,
    Skills,
    Stochastic,
    Uniform,
    skills,
)
from modjax.features import FeatureSpace
from modjax.models import EncoderDecoderModel

LAYERS, HEADS, MODULES = 3, 2, 3


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def route(router, space, logits, tasks, train=False, key=0):
    """The weights `[B, H, M]` of examples with these tasks."""
    mix = Mix(tasks=jnp.asarray(tasks, jnp.int32)[:, None], train=train)
    shares = router.route(mix, space, lambda: jax.random.key(key), lambda *_: jnp.asarray(logits))
    assert shares.up is shares.down
    return shares.down[:, 0]


# One draw.


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_relaxed_draw_has_the_distribution_of_the_formula(temperature, space, monkeypatch):
    """Task 2 of three, before the normalisation: quantile q is `sigmoid((z + log q - log(1 - q)) / temperature)`."""
    logits = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    router = Skills(2, heads=2, temperature=temperature)
    count = 100_000
    weights = route(router, space, logits, np.full(count, 2), train=True)
    monkeypatch.setattr(skills, "normalised", lambda m, straight_through: m)
    drawn = np.asarray(route(router, space, logits, np.full(count, 2), train=True))
    np.testing.assert_allclose(weights, drawn / drawn.sum(-1, keepdims=True), atol=1e-6)

    def formula(u):
        return sigmoid((logits[1] + np.log(u / (1 - u))[:, None, None]) / temperature)

    quantiles = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    found = np.quantile(drawn, quantiles, axis=0)
    np.testing.assert_allclose(found, formula(quantiles), atol=0.01)
    mean = formula((np.arange(10_000) + 0.5) / 10_000).mean(0)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.005)

    # Fresh for each example, head and module.
    columns = drawn.reshape(count, 4)
    columns = np.concatenate([columns[:-1], columns[1:]], axis=1)
    correlations = np.corrcoef(columns.T) - np.eye(8)
    assert np.abs(correlations).max() < 0.02


def test_evaluation_and_unrelaxed_training_use_the_normalised_sigmoid(space):
    logits = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    m = sigmoid(logits[[2, 0]])
    expected = m / m.sum(-1, keepdims=True)
    evaluated = route(Skills(4, heads=2), space, logits, [3, 1])
    np.testing.assert_allclose(evaluated, expected, atol=1e-6)
    calm = route(Skills(4, heads=2, relaxed=False), space, logits, [3, 1], train=True)
    np.testing.assert_array_equal(calm, evaluated)


def test_straight_through_is_0_or_1_forward_and_has_the_sigmoids_gradient(space):
    logits = np.array([[[-1.0, 0.5, 2.0, 0.1]]] * 3, np.float32)
    value = np.array([1.0, -2.0, 3.0, 5.0])
    router = Skills(4, relaxed=False, straight_through=True)

    def total(logits):
        return jnp.sum(route(router, space, logits, [1], train=True) * value)

    found = route(router, space, logits, [1], train=True)[0, 0]
    np.testing.assert_allclose(found, np.array([0, 1, 1, 1]) / 3, rtol=1e-6)
    # d/dm of (m . value) / (sum of m), at the rounded m, times the sigmoid's slope at z.
    rounded, m = np.array([0.0, 1, 1, 1]), sigmoid(logits[0, 0])
    expected = (value / 3 - (rounded @ value) / 9) * m * (1 - m)
    gradient = jax.grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-4)
    assert not gradient[1:].any()


def test_straight_through_keeps_a_head_soft_that_would_round_to_nothing(space):
    logits = np.full((3, 2, 4), -0.5, np.float32)
    logits[:, 1] = [0.5, -0.5, -0.5, -0.5]
    router = Skills(4, heads=2, relaxed=False, straight_through=True)
    found = route(router, space, logits, [1], train=True)[0]
    np.testing.assert_allclose(found, [[0.25] * 4, [1, 0, 0, 0]], rtol=1e-6)
    value = np.array([1.0, -2.0, 3.0, 5.0])
    gradient = jax.grad(lambda z: jnp.sum(route(router, space, z, [1], train=True) * value))(
        jnp.asarray(logits)
    )
    assert 0.01 < np.abs(gradient[0]).max() < 10


@pytest.mark.parametrize("task", [0, 4, -1])
def test_an_unknown_task_is_exactly_uniform_and_moves_no_logits(task, space):
    logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    router = Skills(5, heads=2)
    for train in (False, True):
        weights = route(router, space, logits, [task, 2], train)
        np.testing.assert_array_equal(weights[0], np.float32(1 / 5))
        assert (np.asarray(weights[1]) != np.float32(1 / 5)).all()

        def own(logits, train=train):
            return route(router, space, logits, [task, 2], train)[0, 0, 0]

        np.testing.assert_array_equal(jax.grad(own)(jnp.asarray(logits)), 0.0)


# In a network.


class Pair(nn.Module):
    """Two layers that see the same."""

    @nn.compact
    def __call__(self, x, _):
        return x, jnp.stack([nn.Dense(6, use_bias=False, name=n)(x) for n in ("one", "two")])


class Probe(nn.Module):
    """Layers' outputs `[layer, one or two, B, L, K]`: with identity kernels and `SHOWS` they are 1 + weights."""

    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            layers = nn.scan(
                nn.remat(Pair), variable_axes={"params": 0}, split_rngs={True: True}, length=LAYERS
            )
            return layers(name="layers")(x, None)[1]
        return jnp.stack([Pair(name=f"layers_{i}")(x, None)[1] for i in range(LAYERS)])


# scale [M, H * M]: module m adds 1 to the m-th unit of each head.
SHOWS = 1 + np.tile(np.eye(MODULES, dtype=np.float32), HEADS)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    "granularity, shared",
    [
        ("layer", ()),
        ("sublayer", ("pair",)),
        ("block", ("layer", "pair")),
        ("model", ("layer", "pair")),
    ],
)
def test_draws_are_fresh_for_each_layer_unless_layers_share_their_routing(
    scan, granularity, shared, space
):
    count = 1500
    mixture = Mixture("poly", Scale(), Skills(MODULES, HEADS, granularity=granularity))
    adapted = Adapted(Probe(scan), (Rule(".*", mixture),), space)
    mix = Mix(tasks=jnp.full((count, 1), 2), train=True)
    x = jnp.ones((count, 1, 6))
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), x, mix=mix.replace(train=False))
    known = {"kernel": np.eye(6, dtype=np.float32), "scale": SHOWS}
    params = unflatten_dict(
        {
            path: jnp.broadcast_to(known.get(path[-1], 0.0), shape.shape)
            for path, shape in flatten_dict(shapes["params"]).items()
        }
    )

    @jax.jit
    def call(layers, network):
        rngs = {"dropout": layers, "features": network}  # a draw for all comes from the latter
        return adapted.apply({"params": params}, x, mix=mix, rngs=rngs)

    weights = np.asarray(call(*jax.random.split(jax.random.key(0))))[..., 0, :] - 1
    weights = weights.reshape(LAYERS, 2, count, HEADS, MODULES)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    within = {"layer": weights[1:] - weights[:-1], "pair": weights[:, 1] - weights[:, 0]}
    for axis, apart in within.items():
        assert (np.abs(apart).max() < 1e-6) == (axis in shared)
    draws = weights[:, :1] if "pair" in shared else weights
    draws = draws[:1] if "layer" in shared else draws
    draws = np.moveaxis(draws, 2, -1)[..., 0, :].reshape(-1, count)  # [layers, heads; examples]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.12


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("granularity", ["layer", "sublayer", "block", "stack", "model"])
def test_logits_lie_at_the_part_of_the_network_that_shares_them(
    granularity, scan, make_t5, space, batch
):
    rules = (
        Rule(
            ".*/attention/(query|key)",
            Mixture("poly", LowRank(2), Skills(4, 2, granularity=granularity)),
        ),
        Rule(".*/mlp/wo", Mixture("poly", LowRank(2), Skills(4, 2, granularity=granularity))),
    )
    model = EncoderDecoderModel(Adapted(make_t5(scan_layers=scan), rules, space))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    found = {
        path.removesuffix("/poly/logits").removesuffix("poly/logits"): leaf.shape
        for path, leaf in flatten_dict(shapes, sep="/").items()
        if path.endswith("logits")
    }
    encoder = {
        "layer": ["attention/query", "attention/key", "mlp/wo"],
        "sublayer": ["attention", "mlp"],
        "block": [""],
    }
    decoder = {"layer": ["mlp/wo"], "sublayer": ["mlp"], "block": [""]}
    if granularity == "model":
        places, lead = {""}, ()
    elif granularity == "stack":
        places, lead = {"encoder", "decoder"}, ()
    else:
        layers, lead = (["layers"], (2,)) if scan else (["layers_0", "layers_1"], ())
        places = {
            "/".join(filter(None, (stack, layer, part)))
            for stack, parts in (("encoder", encoder), ("decoder", decoder))
            for layer in layers
            for part in parts[granularity]
        }
    # Three datasets, two heads, four modules; one set of rows for each layer of a scanned network.
    assert found == dict.fromkeys(places, (*lead, 3, 2, 4))


# The product of averages.

PACKED = {
    "tasks": jnp.array([[3, 1, 0], [2, 0, 0]], jnp.int32),
    "segments": {"tokens": jnp.array([[1, 1, 2, 2, 3], [1, 1, 1, 1, 1]], jnp.int32)},
}


@pytest.mark.parametrize("heads, platform", [(1, "cpu"), (2, "cpu"), (2, "tpu")])
def test_packed_tokens_get_the_product_of_their_own_tasks_averages(
    heads, platform, space, monkeypatch
):
    """Against a loop that builds each example's matrices, block by block; the third segment's task is unknown."""
    monkeypatch.setattr(partitioning, "platform", lambda: platform)
    rank, width, features, alpha = 2, 6, 4, 3.0
    mixture = Mixture("poly", LowRank(rank, alpha=alpha), Skills(MODULES, heads))
    adapted = Adapted(nn.Dense(features, use_bias=False), (Rule("", mixture),), space)
    rng = np.random.default_rng(0)
    a = rng.normal(size=(width, MODULES * rank)).astype(np.float32)
    b = rng.normal(size=(MODULES * rank, features)).astype(np.float32)
    logits = rng.normal(size=(3, heads, MODULES)).astype(np.float32)
    kernel = rng.normal(size=(width, features)).astype(np.float32)
    x = rng.normal(size=(2, 5, width)).astype(np.float32)
    params = {"kernel": kernel, "poly": {"a": a, "b": b, "logits": logits}}
    found = adapted.apply({"params": params}, x, mix=Mix(**PACKED))
    for row in range(2):
        for token in range(5):
            segment = int(PACKED["segments"]["tokens"][row, token])
            task = int(PACKED["tasks"][row, segment - 1])
            m = sigmoid(logits[task - 1]) if task else np.ones((heads, MODULES))
            w = m / m.sum(-1, keepdims=True)
            own_a, own_b = np.zeros((width, rank)), np.zeros((rank, features))
            for head in range(heads):
                rows = slice(head * width // heads, (head + 1) * width // heads)
                columns = slice(head * features // heads, (head + 1) * features // heads)
                for skill in range(MODULES):
                    part = slice(skill * rank, (skill + 1) * rank)
                    own_a[rows] += w[head, skill] * a[rows, part]
                    own_b[:, columns] += w[head, skill] * b[part, columns]
            expected = x[row, token] @ (kernel + alpha / rank * own_a @ own_b)
            np.testing.assert_allclose(found[row, token], expected, rtol=1e-4, atol=1e-5)


def sizes(jaxpr):
    """The sizes of all arrays that a program computes."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("heads", [1, 2])
def test_no_matrix_is_built_for_an_example(heads, space):
    batch, length, width, features, rank = 5, 2, 32, 24, 4
    mixture = Mixture("poly", LowRank(rank), Skills(2, heads))
    adapted = Adapted(nn.Dense(features, use_bias=False), (Rule("", mixture),), space)
    mix = Mix(tasks=jnp.ones((batch, 1), jnp.int32))
    x = jnp.ones((batch, length, width))
    params = adapted.init(jax.random.key(0), x, mix=mix)["params"]

    def total(adapter, x):
        y = adapted.apply({"params": {"kernel": params["kernel"], "poly": adapter}}, x, mix=mix)
        return jnp.sum(y**2)

    # Nothing is as large as the smaller of `[B, D, r]` and `[B, r, K]`, forward or backward.
    limit = batch * min(width, features) * rank
    for program in (total, jax.grad(total)):
        assert max(sizes(jax.make_jaxpr(program)(params["poly"], x).jaxpr)) < limit


# AdaMix.


def test_one_module_is_drawn_for_down_and_one_for_up_uniformly_and_apart():
    keys = jax.random.split(jax.random.key(0), 20_000)
    shares = jax.vmap(lambda key: skills.draw(key, 4))(keys)
    assert shares.down.shape == (20_000, 1, 1, 1, 4)  # one for all examples, segments and heads
    down, up = (np.asarray(s)[:, 0, 0, 0] for s in (shares.down, shares.up))
    for drawn in (down, up):
        assert set(np.unique(drawn)) == {0.0, 1.0} and (drawn.sum(-1) == 1).all()
    np.testing.assert_allclose(down.T @ up / 20_000, 1 / 16, atol=0.008)


@pytest.fixture(scope="module")
def adamix(make_t5, space, batch, scatter):
    """(model, base, fresh adapters, gradients of the adapters for some keys) in a scanned network."""
    rules = (
        Rule("encoder/.*/(value|wo)", Mixture("pair", LowRank(2), Stochastic(4))),
        Rule("decoder/.*/wo", Mixture("shared", Bottleneck(2, share_up=True), Stochastic(4))),
    )
    model = EncoderDecoderModel(Adapted(make_t5(scan_layers=True), rules, space))
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
    fresh, base = adapters.split(jax.jit(model.init)(key, batch)["params"], model.module)

    def loss(tree, key):
        return model.loss_fn(adapters.join(tree, base), batch, key)[0]

    gradient = jax.jit(jax.grad(loss))
    moved = scatter(fresh)
    return model, base, fresh, [gradient(moved, jax.random.key(k)) for k in range(8)]


def by_module(model, path, leaf):
    """`[layers, M, ...]` of a leaf `[layers, ...]`, and None where modules own it together."""
    layer, name, kind = path.rsplit("/", 2)
    mixture = model.module.rule_for(layer, name).mixture
    axis = mixture.module.leaves(mixture.modules(None))[kind].axis
    if axis is None:
        return None
    return np.stack(np.split(np.asarray(leaf), 4, axis=axis), axis=1).reshape(2, 4, -1)


def test_a_pass_gives_gradients_to_the_drawn_modules_and_exactly_none_to_the_others(adamix):
    """Three examples, two scanned layers: one module for the whole batch, another in each layer, down and up apart."""
    model, _, _, gradients = adamix
    drawn = {}
    for tree in gradients:
        for path, leaf in flatten_dict(tree, sep="/").items():
            parts = by_module(model, path, leaf)
            if parts is None:
                assert np.abs(leaf).max() > 0
                continue
            active = (parts != 0).any(-1)
            assert (active.sum(-1) == 1).all(), path
            drawn.setdefault(path, []).append(active.argmax(-1))
    drawn = {path: np.array(which) for path, which in drawn.items()}  # [pass, layer]
    assert len(drawn) == 6
    for path, which in drawn.items():
        assert len(set(which[:, 0])) > 1 and (which[:, 0] != which[:, 1]).any(), path
    for layer in ("attention/value", "mlp/wo"):
        down, up = (drawn[f"encoder/layers/{layer}/pair/{leaf}"] for leaf in "ab")
        assert (down != up).any() and (down == up).any()
    layers = "decoder/layers/mlp/wo/shared"
    np.testing.assert_array_equal(drawn[f"{layers}/down"], drawn[f"{layers}/down_bias"])


def test_modules_start_apart_from_each_other(adamix):
    model, _, fresh, _ = adamix
    for path, leaf in flatten_dict(fresh, sep="/").items():
        if path.endswith(("/a", "/down")):
            parts = by_module(model, path, leaf)
            for one in range(4):
                for other in range(one):
                    assert (parts[:, one] != parts[:, other]).mean() > 0.9


def test_the_average_after_training_is_the_mean_of_the_modules_in_one_plain_module(adamix, scatter):
    model, _, fresh, _ = adamix
    trained = scatter(fresh, seed=5)
    single, leaves = adapters.compose(model.module, trained)
    flat = flatten_dict(trained, sep="/")
    for path, leaf in flatten_dict(leaves, sep="/").items():
        layer, _, kind = path.rsplit("/", 2)
        name = "pair" if layer.startswith("encoder") else "shared"
        parts = by_module(model, f"{layer}/{name}/{kind}", flat[f"{layer}/{name}/{kind}"])
        whole = flat[f"{layer}/{name}/{kind}"] if parts is None else parts.mean(1)
        np.testing.assert_allclose(leaf, np.reshape(whole, leaf.shape), atol=1e-6)
    assert {rule.mixture.module for rule in single.rules} == {LowRank(2), Bottleneck(2)}


# What does not fit is refused.


def test_heads_that_do_not_divide_a_layers_widths_are_refused_when_initialised(
    make_t5, space, batch
):
    rules = (Rule(".*/mlp/wo", Mixture("poly", LowRank(2), Skills(4, heads=5))),)
    model = EncoderDecoderModel(Adapted(make_t5(), rules, space))
    with pytest.raises(ValueError, match="mlp/wo' has widths 32 and 16, which 5 heads do not"):
        jax.eval_shape(model.init, jax.random.key(0), batch)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Skills(0), "Skills.num_modules must be an integer of at least 1, got 0"),
        (lambda: Skills(True), "got True"),
        (lambda: Skills(heads=0), "Skills.heads must be an integer of at least 1, got 0"),
        (lambda: Uniform(0), "Uniform.num_modules must be an integer of at least 1, got 0"),
        (lambda: Stochastic(0), "Stochastic.num_modules must be an integer of at least 1, got 0"),
        (lambda: LowRank(0), "LowRank.rank must be an integer of at least 1, got 0"),
        (lambda: Skills(temperature=0.0), "Skills.temperature must be positive"),
        (lambda: Skills(temperature="1"), "Skills.temperature must be positive, got '1'"),
        (lambda: Skills(granularity="blok"), "unknown 'blok'. Did you mean 'block'"),
        (lambda: Mixture("m", composition="avrage"), "unknown 'avrage'. Did you mean 'average'"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_router_without_rows_or_ids_says_what_it_misses(space):
    with pytest.raises(ValueError, match="by='langage' is no feature. Did you mean 'language'"):
        Skills(by="langage").rows(space)
    with pytest.raises(ValueError, match="may have several values of 'language'"):
        Skills(by="language").rows(FeatureSpace((("language", ("en", "sw")),), slots=(2,)))
    with pytest.raises(ValueError, match="needs a feature space"):
        Skills().rows(None)
    with pytest.raises(ValueError, match="has no datasets"):
        Skills().rows(FeatureSpace((("language", ("en",)),)))
    with pytest.raises(ValueError, match=r"needs batch\['tasks'\]"):
        Skills().route(Mix(), space, lambda: None, lambda *_: jnp.zeros((3, 1, 8)))
    with pytest.raises(ValueError, match="Unknown value 'parse_sw' of 'dataset'"):
        Skills().active(space, {"dataset": "parse_sw"}, np.zeros((3, 1, 8)))


def test_training_without_a_key_names_the_stream_that_the_router_draws_from(space):
    adapted = Adapted(nn.Dense(4), (Rule("", Mixture("mix", LowRank(2), Stochastic(2))),), space)
    x = jnp.ones((2, 3, 4))
    params = adapted.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="'mix' draws from the rng stream 'dropout'"):
        adapted.apply({"params": params}, x, mix=Mix(train=True))
