"""config.json of Hugging Face's decoders as fields of `DecoderConfig`.

Settings of the rotary embedding are `rope_theta`, `rope_scaling` and `rope_local_base_freq` in a config.json written by
transformers 4, and `rope_parameters` in one of transformers 5. Where config.json leaves a field out, it means the
default of the model's class.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from modjax.errors import nearest
from modjax.hub import tokenizers
from modjax.hub.errors import HubError, listed
from modjax.networks.rope import KINDS, Rope

_GEMMAS = ("gemma2", "gemma3_text")
_QWENS = ("qwen2", "qwen3")
# What the models' classes assume where config.json does not say, besides what is the same for all.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "n_positions": 1024},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
    },
}
_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of the model's class.

    Raises:
      HubError: a setting under which the same weights mean another function than our network computes.
    """
    settings = {**_DEFAULTS[config["model_type"]], **config}
    _refuse_other_arithmetic(settings)
    return settings


def fields(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `DecoderConfig` that config.json alone decides, as plain values.

    Raises:
      HubError: a field is missing, or a setting is not computed here; it is named.
    """
    try:
        own = _gpt2(settings) if settings["model_type"] == "gpt2" else _llama(settings)
    except KeyError as error:
        raise HubError(f"{where}/config.json has no field {error}.") from error
    return {"token_offset": tokenizers.token_offset(settings), **own}


def _gpt2(settings: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = int(settings["n_embd"]), int(settings["n_head"])
    return {
        "emb_dim": width,
        **_heads(width, heads, heads, None),
        "mlp_dim": int(settings.get("n_inner") or 4 * width),
        "num_layers": int(settings["n_layer"]),
        "mlp_activations": (_activation(settings, "activation_function", "gelu_new"),),
        "norm": "layer",
        "norm_epsilon": float(settings["layer_norm_epsilon"]),
        "norm_offset": 0.0,
        "post_norms": False,
        "qk_norm": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        "max_positions": int(settings["n_positions"]),
        "rope": dataclasses.asdict(Rope()),
        "local_rope": None,
        "windows": (0,),
        "attention_softcap": None,
        "logits_softcap": None,
        "query_scale": None if settings.get("scale_attn_weights", True) else 1.0,
        "embedding_scale": 1.0,
    }


def _llama(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = settings["model_type"]
    gemma = kind in _GEMMAS
    width, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    biased = bool(settings.get("attention_bias", False)) and kind not in ("mistral", "qwen2")
    field, default = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    rope, local_rope = _ropes(settings)
    return {
        "emb_dim": width,
        **_heads(
            width, heads, settings.get("num_key_value_heads") or heads, settings.get("head_dim")
        ),
        "mlp_dim": int(settings["intermediate_size"]),
        "num_layers": int(settings["num_hidden_layers"]),
        "mlp_activations": (_activation(settings, field, default), "linear"),
        "norm": "rms",
        "norm_epsilon": float(settings.get("rms_norm_eps", 1e-6)),
        "norm_offset": 1.0 if gemma else 0.0,
        "post_norms": gemma,
        "qk_norm": kind in ("qwen3", "gemma3_text"),
        "qkv_bias": biased or kind == "qwen2",
        "out_bias": biased,
        "mlp_bias": kind == "llama" and bool(settings.get("mlp_bias", False)),
        "positions": "rope",
        "max_positions": 0,
        "rope": dataclasses.asdict(rope),
        "local_rope": None if local_rope is None else dataclasses.asdict(local_rope),
        "windows": _windows(settings),
        "attention_softcap": _cap(settings, "attn_logit_softcapping") if gemma else None,
        "logits_softcap": _cap(settings, "final_logit_softcapping") if gemma else None,
        "query_scale": float(settings["query_pre_attn_scalar"]) ** -0.5 if gemma else None,
        "embedding_scale": math.sqrt(width) if gemma else 1.0,
    }


def _heads(width: int, heads: int, kv_heads: Any, head_dim: Any) -> dict[str, int]:
    if head_dim is None and (heads < 1 or width % heads):
        raise HubError(f"config.json: a width of {width} does not divide into {heads} heads.")
    head_dim = width // heads if head_dim is None else int(head_dim)
    return {"num_heads": heads, "num_kv_heads": int(kv_heads), "head_dim": head_dim}


def _activation(settings: Mapping[str, Any], field: str, default: str) -> str:
    name = str(settings.get(field) or default)
    if name not in _ACTIVATIONS:
        raise HubError(f"{field} {name!r} is not computed here." + nearest(name, _ACTIVATIONS))
    return _ACTIVATIONS[name]


def _cap(settings: Mapping[str, Any], field: str) -> float | None:
    value = settings.get(field)
    return None if value is None else float(value)


def _windows(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window; 0 for none."""
    kind, depth = settings["model_type"], int(settings["num_hidden_layers"])
    window = settings.get("sliding_window")
    types = settings.get("layer_types")
    if kind == "llama" or (kind in _QWENS and not settings.get("use_sliding_window", False)):
        window = None
    if kind in ("llama", "mistral"):
        # Their classes do not read layer_types: what is written there must be what they do.
        expected = "full_attention" if window is None else "sliding_attention"
        if types is not None and set(types) != {expected}:
            raise HubError(
                f"layer_types {listed(sorted(set(types)))} with sliding_window {window}: all layers of a {kind} are "
                f"of one kind, here {expected}."
            )
        types = [expected] * depth
    elif types is None and kind in _QWENS:
        types = ["full_attention"] * depth
        if window is not None:
            first = int(settings["max_window_layers"])
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    elif types is None:
        period = int(settings["sliding_window_pattern"]) if kind == "gemma3_text" else 2
        types = [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)
        ]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != depth:
        raise HubError(
            f"layer_types must say sliding_attention or full_attention for each of {depth} layers; it has "
            f"{len(types)} entries" + (f", among them {listed(unknown)}." if unknown else ".")
        )
    if "sliding_attention" not in types:
        return (0,)
    if window is None or int(window) < 1:
        raise HubError(f"layer_types has sliding_attention, but sliding_window is {window!r}.")
    return tuple(int(window) if t == "sliding_attention" else 0 for t in types)


def _ropes(settings: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of layers with a window where it differs (Gemma 3)."""
    nested = settings["model_type"] == "gemma3_text"
    old = {"rope_theta": settings.get("rope_theta", 10_000.0)}
    if settings.get("partial_rotary_factor") is not None:
        old["partial_rotary_factor"] = settings["partial_rotary_factor"]
    scaling = dict(settings.get("rope_scaling") or {})
    new = dict(settings.get("rope_parameters") or {})
    by_layer = {"full_attention", "sliding_attention"} & set(new)
    if new and bool(by_layer) != nested:
        raise HubError(
            f"rope_parameters {listed(list(new))}: a {settings['model_type']} has "
            + ("one set for each kind of layers." if nested else "one set for all layers.")
        )
    if not nested:
        return _rope({**old, **(scaling or new)}, settings), None
    local_theta = settings.get("rope_local_base_freq", 10_000.0)
    full = {**old, **(new.get("full_attention") or {}), **scaling}
    local = {**old, "rope_theta": local_theta, **(new.get("sliding_attention") or {})}
    rope, local_rope = _rope(full, settings), _rope(local, settings)
    return rope, None if local_rope == rope else local_rope


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
}


def _rope(given: Mapping[str, Any], settings: Mapping[str, Any]) -> Rope:
    """One set of rope parameters, as transformers 5.23 reads them."""
    values = {name: value for name, value in given.items() if value is not None}
    kind = str(values.pop("rope_type", values.pop("type", "default")))
    values.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise HubError(f"rope_type {kind!r} is not computed here." + nearest(kind, KINDS))
    if float(values.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise HubError("partial_rotary_factor is not 1: heads are rotated whole here, not in part.")
    theta = float(values.pop("rope_theta", 10_000.0))
    unknown = sorted(set(values) - {name for fields in _ROPE_FIELDS.values() for name in fields})
    if unknown:
        raise HubError(f"rope parameters that are not computed here: {listed(unknown)}.")
    needed = {"linear": ["factor"], "llama3": _ROPE_FIELDS["llama3"][:3]}.get(kind, [])
    absent = [name for name in needed if name not in values]
    if absent:
        raise HubError(f"rope_type {kind!r} needs {listed(absent)} in its parameters.")
    original = values.get("original_max_position_embeddings")
    original = settings.get("original_max_position_embeddings") or original
    original = original or settings.get("max_position_embeddings") or 0
    if kind in ("default", "linear"):
        return Rope(theta, kind, float(values["factor"]) if kind == "linear" else 1.0)
    if not original:
        raise HubError(f"rope_type {kind!r} needs original_max_position_embeddings.")
    if kind == "llama3":
        low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
        return Rope(theta, kind, float(values["factor"]), int(original), low, high)
    factor = values.get("factor")
    if factor is None:
        factor = settings.get("max_position_embeddings", original) / original
    return Rope(
        theta,
        kind,
        float(factor),
        int(original),
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_attention_factor(values, float(factor)),
    )


def _attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """Yarn's factor of cosines and sines: the one given, else by how far the context is stretched."""
    given = values.get("attention_factor")
    if given is not None:
        return float(given)

    def grown(slope: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0

    slope, of_all = values.get("mscale"), values.get("mscale_all_dim")
    return grown(slope) / grown(of_all) if slope and of_all else grown(1.0)


def _refuse_other_arithmetic(settings: Mapping[str, Any]) -> None:
    """Settings under which the same weights mean another function than our network computes."""
    for field in (
        "scale_attn_by_inverse_layer_idx",
        "add_cross_attention",
        "use_bidirectional_attention",
        "pruned_heads",
    ):
        if settings.get(field):
            raise HubError(
                f"{field} is {settings[field]}: our decoders attend causally, with all heads and "
                "the same scale in every layer."
            )
    if settings.get("quantization_config"):
        raise HubError(
            "config.json has a quantization_config: quantised weights must be saved again in a floating point dtype."
        )
    if settings["model_type"] == "gemma3_text" and settings.get("attn_logit_softcapping"):
        raise HubError(
            f"attn_logit_softcapping is {settings['attn_logit_softcapping']}: Gemma 3's attention "
            "does not read it, so it is not clear what was meant."
        )
