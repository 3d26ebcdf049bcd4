"""Each parameter and each name has one source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import initialize, models, optimizers
from modjax.features import FeatureSpace
from modjax.provenance import CheckpointError

STORED = FeatureSpace((("task", ("parse",)), ("language", ("en", "sw"))), datasets=("a", "b"))


def resolve(*languages, own=True, feature="language", datasets=("a",), slots=(1, 1)):
    derived = FeatureSpace((("task", ("parse",)), (feature, languages)), datasets, slots)
    return initialize.resolve_space(derived, STORED, own, "runs/x/checkpoint_3")


def test_a_continued_run_has_the_ids_of_its_checkpoint_whatever_the_order_of_its_mixture():
    assert resolve("sw", "en", datasets=("b", "a")) == STORED
    assert resolve("sw") == STORED


def test_another_run_appends_what_the_checkpoint_lacks():
    space = resolve("yo", "sw", own=False, datasets=("c",))
    assert space.values("language") == ("en", "sw", "yo")
    assert space.datasets == ("a", "b", "c")


def test_another_run_has_room_for_the_values_that_its_datasets_have_at_once():
    assert resolve("sw", "en", own=False, slots=(1, 2)).slots == (1, 2)


def test_a_run_of_its_own_may_not_change_its_names():
    with pytest.raises(CheckpointError, match="trained without language 'yo'.*INITIAL_CHECKPOINT"):
        resolve("yo")
    with pytest.raises(CheckpointError, match="trained without dataset 'c'"):
        resolve("en", datasets=("c",))
    with pytest.raises(CheckpointError, match="trained without 2 values of language at once"):
        resolve("sw", "en", slots=(1, 2))
    for own in (True, False):
        with pytest.raises(CheckpointError, match="no feature 'langauge'. Did you mean 'language'"):
            resolve("en", feature="langauge", own=own)


def test_a_base_gives_every_parameter_or_is_refused():
    wanted = {"a": {"kernel": np.ones((2, 3)), "lora": {"b": np.ones((1, 3))}}, "c": np.ones(2)}
    base = {"a": {"kernel": np.full((2, 3), 7.0)}, "c": np.ones(2), "unused": np.ones(1)}
    taken = initialize.take_base(wanted, base, ["lora"], "here")
    assert set(taken) == {"a", "c"} and set(taken["a"]) == {"kernel"}
    assert taken["a"]["kernel"] is base["a"]["kernel"]
    with pytest.raises(ValueError, match="base here does not fit the model: a/lora/b is missing"):
        initialize.take_base(wanted, base, [], "here")
    with pytest.raises(ValueError, match=r"c is \[3\], the model has \[2\]"):
        initialize.take_base(wanted, base | {"c": np.ones(3)}, ["lora"], "here")


def test_a_head_that_the_base_lacks_starts_fresh():
    wanted = {"a": {"kernel": np.ones((2, 3))}, "head": {"kernel": np.ones((3, 4))}}
    taken = initialize.take_base(wanted, {"a": {"kernel": np.ones((2, 3))}}, [], "here")
    assert set(taken) == {"a"}
    assert set(initialize.added(wanted, ["lora"])) == {"head"}


def test_the_frozen_base_is_kept_in_the_precision_asked_for():
    tree = {"kernel": np.ones((2, 2), np.float32), "ids": np.ones(2, np.int32)}
    half = initialize.to_dtype(tree, "bfloat16")
    assert (half["kernel"].dtype, half["ids"].dtype) == (jnp.bfloat16, np.int32)
    assert initialize.to_dtype(tree, None) is tree
    with pytest.raises(ValueError, match="float16 overflows"):
        initialize.to_dtype(tree, "float16")


def test_a_start_traces_its_model_once(make_t5):
    class Counted(models.EncoderDecoderModel):
        count = 0

        def init(self, rng, batch):
            Counted.count += 1
            return super().init(rng, batch)

    space = FeatureSpace((), ())
    # Made anew each time, as gin does.
    for _ in range(2):
        model = Counted(make_t5(vocab_size=16, num_encoder_layers=1, num_decoder_layers=1))
        batch = model.example_batch({"inputs": 3, "targets": 2}, space)
        layout = initialize.layout(model, batch, (optimizers.Group(".*"),))
        drawn = initialize.host_init(model, batch, layout.trained, seed=0)
        assert jax.tree.map(np.shape, drawn) == jax.tree.map(lambda x: x.shape, layout.trained)
    assert Counted.count == 1
    longer = model.example_batch({"inputs": 4, "targets": 2}, space)
    initialize.variable_shapes(model, longer)
    assert Counted.count == 2
