"""Hugging Face's BERT, RoBERTa and XLM-R in our names, without torch.

How theirs and ours differ: a linear weight is `[out, in]` there and a kernel `[in, out]` here; everything else is a
change of name. Their names come with the model's prefix ("bert.", "roberta.") where it was saved with a head, and
files of TensorFlow's BERT call the norms' weights gamma and beta.

Our token 0 is padding. Where theirs is another one (RoBERTa, XLM-R: 1), a batch holds their ids plus one.

A head comes from the files: "pooled" is the linear layer of BertForSequenceClassification (and of the multiple choice
models), "dense" the two layers of RobertaForSequenceClassification. The heads of pretraining are left behind.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from modjax.errors import nearest
from modjax.hub import hf_files, tokenizers
from modjax.hub.errors import HubError
from modjax.hub.safetensors_io import TensorFiles
from modjax.hub.sources import Source, Target, targets

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")

_PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
# With a head: the classes' names begin so, and this is the head they have.
_CLASSES = {
    "bert": ("Bert", "pooled"),
    "roberta": ("Roberta", "dense"),
    "xlm-roberta": ("XLMRoberta", "dense"),
}
_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}
# Buffers that every load computes anew, and the heads of pretraining.
_IGNORED = r"embeddings\.position_ids|cls\.(predictions|seq_relationship)\..*|lm_head\..*"
_EMBEDDINGS = {
    "token_embedder": "word_embeddings",
    "encoder/position_embedder": "position_embeddings",
    "encoder/type_embedder": "token_type_embeddings",
}
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "mlp/wi": "intermediate.dense",
    "mlp/wo": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def read_config(
    config: Mapping[str, Any], files: TensorFiles
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Fields of `EncoderConfig` for a Hugging Face config.json, and where each parameter comes from.

    Args:
      config: config.json, with a `model_type` of MODEL_TYPES.
      files: the tensors; they decide about the pooler, the head and its outputs.

    Returns:
      `(network, sources)`. `network` says sizes, activation, the tokens' and positions' offsets, pooler and head, not
      what a run chooses (dropout, precision, scanning, rematerialisation). `sources` has a key for every parameter of
      the unrolled network, joined with "/".

    Raises:
      HubError: a field is missing, the model computes something that our network does not, or the files hold tensors
        that have no place in it; they are named.
    """
    _refuse_other_arithmetic(config)
    names = _names(config["model_type"], files)
    head = _head(config, names, files)
    pad = config.get("pad_token_id")
    if pad is None:
        pad = 0 if config["model_type"] == "bert" else 1
    network = {
        "vocab_size": _rows(config, "vocab_size", "word_embeddings", names, files),
        "token_offset": tokenizers.token_offset(config),
        **_sizes(config, files),
        "mlp_activations": (_activation(config),),
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-12)),
        "max_positions": _rows(
            config, "max_position_embeddings", "position_embeddings", names, files
        ),
        "position_offset": 0 if config["model_type"] == "bert" else int(pad) + 1,
        "type_vocab_size": _rows(config, "type_vocab_size", "token_type_embeddings", names, files),
        "pooler": "pooler.dense.weight" in names,
        **head,
    }
    found = {}
    for ours, source in sources(config["model_type"], network).items():
        name = source.tensor.removeprefix(_PREFIXES[config["model_type"]])
        found[ours] = dataclasses.replace(source, tensor=names.get(name, name))
    used = {source.tensor for source in found.values()}
    left = [
        tensor
        for name, tensor in names.items()
        if tensor not in used and not re.fullmatch(_IGNORED, name)
    ]
    hf_files.refuse_left(left, files, "for tokens or answers, is not read here")
    return network, found


def export(
    config: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Target]]:
    """config.json and the tensors of a network of ours with a head, as transformers and `read_config` read them.

    Args:
      config: the config.json that the network was imported from.
      network: the fields of its `EncoderConfig`.

    Raises:
      HubError: the network's head is not the one that the model's class has.
    """
    kind = config["model_type"]
    name, head = _CLASSES[kind]
    if network["head"] != head:
        raise HubError(
            f"the network's head is {network['head']!r}, and {name}ForSequenceClassification has {head!r}: there is no "
            f"class of transformers for it. Train with launch.config_of.head = {head!r}."
        )
    # A class whose head does not read the pooler has none.
    written = sources(kind, {**network, "pooler": head == "pooled"})
    labels = config.get("id2label") or {}
    if len(labels) != network["num_outputs"]:
        labels = {str(i): f"LABEL_{i}" for i in range(network["num_outputs"])}
    changes = {
        "architectures": [f"{name}ForSequenceClassification"],
        "vocab_size": network["vocab_size"],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }
    kept = {key: value for key, value in config.items() if key != "num_labels"}
    return {**kept, **changes}, targets(written)


def _names(model_type: str, files: TensorFiles) -> dict[str, str]:
    """The files' tensors by their name without prefix and with today's names of the norms."""

    def bare(tensor: str) -> str:
        name = tensor.removeprefix(_PREFIXES[model_type])
        name = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name)
        return re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name)

    return hf_files.by_name(files, bare)


def sources(model_type: str, network: Mapping[str, Any]) -> dict[str, Source]:
    """Where each parameter of the unrolled network lies in a file of today's transformers, by our names.

    Args:
      model_type: one of MODEL_TYPES.
      network: the fields of an `EncoderConfig`.
    """
    names: dict[str, Source] = {}

    def norm(ours: str, theirs: str) -> None:
        names[f"{ours}/scale"] = Source(f"{theirs}.weight")
        names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    def dense(ours: str, theirs: str) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transpose=True)
        names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    prefix = _PREFIXES[model_type]
    for ours, theirs in _EMBEDDINGS.items():
        names[f"{ours}/embedding"] = Source(f"{prefix}embeddings.{theirs}.weight")
    norm("encoder/embedding_norm", f"{prefix}embeddings.LayerNorm")
    for i in range(network["num_layers"]):
        for ours, theirs in _LAYER.items():
            dense(f"encoder/layers_{i}/{ours}", f"{prefix}encoder.layer.{i}.{theirs}")
        for ours, theirs in _NORMS.items():
            norm(f"encoder/layers_{i}/{ours}", f"{prefix}encoder.layer.{i}.{theirs}")
    if network["pooler"]:
        dense("pooler", f"{prefix}pooler.dense")
    if network["head"] == "dense":
        dense("classifier/dense", "classifier.dense")
        dense("classifier/logits_dense", "classifier.out_proj")
    elif network["head"] == "pooled":
        dense("classifier/logits_dense", "classifier")
    return names


def _sizes(config: Mapping[str, Any], files: TensorFiles) -> dict[str, int]:
    try:
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        sizes = {
            "mlp_dim": int(config["intermediate_size"]),
            "num_layers": int(config["num_hidden_layers"]),
        }
    except KeyError as error:
        raise HubError(f"{files.directory}/config.json has no field {error}.") from error
    if heads < 1 or width % heads:
        raise HubError(
            f"{files.directory}/config.json: hidden_size {width} does not divide into {heads} heads."
        )
    return {"emb_dim": width, "num_heads": heads, "head_dim": width // heads, **sizes}


def _rows(
    config: Mapping[str, Any], field: str, table: str, names: Mapping[str, str], files: TensorFiles
) -> int:
    """Rows of an embedding; a vocabulary may be padded beyond what config.json says, nothing else."""
    name = f"embeddings.{table}.weight"
    if name not in names:
        raise HubError(f"{files.directory} has no tensor {name}.")
    if field == "vocab_size":
        return hf_files.vocab_rows(config, names[name], files)
    rows = files.shapes[names[name]][0]
    said = int(config.get(field) or rows)
    if said != rows:
        raise HubError(
            f"{files.directory}: config.json says {field} {said}, {names[name]} has {rows} rows."
        )
    return rows


def _head(
    config: Mapping[str, Any], names: Mapping[str, str], files: TensorFiles
) -> dict[str, str | int]:
    """The fields `head` and `num_outputs`."""
    if "classifier.dense.weight" in names:
        head, last = "dense", "classifier.out_proj.weight"
    elif "classifier.weight" in names:
        head, last = "pooled", "classifier.weight"
    else:
        return {"head": "none", "num_outputs": 0}
    # A head for each token may have the same names and shapes.
    tasks = config.get("architectures") or []
    if tasks and not any(
        re.search("For(SequenceClassification|MultipleChoice)$", t) for t in tasks
    ):
        raise HubError(
            f"{files.directory}: its head ({last}) is that of {', '.join(tasks)}, which is not computed here; "
            "known are the heads for SequenceClassification and MultipleChoice."
        )
    if head == "pooled" and "pooler.dense.weight" not in names:
        raise HubError(
            f"{files.directory}: {names[last]} is a head, but there is no pooler (pooler.dense.weight) that it could "
            "read. Heads for tokens are not computed here."
        )
    if last not in names:
        raise HubError(f"{files.directory} has classifier.dense.weight but no {last}.")
    return {"head": head, "num_outputs": files.shapes[names[last]][0]}


def _refuse_other_arithmetic(config: Mapping[str, Any]) -> None:
    """Settings under which the same weights mean another function than our network computes."""
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise HubError(
            f"position_embedding_type is {positions!r}; our encoders have absolute positions."
        )
    for field in ("is_decoder", "add_cross_attention", "is_encoder_decoder", "pruned_heads"):
        if config.get(field):
            raise HubError(
                f"{field} is {config[field]}: an encoder alone, with all its heads, is computed here."
            )
    if config.get("quantization_config"):
        raise HubError(
            "config.json has a quantization_config: quantised weights must be saved again in a floating point dtype."
        )


def _activation(config: Mapping[str, Any]) -> str:
    name = str(config.get("hidden_act") or "gelu")
    if name not in _ACTIVATIONS:
        raise HubError(f"hidden_act {name!r} is not computed here." + nearest(name, _ACTIVATIONS))
    return _ACTIVATIONS[name]
