"""Arrays and caches get beams, and lose none of their order."""

import flax.core
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import decoding


def test_expanding_repeats_each_example_in_place():
    features = np.arange(12).reshape(2, 3, 2)
    flat = decoding.flat_batch_beam_expand(jnp.asarray(features), 4)
    assert flat.shape == (8, 3, 2)
    for row in range(8):
        np.testing.assert_array_equal(flat[row], features[row // 4])


@pytest.mark.parametrize("offset", [0, 1])
def test_adding_and_flattening_a_beam_axis_is_expanding(offset):
    x = jnp.arange(24).reshape(2, 3, 4)
    with_beams = decoding.add_beam_dim(x, 5, offset)
    assert with_beams.shape == ((2, 5, 3, 4) if offset == 0 else (2, 3, 5, 4))
    flat = decoding.flatten_beam_dim(with_beams, offset)
    np.testing.assert_array_equal(flat, decoding.flat_batch_beam_expand(x, 5, offset))
    back = decoding.unflatten_beam_dim(flat, x.shape[offset], 5, offset)
    np.testing.assert_array_equal(back, with_beams)


@pytest.mark.parametrize("offset", [0, 1])
def test_gathering_takes_each_examples_own_beams(offset):
    x = np.random.RandomState(0).normal(size=(3, 4, 5) if offset == 0 else (2, 3, 4, 5))
    index = np.array([[1, 1], [3, 0], [2, 3]])
    got = decoding.gather_beams({"x": jnp.asarray(x)}, jnp.asarray(index), offset)["x"]
    want = np.take_along_axis(
        x, index[:, :, None] if offset == 0 else index[None, :, :, None], offset + 1
    )
    np.testing.assert_allclose(got, want)


def _cache(layers: bool) -> dict:
    lead = (2,) if layers else ()
    keys = np.random.RandomState(1).normal(size=(*lead, 3, 4)).astype(np.float32)
    return {
        "self_attention": {
            "cached_key": jnp.asarray(keys),
            "cache_index": jnp.zeros(lead, jnp.int32),
            "cached_bias": jnp.ones((1, 2, 7)),
        },
        "encoder_decoder_attention": {"cached_key": jnp.asarray(keys)},
        "position_embedder_index": jnp.zeros((), jnp.int32),
    }


@pytest.mark.parametrize("layers", [False, True])
def test_a_cache_expands_its_examples_and_leaves_what_serves_all_rows(layers):
    cache = _cache(layers)
    flat = decoding.expand_cache(cache, 3, 2, offset=int(layers))
    keys = np.repeat(cache["self_attention"]["cached_key"], 2, axis=int(layers))
    np.testing.assert_array_equal(flat["self_attention"]["cached_key"], keys)
    np.testing.assert_array_equal(flat["encoder_decoder_attention"]["cached_key"], keys)
    assert flat["self_attention"]["cache_index"].shape == ((2,) if layers else ())
    assert flat["self_attention"]["cached_bias"].shape == (1, 2, 7)
    assert flat["position_embedder_index"].shape == ()


def test_a_prefilled_caches_index_expands_too():
    cache = {"cache_index": jnp.array([3, 5])}
    np.testing.assert_array_equal(decoding.expand_cache(cache, 2, 2)["cache_index"], [3, 3, 5, 5])


@pytest.mark.parametrize("layers", [False, True])
def test_gathering_a_cache_moves_beams_but_not_what_they_share(layers):
    cache = decoding.expand_cache(_cache(layers), 3, 2, offset=int(layers))
    keys = cache["self_attention"]["cached_key"]
    keys = keys + jnp.arange(6.0).reshape(6, 1)  # now beams differ
    cache["self_attention"]["cached_key"] = keys
    cache["encoder_decoder_attention"]["cached_key"] = keys
    beams = jnp.array([[1, 0], [0, 0], [1, 1]])
    got = decoding.gather_cache(cache, beams, 2, offset=int(layers))
    want = np.asarray(keys)[..., [1, 0, 2, 2, 5, 5], :]
    np.testing.assert_array_equal(got["self_attention"]["cached_key"], want)
    np.testing.assert_array_equal(got["encoder_decoder_attention"]["cached_key"], keys)
    assert got["self_attention"]["cached_bias"].shape == (1, 2, 7)


@pytest.mark.parametrize("layers", [False, True])
def test_what_lies_side_by_side_is_beam_0s_first_and_stays_where_it_is(layers):
    lead, offset = ((2,) if layers else ()), int(layers)
    keys = np.random.RandomState(1).normal(size=(*lead, 3, 4, 2)).astype(np.float32)
    mask = np.array([[1, 1], [1, 0], [0, 0]], bool).reshape(*(1,) * offset, 3, 2)
    cache = {"joint_key": jnp.asarray(keys), "joint_mask": jnp.asarray(mask)}
    flat = decoding.expand_cache(cache, 3, 2, offset, picked=True)
    assert flat["joint_key"].shape == (*lead, 3, 4, 4)
    np.testing.assert_array_equal(flat["joint_key"][..., ::2], keys)
    seen = np.repeat(mask, 2, axis=offset)
    np.testing.assert_array_equal(flat["joint_mask"][..., ::2], seen)
    assert not np.asarray(flat["joint_mask"])[..., 1::2].any()
    got = decoding.gather_cache(flat, jnp.array([[1, 0], [0, 0], [1, 1]]), 2, offset)
    np.testing.assert_array_equal(got["joint_key"], flat["joint_key"])
    own = decoding.expand_cache(cache, 3, 2, offset)
    np.testing.assert_array_equal(own["joint_key"], np.repeat(keys, 2, axis=offset))
    np.testing.assert_array_equal(own["joint_mask"], seen)


def test_picking_beams_picks_what_they_see():
    mask = jnp.asarray(np.eye(6, dtype=bool))
    got = decoding.gather_cache({"joint_mask": mask}, jnp.array([[1, 0], [0, 0], [1, 1]]), 2)
    np.testing.assert_array_equal(got["joint_mask"], np.eye(6)[[1, 0, 2, 2, 5, 5]])


def test_frozen_caches_stay_frozen():
    cache = flax.core.freeze(_cache(False))
    assert isinstance(decoding.expand_cache(cache, 3, 2), flax.core.FrozenDict)


def test_a_cache_of_another_batch_is_refused_by_name():
    with pytest.raises(ValueError, match=r"attention/cached_key .*cache_offset=1"):
        decoding.expand_cache(_cache(False) | {"position_embedder_index": 0}, 3, 2, offset=1)
