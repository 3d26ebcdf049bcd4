"""Hugging Face T5 folders, without torch or transformers: names, shapes, variants, refusals."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from modjax import hub
from modjax.networks import t5

IGNORED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
BIAS = "{}.layer.0.SelfAttention.relative_attention_bias.weight"


def test_each_weight_lands_where_its_name_says(hf):
    tensors = hf.tensors(gated=True, tied=False)
    folder = hf.write(tensors, hf.config(feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    overrides, params = hub.load_base(folder)
    assert overrides == {
        "vocab_size": 11,
        "emb_dim": 6,
        "num_heads": 3,
        "head_dim": 2,
        "mlp_dim": 10,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "mlp_activations": ("gelu", "linear"),
        "logits_via_embedding": False,
        "relpos_per_layer": False,
        "relpos_buckets": 8,
        "relpos_max_distance": 20,
        "scan_layers": False,
    }
    ours = _flat(params)
    for name, theirs in {
        "decoder/logits_dense/kernel": "lm_head.weight",
        "encoder/relpos_bias/rel_embedding": BIAS.format("encoder.block.0"),
        "decoder/relpos_bias/rel_embedding": BIAS.format("decoder.block.0"),
        "encoder/layers_1/attention/query/kernel": "encoder.block.1.layer.0.SelfAttention.q.weight",
        "encoder/layers_1/attention/out/kernel": "encoder.block.1.layer.0.SelfAttention.o.weight",
        "encoder/layers_1/mlp/wi_0/kernel": "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
        "encoder/layers_1/mlp/wi_1/kernel": "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
        "decoder/layers_1/self_attention/key/kernel": (
            "decoder.block.1.layer.0.SelfAttention.k.weight"
        ),
        "decoder/layers_1/encoder_decoder_attention/value/kernel": (
            "decoder.block.1.layer.1.EncDecAttention.v.weight"
        ),
        "decoder/layers_1/mlp/wo/kernel": "decoder.block.1.layer.2.DenseReluDense.wo.weight",
    }.items():
        np.testing.assert_array_equal(ours[name], tensors[theirs].T)
    for name, theirs in {
        "token_embedder/embedding": "shared.weight",
        "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
        "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
        "encoder/layers_1/pre_attention_layer_norm/scale": (
            "encoder.block.1.layer.0.layer_norm.weight"
        ),
        "encoder/layers_1/pre_mlp_layer_norm/scale": "encoder.block.1.layer.1.layer_norm.weight",
        "decoder/layers_1/pre_self_attention_layer_norm/scale": (
            "decoder.block.1.layer.0.layer_norm.weight"
        ),
        "decoder/layers_1/pre_cross_attention_layer_norm/scale": (
            "decoder.block.1.layer.1.layer_norm.weight"
        ),
        "decoder/layers_1/pre_mlp_layer_norm/scale": "decoder.block.1.layer.2.layer_norm.weight",
    }.items():
        np.testing.assert_array_equal(ours[name], tensors[theirs])
    assert all(value.flags.c_contiguous for value in ours.values())


@pytest.mark.parametrize("scan_layers", [False, True])
def test_position_bias_in_every_layer_of_umt5(hf, scan_layers):
    tensors = hf.tensors(gated=True, tied=True, bias_in_every_layer=True)
    config = hf.config(model_type="umt5", feed_forward_proj="gated-gelu")
    overrides, params = hub.load_base(hf.write(tensors, config), scan_layers=scan_layers)
    assert overrides["relpos_per_layer"] and overrides["logits_via_embedding"]
    decoder = params["decoder"]
    layer = decoder["layers"] if scan_layers else decoder["layers_1"]
    ours = layer["relpos_bias"]["rel_embedding"]
    np.testing.assert_array_equal(
        ours[1] if scan_layers else ours, tensors[BIAS.format("decoder.block.1")].T
    )


def test_stacked_while_reading_equals_stacked_afterwards(hf):
    folder = hf.write(hf.tensors(), hf.config())
    overrides, stacked = hub.load_base(folder, scan_layers=True)
    _, unrolled = hub.load_base(folder)
    assert overrides["scan_layers"] is True
    again = hub.stack_layers(unrolled)
    shapes = _flat(again)
    assert shapes.keys() == _flat(stacked).keys()
    for name, value in _flat(stacked).items():
        np.testing.assert_array_equal(value, shapes[name])
    assert stacked["decoder"]["layers"]["mlp"]["wi"]["kernel"].shape == (2, 6, 10)


def test_headers_alone_give_the_configuration(hf):
    folder = hf.write(hf.tensors(), hf.config())
    overrides, _ = hub.load_base(folder)
    del overrides["scan_layers"]
    assert hub.load_config(folder) == overrides
    t5.T5Config(**overrides)


@pytest.mark.parametrize(
    "model_type, version, says_tied, own_head, tied, factor",
    [
        ("t5", "4.40.0", True, False, True, None),
        ("t5", "4.40.0", False, True, False, 1.0),
        ("t5", None, None, False, True, None),  # 4.x assumed tied for t5
        ("mt5", "4.40.0", None, True, False, None),  # and not tied for mt5
        ("mt5", "4.40.0", False, True, False, 1.0),
        ("mt5", "5.1.0", True, True, False, 1.0),  # 5.x always says tied
        ("mt5", "5.1.0", True, False, False, "embedding"),
        ("umt5", "4.40.0", False, True, False, 1.0),
        ("umt5", "5.1.0", True, False, True, None),
        ("umt5", "5.1.0", True, True, False, 6**-0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*scales umT5")
def test_output_layer_follows_the_files_and_the_writers_version(
    hf, model_type, version, says_tied, own_head, tied, factor
):
    tensors = hf.tensors(tied=not own_head, bias_in_every_layer=model_type == "umt5")
    config = hf.config(model_type=model_type, transformers_version=version)
    del config["tie_word_embeddings"]
    if says_tied is not None:
        config["tie_word_embeddings"] = says_tied
    overrides, params = hub.load_base(hf.write(tensors, config))
    assert overrides["logits_via_embedding"] is tied
    if tied:
        assert "logits_dense" not in params["decoder"]
        return
    expected = tensors["shared.weight" if factor == "embedding" else "lm_head.weight"].T
    if isinstance(factor, float):
        expected = expected * np.float32(factor)
    np.testing.assert_allclose(params["decoder"]["logits_dense"]["kernel"], expected, rtol=1e-6)


def test_scaling_flag_of_transformers_5_decides_for_t5(hf):
    tensors = hf.tensors(tied=True)
    config = hf.config(transformers_version="5.23.0", scale_decoder_outputs=False)
    overrides, params = hub.load_base(hf.write(tensors, config))
    assert not overrides["logits_via_embedding"]
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], tensors["shared.weight"].T
    )


def test_an_untied_umt5_resaved_by_transformers_5_warns(hf):
    tensors = hf.tensors(tied=False, bias_in_every_layer=True)
    config = hf.config(model_type="umt5", transformers_version="5.23.0")
    with pytest.warns(UserWarning, match="scales umT5's logits"):
        hub.load_base(hf.write(tensors, config))


def test_stored_copies_of_the_embedding_and_the_ignored_bias_are_accepted(hf):
    tensors = hf.tensors(tied=True)
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[copy] = tensors["shared.weight"].copy()
    tensors[IGNORED] = np.zeros((8, 3), np.float32)
    overrides, params = hub.load_base(hf.write(tensors, hf.config()))
    assert overrides["logits_via_embedding"]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], tensors["shared.weight"])


@pytest.mark.parametrize("kept", ["encoder.embed_tokens.weight", "lm_head.weight"])
def test_a_shared_embedding_is_found_under_any_of_its_names(hf, kept):
    tensors = hf.tensors(tied=True)
    embedding = tensors[kept] = tensors.pop("shared.weight")
    _, params = hub.load_base(hf.write(tensors, hf.config()))
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], embedding)


def test_a_copy_of_the_embedding_that_differs_is_refused(hf):
    tensors = hf.tensors(tied=True)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    with pytest.raises(hub.HubError, match="encoder.embed_tokens.weight differs from shared"):
        hub.load_base(hf.write(tensors, hf.config()))


def test_untied_without_output_layer_is_refused(hf):
    with pytest.raises(hub.HubError, match="hold no lm_head.weight"):
        hub.load_base(hf.write(hf.tensors(tied=True), hf.config(tie_word_embeddings=False)))


def test_a_missing_weight_is_named_in_both_languages(hf):
    tensors = hf.tensors()
    del tensors["decoder.block.1.layer.1.EncDecAttention.v.weight"]
    expected = (
        r"lacks decoder/layers_1/encoder_decoder_attention/value/kernel \(from "
        r"decoder.block.1.layer.1.EncDecAttention.v.weight\)"
    )
    with pytest.raises(hub.HubError, match=expected):
        hub.load_base(hf.write(tensors, hf.config()))


def test_an_encoder_without_decoder_is_refused(hf):
    tensors = {k: v for k, v in hf.tensors().items() if not k.startswith("decoder")}
    with pytest.raises(hub.HubError, match=r"lacks decoder/.* in all\)"):
        hub.load_base(hf.write(tensors, hf.config()))


def test_weights_without_a_place_are_named(hf):
    tensors = hf.tensors()
    tensors["classification_head.dense.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(hub.HubError, match="no place in this network: classification_head.dense"):
        hub.load_base(hf.write(tensors, hf.config()))


def test_more_layers_in_the_files_than_in_the_configuration_are_named(hf):
    with pytest.raises(hub.HubError, match="no place in this network: .*block.2"):
        hub.load_base(hf.write(hf.tensors(layers=3), hf.config()))


def test_another_shape_is_named(hf):
    with pytest.raises(
        hub.HubError, match=r"query/kernel .* is \[6, 6\], the network has \[6, 8\]"
    ):
        hub.load_base(hf.write(hf.tensors(), hf.config(num_heads=4)))


def test_padding_of_the_vocabulary_is_kept_and_said(hf):
    with pytest.warns(UserWarning, match="vocab_size 9: the last 2 are kept as padding"):
        overrides, _ = hub.load_base(hf.write(hf.tensors(), hf.config(vocab_size=9)))
    assert overrides["vocab_size"] == 11


def test_a_vocabulary_larger_than_the_embedding_is_refused(hf):
    with pytest.raises(hub.HubError, match="vocab_size 12, shared.weight has 11 rows"):
        hub.load_base(hf.write(hf.tensors(), hf.config(vocab_size=12)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_proj": "gated-swish"}, "feed_forward_proj 'gated-swish'.*gated-silu"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"pad_token_id": 3}, "pad_token_id is 3"),
        ({"d_kv": None}, "has no field 'd_kv'"),
        ({"model_type": "gptj"}, "model_type is 'gptj'; known: t5, mt5, umt5, gpt2, llama"),
    ],
)
def test_a_network_that_we_do_not_compute_is_refused(hf, change, message):
    with pytest.raises(hub.HubError, match=message):
        hub.load_base(hf.write(hf.tensors(), hf.config(**change)))


def test_another_first_token_of_the_decoder_warns(hf):
    with pytest.warns(UserWarning, match="decoder_start_token_id is 2"):
        hub.load_base(hf.write(hf.tensors(), hf.config(decoder_start_token_id=2)))


def test_float16_is_read_with_advice_and_converted_on_request(hf):
    tensors = {k: v.astype(np.float16) for k, v in hf.tensors().items()}
    folder = hf.write(tensors, hf.config())
    with pytest.warns(UserWarning, match="overflow float16 .mT5 above all. and give NaN"):
        _, params = hub.load_base(folder)
    assert params["token_embedder"]["embedding"].dtype == np.float16
    _, params = hub.load_base(folder, dtype="bfloat16")
    assert params["token_embedder"]["embedding"].dtype == ml_dtypes.bfloat16


def test_layers_of_mixed_precision_stack_in_the_wider_one(hf):
    tensors = hf.tensors()
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    tensors[name.format(0)] = tensors[name.format(0)].astype(ml_dtypes.bfloat16)
    _, params = hub.load_base(hf.write(tensors, hf.config()), scan_layers=True)
    query = params["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert query.dtype == np.float32
    np.testing.assert_array_equal(query[1], tensors[name.format(1)].T)


def test_weights_that_are_not_finite_are_named(hf):
    tensors = hf.tensors()
    tensors["encoder.final_layer_norm.weight"][2] = np.inf
    with pytest.raises(hub.HubError, match="encoder.final_layer_norm.weight holds .* not finite"):
        hub.load_base(hf.write(tensors, hf.config()))


def test_integer_weights_are_refused(hf):
    tensors = hf.tensors()
    tensors["shared.weight"] = np.ones((11, 6), np.int8)
    with pytest.raises(hub.HubError, match="shared.weight has dtype I8.*Quantised"):
        hub.load_base(hf.write(tensors, hf.config()))


def test_pickled_weights_are_refused_with_the_command_that_reads_them(hf):
    folder = hf.write(hf.tensors(), hf.config())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    command = rf"python -m modjax.hub import_hf {folder} DESTINATION \(needs torch\)"
    with pytest.raises(
        hub.HubError, match=rf"no model.safetensors but pytorch_model.bin.*{command}"
    ):
        hub.load_base(folder)
    with pytest.raises(hub.HubError, match=f"not safetensors.*{command}"):
        hub.load_base(folder / "pytorch_model.bin")


def test_weights_in_formats_that_nothing_here_reads_are_named(hf):
    folder = hf.write(hf.tensors(), hf.config())
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "tf_model.h5").write_bytes(b"")
    what = "pytorch_model.bin.index.json.*pytorch_model-00001-of-00001.bin, tf_model.h5: save the"
    with pytest.raises(hub.HubError, match=what):
        hub.load_base(folder)
    with pytest.raises(hub.HubError, match="tf_model.h5 is a file; give the folder"):
        hub.load_base(folder / "tf_model.h5")


def test_shards_are_read_and_a_missing_one_is_named(hf):
    tensors = hf.tensors()
    folder = hf.write(tensors, hf.config())
    _, whole = hub.load_base(folder)
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, sharded = hub.load_base(folder)
    for name, value in _flat(whole).items():
        np.testing.assert_array_equal(_flat(sharded)[name], value)

    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": files[0]}}))
    with pytest.raises(hub.HubError, match=f"lists tensors that {files[0]} does not hold: extra"):
        hub.load_base(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": "../else.safetensors"}}))
    with pytest.raises(hub.HubError, match="is not the name of a file in this folder"):
        hub.load_base(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / files[1]).unlink()
    with pytest.raises(hub.HubError, match=f"{files[1]} is missing.*says it holds"):
        hub.load_base(folder)


def _flat(tree, prefix=""):
    out = {}
    for name, value in tree.items():
        out |= (
            _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
        )
    return out
