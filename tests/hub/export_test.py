"""What is written for PEFT and transformers: names, shapes, values by the formula, and what is refused.

Base folders are written out by hand: the names are the point.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from modjax import adapters, hub
from modjax.hub import run as runs
from modjax.hub.__main__ import main
from modjax.hub.export import export_hf
from modjax.hub.hf_import import import_hf
from modjax.hub.kinds import KINDS
from modjax.hub.layers import flatten, unflatten
from modjax.hub.peft import export_peft
from modjax.networks import decoder, t5
from modjax.optimizers import Group
from tests.testdata.trained_runs import write_run

PREFIX = "base_model.model."
SW = {"task": "parse", "language": "sw"}
WIDTH = 8


def rule(layers, module=None, router=None, name="bank"):
    module = adapters.LowRank(rank=2) if module is None else module
    return adapters.Rule(layers, adapters.Mixture(name, module, router or adapters.Single()))


def gpt2_folder(folder, layers=2):
    shapes = {"wte.weight": (11, WIDTH), "wpe.weight": (9, WIDTH)}
    for i in range(layers):
        for name, (rows, columns) in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
        }.items():
            shapes[f"h.{i}.{name}.weight"] = (rows, columns)
            shapes[f"h.{i}.{name}.bias"] = (columns,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (WIDTH,), f"h.{i}.{name}.bias": (WIDTH,)}
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    config = dict(
        model_type="gpt2", vocab_size=11, n_positions=9, n_embd=WIDTH, n_head=2, n_layer=layers
    )
    return _write(folder, {f"transformer.{n}": s for n, s in shapes.items()}, config)


def bert_folder(folder):
    shapes = {
        "embeddings.word_embeddings.weight": (11, WIDTH),
        "embeddings.position_embeddings.weight": (9, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for name, (rows, columns) in {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (20, WIDTH),
        "output.dense": (WIDTH, 20),
    }.items():
        shapes[f"encoder.layer.0.{name}.weight"] = (rows, columns)
        shapes[f"encoder.layer.0.{name}.bias"] = (rows,)
    for name in (
        "embeddings",
        "encoder.layer.0.attention.output",
        "encoder.layer.0.output",
    ):
        shapes |= {f"{name}.LayerNorm.weight": (WIDTH,), f"{name}.LayerNorm.bias": (WIDTH,)}
    config = dict(
        model_type="bert",
        architectures=["BertModel"],
        vocab_size=11,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=9,
    )
    return _write(folder, {f"bert.{n}": s for n, s in shapes.items()}, config)


def _write(folder, shapes, config):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HEAD = {"head": "pooled", "num_outputs": 3}


@pytest.fixture
def base(hf):
    """A T5 1.1 as transformers writes it, with the files of a tokenizer."""
    config = hf.config(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    folder = hf.write(hf.tensors(gated=True, tied=False), config)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder


def written(folder, stem="adapter_model"):
    return safetensors.numpy.load_file(folder / f"{stem}.safetensors")


def test_flix_is_the_lora_of_the_active_pairs(base, tmp_path):
    module = adapters.LowRank(rank={"task": 3, "language": 2}, alpha={"task": 6, "language": 1})
    _, params = write_run(
        tmp_path / "run", base, [rule(".*/(query|wo)", module, adapters.Features())]
    )
    config = export_peft(tmp_path / "run", tmp_path / "out", SW)
    assert config == json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": 5,
        "lora_alpha": 5,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q", "wo"],
        "base_model_name_or_path": str(base),
        "inference_mode": True,
    }
    places = {
        f"encoder/layers_{i}/attention/query": f"encoder.block.{i}.layer.0.SelfAttention.q"
        for i in range(2)
    }
    for i in range(2):
        places |= {
            f"encoder/layers_{i}/mlp/wo": f"encoder.block.{i}.layer.1.DenseReluDense.wo",
            f"decoder/layers_{i}/self_attention/query": f"decoder.block.{i}.layer.0.SelfAttention.q",
            f"decoder/layers_{i}/encoder_decoder_attention/query": (
                f"decoder.block.{i}.layer.1.EncDecAttention.q"
            ),
            f"decoder/layers_{i}/mlp/wo": f"decoder.block.{i}.layer.2.DenseReluDense.wo",
        }
    tensors, flat = written(tmp_path / "out"), flatten(params)
    assert set(tensors) == {
        f"{PREFIX}{theirs}.lora_{side}.weight" for theirs in places.values() for side in "AB"
    }
    # A feature that is None, as metadata may say, is off as one that is left out.
    export_peft(tmp_path / "run", tmp_path / "none", {**SW, "language": None})
    export_peft(tmp_path / "run", tmp_path / "out_of", {"task": SW["task"]})
    off = written(tmp_path / "none")
    for name, value in written(tmp_path / "out_of").items():
        np.testing.assert_array_equal(off[name], value)
        assert 3 in value.shape
    # parse is the first of two tasks, sw the second of three languages.
    columns = np.array([0, 1, 2, 8, 9])
    scale = np.array([2, 2, 2, 0.5, 0.5], np.float32)[:, None]
    for ours, theirs in places.items():
        a, b = flat[f"{ours}/bank/a"][:, columns], flat[f"{ours}/bank/b"][columns] * scale
        np.testing.assert_array_equal(tensors[f"{PREFIX}{theirs}.lora_A.weight"], a.T)
        np.testing.assert_array_equal(tensors[f"{PREFIX}{theirs}.lora_B.weight"], b.T)


def test_averages_are_one_pair(base, tmp_path):
    module = adapters.LowRank(rank=2, alpha=6)
    router = adapters.Skills(2, heads=2, by="task")
    _, params = write_run(tmp_path / "run", base, [rule("encoder/.*/query", module, router)])
    export_peft(tmp_path / "run", tmp_path / "out", SW)
    flat, at = flatten(params), "encoder/layers_1/attention/query/bank"
    z = 1 / (1 + np.exp(-flat[f"{at}/logits"][0]))
    weights = z / z.sum(-1, keepdims=True)  # [heads, skills]
    a = np.einsum("hdmr,hm->hdr", flat[f"{at}/a"].reshape(2, 3, 2, 2), weights).reshape(6, 2)
    b = np.einsum("mrhk,hm->rhk", flat[f"{at}/b"].reshape(2, 2, 2, 3), weights).reshape(2, 6)
    tensors, name = written(tmp_path / "out"), "encoder.block.1.layer.0.SelfAttention.q"
    np.testing.assert_allclose(tensors[f"{PREFIX}{name}.lora_A.weight"], a.T, rtol=1e-5)
    np.testing.assert_allclose(tensors[f"{PREFIX}{name}.lora_B.weight"], 3 * b.T, rtol=1e-5)


def test_layers_of_one_fused_module_become_blocks_of_it(tmp_path):
    base = gpt2_folder(tmp_path / "gpt2")
    rules = [
        rule(".*/(query|value)", adapters.LowRank(rank=2)),
        rule(".*/(out|wo)", adapters.LowRank(rank=3)),
    ]
    _, params = write_run(tmp_path / "run", base, rules, scan_layers=True)
    config = export_peft(tmp_path / "run", tmp_path / "out")
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert (config["r"], config["rank_pattern"]) == (3, {"c_attn": 4})
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"
    at = params["decoder"]["layers"]["self_attention"]
    tensors = written(tmp_path / "out")
    for i in range(2):
        query, value = (at[name]["bank"] for name in ("query", "value"))
        a = tensors[f"{PREFIX}transformer.h.{i}.attn.c_attn.lora_A.weight"]
        b = tensors[f"{PREFIX}transformer.h.{i}.attn.c_attn.lora_B.weight"]
        zeros = np.zeros((WIDTH, WIDTH), np.float32)
        update = np.hstack([query["a"][i] @ query["b"][i], zeros, value["a"][i] @ value["b"][i]])
        np.testing.assert_allclose((b @ a).T, update, atol=1e-6)
        assert a.shape == (4, WIDTH) and b.shape == (3 * WIDTH, 4)
        name = f"{PREFIX}transformer.h.{i}.mlp.c_proj.lora_A.weight"
        np.testing.assert_array_equal(
            tensors[name], params["decoder"]["layers"]["mlp"]["wo"]["bank"]["a"][i].T
        )


IA3 = [
    rule(".*/(key|value)", adapters.Scale(), name="ia3"),
    rule(".*/mlp/wo", adapters.Scale("input"), name="ia3"),
]


def test_scales_are_ia3(base, tmp_path):
    _, params = write_run(tmp_path / "run", base, IA3)
    config = export_peft(tmp_path / "run", tmp_path / "out")
    assert config["peft_type"] == "IA3"
    assert config["target_modules"] == ["k", "v", "wo"]
    assert config["feedforward_modules"] == ["wo"]
    tensors = written(tmp_path / "out")
    assert len(tensors) == 2 * 2 + 2 * 4 + 4
    layer = params["decoder"]["layers_0"]
    scale = layer["encoder_decoder_attention"]["key"]["ia3"]["scale"]
    found = tensors[f"{PREFIX}decoder.block.0.layer.1.EncDecAttention.k.ia3_l"]
    np.testing.assert_allclose(found, scale.T, atol=1e-6)
    found = tensors[f"{PREFIX}decoder.block.0.layer.2.DenseReluDense.wo.ia3_l"]
    np.testing.assert_allclose(found, layer["mlp"]["wo"]["ia3"]["scale"], atol=1e-6)


def test_a_fused_module_is_scaled_where_a_layer_of_it_is(tmp_path):
    base = gpt2_folder(tmp_path / "gpt2", layers=1)
    _, params = write_run(tmp_path / "run", base, IA3)
    config = export_peft(tmp_path / "run", tmp_path / "out")
    assert config["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert config["feedforward_modules"] == ["mlp.c_proj"]
    at = params["decoder"]["layers_0"]["self_attention"]
    key, value = (at[name]["ia3"]["scale"][0] for name in ("key", "value"))
    found = written(tmp_path / "out")[f"{PREFIX}transformer.h.0.attn.c_attn.ia3_l"]
    np.testing.assert_allclose(found[:, 0], [*np.ones(WIDTH), *key, *value], atol=1e-6)


def test_names_are_whole_where_short_ones_would_pick_more(base, tmp_path):
    write_run(tmp_path / "run", base, [rule("encoder/layers_1/attention/query")])
    config = export_peft(tmp_path / "run", tmp_path / "out")
    assert config["target_modules"] == ["encoder.block.1.layer.0.SelfAttention.q"]
    bert = bert_folder(tmp_path / "bert")
    write_run(tmp_path / "other", bert, IA3, **HEAD)
    config = export_peft(tmp_path / "other", tmp_path / "ia3")
    # "output.dense" would also be attention.output.dense
    assert config["target_modules"] == ["bert.encoder.layer.0.output.dense", "key", "value"]
    assert config["feedforward_modules"] == ["bert.encoder.layer.0.output.dense"]


def test_a_head_goes_along_whole_with_what_adapts_it(tmp_path):
    bert = bert_folder(tmp_path / "bert")
    _, params = write_run(tmp_path / "run", bert, [rule(".*/(query|out|logits_dense)")], **HEAD)
    config = export_peft(tmp_path / "run", tmp_path / "out")
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    assert config["target_modules"] == ["attention.output.dense", "query"]
    tensors, head = written(tmp_path / "out"), params["classifier"]["logits_dense"]
    merged = head["kernel"] + head["bank"]["a"] @ head["bank"]["b"]
    np.testing.assert_allclose(tensors[f"{PREFIX}classifier.weight"], merged.T, atol=1e-5)
    np.testing.assert_array_equal(tensors[f"{PREFIX}classifier.bias"], head["bias"])
    assert not any("classifier" in name and "lora" in name for name in tensors)


def test_the_merged_model_has_the_names_it_was_imported_from(base, tmp_path):
    import_hf(str(base), tmp_path / "base")
    _, params = write_run(
        tmp_path / "run", tmp_path / "base", [rule(".*/query")], scan_layers=False
    )
    config = export_hf(tmp_path / "run", tmp_path / "out")
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    assert config["feed_forward_proj"] == "gated-gelu"
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (False, False)
    before, after = written(base, "model"), written(tmp_path / "out", "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(".q.weight"):
            assert np.abs(after[name] - tensor).max() > 0.1
        else:
            np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    query = params["encoder"]["layers_1"]["attention"]["query"]
    update = query["bank"]["a"] @ query["bank"]["b"]
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    np.testing.assert_allclose(after[name], before[name] + update.T, atol=1e-6)
    # The tokenizer comes along, and what only our bases have does not.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("network", ["gpt2", "bert"])
def test_other_networks_go_back_to_the_same_tensors(tmp_path, network):
    base = {"gpt2": gpt2_folder, "bert": bert_folder}[network](tmp_path / network)
    scale = adapters.Scale()
    changes = {"gpt2": {"scan_layers": True}, "bert": HEAD}[network]
    _, params = write_run(tmp_path / "run", base, [rule(".*/value", scale)], **changes)
    config = export_hf(tmp_path / "run", tmp_path / "out", dtype="float32")
    before, after = written(base, "model"), written(tmp_path / "out", "model")
    if network == "bert":
        np.testing.assert_array_equal(
            after.pop("classifier.weight"), params["classifier"]["logits_dense"]["kernel"].T
        )
        np.testing.assert_array_equal(
            after.pop("classifier.bias"), params["classifier"]["logits_dense"]["bias"]
        )
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert list(config["id2label"]) == ["0", "1", "2"]
        scale = params["encoder"]["layers_0"]["attention"]["value"]["bank"]["scale"][0]
        name, axis = "bert.encoder.layer.0.attention.self.value", 0
        factor = scale
    else:
        scale = params["decoder"]["layers"]["self_attention"]["value"]["bank"]["scale"][1, 0]
        name, axis = "transformer.h.1.attn.c_attn", 1
        factor = np.concatenate([np.ones(2 * WIDTH), scale])
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert {f"{name}.weight", f"{name}.bias"} <= changed and len(changed) == 2 * len(
        [key for key in before if key.endswith(f"{name.split('.')[-1]}.weight")]
    )
    weight = before[f"{name}.weight"] * (factor[None] if axis else factor[:, None])
    np.testing.assert_allclose(after[f"{name}.weight"], weight, atol=1e-5)
    np.testing.assert_allclose(after[f"{name}.bias"], before[f"{name}.bias"] * factor, atol=1e-5)


def test_a_bfloat16_base_takes_its_update_in_float32(base, tmp_path):
    import_hf(str(base), tmp_path / "half", dtype="bfloat16")
    write_run(tmp_path / "run", tmp_path / "half", [rule(".*/query")])
    assert export_hf(tmp_path / "run", tmp_path / "own")["dtype"] == "bfloat16"
    wide = export_hf(tmp_path / "run", tmp_path / "wide", dtype="float32")
    assert wide["dtype"] == "float32" and "torch_dtype" not in wide
    own, wide = (hub.load_base(tmp_path / name)[1] for name in ("own", "wide"))
    for name, value in flatten(wide).items():
        np.testing.assert_array_equal(value.astype(flatten(own)[name].dtype), flatten(own)[name])


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_t5_of_our_own_gets_a_configuration(tmp_path, per_layer):
    network = t5.T5Config(
        vocab_size=11,
        emb_dim=6,
        num_heads=2,
        head_dim=4,
        mlp_dim=10,
        num_encoder_layers=2,
        num_decoder_layers=1,
        mlp_activations=("silu", "linear"),
        logits_via_embedding=not per_layer,
        relpos_per_layer=per_layer,
        relpos_buckets=8,
        relpos_max_distance=20,
    )
    rng = np.random.default_rng(0)
    shapes = KINDS["t5"].shapes(network).items()
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}
    hub.save_base(tmp_path / "base", network, unflatten(flat))
    _, params = write_run(tmp_path / "run", tmp_path / "base")  # all of it trains
    export_hf(tmp_path / "run", tmp_path / "out")
    fields, again = hub.load_base(tmp_path / "out")
    assert t5.T5Config(**fields) == network
    for name, value in flatten(params).items():
        np.testing.assert_allclose(flatten(again)[name], value, rtol=1e-6, err_msg=name)


# What is refused.


def refuse(run, tmp_path, match, features=None, export=export_peft, error=hub.HubError, **options):
    with pytest.raises(error, match=match):
        export(run, tmp_path / "refused", features or {}, **options)
    assert not (tmp_path / "refused").exists()


def test_what_peft_cannot_express_is_refused_with_the_reason(base, tmp_path):
    write_run(tmp_path / "bottleneck", base, [rule(".*/wo", adapters.Bottleneck(4))])
    refuse(tmp_path / "bottleneck", tmp_path, "composes to Bottleneck, for which PEFT has no")
    refuse(tmp_path / "bottleneck", tmp_path, "does not merge", export=export_hf, error=ValueError)
    both = [rule(".*/query"), rule(".*/wo", adapters.Scale())]
    write_run(tmp_path / "both", base, both)
    refuse(tmp_path / "both", tmp_path, "low-rank pairs and scales.*of one kind.*export_hf")
    write_run(tmp_path / "output", base, [rule("decoder/logits_dense")])
    refuse(tmp_path / "output", tmp_path, "output layer is adapted")
    sides = [rule(".*/wo", adapters.Scale(), name="o"), rule(".*/wo", adapters.Scale("input"))]
    write_run(tmp_path / "sides", base, sides)
    refuse(tmp_path / "sides", tmp_path, "one scale for a module")
    fused = gpt2_folder(tmp_path / "gpt2", layers=1)
    write_run(tmp_path / "fused", fused, [rule(".*/query", adapters.Scale("input"))])
    refuse(tmp_path / "fused", tmp_path, "share their input")


def test_a_run_that_trained_the_network_has_no_adapter(base, tmp_path):
    write_run(tmp_path / "full", base)
    refuse(tmp_path / "full", tmp_path, "no adapters: it trained the network itself.*export_hf")
    refuse(tmp_path / "full", tmp_path, "leave the features out", SW, export=export_hf)
    groups = (Group(".*/bank/.*"), Group(".*/scale"), Group(".*", train=False))
    write_run(tmp_path / "mixed", base, [rule(".*/query")], groups=groups)
    refuse(tmp_path / "mixed", tmp_path, "beside its adapters, decoder/decoder_norm/scale")


def test_a_base_that_is_no_model_of_hugging_face_is_refused(tmp_path):
    fields, params = hub.load_base(gpt2_folder(tmp_path / "gpt2", layers=1))
    hub.save_base(tmp_path / "own", decoder.DecoderConfig(**fields), params)
    write_run(tmp_path / "run", tmp_path / "own", [rule(".*/query")])
    for export in (export_peft, export_hf):
        refuse(tmp_path / "run", tmp_path, "never came from Hugging Face", export=export)


def test_a_head_that_their_class_does_not_have_is_refused(tmp_path):
    base = bert_folder(tmp_path / "bert")
    write_run(tmp_path / "run", base, [rule(".*/query")], head="dense", num_outputs=2)
    for export in (export_peft, export_hf):
        refuse(tmp_path / "run", tmp_path, "has 'pooled'", export=export)


def test_a_prefix_language_model_is_refused(tmp_path):
    base = gpt2_folder(tmp_path / "gpt2", layers=1)
    gin = f"BASE = {str(base)!r}\n\nmodels.DecoderOnlyModel.prefix = True\n"
    write_run(tmp_path / "run", base, [rule(".*/query")], gin=gin)
    refuse(tmp_path / "run", tmp_path, "prefix language model")


def test_features_that_the_run_does_not_know_are_refused(base, tmp_path):
    write_run(tmp_path / "lora", base, [rule(".*/query")])
    for export in (export_peft, export_hf):
        options = {"export": export, "error": ValueError}
        refuse(
            tmp_path / "lora", tmp_path, "swa.*Did you mean 'sw'", {"language": "swa"}, **options
        )
        refuse(tmp_path / "lora", tmp_path, "Known: task, language", {"tusk": "parse"}, **options)
    write_run(tmp_path / "skills", base, [rule(".*/query", router=adapters.Skills(2))])
    refuse(
        tmp_path / "skills", tmp_path, "routed by dataset: say dataset=NAME, one of parse_en", SW
    )
    export_peft(tmp_path / "skills", tmp_path / "one", {**SW, "dataset": "parse_yo"})
    export_peft(tmp_path / "skills", tmp_path / "mean")
    one, mean = written(tmp_path / "one"), written(tmp_path / "mean")
    assert one.keys() == mean.keys() and any((one[key] != mean[key]).any() for key in one)


# Where things are.


def test_the_base_is_found_where_the_run_says(base, tmp_path):
    rules = [rule(".*/query")]
    gin = (
        f"BASE = %INITIAL_CHECKPOINT_PATH\nINITIAL_CHECKPOINT_PATH = \\\n    {str(base)!r}\nX = 1\n"
    )
    write_run(tmp_path / "run", base, rules, gin=gin)
    assert runs.open_run(tmp_path / "run").folder == base
    write_run(tmp_path / "moved", base, rules, gin="BASE = '/not/here'\n")
    refuse(tmp_path / "moved", tmp_path, "/not/here, which is not here: .*--base")
    assert runs.open_run(tmp_path / "moved", base).folder == base
    write_run(tmp_path / "silent", base, rules, gin="")
    refuse(tmp_path / "silent", tmp_path, "does not say on which base")
    write_run(tmp_path / "random", base, rules, gin="BASE = 'random'\n")
    refuse(tmp_path / "random", tmp_path, "from random weights.*EXPORT_DIR")


def test_another_base_is_refused(base, hf, tmp_path):
    write_run(tmp_path / "run", base, [rule(".*/query")])
    config = json.loads((base / "config.json").read_text())
    other = hf.write(hf.tensors(gated=True, tied=False, seed=1), config, "other")
    refuse(tmp_path / "run", tmp_path, "made with another base", error=ValueError, base=other)


@pytest.mark.parametrize("export", [export_peft, export_hf])
def test_what_is_there_is_written_over_only_when_asked(base, tmp_path, export):
    write_run(tmp_path / "run", base, [rule(".*/query")])
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_text() for path in out.iterdir()}
    with pytest.raises(hub.HubError, match="not empty; --force"):
        export(tmp_path / "run", out)
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    export(tmp_path / "run", out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    # Another model's tokenizer would be read with this model.
    assert (out / "tokenizer.json").exists() == (export is export_peft)


def test_on_the_command_line(base, tmp_path, capsys):
    write_run(tmp_path / "run", base, [rule(".*/query", router=adapters.Features())])
    run, features = str(tmp_path / "run"), "task=parse,language=sw"
    command = ["export_peft", run, "--features", features, str(tmp_path / "peft")]
    assert main(command) == 0
    assert "LORA for q" in capsys.readouterr().out
    assert main(command) == 2  # it is there now
    mixed = '{"task": "parse", "language": {"sw": 0.5, "yo": 0.5}}'
    assert main(["export_peft", run, "--features", mixed, str(tmp_path / "mixed")]) == 0
    ranks = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
        for name in ("peft", "mixed")
    ]
    assert ranks[1] * 2 == ranks[0] * 3  # three modules for two
    capsys.readouterr()
    command = [
        "export_hf",
        run,
        "--features",
        features,
        str(tmp_path / "merged"),
        "--dtype",
        "bfloat16",
    ]
    assert main(command) == 0
    assert "T5ForConditionalGeneration in bfloat16" in capsys.readouterr().out
    for wrong, message in {
        "task=parse,langauge=sw": "Unknown feature 'langauge'. Did you mean 'language'? Known: task, ",
        "task=parse,language=xx": "unknown value 'xx' of feature 'language'. Known: en, sw, yo.",
        "parse": "'parse' is not of the form NAME=VALUE",
        '{"task": parse}': "not a JSON object",
        '{"task": 1}': "'task' is 1, and not a name",
        '{"language": {"sw": "half"}}': "weight of 'sw' in feature 'language' must be a number",
        "": "nothing to compose",
    }.items():
        destination = str(tmp_path / "none")
        assert main(["export_peft", run, "--features", wrong, destination]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert main(["export_hf", str(tmp_path / "nowhere"), str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
