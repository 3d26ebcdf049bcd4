"""One dataset's adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.

    ours, at a layer [D, K]            PEFT's, at the module that holds the layer's weight
    a [D, r], b [r, K], composed       lora_A.weight [r, D], lora_B.weight [K, r]; alpha = r
    scale [1, K] of the output         ia3_l [K, 1]
    scale [1, D] of the input          ia3_l [1, D], the module among the feedforward_modules

GPT-2 has query, key and value in one module, `c_attn`. Its pair is made of theirs: A one below the other, B in blocks,
each in the rows of its own output; so the ranks add up. Its scale is 1 where a layer has none.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modjax import initialize
from modjax.adapters import LowRank, Scale
from modjax.hub.errors import HubError, listed
from modjax.hub.export import merged
from modjax.hub.hf_import import check_free
from modjax.hub.run import Layers, Run, open_run
from modjax.hub.safetensors_io import read_json, write_tensors
from modjax.hub.sources import Source

CONFIG = "adapter_config.json"
_STEM = "adapter_model"
_PREFIX = "base_model.model."
_TASKS = {"t5": "SEQ_2_SEQ_LM", "decoder": "CAUSAL_LM", "encoder": "SEQ_CLS"}
_INSTEAD = "`export_hf` writes the whole model."


class _Part(NamedTuple):
    """A module of ours, and which part of their module's output it changes."""

    module: Any
    leaves: dict[str, np.ndarray]
    source: Source


def export_peft(
    run: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    features: Mapping[str, Any] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the adapter of one dataset for PEFT: a LoRA, or IA3.

    Args:
      run: a checkpoint, or a MODEL_DIR, whose latest one is taken. Its method composes to low-rank pairs (LoRA, FLix,
        Polytropon, Poly-S, AdaMix), or to scales (IA3).
      destination: the folder to write.
      features: the dataset's, `{"task": "parse", "language": "sw"}`; see `Run.compose`.
      base: the folder of the run's base, if it has moved.
      force: write over what is there.

    Returns:
      adapter_config.json.

    Raises:
      HubError: the destination exists, or PEFT cannot express the adapter; the reason is given.
      ValueError: features that do not exist.
      CheckpointError: see `open_run`.
    """
    folder = Path(destination)
    check_free(folder, force)
    opened = open_run(run, base)
    _check_trained(opened)
    layers = opened.compose(features or {})
    theirs = opened.huggingface()
    _, targets = opened.base.kind.huggingface.export(theirs, opened.fields)
    known = opened.base.kind.huggingface.sources(str(theirs["model_type"]), opened.fields)
    known = {name: source for name, source in known.items() if source.tensor in targets}

    of_head = {path for path in layers if initialize.is_head(f"{path}/")}
    rest = {path: found for path, found in layers.items() if path not in of_head}
    if opened.base.network == "t5" and "decoder/logits_dense" in rest:
        raise HubError(
            "the output layer is adapted, and transformers' versions differ in how they scale a T5's. "
            + _INSTEAD
        )
    config, tensors = _express(_by_module(rest, known), known)
    # The head is written whole, with what adapts it merged in.
    heads = {
        name: target
        for name, target in targets.items()
        if any(initialize.is_head(parameter) for parameter in target.parameters)
    }
    adapting = {path: layers[path] for path in of_head}
    tensors |= merged(opened, heads, adapting, np.dtype(np.float32))
    config |= {
        "task_type": _TASKS[opened.base.network],
        "base_model_name_or_path": _name_of(opened, theirs),
        "inference_mode": True,
    }
    if heads:
        config["modules_to_save"] = sorted({name.split(".")[0] for name in heads})
    write_tensors(
        folder,
        {_PREFIX + name: tensor for name, tensor in tensors.items()},
        max_shard_bytes=2**63,
        last={CONFIG: json.dumps(config, indent=2) + "\n"},
        stem=_STEM,
    )
    return config


def _check_trained(run: Run) -> None:
    if run.model.adapted is None:
        raise HubError(
            f"{run.checkpoint} has no adapters: it trained the network itself, {listed(run.trained_base, 3)}. "
            + _INSTEAD
        )
    if run.trained_base:
        raise HubError(
            f"{run.checkpoint} trained parameters of the network beside its adapters, {listed(run.trained_base, 3)}: "
            f"an adapter alone would not be the model. {_INSTEAD}"
        )


def _name_of(run: Run, theirs: Mapping[str, Any]) -> str | None:
    """Where PEFT finds the base by itself: its folder if that is one of theirs, or what that was called."""
    path = run.folder / "config.json"  # a checkpoint of T5X has none
    is_theirs = path.exists() and "format" not in read_json(path)
    return str(run.folder) if is_theirs else theirs.get("_name_or_path")


def _by_module(layers: Layers, known: Mapping[str, Source]) -> dict[str, list[_Part]]:
    """{their module: what changes it}."""
    found: dict[str, list[_Part]] = {}
    for path, modules in layers.items():
        source = known.get(f"{path}/kernel")
        if source is None:
            continue  # a pooler that nothing reads, so that their class has none
        name = source.tensor.removesuffix(".weight")
        found.setdefault(name, []).extend(_Part(*module, source) for module in modules)
    return found


def _express(
    modules: Mapping[str, list[_Part]], known: Mapping[str, Source]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, tensors) of an adapter."""
    parts = [part for found in modules.values() for part in found]
    kinds = {type(part.module) for part in parts}
    other = sorted(kind.__name__ for kind in kinds - {LowRank, Scale})
    if other:
        raise HubError(
            f"the method composes to {listed(other)}, for which PEFT has no adapter: it has low-rank pairs and scales. "
            "`adapters.compose` gives the modules to run them here."
        )
    if not kinds:
        raise HubError(
            f"nothing but the output layer is adapted, so there is no adapter. {_INSTEAD}"
        )
    if len(kinds) > 1:
        raise HubError(
            f"the method composes to low-rank pairs and scales, and an adapter of PEFT is of one kind. {_INSTEAD}"
        )
    widths: dict[str, int] = {}  # of modules that hold several of our layers
    for source in known.values():
        if source.part is not None:
            name = source.tensor.removesuffix(".weight")
            widths[name] = max(widths.get(name, 0), source.part[1])
    config, tensors = (_lora if LowRank in kinds else _ia3)(modules, widths)
    everything = {source.tensor.removesuffix(".weight") for source in known.values()}
    fed = set(config.pop("feedforward_modules", ()))
    targets = _endings(set(modules) - fed, everything - set(modules))
    if LowRank not in kinds:
        # PEFT compares these without a dot in front.
        outputs = set(modules) - fed
        inputs = _endings(
            fed, everything - fed, lambda name: any(o.endswith(name) for o in outputs)
        )
        config["feedforward_modules"] = inputs
        targets = sorted({*targets, *inputs})
    config["target_modules"] = targets
    config["fan_in_fan_out"] = not all(part.source.transpose for part in parts)
    return config, tensors


def _lora(
    modules: Mapping[str, list[_Part]], widths: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors, ranks = {}, {}
    for name, parts in modules.items():
        a = np.concatenate([part.leaves["a"] for part in parts], axis=-1)
        b = np.zeros((a.shape[1], widths.get(name, parts[0].leaves["b"].shape[1])), np.float32)
        at = 0
        for part in parts:
            rows = part.leaves["b"]
            b[at : at + len(rows), slice(*(part.source.part or (None,)))] = rows
            at += len(rows)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.T, b.T
        ranks[name] = at
    (rank, _), *others = collections.Counter(ranks.values()).most_common()
    pattern: dict[str, int] = {}
    for other, _ in others:
        named = {name for name in ranks if ranks[name] == other}
        pattern |= dict.fromkeys(_endings(named, set(ranks) - named), other)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return config, tensors


def _ia3(
    modules: Mapping[str, list[_Part]], widths: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors, fed = {}, []
    for name, parts in modules.items():
        sides = {part.module.acts_on for part in parts}
        if "input" in sides and (len(sides) > 1 or name in widths):
            what = "layers that share their input there" if name in widths else "input and output"
            raise HubError(
                f"{name} has scales of {what}, and IA3 of PEFT has one scale for a module. {_INSTEAD}"
            )
        own = parts[0].leaves["scale"].shape[1]
        scale = np.ones(widths.get(name, own), np.float32)
        for part in parts:
            scale[slice(*(part.source.part or (None,)))] *= part.leaves["scale"][0]
        tensors[f"{name}.ia3_l"] = scale[None] if "input" in sides else scale[:, None]
        fed += [name] if "input" in sides else []
    return {"peft_type": "IA3", "feedforward_modules": fed}, tensors


def _endings(
    wanted: set[str], others: set[str], taken: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Names that pick exactly the modules `wanted`: short ones, as "q", where no other module ends so.

    Args:
      wanted, others: full names.
      taken: short names that will not do.
    """
    found = set()
    for name in wanted:
        words = name.split(".")
        endings = [words[-n:] for n in range(1, len(words))]
        short = [".".join(e) for e in endings if not any(word.isdigit() for word in e)]
        good = (e for e in short if not taken(e) and not any(o.endswith(f".{e}") for o in others))
        found.add(next(good, name))
    return sorted(found)
