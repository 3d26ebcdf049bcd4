"""Stacking and unstacking layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from modjax import hub


def _tree(layers=3):
    def layer(i):
        return {"query": {"kernel": np.full((2, 3), i), "lora": {"a": np.full(1, i)}}}

    encoder = {f"layers_{i}": layer(i) for i in range(layers)}
    return {"encoder": {**encoder, "encoder_norm": {"scale": np.ones(2)}}, "head": np.zeros(1)}


def test_layers_are_stacked_in_the_order_of_their_numbers_beyond_ten():
    stacked = hub.stack_layers(_tree(12))
    kernel = stacked["encoder"]["layers"]["query"]["kernel"]
    assert kernel.shape == (12, 2, 3)
    np.testing.assert_array_equal(kernel[:, 0, 0], np.arange(12))
    assert list(stacked) == ["encoder", "head"]
    assert set(stacked["encoder"]) == {"layers", "encoder_norm"}


def test_unstacking_undoes_stacking_adapters_included():
    tree = _tree()
    again = hub.unstack_layers(hub.stack_layers(tree))
    assert set(again["encoder"]) == set(tree["encoder"])
    for i in range(3):
        ours, theirs = again["encoder"][f"layers_{i}"], tree["encoder"][f"layers_{i}"]
        np.testing.assert_array_equal(ours["query"]["kernel"], theirs["query"]["kernel"])
        np.testing.assert_array_equal(ours["query"]["lora"]["a"], theirs["query"]["lora"]["a"])


def test_the_callers_tree_is_left_alone_and_jax_leaves_stay_jax():
    tree = {f"layers_{i}": {"w": jnp.full(2, float(i))} for i in range(2)}
    stacked = hub.stack_layers(tree)
    assert set(tree) == {"layers_0", "layers_1"}
    assert isinstance(stacked["layers"]["w"], jnp.ndarray)
    assert isinstance(hub.stack_layers(_tree())["encoder"]["layers"]["query"]["kernel"], np.ndarray)


def test_layers_that_differ_are_refused_by_name():
    tree = _tree()
    del tree["encoder"]["layers_1"]["query"]["lora"]
    with pytest.raises(hub.HubError, match="layers/query: layer 1 lacks lora"):
        hub.stack_layers(tree)
    tree = _tree()
    tree["encoder"]["layers_2"]["query"]["kernel"] = np.ones((2, 4))
    with pytest.raises(
        hub.HubError, match=r"layers/query/kernel: .* shapes \[\(2, 3\), \(2, 4\)\]"
    ):
        hub.stack_layers(tree)


def test_gaps_between_layers_are_refused():
    tree = _tree()
    del tree["encoder"]["layers_1"]
    with pytest.raises(hub.HubError, match="without gaps .* layers_0, layers_2"):
        hub.stack_layers(tree)


def test_a_tree_stacked_in_part_is_refused():
    with pytest.raises(hub.HubError, match="stacked in part"):
        hub.stack_layers({"layers": {"w": np.ones(2)}, "layers_0": {"w": np.ones(1)}})


def test_unequal_leading_axes_are_refused():
    with pytest.raises(hub.HubError, match="different leading axes"):
        hub.unstack_layers({"layers": {"w": np.ones((2, 1)), "v": np.ones((3, 1))}})
    with pytest.raises(hub.HubError, match="different leading axes"):
        hub.unstack_layers({"layers": {"w": np.ones((2, 1)), "v": np.ones(())}})
