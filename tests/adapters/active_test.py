"""Lazy training: a step is Adam's on the modules that its batch uses, and does not happen to the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import initialize, optimizers, partitioning, trainer
from modjax.adapters import ActiveModules, Adapted, Features, LowRank, Mixture, Rule, Skills
from modjax.models import EncoderModel

RANK = {"language": 2, "dataset": 3, "shared": 1}
BY_GROUP = LowRank(RANK, learning_rate={"language": 0.5, "dataset": 1.0, "shared": 2.0})
BY_VALUE = LowRank(
    {"language=en": 2, "language=sw": 2, "language=yo": 2, "dataset": 3, "shared": 1},
    {"language": 4.0, "language=sw": 4.0, "shared": 3.0},
    learning_rate={"language": 0.5, "language=sw": 0.0, "dataset=parse_yo": 2.0},
)


def rules_of(module):
    return (
        Rule(
            ".*attention/value",
            Mixture("flix", module, Features(("language", "dataset"), shared=True)),
        ),
        Rule(".*mlp/wi", Mixture("poly", LowRank(2), Skills(2, by="language"))),
    )


RULES = rules_of(BY_GROUP)
# Of two rows and steps: languages, datasets.
IDS = (([2, 0], [1, 1]), ([3, 3], [0, 3]), ([1, 2], [3, 2]))


def make(model, batch, **options):
    """A trainer, and the parameters, away from their start."""
    optimizer = optimizers.Optimizer(
        options.pop("algorithm", optimizers.adamw()), 0.05, 0.1, clip_norm=0.5, **options
    )
    layout = initialize.layout(model, batch)
    drawn = initialize.host_init(model, batch, optimizers.combine(layout.trained, layout.frozen), 0)
    trained, frozen = optimizers.select(drawn, adapter_paths=paths(layout.trained))
    noise = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("f"), trained)
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    made = trainer.Trainer(model, optimizer, mesh, trained, frozen, rates=layout.rates)
    return made, made.init_state(trained, 0), frozen


def paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return ["/".join(key.key for key in path) for path, _ in flat]


def owned(path, shape, languages, datasets):
    """Which entries of a parameter, or of its moments, belong to the values of a batch; True for what nobody owns."""
    if path.endswith("logits"):
        return np.isin([1, 2, 3], languages)[:, None, None]
    if "/flix/" not in path:
        return np.bool_(True)
    modules = np.repeat(np.isin([1, 2, 3], languages), 2)
    columns = np.concatenate([modules, np.repeat(np.isin([1, 2, 3], datasets), 3), [True]])
    return columns if path.endswith("/a") else columns[:, None]


@pytest.mark.parametrize("module", [BY_GROUP, BY_VALUE], ids=["by_group", "by_value"])
def test_a_lazy_step_is_adams_on_what_is_used_and_nothing_on_the_rest(
    make_encoder, encoder_batch, space, module
):
    network = make_encoder(num_layers=2, scan_layers=True)
    model = EncoderModel(Adapted(network, rules_of(module), space))
    rows = {name: np.asarray(value[:2]) for name, value in encoder_batch.items()}
    dense, state, frozen = make(model, rows)
    lazy, found, _ = make(model, rows, lazy=True)
    stop = np.zeros(1, np.int32)
    for languages, datasets in IDS:
        features = np.array([[[1, language]] for language in languages], np.int32)
        rows |= {"features": features, "tasks": np.array(datasets, np.int32)[:, None]}
        before = jax.device_get(state)
        after, expected = dense.train_step(state, frozen, rows, stop)

        def merged(path, old, new, languages=languages, datasets=datasets):
            name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
            if not any(part in name for part in ("/flix/", "/logits")):
                return new
            return np.where(owned(name, new.shape, languages, datasets), new, old)

        state = jax.tree_util.tree_map_with_path(merged, before, jax.device_get(after))
        found, scalars = lazy.train_step(found, frozen, rows, stop)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(scalars[name], expected[name], rtol=1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            jax.device_get(found),
            state,
        )


def test_ids_become_places_of_the_used_values(make_encoder, encoder_batch, space):
    model = EncoderModel(Adapted(make_encoder(), RULES, space))
    layout = initialize.layout(model, encoder_batch)
    active = ActiveModules(model, layout.trained)
    # A packed row of two examples; 9 is no language, 0 none. Tasks are no group of these rules.
    batch = {
        "features": jnp.array([[[2, 3], [1, 9]]], jnp.int32),
        "tasks": jnp.array([[0, 2]], jnp.int32),
    }
    small, narrowed, index = active.narrow(batch)
    assert narrowed["features"].tolist() == [[[2, 1], [1, 0]]]
    assert narrowed["tasks"].tolist() == [[0, 1]]
    sizes = [len(values) for _, values in small.adapted.space.features]
    assert (sizes, len(small.adapted.space.datasets)) == ([2, 2], 2)
    # The second place of each group is empty: zeros are read there, and nothing is written.
    table = {"encoder": layout.trained["encoder"]}
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), table)
    taken = active.take(ones, index)
    for path, x in zip(paths(taken), jax.tree.leaves(taken), strict=True):
        if path.endswith("flix/a"):
            assert x[0].tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    put = active.put(ones, jax.tree.map(lambda x: x + 1, taken), index)
    for path, x in zip(paths(put), jax.tree.leaves(put), strict=True):
        if path.endswith("flix/b"):
            assert x[:, 0].tolist() == [1] * 4 + [2] * 2 + [1] * 3 + [2] * 3 + [1] * 3 + [2]
        if path.endswith("logits"):
            assert x[:, 0, 0].tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("rules", "algorithm", "message"),
    [
        (RULES, optimizers.adafactor(min_dim_size_to_factor=2), "keeps its state element by"),
        ((Rule(".*wi", Mixture("lora", LowRank(2))),), optimizers.adamw(), "none could rest"),
        (
            (
                Rule(
                    ".*wi",
                    Mixture("x", LowRank({"task": 1, "language": 2, "language=yo": 3}), Features()),
                ),
            ),
            optimizers.adamw(),
            "modules of 'language' at .*wi/x have sizes 2 and 3: give them one size",
        ),
        (
            (Rule(".*wi", Mixture("x", LowRank(2, {"language=yo": 4.0}), Features())),),
            optimizers.adamw(),
            r"LowRank.alpha of 'x' differs .* 'language', \[4.0, None\]: give them one alpha",
        ),
        (
            (Rule(".*wi", Mixture("x", LowRank(2), Features(copies=2))),),
            optimizers.adamw(),
            "'x' has Features.copies",
        ),
    ],
)
def test_what_cannot_be_lazy_is_refused(
    make_encoder, encoder_batch, space, rules, algorithm, message
):
    model = EncoderModel(Adapted(make_encoder(), rules, space))
    with pytest.raises(ValueError, match=message):
        make(model, encoder_batch, algorithm=algorithm, lazy=True)
