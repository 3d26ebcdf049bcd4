"""What a checkpoint was made with: how that is identified, compared, and refused."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or used for this run."""


def fingerprint(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a frozen base: a hash over names, shapes, dtypes and values, and a short one
    per array.

    Args:
      frozen: nested dict of host arrays, as loaded (before a change of dtype).

    Returns:
      {"digest": str, "arrays": {path: "float32[8,16] 1f3a..."}}.
    """
    whole = hashlib.sha256()
    arrays = {}
    for path, leaf in sorted(traverse_util.flatten_dict(dict(frozen), sep="/").items()):
        value = np.ascontiguousarray(np.asarray(leaf))
        digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        arrays[path] = f"{value.dtype}{list(value.shape)} {digest[:16]}".replace(", ", ",")
        whole.update(f"{path} {value.dtype} {value.shape} {digest}\n".encode())
    return {"digest": whole.hexdigest(), "arrays": arrays}


def differences(stored: Any, current: Any, where: str = "") -> list[str]:
    """One line per value in which two JSON values differ: 'rules/0/rank: 8 in the checkpoint, 4 in
    this run'.
    """
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        keys = [*stored, *(key for key in current if key not in stored)]
        pairs = [(key, stored.get(key), current.get(key)) for key in keys]
    elif isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(stored, current, strict=True))]
    else:
        same = stored == current
        return [] if same else [f"{where}: {stored!r} in the checkpoint, {current!r} in this run"]
    lines = []
    for key, old, new in pairs:
        lines += differences(old, new, f"{where}/{key}" if where else str(key))
    return lines


def check_same(part: str, stored: Any, current: Any, path: Any) -> None:
    """Refuses a checkpoint whose `part` ("method", "base", ...) is not this run's, and says what
    differs.

    Raises:
      CheckpointError: naming the checkpoint and the first differences.
    """
    lines = differences(json.loads(json.dumps(stored)), json.loads(json.dumps(current)))
    lines = [line for line in lines if not line.startswith("digest:")] or lines
    if lines:
        there, here = is_scanned(stored), is_scanned(current)
        if there is not None and here is not None and there != here:
            raise CheckpointError(
                f"the checkpoint {path} was made with SCAN_LAYERS = {there}, and this run has {here}: set it as there "
                "(scan_layers of the network's configuration)"
            )
        more = f"\n  ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CheckpointError(
            f"the checkpoint {path} was made with another {part}:\n  "
            + "\n  ".join(lines[:8])
            + more
        )


def is_scanned(part: Any) -> bool | None:
    """Whether parameters are those of scanned layers, by their paths; None where there are no layers.

    Args:
      part: {path: of a parameter}, or what `fingerprint` gives.
    """
    paths = part.get("arrays", part) if isinstance(part, Mapping) else ()
    names = {name for path in paths for name in str(path).split("/")}
    if "layers" in names:
        return True
    return False if any(name.startswith("layers_") for name in names) else None
