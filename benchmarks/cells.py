"""What benchmarks of many runs share: gin files as a function's arguments, and cores for processes."""

import os
import pathlib
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]


def configure(entry: str, files: Sequence[str], bindings: Sequence[str]) -> None:
    """Loads gin files of the repository and of gin_configs, and bindings, which win."""
    from modjax import launch

    launch.load_gin(launch.Flags(tuple(files), tuple(bindings), (str(ROOT),)), entry)


def cores(count: int) -> list[int | None]:
    """The cores that `count` processes may use, one for each; None, for any, where they do not suffice."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return list(usable[:count]) if 1 < count <= len(usable) else [None] * count
