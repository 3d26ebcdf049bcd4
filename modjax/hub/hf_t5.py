"""Hugging Face's T5, T5 1.1, mT5, ByT5, Flan-T5 and umT5 in our names, without torch.

How theirs and ours differ: a linear weight is `[out, in]` there and a kernel `[in, out]` here,
position biases are `[buckets, heads]` there and `[heads, buckets]` here; everything else is a
change of name.

The output layer is where the variants, and transformers' own versions, disagree. Whether it is tied
is read from the files: an `lm_head.weight` that differs from the embedding is an output layer of
its own. Whether logits are scaled by 1/sqrt(D) follows the transformers version that wrote
config.json:

    model_type   written by 4.x (or unsaid)       written by 5.x
    t5           scaled if tie_word_embeddings    scale_decoder_outputs
    mt5          scaled if tie_word_embeddings    not scaled
    umt5         scaled if tie_word_embeddings    scaled, even with an output layer of its own

(found by comparing logits with 4.57.1 and 5.23.0).

Our network knows "tied and scaled" and "separate and not scaled". The two other combinations become
a separate output layer: a copy of the embedding, or a kernel that is multiplied by 1/sqrt(D) once.
On the way back a model is written as transformers 5 reads it: an mT5 that is tied and scaled gets
such a kernel, and that of a umT5 is multiplied by sqrt(D).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from modjax.errors import nearest
from modjax.hub import hf_files
from modjax.hub.errors import HubError
from modjax.hub.safetensors_io import TensorFiles
from modjax.hub.sources import Source, Target, targets

MODEL_TYPES = ("t5", "mt5", "umt5")

_CLASSES = {name: f"{name.upper()}ForConditionalGeneration" for name in MODEL_TYPES}
_WRITTEN_FOR = "5.23.0"  # of transformers; see the table above

_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu"}
_EMBEDDING = "shared.weight"
# Older versions of transformers stored the shared embedding under these names too, or under one of
# them only.
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
# Published T5 1.0 files still carry this one; no version of the model has ever read it.
_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def read_config(
    config: Mapping[str, Any], files: TensorFiles
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Fields of `T5Config` for a Hugging Face config.json, and where each parameter comes from.

    Args:
      config: config.json, with a `model_type` of MODEL_TYPES.
      files: the tensors (their names and shapes decide what config.json leaves open).

    Returns:
      `(network, sources)`. `network` says sizes, activations, output layer and position biases, not
      what a run chooses (dropout, precision, scanning, rematerialisation). Its `vocab_size` is the
      number of rows of the embedding, which public checkpoints pad beyond their tokenizer's (32128
      for 32100, 250112 for 250100, ByT5's 384 for 259). `sources` has a key for every parameter of
      the unrolled network, joined with "/".

    Raises:
      HubError: a field is missing, the model computes something that our network does not, or the
        files hold tensors that have no place in it; they are named.
    """
    _refuse_other_arithmetic(config)
    try:
        sizes = {
            "emb_dim": int(config["d_model"]),
            "num_heads": int(config["num_heads"]),
            "head_dim": int(config["d_kv"]),
            "mlp_dim": int(config["d_ff"]),
            "num_encoder_layers": int(config["num_layers"]),
            "num_decoder_layers": int(config.get("num_decoder_layers") or config["num_layers"]),
        }
    except KeyError as error:
        raise HubError(f"{files.directory}/config.json has no field {error}.") from error
    tied, scaled = _output_layer(config, files)
    network = {
        "vocab_size": hf_files.vocab_rows(config, _embedding(files), files),
        **sizes,
        "mlp_activations": _activations(config),
        "logits_via_embedding": tied and scaled,
        "relpos_per_layer": config["model_type"] == "umt5",
        "relpos_buckets": int(config.get("relative_attention_num_buckets") or 32),
        "relpos_max_distance": int(config.get("relative_attention_max_distance") or 128),
    }
    found = sources(str(config["model_type"]), network)
    found["token_embedder/embedding"] = Source(_embedding(files))
    if not network["logits_via_embedding"]:
        found["decoder/logits_dense/kernel"] = Source(
            _embedding(files) if tied else _HEAD,
            transpose=True,
            factor=network["emb_dim"] ** -0.5 if scaled else 1.0,
        )
    _check_leftovers(found, tied, files)
    return network, found


def export(
    config: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Target]]:
    """config.json and the tensors of a network of ours, as transformers 5 and `read_config` read them.

    Args:
      config: the config.json that the network was imported from.
      network: the fields of its `T5Config`.
    """
    kind, tied = str(config["model_type"]), bool(network["logits_via_embedding"])
    tensors = targets(sources(kind, network))
    scale = float(network["emb_dim"]) ** 0.5
    if kind == "mt5" and tied:
        tied = False
        tensors[_HEAD] = Target(("token_embedder/embedding",), factor=1.0 / scale)
    elif kind == "umt5" and not tied:
        tensors[_HEAD] = dataclasses.replace(tensors[_HEAD], factor=scale)
    changes: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "vocab_size": network["vocab_size"],
        "tie_word_embeddings": tied,
        "transformers_version": _WRITTEN_FOR,
    }
    if kind == "t5":
        changes["scale_decoder_outputs"] = tied
    return {**config, **changes}, tensors


def config_of(network: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a network that did not come from Hugging Face, to be given to `export`.

    Args:
      network: the fields of its `T5Config`.

    Raises:
      HubError: transformers has no name for its activations.
    """
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    first, *rest = network["mlp_activations"]
    if first not in names or rest not in ([], ["linear"]):
        raise HubError(
            f"transformers' T5 does not compute mlp_activations {network['mlp_activations']}."
        )
    projection = f"gated-{names[first]}" if rest else names[first]
    return {
        "model_type": "umt5" if network["relpos_per_layer"] else "t5",
        "is_encoder_decoder": True,
        "d_model": network["emb_dim"],
        "num_heads": network["num_heads"],
        "d_kv": network["head_dim"],
        "d_ff": network["mlp_dim"],
        "num_layers": network["num_encoder_layers"],
        "num_decoder_layers": network["num_decoder_layers"],
        "feed_forward_proj": "gated-gelu" if projection == "gated-gelu_new" else projection,
        "relative_attention_num_buckets": network["relpos_buckets"],
        "relative_attention_max_distance": network["relpos_max_distance"],
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    }


def sources(model_type: str, network: Mapping[str, Any]) -> dict[str, Source]:
    """Where each parameter of the unrolled network lies in a file of today's transformers, by our names.

    Args:
      model_type: one of MODEL_TYPES, which all have the same names.
      network: the fields of a `T5Config`.
    """
    del model_type
    names = {"token_embedder/embedding": Source(_EMBEDDING)}
    if not network["logits_via_embedding"]:
        names["decoder/logits_dense/kernel"] = Source(_HEAD, transpose=True)
    for stack in ("encoder", "decoder"):
        names[f"{stack}/{stack}_norm/scale"] = Source(f"{stack}.final_layer_norm.weight")
        for i in range(network[f"num_{stack}_layers"]):
            layer, block = f"{stack}/layers_{i}", f"{stack}.block.{i}"
            names |= _block(layer, block, stack == "decoder", network)
            if network["relpos_per_layer"] or i == 0:
                at = layer if network["relpos_per_layer"] else stack
                names[f"{at}/relpos_bias/rel_embedding"] = Source(
                    f"{block}.layer.0.SelfAttention.relative_attention_bias.weight", transpose=True
                )
    return names


def _block(layer: str, block: str, decoder: bool, network: Mapping[str, Any]) -> dict[str, Source]:
    attentions = {"self_attention" if decoder else "attention": ("layer.0", "SelfAttention")}
    norms = {"pre_self_attention" if decoder else "pre_attention": "layer.0"}
    if decoder:
        attentions["encoder_decoder_attention"] = ("layer.1", "EncDecAttention")
        norms["pre_cross_attention"] = "layer.1"
    mlp = "layer.2" if decoder else "layer.1"
    norms["pre_mlp"] = mlp
    names = {}
    for ours, theirs in norms.items():
        names[f"{layer}/{ours}_layer_norm/scale"] = Source(f"{block}.{theirs}.layer_norm.weight")
    for ours, (at, kind) in attentions.items():
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            names[f"{layer}/{ours}/{name}/kernel"] = Source(
                f"{block}.{at}.{kind}.{letter}.weight", transpose=True
            )
    gated = len(network["mlp_activations"]) > 1
    for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
        names[f"{layer}/mlp/{name}/kernel"] = Source(
            f"{block}.{mlp}.DenseReluDense.{name}.weight", transpose=True
        )
    return names


def _refuse_other_arithmetic(config: Mapping[str, Any]) -> None:
    """Settings under which the same weights mean another function than our network computes."""
    epsilon = config.get("layer_norm_epsilon")
    if epsilon is not None and not np.isclose(epsilon, 1e-6, rtol=1e-3):
        raise HubError(f"layer_norm_epsilon is {epsilon}; our T5 norms use 1e-6.")
    if config.get("pad_token_id"):
        raise HubError(
            f"pad_token_id is {config['pad_token_id']}; our batches and masks take token 0 for "
            "padding."
        )
    if config.get("decoder_start_token_id"):
        warnings.warn(
            f"decoder_start_token_id is {config['decoder_start_token_id']}; decoding here starts "
            "with token 0.",
            stacklevel=5,
        )


def _activations(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`feed_forward_proj` in our names; 'gated-gelu' has always been the tanh approximation."""
    text = str(config.get("feed_forward_proj") or _default_projection(config))
    gate, _, name = text.rpartition("-")
    if text == "gated-gelu":
        name = "gelu_new"
    if gate not in ("", "gated") or name not in _ACTIVATIONS:
        known = [p for n in ("relu", "silu") for p in (n, f"gated-{n}")]
        raise HubError(
            f"feed_forward_proj {text!r} is not computed here."
            + nearest(text, ["gated-gelu", *known])
        )
    return (_ACTIVATIONS[name], "linear") if gate else (_ACTIVATIONS[name],)


def _default_projection(config: Mapping[str, Any]) -> str:
    return "relu" if config["model_type"] == "t5" else "gated-gelu"


def _embedding(files: TensorFiles) -> str:
    """The name under which the files hold the token embedding."""
    for name in (_EMBEDDING, *_EMBEDDING_COPIES, _HEAD):
        if name in files.shapes:
            return name
    raise HubError(f"{files.directory}: no token embedding; expected {_EMBEDDING}.")


def _output_layer(config: Mapping[str, Any], files: TensorFiles) -> tuple[bool, bool]:
    """(tied, scaled); see the table at the top of this file."""
    model_type = config["model_type"]
    # What transformers 4 assumed where the file does not say.
    says_tied = config.get("tie_word_embeddings")
    says_tied = model_type != "mt5" if says_tied is None else bool(says_tied)
    embedding = _embedding(files)
    version = str(config.get("transformers_version") or "4")
    recent = int(version.split(".")[0]) >= 5 if version.split(".")[0].isdigit() else False
    if _HEAD not in files.shapes or embedding == _HEAD:
        if not says_tied:
            missing = _HEAD if embedding != _HEAD else _EMBEDDING
            raise HubError(
                f"{files.directory}: config.json says tie_word_embeddings is false, but the files "
                f"hold no {missing}."
            )
        tied = True
    else:
        tied = files.same(embedding, _HEAD)
    if model_type == "t5" and config.get("scale_decoder_outputs") is not None:
        return tied, bool(config["scale_decoder_outputs"])
    if model_type == "t5" or not recent:
        return tied, says_tied
    if model_type == "umt5" and not tied:
        warnings.warn(
            f"{files.directory}: config.json was written by transformers {version}, which scales "
            "umT5's logits by 1/sqrt(d_model) although its output layer is not tied; so does this "
            "network. Weights that were not trained so (Google's umT5) want the config.json they "
            "were published with.",
            stacklevel=5,
        )
    return tied, model_type == "umt5"


def _check_leftovers(found: Mapping[str, Source], tied: bool, files: TensorFiles) -> None:
    embedding = _embedding(files)
    used = {source.tensor for source in found.values()} | set(_IGNORED)
    left = [name for name in files.shapes if name not in used]
    copies = [name for name in left if name in _EMBEDDING_COPIES or (name == _HEAD and tied)]
    for name in copies:
        if not files.same(name, embedding):
            raise HubError(
                f"{files.directory}: {name} differs from {embedding}; this network shares one "
                "embedding between encoder and decoder."
            )
    unexpected = [name for name in left if name not in copies]
    hf_files.refuse_left(unexpected, files, "of another task, is not a base")
