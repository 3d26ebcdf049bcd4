"""What a dataset's mixture amounts to: one plain module at each layer, or a base with the update merged in.

FLix composes without loss: the sum of the active pairs is one pair whose rank is the sum of theirs (arXiv 2402.17934).
So does an average of modules (arXiv 2211.03831, 2205.12410), whose result is as large as one of them.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax import quantization
from modjax.adapters.adapted import Adapted
from modjax.adapters.low_rank import LowRank
from modjax.adapters.routing import DATASET, ModuleName
from modjax.adapters.rules import Mixture, Rule
from modjax.adapters.scale import Scale
from modjax.adapters.trees import Tree, banks, from_places, place_of, routers, within
from modjax.errors import nearest
from modjax.features import FeatureSpace, UnknownFeatureError, as_values


def compose(
    adapted: Adapted, adapters: Tree, *, name: str = "lora", **features: Any
) -> tuple[Adapted, dict[str, Any]]:
    """The plain modules that equal the mixtures for one dataset: one LoRA for low-rank pairs, and so on.

    Args:
      adapted: the trained network.
      adapters: its adapters.
      name: of the composed mixture; modules of other kinds at the same layers are called `<name>_2` and so on.
      **features: the dataset's, as in its metadata: `task="parse", language="sw"`; `dataset=...` where datasets own
        modules or logits. A feature left out is off; for learned routing, an unknown task, which averages. Of features
        that own modules also `language={"sw": 0.5, "zu": 0.5}`: their weighted sum, for a language that has no module
        or whose own was not trained beside this task.

    Returns:
      (an Adapted with the same network and single routers, its adapters): applied without features, it gives what the
      mixture gives for that dataset in evaluation. Scales are folded into `b`, so a LoRA's alpha equals its rank.

    Raises:
      ValueError: an unknown feature or value, or features that leave no module active.
    """
    known = {k: v for k, v in features.items() if v is not None}
    if adapted.space is not None:
        for feature, value in known.items():
            _check_known(feature, value, adapted.space)
    logits = routers(adapters, adapted)
    composed: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for (path, mixture_name), bank in banks(adapters, adapted).items():
        mixture = adapted.rule_for(path, mixture_name).mixture
        place = place_of(path, mixture.router.granularity)
        weights = mixture.router.active(adapted.space, known, logits.get((place, mixture_name)))
        weights = _per_layer(np.atleast_2d(weights), bank, mixture, adapted)
        if weights.any():
            modules = mixture.modules(adapted.space)
            one = mixture.module.compose(bank, modules, weights, mixture.composes)
            _add(composed.setdefault(path, []), *one)
    if not composed:
        raise ValueError(
            f"No module is active for {features or 'no features'}: there is nothing to compose."
        )
    places: dict[tuple[str, str], dict[str, Any]] = {}
    paths: dict[tuple[int, Any], list[str]] = {}

    def named(i: int) -> str:
        return name if i == 0 else f"{name}_{i + 1}"

    for path, found in composed.items():
        for i, (module, leaves) in enumerate(found):
            places[path, named(i)] = leaves
            paths.setdefault((i, module), []).append(path)
    # A layer applies its modules as the rules are ordered.
    rules = tuple(
        Rule("|".join(re.escape(path) for path in at), Mixture(named(i), module))
        for (i, module), at in sorted(paths.items(), key=lambda item: item[0][0])
    )
    return Adapted(adapted.network, rules, streams=adapted.streams), from_places(places)


def _check_known(feature: str, value: Any, space: FeatureSpace) -> None:
    """Raises UnknownFeatureError where a space lacks a feature, or a value of it."""
    if feature not in (*space.names, DATASET):
        raise UnknownFeatureError(
            f"Unknown feature {feature!r}." + nearest(feature, (*space.names, DATASET))
        )
    for name in as_values(tuple(value) if isinstance(value, Mapping) else value, feature):
        if feature == DATASET:
            space.dataset_id(name)
        else:
            space.id(feature, name)


def _per_layer(
    weights: np.ndarray, bank: dict[str, Any], mixture: Mixture, adapted: Adapted
) -> np.ndarray:
    """Weights `[..., H, M]` with leading axes that broadcast against those of a scanned bank."""
    leaf, spec = next(iter(mixture.leaves(adapted.space).items()))
    lead = bank[leaf].shape[: bank[leaf].ndim - len(spec.axes)]
    return np.broadcast_to(weights, (*lead, *weights.shape[-2:])) if lead else weights


def _add(found: list[tuple[Any, dict[str, Any]]], module: Any, leaves: dict[str, Any]) -> None:
    """Appends a composed module, or joins it with the one before it where two make one of their kind."""
    if found:
        last, others = found[-1]
        if isinstance(last, LowRank) and isinstance(module, LowRank):
            joined = {
                "a": jnp.concatenate([others["a"], leaves["a"]], axis=-1),
                "b": jnp.concatenate([others["b"], leaves["b"]], axis=-2),
            }
            found[-1] = (LowRank(joined["a"].shape[-1]), joined)
            return
        if isinstance(last, Scale) and last == module:
            found[-1] = (module, {"scale": others["scale"] * leaves["scale"]})
            return
    found.append((module, leaves))


def merge(
    adapted: Adapted, adapters: Tree, base: Tree, *, dequantize: bool = False, **features: Any
) -> dict[str, Any]:
    """The base's parameters with one dataset's update in its kernels, computed in float32.

    The result runs on the plain network, at the cost of the base. It is in the base's dtypes, so a bfloat16 base rounds
    the update. Arguments and errors as in `compose`, and

    Args:
      base: the base's parameters.
      dequantize: of an int8 base, to give all of it in float32.

    Raises:
      ValueError: a module that does not merge, as a bottleneck; or a base in int8, unless it is to be dequantised.
    """
    if dequantize:
        base = quantization.dequantize(base)
    elif quantization.is_quantized(base):
        raise ValueError(
            "The base is in int8, which would round the update away: merge into the float base that it was made of, or "
            "say dequantize=True to get a float32 base with the error that int8 left in it."
        )
    composed, leaves = compose(adapted, adapters, **features)
    flat = dict(flatten_dict(base, sep="/"))
    found = [
        (path, composed.rule_for(path, name).mixture.module, bank)
        for (path, name), bank in banks(leaves, composed).items()
    ]
    for path, module, bank in sorted(found, key=lambda part: merges_last(part[1])):
        kernel_path, bias_path = within(path, "kernel"), within(path, "bias")
        kernel, bias = flat[kernel_path], flat.get(bias_path)
        matrix, flat_bias = _as_matrix(kernel, bias, module, bank)
        merged, merged_bias = module.merge(bank, matrix, flat_bias)
        flat[kernel_path] = merged.reshape(kernel.shape).astype(kernel.dtype)
        if bias is not None:
            flat[bias_path] = merged_bias.reshape(bias.shape).astype(bias.dtype)
    return unflatten_dict(flat, sep="/")


def merges_last(module: Any) -> bool:
    """Whether a module is merged after a layer's others: `(x * s) (W + a b)` is `x` times `s * (W + a b)`."""
    return module.acts_on == "input"


def _as_matrix(kernel: Any, bias: Any, module: Any, bank: dict[str, Any]) -> tuple[Any, Any]:
    """A kernel as `[..., D, K]` and its bias as `[..., K]`, float32, whatever axes the layer spreads them over."""
    leaf, spec = next(iter(module.leaves((ModuleName("all"),)).items()))
    lead = bank[leaf].shape[: bank[leaf].ndim - len(spec.axes)]
    side = next(s for s in spec.axes if s in ("in", "out"))
    width = bank[leaf].shape[len(lead) + spec.axes.index(side)]
    size = int(np.prod(kernel.shape[len(lead) :]))
    shape = (width, size // width) if side == "in" else (size // width, width)
    matrix = jnp.asarray(kernel, jnp.float32).reshape(*lead, *shape)
    if bias is None:
        return matrix, None
    return matrix, jnp.asarray(bias, jnp.float32).reshape(*lead, shape[1])
