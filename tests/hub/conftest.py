"""A tiny T5 folder in Hugging Face's names, written out by hand: the names are the point."""

import json
import types

import numpy as np
import pytest
import safetensors.numpy

WIDTH, HEADS, HEAD_DIM, MLP, VOCAB, BUCKETS = 6, 3, 2, 10, 11, 8


def hf_tensors(*, gated=False, tied=True, bias_in_every_layer=False, layers=2, seed=0):
    """Random weights by Hugging Face's names, `[out, in]`."""
    rng = np.random.default_rng(seed)
    inner = HEADS * HEAD_DIM
    shapes = {"shared.weight": (VOCAB, WIDTH)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for stack in ("encoder", "decoder"):
        shapes[f"{stack}.final_layer_norm.weight"] = (WIDTH,)
        for i in range(layers):
            block = f"{stack}.block.{i}.layer"
            attentions = ["0.SelfAttention"] + ["1.EncDecAttention"] * (stack == "decoder")
            for at in attentions:
                for letter in "qkv":
                    shapes[f"{block}.{at}.{letter}.weight"] = (inner, WIDTH)
                shapes[f"{block}.{at}.o.weight"] = (WIDTH, inner)
                shapes[f"{block}.{at.split('.')[0]}.layer_norm.weight"] = (WIDTH,)
            if i == 0 or bias_in_every_layer:
                name = f"{block}.0.SelfAttention.relative_attention_bias.weight"
                shapes[name] = (BUCKETS, HEADS)
            mlp = 2 if stack == "decoder" else 1
            for wi in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{block}.{mlp}.DenseReluDense.{wi}.weight"] = (MLP, WIDTH)
            shapes[f"{block}.{mlp}.DenseReluDense.wo.weight"] = (WIDTH, MLP)
            shapes[f"{block}.{mlp}.layer_norm.weight"] = (WIDTH,)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def hf_config(**changes):
    """config.json of the tensors above as transformers 4 wrote it for a T5 1.0."""
    config = {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": HEAD_DIM,
        "d_ff": MLP,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": HEADS,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-06,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
        "transformers_version": "4.40.0",
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


@pytest.fixture
def hf(tmp_path):
    """`hf.tensors(...)`, `hf.config(...)`, and `hf.write(tensors, config)` -> folder."""

    def write(tensors, config, name="hf"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder

    return types.SimpleNamespace(tensors=hf_tensors, config=hf_config, write=write)
