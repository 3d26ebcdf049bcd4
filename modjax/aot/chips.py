"""Kinds of TPU chips: what a compiled program is held against.

As Google's documentation of each version has them (cloud.google.com/tpu/docs, "system architecture"), written down from
memory and not checked against it: check a figure that matters to you.
"""

import dataclasses

from modjax.errors import nearest
from modjax.profiling import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes that a program may use.
      links: bytes a second that a chip receives over all its links to other chips.
      clock: cycles a second, of XLA's estimates.
    """

    flops: float
    memory: float
    links: float
    clock: float


CHIPS = {
    "TPU v4": Chip(PEAK_FLOPS["TPU v4"], 32e9, 300e9, 1.05e9),
    "TPU v5 lite": Chip(PEAK_FLOPS["TPU v5 lite"], 15.75 * 2**30, 200e9, 1.5e9),
    "TPU v5": Chip(PEAK_FLOPS["TPU v5"], 95e9, 600e9, 1.75e9),
    "TPU v6 lite": Chip(PEAK_FLOPS["TPU v6 lite"], 31.25 * 2**30, 448e9, 1.75e9),
}


def of(kind: str) -> Chip:
    """The chip of a device kind. Raises ValueError for one that is not in the table."""
    if kind not in CHIPS:
        raise ValueError(
            f"no figures for the chip {kind!r}: add it to modjax/aot/chips.py."
            + nearest(kind, CHIPS)
        )
    return CHIPS[kind]
