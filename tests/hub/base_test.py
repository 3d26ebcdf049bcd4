"""Our own folders: what is saved is what is loaded, and nothing else is taken for a base."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from modjax import hub
from modjax.networks import t5

SIZES = dict(
    vocab_size=13,
    emb_dim=8,
    num_heads=2,
    head_dim=3,
    mlp_dim=12,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relpos_buckets=8,
)


def _params(config, seed=0):
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(t5.Transformer(config).init, jax.random.key(0), tokens, tokens, tokens)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes["params"])


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("relpos_per_layer", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_saved_and_loaded_is_the_same_base(tmp_path, scan_layers, relpos_per_layer):
    config = t5.T5Config(
        **SIZES, scan_layers=scan_layers, relpos_per_layer=relpos_per_layer, dropout_rate=0.1
    )
    params = _params(config)
    hub.save_base(tmp_path / "base", config, params)
    overrides, loaded = hub.load_base(tmp_path / "base", scan_layers=scan_layers)
    _equal(loaded, params)
    assert t5.T5Config(**overrides, dropout_rate=0.1) == config
    _, other = hub.load_base(tmp_path / "base", scan_layers=not scan_layers)
    _equal(hub.unstack_layers(other) if not scan_layers else hub.stack_layers(other), params)


def test_tensors_are_named_as_t5x_names_them_and_readable_by_the_format_library(tmp_path):
    config = t5.T5Config(**SIZES, scan_layers=True)
    params = _params(config)
    hub.save_base(tmp_path, config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "decoder/layers_1/encoder_decoder_attention/query/kernel" in tensors
    assert {"token_embedder/embedding", "decoder/logits_dense/kernel"} <= set(tensors)
    np.testing.assert_array_equal(
        tensors["encoder/layers_1/mlp/wi_0/kernel"],
        params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"][1],
    )


def test_jax_arrays_and_bfloat16_make_the_round_trip(tmp_path):
    config = t5.T5Config(**SIZES)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), _params(config))
    hub.save_base(tmp_path, config, params)
    _, loaded = hub.load_base(tmp_path)
    assert loaded["token_embedder"]["embedding"].dtype == ml_dtypes.bfloat16
    _equal(loaded, jax.tree.map(np.asarray, params))
    _, wide = hub.load_base(tmp_path, dtype="float32")
    assert wide["token_embedder"]["embedding"].dtype == np.float32


def test_arrays_are_written_as_they_read_however_they_lie_in_memory(tmp_path):
    config = t5.T5Config(**SIZES)
    params = _params(config)
    embedding = params["token_embedder"]["embedding"]
    params["token_embedder"]["embedding"] = np.asfortranarray(embedding)
    hub.save_base(tmp_path, config, params)
    np.testing.assert_array_equal(
        hub.load_base(tmp_path)[1]["token_embedder"]["embedding"], embedding
    )


def test_dtype_on_saving_rounds_to_nearest(tmp_path):
    config = t5.T5Config(**SIZES)
    params = _params(config)
    hub.save_base(tmp_path, config, params, "bfloat16")
    _, loaded = hub.load_base(tmp_path)
    _equal(loaded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))


def test_shards_stay_below_the_limit_and_load_again(tmp_path):
    config = t5.T5Config(**SIZES)
    params = _params(config)
    hub.save_base(tmp_path, config, params, max_shard_bytes=2000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(
        sum(x.nbytes for x in safetensors.numpy.load_file(s).values()) <= 2000 for s in shards
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    _equal(hub.load_base(tmp_path)[1], params)


def test_saving_again_leaves_no_file_of_the_earlier_base(tmp_path):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config), max_shard_bytes=2000)
    (tmp_path / "README.md").write_text("kept")
    hub.save_base(tmp_path, config, _params(config, seed=1))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    _equal(hub.load_base(tmp_path)[1], _params(config, seed=1))


def test_a_failed_save_leaves_the_earlier_base_whole(tmp_path, monkeypatch):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    calls = []

    def full_disk(file):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hub.save_base(tmp_path, config, _params(config, seed=1), max_shard_bytes=2000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    _equal(hub.load_base(tmp_path)[1], _params(config))


@pytest.mark.parametrize("keep", [0, 7, 100, -5])
def test_a_truncated_file_is_named(tmp_path, keep):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(hub.HubError, match=r"model.safetensors cannot be read .* cut short"):
        hub.load_base(tmp_path)


def test_a_save_cut_short_while_it_replaces_files_is_not_taken_for_a_base(tmp_path, monkeypatch):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    real, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        hub.save_base(tmp_path, config, _params(config, seed=1), max_shard_bytes=2000)
    with pytest.raises(hub.HubError, match="no config.json.*cut short.*model-00001-of"):
        hub.load_base(tmp_path)


def test_parameters_that_are_not_the_networks_are_not_saved(tmp_path):
    config = t5.T5Config(**SIZES)
    params = _params(config)
    params["encoder"]["layers_0"]["attention"]["query"]["lora"] = {"a": np.zeros((8, 2))}
    del params["decoder"]["decoder_norm"]
    params["token_embedder"]["embedding"] = np.zeros((13, 9), np.float32)
    with pytest.raises(hub.HubError) as error:
        hub.save_base(tmp_path / "base", config, params)
    for part in (
        "lacks decoder/decoder_norm/scale",
        "does not have: encoder/layers_0/attention/query/lora/a",
        "token_embedder/embedding is [13, 9], the network has [13, 8]",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "base").exists()


def test_a_file_with_one_tensor_more_or_less_is_refused(tmp_path):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["decoder/logits/kernel"] = tensors.pop("decoder/logits_dense/kernel")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(hub.HubError, match="lacks decoder/logits_dense/kernel.*decoder/logits/ke"):
        hub.load_base(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "is version 2 of network 't5'; readable is version 1"),
        ({"network": "gpt"}, "of network 'gpt'"),
        ({"config": {"emb_dimm": 8}}, "unknown field 'emb_dimm'. Did you mean 'emb_dim'"),
        ({"config": {"emb_dim": 8}}, "'config' lacks head_dim"),
        ({"format": "else"}, "neither ours .* nor of a Hugging Face model"),
    ],
)
def test_another_configuration_file_is_refused(tmp_path, change, message):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, **change}))
    with pytest.raises(hub.HubError, match=message):
        hub.load_base(tmp_path)


def test_a_damaged_configuration_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "modj')
    with pytest.raises(hub.HubError, match="config.json cannot be read as JSON"):
        hub.load_base(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(hub.HubError, match="a JSON object is expected"):
        hub.load_base(tmp_path)


def test_a_path_that_is_no_base_says_what_is_wanted(tmp_path):
    with pytest.raises(hub.HubError, match="does not exist.*hf download"):
        hub.load_base(tmp_path / "google/mt5-small")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(hub.HubError, match="is a file; give the folder"):
        hub.load_base(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(hub.HubError, match="no config.json.*nothing"):
        hub.load_base(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(hub.HubError, match="neither model.safetensors nor .* config.json"):
        hub.load_base(tmp_path / "empty")


def test_an_unknown_dtype_is_refused_with_the_known_ones(tmp_path):
    config = t5.T5Config(**SIZES)
    hub.save_base(tmp_path, config, _params(config))
    with pytest.raises(hub.HubError, match="unknown dtype 'bf16'.*bfloat16"):
        hub.load_base(tmp_path, dtype="bf16")
    with pytest.raises(hub.HubError, match="unknown dtype 'float8'"):
        hub.save_base(tmp_path, config, _params(config), "float8")
