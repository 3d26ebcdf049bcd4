"""Hugging Face's GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 (text) in our names, without torch.

How theirs and ours differ: a linear weight is `[out, in]` there and a kernel `[in, out]` here, but GPT-2's are
`[in, out]` there too, with query, key and value side by side in one tensor; everything else is a change of name. Their
names come with a prefix ("model.", "transformer.") unless the model was saved without its output layer.

Our token 0 is padding. Where their token 0 is a word (pad_token_id is not 0), a batch holds their ids plus one.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from modjax.hub import hf_decoder_config, hf_files
from modjax.hub.errors import HubError
from modjax.hub.safetensors_io import TensorFiles
from modjax.hub.sources import Source, Target, targets

# The last one is refused, with the way to its text model.
MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Buffers that every load computes anew.
_IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_HEAD = "lm_head.weight"
_LLAMA_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_LLAMA_MLP = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
_LLAMA_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "pre_mlp_layer_norm": "post_attention_layernorm",
}
_GEMMA_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}


def read_config(
    config: Mapping[str, Any], files: TensorFiles
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Fields of `DecoderConfig` for a Hugging Face config.json, and where each parameter comes from.

    Args:
      config: config.json, with a `model_type` of MODEL_TYPES.
      files: the tensors (they decide whether the output layer is tied, and the rows of embeddings).

    Returns:
      `(network, sources)`. `network` holds plain values (numbers, strings, tuples, dictionaries), and not what a run
      chooses (dropout, precision, scanning, rematerialisation). `sources` has a key for every parameter of the unrolled
      network, joined with "/".

    Raises:
      HubError: a field is missing, the model computes something that our network does not, or the files hold tensors
        that have no place in it; they are named.
    """
    kind = config["model_type"]
    if kind == "gemma3":
        raise HubError(
            f"{files.directory} is a Gemma 3 for images and text; its text model is computed here. Save that one with "
            "transformers: model = AutoModelForImageTextToText.from_pretrained(SRC); text = "
            "Gemma3ForCausalLM(model.config.text_config); text.model.load_state_dict("
            "model.model.language_model.state_dict()); text.save_pretrained(DST)"
        )
    settings = hf_decoder_config.complete(config)
    names = hf_files.by_name(files, _bare)
    embedding = _embedding(kind, names, files)
    tied = _tied(settings, embedding, files)
    network = {
        "vocab_size": hf_files.vocab_rows(config, embedding, files),
        **hf_decoder_config.fields(settings, str(files.directory)),
        "logits_via_embedding": tied,
    }
    found = {}
    for ours, source in sources(kind, network).items():
        name = _bare(source.tensor)
        found[ours] = dataclasses.replace(source, tensor=names.get(name, name))
    _check_tensors(found, names, tied, files)
    return network, found


def export(
    config: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Target]]:
    """config.json and the tensors of a network of ours, as transformers and `read_config` read them.

    Args:
      config: the config.json that the network was imported from.
      network: the fields of its `DecoderConfig`.
    """
    kind = str(config["model_type"])
    changes = {
        "architectures": [_CLASSES[kind]],
        "vocab_size": network["vocab_size"],
        "tie_word_embeddings": network["logits_via_embedding"],
    }
    return {**config, **changes}, targets(sources(kind, network))


def sources(model_type: str, network: Mapping[str, Any]) -> dict[str, Source]:
    """Where each parameter of the unrolled network lies in a file of today's transformers, by our names.

    Args:
      model_type: one of MODEL_TYPES.
      network: the fields of a `DecoderConfig`.
    """
    bare = _gpt2_tensors(network) if model_type == "gpt2" else _llama_tensors(network)
    prefix = "transformer." if model_type == "gpt2" else "model."
    return {
        ours: dataclasses.replace(
            source, tensor=source.tensor if source.tensor == _HEAD else prefix + source.tensor
        )
        for ours, source in bare.items()
    }


def _bare(tensor: str) -> str:
    """A tensor's name without prefix."""
    return re.sub(r"^(model|transformer)\.", "", tensor)


def _embedding(kind: str, names: Mapping[str, str], files: TensorFiles) -> str:
    """The tensor that is the token embedding."""
    name = "wte.weight" if kind == "gpt2" else "embed_tokens.weight"
    if name not in names:
        raise HubError(f"{files.directory} has no token embedding, {name}.")
    return names[name]


def _tied(settings: Mapping[str, Any], embedding: str, files: TensorFiles) -> bool:
    """Whether the output layer is the embedding: the files decide, where they hold one."""
    if _HEAD in files.shapes:
        return files.same(_HEAD, embedding)
    if not settings.get("tie_word_embeddings", False):
        raise HubError(
            f"{files.directory}: its output layer is not tied to the embedding (tie_word_embeddings), but the files "
            f"hold no {_HEAD}."
        )
    return True


def _gpt2_tensors(network: Mapping[str, Any]) -> dict[str, Source]:
    """Each of our parameters in GPT-2's names, without prefix."""
    names = {
        "token_embedder/embedding": Source("wte.weight"),
        "decoder/position_embedder/embedding": Source("wpe.weight"),
    }

    def norm(ours: str, theirs: str) -> None:
        names[f"{ours}/scale"] = Source(f"{theirs}.weight")
        names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    def dense(ours: str, theirs: str, part: tuple[int, int] | None = None) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", part=part)
        names[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    width = network["emb_dim"]
    for i in range(network["num_layers"]):
        layer, block = f"decoder/layers_{i}", f"h.{i}"
        norm(f"{layer}/pre_self_attention_layer_norm", f"{block}.ln_1")
        norm(f"{layer}/pre_mlp_layer_norm", f"{block}.ln_2")
        for j, ours in enumerate(("query", "key", "value")):
            part = (j * width, (j + 1) * width)
            dense(f"{layer}/self_attention/{ours}", f"{block}.attn.c_attn", part)
        dense(f"{layer}/self_attention/out", f"{block}.attn.c_proj")
        dense(f"{layer}/mlp/wi", f"{block}.mlp.c_fc")
        dense(f"{layer}/mlp/wo", f"{block}.mlp.c_proj")
    norm("decoder/decoder_norm", "ln_f")
    if not network["logits_via_embedding"]:
        names["decoder/logits_dense/kernel"] = Source(_HEAD, transpose=True)
    return names


def _llama_tensors(network: Mapping[str, Any]) -> dict[str, Source]:
    """Each of our parameters in the names of Llama and those after it, without prefix."""
    names = {
        "token_embedder/embedding": Source("embed_tokens.weight"),
        "decoder/decoder_norm/scale": Source("norm.weight"),
    }

    def dense(ours: str, theirs: str, bias: bool) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transpose=True)
        if bias:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    for i in range(network["num_layers"]):
        layer, block = f"decoder/layers_{i}", f"layers.{i}"
        for ours, theirs in (_GEMMA_NORMS if network["post_norms"] else _LLAMA_NORMS).items():
            names[f"{layer}/{ours}/scale"] = Source(f"{block}.{theirs}.weight")
        for ours, theirs in _LLAMA_ATTENTION.items():
            bias = network["out_bias" if ours == "out" else "qkv_bias"]
            dense(f"{layer}/self_attention/{ours}", f"{block}.self_attn.{theirs}", bias)
        if network["qk_norm"]:
            for ours in ("query", "key"):
                theirs = f"{block}.self_attn.{ours[0]}_norm.weight"
                names[f"{layer}/self_attention/{ours}_norm/scale"] = Source(theirs)
        for ours, theirs in _LLAMA_MLP.items():
            dense(f"{layer}/mlp/{ours}", f"{block}.mlp.{theirs}", network["mlp_bias"])
    if not network["logits_via_embedding"]:
        names["decoder/logits_dense/kernel"] = Source(_HEAD, transpose=True)
    return names


def _check_tensors(
    found: Mapping[str, Source], names: Mapping[str, str], tied: bool, files: TensorFiles
) -> None:
    used = {source.tensor for source in found.values()} | ({_HEAD} if tied else set())
    left = [
        tensor
        for name, tensor in names.items()
        if tensor not in used and not re.fullmatch(_IGNORED, name)
    ]
    hf_files.refuse_left(left, files, "of another task, is not a base")
    ends: dict[str, int] = {}
    for source in found.values():
        if source.part is not None:
            ends[source.tensor] = max(ends.get(source.tensor, 0), source.part[1])
    for tensor, end in ends.items():
        if tensor in files.shapes and files.shapes[tensor][-1] != end:
            raise HubError(
                f"{files.directory}: {tensor} is {list(files.shapes[tensor])}; query, key and value "
                f"side by side would be {end} wide."
            )
