"""The feature router: who is active, what dropout drops, and what an unknown value adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.adapters import Features, LowRank, Mix
from modjax.features import FeatureSpace


def weights(router, mix, space, key=0):
    routing = router.route(mix, space, lambda: jax.random.key(key))
    return np.asarray(routing.weights(len(router.modules(space))))


def test_features_are_multi_hot_and_none_adds_nothing():
    space = FeatureSpace(
        (("task", ("parse", "tag")), ("language", ("en", "sw", "yo"))), slots=(1, 2)
    )
    mix = Mix(features=jnp.array([[[1, 2, 3]], [[0, 0, 0]], [[2, 1, 0]]], jnp.int32))
    found = weights(Features(), mix, space)[:, 0]
    assert found.tolist() == [[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]


def test_an_id_beyond_the_space_is_none_like_0_and_not_another_features_module(space):
    mix = Mix(features=jnp.array([[[3, 1]], [[-1, 9]]], jnp.int32))
    assert weights(Features(), mix, space)[:, 0].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_a_feature_that_every_dataset_has_none_of_is_no_slot():
    rows = {"a": {"task": "parse", "domain": None}, "b": {"task": "tag", "domain": None}}
    space = FeatureSpace.from_metadata(rows)
    features = jnp.array([[space.encode(row)] for row in rows.values()])
    mix = Mix(features=features)
    assert weights(Features(), mix, space)[:, 0].tolist() == [[1, 0], [0, 1]]
    only = Features(features=("domain",), shared=True)
    assert weights(only, mix, space)[:, 0].tolist() == [[1], [1]]
    assert weights(Features(features=(), shared=True), mix, space)[:, 0].tolist() == [[1], [1]]
    for router in (Features(), only):
        routing = router.route(mix, space, lambda: jax.random.key(0))
        gates = LowRank(2).prepare(routing, router.modules(space), None, "sum")
        assert (np.asarray(gates.gathered).sum(-1) == 2).all()


def test_datasets_own_modules_under_the_name_dataset(space):
    mix = Mix(tasks=jnp.array([[2], [0]], jnp.int32))
    router = Features(features=("dataset",))
    assert [str(m) for m in router.modules(space)] == [
        "dataset=parse_en",
        "dataset=tag_sw",
        "dataset=parse_yo",
    ]
    assert weights(router, mix, space)[:, 0].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_dropout_has_its_rate_per_feature_and_is_independent_over_examples_and_features(space):
    n = 20_000
    features = jnp.tile(jnp.array([[[1, 2]]], jnp.int32), (n, 1, 1))
    router = Features(dropout={"language": 0.3, "task": 0.1}, shared=True)
    found = weights(router, Mix(features=features, train=True), space)[:, 0]
    task, language, shared = found[:, 0], found[:, 3], found[:, 5]
    assert set(np.unique(found)) == {0.0, 1.0}  # no rescaling
    assert shared.all()
    np.testing.assert_allclose([task.mean(), language.mean()], [0.9, 0.7], atol=0.012)
    assert abs(np.corrcoef(task, language)[0, 1]) < 0.03
    assert abs(np.corrcoef(language[1:], language[:-1])[0, 1]) < 0.03


def test_dropout_does_nothing_in_evaluation_and_repeats_for_the_same_key(space):
    features = jnp.tile(jnp.array([[[1, 2]]], jnp.int32), (100, 1, 1))
    router = Features(dropout=0.5)
    calm = weights(router, Mix(features=features), space)
    assert (calm.sum(-1) == 2).all()
    drawn = [weights(router, Mix(features=features, train=True), space, key) for key in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize(
    "router, message",
    [
        (Features(features=("langage",)), "unknown feature 'langage'. Did you mean 'language'"),
        (Features(dropout={"langage": 0.1}), "dropout: unknown feature 'langage'. Did you mean"),
    ],
)
def test_unknown_feature_names_are_refused(router, message, space):
    with pytest.raises(ValueError, match=message):
        router.modules(space)


def test_what_a_router_misses_is_named(space):
    with pytest.raises(ValueError, match="needs a feature space"):
        Features().modules(None)
    with pytest.raises(ValueError, match=r"needs batch\['features'\] for feature 'task'"):
        Features().route(Mix(), space, lambda: None)
    with pytest.raises(ValueError, match=r"needs batch\['tasks'\] for feature 'dataset'"):
        Features(features=("dataset",)).route(Mix(), space, lambda: None)
    with pytest.raises(ValueError, match="3 columns, and the feature space 2: task, language"):
        Features().route(Mix(features=jnp.ones((1, 1, 3), int)), space, lambda: None)
    with pytest.raises(ValueError, match="dropout must be in"):
        Features(dropout=1.2)
    with pytest.raises(ValueError, match="has no module"):
        Features(features=())
    assert Features("language").modules(space) == Features(("language",)).modules(space)
    with pytest.raises(ValueError, match="unknown feature 'langauge'. Did you mean 'language'"):
        Features("langauge").modules(space)
    with pytest.raises(ValueError, match="no values"):
        Features().modules(FeatureSpace(()))


def test_the_weights_of_a_dataset_go_by_names_and_leave_out_what_is_not_said(space):
    router = Features(shared=True)
    assert router.active(space, {"task": "tag"}).tolist() == [0, 1, 0, 0, 0, 1]
    assert router.active(space, {"language": ["en", "yo"]}).tolist() == [0, 0, 1, 0, 1, 1]
    halves = router.active(space, {"task": "tag", "language": {"en": 0.5, "yo": 0.25}})
    assert halves.tolist() == [0, 1, 0.5, 0, 0.25, 1]
    with pytest.raises(ValueError, match="Unknown value 'ye' of feature 'language'"):
        router.active(space, {"language": "ye"})
    with pytest.raises(ValueError, match="weight of 'en' in feature 'language' must be a number"):
        router.active(space, {"language": {"en": "0.5"}})
    with pytest.raises(ValueError, match="Unknown feature 'lang'. Did you mean 'language'"):
        router.active(space, {"lang": "yo"})


def test_of_several_copies_a_feature_uses_one_in_training_and_all_alike_in_evaluation(space):
    router = Features(copies=3, shared=True)
    names = [str(m) for m in router.modules(space)]
    assert names[:4] == ["task=parse#0", "task=parse#1", "task=parse#2", "task=tag#0"]
    assert names[-3:] == ["shared#0", "shared#1", "shared#2"] and len(names) == 3 * 6
    features = jnp.array([[[1, 2]], [[2, 0]], [[1, 3]]], jnp.int32)
    once = weights(Features(shared=True), Mix(features=features), space)[:, 0]
    calm = weights(router, Mix(features=features), space)[:, 0].reshape(3, 6, 3)
    np.testing.assert_allclose(calm, np.repeat(once[..., None] / 3, 3, -1), atol=1e-7)

    drawn = np.stack(
        [weights(router, Mix(features=features, train=True), space, key)[:, 0] for key in range(60)]
    ).reshape(60, 3, 6, 3)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_array_equal(drawn.sum(-1), np.tile(once, (60, 1, 1)))
    # The whole batch uses the same copy of a feature, and features are drawn apart.
    copy = drawn.argmax(-1)
    np.testing.assert_array_equal(copy[:, 0, 0], copy[:, 2, 0])
    assert (copy[:, 0, 0] != copy[:, 0, 3]).any() and (copy[:, 0, 0] != copy[:, 0, 5]).any()
    assert all(set(copy[:, 0, slot]) == {0, 1, 2} for slot in (0, 3, 5))
    # What a dataset is composed of is what evaluation uses.
    active = router.active(space, {"task": "parse", "language": "sw"})
    np.testing.assert_allclose(active, calm[0].reshape(-1), atol=1e-7)


@pytest.mark.parametrize("copies", [0, True, 1.5])
def test_an_impossible_number_of_copies_is_refused(copies):
    with pytest.raises(ValueError, match="Features.copies must be an integer of at least 1"):
        Features(copies=copies)


@pytest.mark.parametrize("dropout", [1.5, 1.0, "0.1", {"task": "0.1"}, {"task": 1.0}])
def test_an_impossible_rate_of_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=r"Features.dropout must be in \[0, 1\), got"):
        Features(dropout=dropout)


def test_a_setting_of_a_module_holds_for_its_copies_unless_one_is_named(space):
    modules = Features(copies=2).modules(space)
    ranks = LowRank({"task": 2, "task=tag": 3, "task=tag#1": 4, "language": 1}).ranks(modules)
    assert ranks == (2, 2, 3, 4, 1, 1, 1, 1, 1, 1)
