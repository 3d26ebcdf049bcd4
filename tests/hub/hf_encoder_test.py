"""Hugging Face encoder folders, without torch or transformers: names, shapes, heads, refusals.

The tensors are written out by hand: the names are the point.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from modjax import hub
from modjax.networks import encoder

WIDTH, HEADS, MLP, VOCAB, POSITIONS = 6, 3, 10, 11, 9


def hf_tensors(prefix="", *, types=2, pooler=True, layers=2, **head):
    """Random weights by Hugging Face's names, `[out, in]`; `head` adds tensors by name and shape."""
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (types, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    linear = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (MLP, WIDTH),
        "output.dense": (WIDTH, MLP),
    }
    for i in range(layers):
        for name, (rows, columns) in linear.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (rows,)
        for name in ("attention.output", "output"):
            shapes[f"encoder.layer.{i}.{name}.LayerNorm.weight"] = (WIDTH,)
            shapes[f"encoder.layer.{i}.{name}.LayerNorm.bias"] = (WIDTH,)
    if pooler:
        shapes |= {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)}
    shapes = {prefix + name: shape for name, shape in shapes.items()} | head
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def hf_config(**changes):
    """config.json of the tensors above, as transformers 4 wrote it for a BERT."""
    config = {
        "model_type": "bert",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "hidden_act": "gelu",
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "transformers_version": "4.40.0",
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


ROBERTA = dict(model_type="roberta", type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
POOLED = {"classifier.weight": (3, WIDTH), "classifier.bias": (3,)}
DENSE = {
    "classifier.dense.weight": (WIDTH, WIDTH),
    "classifier.dense.bias": (WIDTH,),
    "classifier.out_proj.weight": (1, WIDTH),
    "classifier.out_proj.bias": (1,),
}


@pytest.fixture
def write(tmp_path):
    """`write(tensors, config)` -> folder."""

    def write(tensors, config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def load(folder, **options):
    overrides, params = hub.load_base(folder, **options)
    return overrides, flatten_dict(params, sep="/")


def test_each_weight_lands_where_its_name_says(write):
    tensors = hf_tensors("bert.", **POOLED)
    overrides, ours = load(write(tensors, hf_config()))
    assert overrides == {
        "vocab_size": 11,
        "token_offset": 0,
        "emb_dim": 6,
        "num_heads": 3,
        "head_dim": 2,
        "mlp_dim": 10,
        "num_layers": 2,
        "mlp_activations": ("gelu_exact",),
        "norm_epsilon": 1e-12,
        "max_positions": 9,
        "position_offset": 0,
        "type_vocab_size": 2,
        "pooler": True,
        "head": "pooled",
        "num_outputs": 3,
        "scan_layers": False,
    }
    layer = "bert.encoder.layer.1"
    expected = {
        "token_embedder/embedding": "bert.embeddings.word_embeddings.weight",
        "encoder/position_embedder/embedding": "bert.embeddings.position_embeddings.weight",
        "encoder/type_embedder/embedding": "bert.embeddings.token_type_embeddings.weight",
        "encoder/embedding_norm/scale": "bert.embeddings.LayerNorm.weight",
        "encoder/embedding_norm/bias": "bert.embeddings.LayerNorm.bias",
        "encoder/layers_1/attention/query/kernel": f"{layer}.attention.self.query.weight",
        "encoder/layers_1/attention/query/bias": f"{layer}.attention.self.query.bias",
        "encoder/layers_1/attention/key/kernel": f"{layer}.attention.self.key.weight",
        "encoder/layers_1/attention/key/bias": f"{layer}.attention.self.key.bias",
        "encoder/layers_1/attention/value/kernel": f"{layer}.attention.self.value.weight",
        "encoder/layers_1/attention/value/bias": f"{layer}.attention.self.value.bias",
        "encoder/layers_1/attention/out/kernel": f"{layer}.attention.output.dense.weight",
        "encoder/layers_1/attention/out/bias": f"{layer}.attention.output.dense.bias",
        "encoder/layers_1/attention_norm/scale": f"{layer}.attention.output.LayerNorm.weight",
        "encoder/layers_1/attention_norm/bias": f"{layer}.attention.output.LayerNorm.bias",
        "encoder/layers_1/mlp/wi/kernel": f"{layer}.intermediate.dense.weight",
        "encoder/layers_1/mlp/wi/bias": f"{layer}.intermediate.dense.bias",
        "encoder/layers_1/mlp/wo/kernel": f"{layer}.output.dense.weight",
        "encoder/layers_1/mlp/wo/bias": f"{layer}.output.dense.bias",
        "encoder/layers_1/mlp_norm/scale": f"{layer}.output.LayerNorm.weight",
        "encoder/layers_1/mlp_norm/bias": f"{layer}.output.LayerNorm.bias",
        "pooler/kernel": "bert.pooler.dense.weight",
        "pooler/bias": "bert.pooler.dense.bias",
        "classifier/logits_dense/kernel": "classifier.weight",
        "classifier/logits_dense/bias": "classifier.bias",
    }
    assert {name for name in ours if "layers_0" not in name} == expected.keys()
    for name, theirs in expected.items():
        tensor = tensors[theirs]
        np.testing.assert_array_equal(ours[name], tensor.T if name.endswith("kernel") else tensor)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta_has_its_offsets_and_its_head_of_two_layers(write, model_type):
    tensors = hf_tensors("roberta.", types=1, pooler=False, **DENSE)
    overrides, ours = load(write(tensors, hf_config(**{**ROBERTA, "model_type": model_type})))
    network = encoder.EncoderConfig(**overrides)
    assert (network.token_offset, network.position_offset, network.max_positions) == (1, 2, 9)
    assert (network.type_vocab_size, network.norm_epsilon) == (1, 1e-5)
    assert (network.pooler, network.head, network.num_outputs) == (False, "dense", 1)
    for name, theirs in {
        "classifier/dense/kernel": "classifier.dense.weight",
        "classifier/logits_dense/kernel": "classifier.out_proj.weight",
        "classifier/logits_dense/bias": "classifier.out_proj.bias",
    }.items():
        np.testing.assert_array_equal(ours[name], tensors[theirs].T)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("pooler", [False, True])
def test_a_base_alone_with_and_without_prefix_and_pooler(write, prefix, pooler):
    tensors = hf_tensors(prefix, pooler=pooler)
    overrides, ours = load(write(tensors, hf_config()))
    assert (overrides["head"], overrides["num_outputs"], overrides["pooler"]) == ("none", 0, pooler)
    assert ("pooler/kernel" in ours) is pooler and len(ours) == len(tensors)


def test_a_pooler_that_the_head_does_not_read_is_kept(write):
    # RobertaForSequenceClassification had one until transformers 4.
    tensors = hf_tensors("roberta.", types=1, **DENSE)
    overrides, ours = load(write(tensors, hf_config(**ROBERTA)))
    assert overrides["head"] == "dense" and "pooler/kernel" in ours


def test_a_head_may_be_that_of_multiple_choice(write):
    head = {"classifier.weight": (1, WIDTH), "classifier.bias": (1,)}
    config = hf_config(**ROBERTA, architectures=["RobertaForMultipleChoice"])
    overrides, _ = load(write(hf_tensors("roberta.", types=1, **head), config))
    assert (overrides["head"], overrides["num_outputs"]) == ("pooled", 1)


def test_names_of_the_norms_in_tensorflow_s_files_are_known(write):
    tensors = hf_tensors("bert.")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in tensors.items()
    }
    _, ours = load(write(old, hf_config()))
    name = "bert.encoder.layer.0.output.LayerNorm."
    np.testing.assert_array_equal(ours["encoder/layers_0/mlp_norm/scale"], tensors[name + "weight"])
    np.testing.assert_array_equal(ours["encoder/layers_0/mlp_norm/bias"], tensors[name + "bias"])


def test_buffers_and_heads_of_pretraining_are_left_behind(write):
    more = {
        "cls.predictions.bias": (VOCAB,),
        "cls.predictions.transform.LayerNorm.gamma": (WIDTH,),
        "cls.predictions.decoder.weight": (VOCAB, WIDTH),
        "cls.seq_relationship.weight": (2, WIDTH),
        "lm_head.dense.weight": (WIDTH, WIDTH),
        "lm_head.bias": (VOCAB,),
    }
    tensors = hf_tensors("bert.", **more)
    tensors["bert.embeddings.position_ids"] = np.arange(POSITIONS)[None]
    overrides, ours = load(write(tensors, hf_config()))
    assert overrides["head"] == "none" and len(ours) == len(tensors) - len(more) - 1


def test_stacked_while_reading_equals_stacked_afterwards(write):
    folder = write(hf_tensors(), hf_config())
    overrides, stacked = load(folder, scan_layers=True)
    _, unrolled = hub.load_base(folder)
    again = flatten_dict(hub.stack_layers(unrolled), sep="/")
    assert overrides["scan_layers"] is True and stacked.keys() == again.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, stacked[name])
    assert stacked["encoder/layers/mlp/wi/bias"].shape == (2, 10)


@pytest.mark.parametrize(
    "changes, fields",
    [
        (dict(hidden_act="gelu_new"), dict(mlp_activations=("gelu",))),
        (dict(hidden_act="relu"), dict(mlp_activations=("relu",))),
        (dict(pad_token_id=None), dict(token_offset=0, position_offset=0)),
        (dict(pad_token_id=5), dict(token_offset=1, position_offset=0)),
        (dict(model_type="roberta", pad_token_id=None), dict(token_offset=1, position_offset=2)),
        (dict(model_type="roberta", pad_token_id=0), dict(token_offset=0, position_offset=1)),
        (dict(layer_norm_eps=None), dict(norm_epsilon=1e-12)),
        (dict(max_position_embeddings=None, type_vocab_size=None), dict(max_positions=9)),
    ],
)
def test_what_config_json_says_and_leaves_unsaid(write, changes, fields):
    overrides = hub.load_config(write(hf_tensors(), hf_config(**changes)))
    assert {name: overrides[name] for name in fields} == fields


def test_a_vocabulary_padded_beyond_the_tokenizer_s_is_kept_with_a_warning(write):
    folder = write(hf_tensors(), hf_config(vocab_size=8))
    with pytest.warns(UserWarning, match="11 rows, config.json says vocab_size 8: the last 3"):
        assert hub.load_config(folder)["vocab_size"] == 11


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
        (dict(hidden_act="gelu_nw"), "hidden_act 'gelu_nw' is not computed.*'gelu_new'"),
        (dict(is_decoder=True), "is_decoder is True"),
        (dict(add_cross_attention=True), "add_cross_attention is True"),
        (dict(pruned_heads={"1": [0]}), "pruned_heads is"),
        (dict(quantization_config={"bits": 4}), "quantization_config.*floating point"),
        (dict(num_attention_heads=4), "hidden_size 6 does not divide into 4 heads"),
        (dict(intermediate_size=None), "no field 'intermediate_size'"),
        (dict(vocab_size=12), "says vocab_size 12, .*word_embeddings.weight has 11 rows"),
        (dict(max_position_embeddings=8), "says max_position_embeddings 8, .* has 9 rows"),
        (dict(type_vocab_size=1), "says type_vocab_size 1, .* has 2 rows"),
        (dict(intermediate_size=12), r"mlp/wi/kernel \(from encoder.layer.0.intermediate.dense.we"),
        (dict(num_hidden_layers=3), r"lacks .*layers_2/attention/key/bias \(from encoder.layer.2"),
        (dict(num_hidden_layers=1), "no place in this network: encoder.layer.1.attention.output"),
    ],
)
def test_a_configuration_that_is_another_function_is_refused(write, changes, message):
    with pytest.raises(hub.HubError, match=message):
        hub.load_config(write(hf_tensors(), hf_config(**changes)))


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        (hf_tensors(**{"qa_outputs.weight": (2, WIDTH)}), {}, "no place .*: qa_outputs.weight"),
        (hf_tensors(**{"crf.start": (2,)}), {}, "no place in this network: crf.start"),
        (
            hf_tensors(**{"encoder.layer.0.crossattention.self.query.bias": (WIDTH,)}),
            {},
            "no place .*crossattention",
        ),
        (hf_tensors("roberta."), {}, "no tensor embeddings.word_embeddings.weight"),
        (hf_tensors(pooler=False, **POOLED), {}, "no pooler .*Heads for tokens"),
        (
            hf_tensors(**POOLED),
            dict(architectures=["BertForTokenClassification"]),
            "BertForTokenClassification, which is not computed here",
        ),
        (hf_tensors(**{"classifier.weight": (3, WIDTH)}), {}, "lacks classifier/logits_dense/bias"),
        (
            hf_tensors(**{"classifier.dense.weight": (WIDTH, WIDTH)}),
            {},
            "classifier.dense.weight but no classifier.out_proj.weight",
        ),
        (
            hf_tensors("bert.") | hf_tensors(layers=0, pooler=False),
            {},
            "holds embeddings.* twice, as .* and as",
        ),
    ],
)
def test_tensors_without_a_place_and_missing_ones_are_named(write, tensors, changes, message):
    with pytest.raises(hub.HubError, match=message):
        hub.load_config(write(tensors, hf_config(**changes)))


@pytest.mark.parametrize("dtype, name", [(np.int8, "I8"), (np.int64, "I64"), (np.bool_, "BOOL")])
def test_weights_that_are_not_floating_point_are_refused(write, dtype, name):
    tensors = hf_tensors()
    weight = "encoder.layer.0.output.dense.weight"
    tensors[weight] = np.ones_like(tensors[weight], dtype)
    with pytest.raises(hub.HubError, match=f"{weight} has dtype {name}; .*Quantised"):
        hub.load_config(write(tensors, hf_config()))


def test_a_dtype_that_numpy_lacks_is_refused_on_opening(write):
    tensors = hf_tensors()
    tensors["scales"] = np.ones(3, ml_dtypes.float8_e4m3fn)
    with pytest.raises(hub.HubError, match="scales has dtype F8_E4M3; .*Quantised"):
        hub.load_config(write(tensors, hf_config()))
