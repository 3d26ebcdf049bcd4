"""What a dataset's mixture amounts to: one plain LoRA, or a base with the update merged in.

FLix composes without loss: the sum of the active pairs is one pair whose rank is the sum of theirs (arXiv 2402.17934).
"""

import re
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax.adapters.adapted import Adapted, Mixture, Rule
from modjax.adapters.modules import LowRank
from modjax.adapters.trees import Tree, from_places, places, within


def compose(
    adapted: Adapted, adapters: Tree, *, name: str = "lora", **features: Any
) -> tuple[Adapted, dict[str, Any]]:
    """The plain LoRA that equals the mixture for one dataset.

    Args:
      adapted: the trained network.
      adapters: its adapters.
      name: of the LoRA's mixture.
      **features: the dataset's, as in its metadata: `task="parse", language="sw"`; `dataset=...` where datasets own
        modules. A feature left out is off.

    Returns:
      (an Adapted with the same network and single routers, its adapters): applied without features, it gives what the
      mixture gives for that dataset. Scales are folded into `b`, so its alpha equals its rank.

    Raises:
      ValueError: an unknown feature or value, or features that leave no module active.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for (path, mixture_name), bank in places(adapters, adapted).items():
        mixture = adapted.rule_for(path, mixture_name).mixture
        weights = mixture.router.active(adapted.space, features)
        if weights.any():
            modules = mixture.modules(adapted.space)
            pair = mixture.module.compose(bank, modules, weights)
            pairs.setdefault(path, []).append(pair)
    if not pairs:
        raise ValueError(
            f"No module is active for {features or 'no features'}: there is nothing to compose."
        )
    banks = {
        (path, name): {
            "a": jnp.concatenate([p["a"] for p in found], axis=-1),
            "b": jnp.concatenate([p["b"] for p in found], axis=-2),
        }
        for path, found in pairs.items()
    }
    by_rank: dict[int, list[str]] = {}
    for (path, _), bank in banks.items():
        by_rank.setdefault(bank["a"].shape[-1], []).append(path)
    rules = tuple(
        Rule("|".join(re.escape(path) for path in paths), Mixture(name, LowRank(rank)))
        for rank, paths in by_rank.items()
    )
    return Adapted(adapted.network, rules, streams=adapted.streams), from_places(banks)


def merge(adapted: Adapted, adapters: Tree, base: Tree, **features: Any) -> dict[str, Any]:
    """The base's parameters with one dataset's update added to its kernels, computed in float32.

    The result runs on the plain network, at the cost of the base. It is in the base's dtypes, so a bfloat16 base rounds
    the update. Arguments and errors as in `compose`, and `base`: the base's parameters.
    """
    composed, pairs = compose(adapted, adapters, **features)
    flat = dict(flatten_dict(base, sep="/"))
    for (path, _), pair in places(pairs, composed).items():
        kernel_path = within(path, "kernel")
        kernel = flat[kernel_path]
        a, b = (jnp.asarray(pair[k], jnp.float32) for k in ("a", "b"))
        update = jnp.einsum("...dr,...rk->...dk", a, b, precision="highest")
        merged = jnp.asarray(kernel, jnp.float32) + update.reshape(kernel.shape)
        flat[kernel_path] = merged.astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")
