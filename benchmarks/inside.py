"""What trained adapters hold: how large each module's update is, layer by layer, and who routes to which skill."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


def norms(trained: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The Frobenius norm of each low-rank module's update `a b`, by layer: `{"encoder 0": {"task=parse": 1.2}}`.

    The sites of a layer count together, as one vector; alpha is taken to be the rank.

    Args:
      trained: parameters, as a run trains them.
      method: of a checkpoint's metadata.
    """
    flat = {path: np.asarray(leaf) for path, leaf in _leaves(trained).items()}
    squares: dict[str, dict[str, float]] = {}
    for rule in method["rules"]:
        if rule["module"]["type"] != "LowRank" or rule["composition"] != "sum":
            continue
        for path, a in flat.items():
            if not path.endswith(f"/{rule['name']}/a"):
                continue
            layer = re.search(r"(encoder|decoder)/layers_(\d+)", path)
            where = " ".join(layer.groups()) if layer else path.partition("/")[0]
            found = squares.setdefault(where, {})
            b, start = flat[path[:-1] + "b"], 0
            for module, rank in rule["bank"]["a"][1]:
                own = slice(start, start + rank)
                start += rank
                left, right = a[:, own].T @ a[:, own], b[own] @ b[own].T
                found[module] = found.get(module, 0.0) + float(np.sum(left * right))
    return {
        where: {module: round(max(value, 0.0) ** 0.5, 3) for module, value in found.items()}
        for where, found in sorted(squares.items())
    }


def routing(trained: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, list[float]]:
    """The weights of the skills that each row of a `Skills` router has, mean over layers and heads."""
    found: dict[str, list[np.ndarray]] = {}
    for rule in method["rules"]:
        if rule["router"]["type"] != "Skills":
            continue
        rows = [name for name, _ in rule["bank"]["logits"][1]]
        for path, logits in _leaves(trained).items():
            if path.endswith(f"{rule['name']}/logits"):
                share = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
                share = share / (share.sum(-1, keepdims=True) + 1e-12)
                for name, weights in zip(rows, share, strict=True):
                    found.setdefault(name, []).append(weights.mean(0))
    return {name: np.round(np.mean(some, 0), 4).tolist() for name, some in found.items()}


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")
