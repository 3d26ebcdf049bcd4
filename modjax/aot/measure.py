"""A program compiled for a pod: what it holds, computes and sends on each chip."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from modjax import quiet
from modjax.aot import chips, hlo
from modjax.aot.job import Program

# In the names of their operations: adapters' modules are called so.
ADAPTERS = r"/(LowRank|Bottleneck|Scale)Bank\b"


class AotError(ValueError):
    """What was asked for cannot be compiled here; the message says what would do."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a program on one chip.

    Attributes:
      fits: whether the chip's memory suffices.
      peak: bytes in all; where it does not fit, what the compiler would have needed.
      memory: bytes that the chip has for programs; 0 where it is not known, as on CPUs.
      held: {part of the arguments: bytes}.
      temporary: bytes of activations and whatever else is made on the way; None where it does not fit.
      flops: of matrix products, recomputation and adapters included.
      collectives: {kind: bytes received}.
      calls: {kind: how many}.
      added: bytes of the collectives that adapters ask for themselves, of all.
      computing: seconds by the compiler's estimate of each operation, as often as it runs; collectives are not in it.
      sending: seconds that the collectives' bytes take over all links of the chip: a lower bound.
      optimal: XLA's `optimal_seconds`, without the -1 of each operation that it cannot price; the bodies of loops
        are in it once.
    """

    fits: bool
    peak: int
    memory: int
    held: Mapping[str, int]
    temporary: int | None = None
    flops: float = 0.0
    collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)
    calls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    added: float = 0.0
    computing: float = 0.0
    sending: float = 0.0
    optimal: float = 0.0

    @property
    def seconds(self) -> tuple[float, float]:
        """(if all collectives hide behind computing, if none does)."""
        return max(self.computing, self.sending), self.computing + self.sending


def devices_of(topology: str) -> list[Any]:
    """The chips of a TPU topology, as "v5e:4x4".

    Raises:
      AotError: libtpu is not installed, or does not know the topology.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise AotError(
            "libtpu is not installed, without which there is no compiler for TPUs: "
            "pip install -c constraints.txt -e '.[tpu]'"
        ) from None
    from jax.experimental import topologies

    # libtpu asks the machine for a TPU that is not there, and tells at length that it found none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing runs on a chip here: several may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with quiet.held_stderr():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
            return list(found.devices)
        except Exception as error:
            raise AotError(
                f"libtpu does not give the topology {topology!r} (kind:AxB, as v5e:4x4 or v5e:16x16, or "
                f"kind:AxBxC, as v5p:4x4x4): {str(error).splitlines()[0]}"
            ) from error


def compile_for(
    program: Program,
    kind: str,
    text: pathlib.Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Cost:
    """Compiles a program and counts it.

    Args:
      program: for the devices it is to be compiled for.
      kind: their device kind.
      text: where the compiled module is written.
      options: of the compiler, by the names of XLA's flags.
    """
    chip = chips.of(kind) if kind.startswith("TPU") else None
    memory = int(chip.memory) if chip else 0
    with quiet.held_stderr():
        try:
            compiled = program.lowered.compile(compiler_options=dict(options or {}))
        except Exception as error:
            need = hlo.fits_error(str(error))
            if need is None:
                raise
            return Cost(False, int(need[0]), int(need[1]), program.held)
    module = compiled.as_text() or ""
    if text is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(module)
    used: Any = compiled.memory_analysis()
    properties: Any = compiled.cost_analysis()
    arguments = used.argument_size_in_bytes
    made = used.output_size_in_bytes - used.alias_size_in_bytes
    peak = arguments + made + used.temp_size_in_bytes + used.generated_code_size_in_bytes
    counts = hlo.count(module, program.trips, ADAPTERS)
    seconds = float(properties.get("optimal_seconds", 0.0))
    return Cost(
        not memory or peak <= memory,
        peak,
        memory,
        program.held,
        used.temp_size_in_bytes,
        counts.flops,
        counts.collectives,
        counts.calls,
        counts.marked,
        counts.cycles / chip.clock if chip else 0.0,
        counts.collective_bytes / chip.links if chip else 0.0,
        priced(seconds),
    )


def priced(optimal_seconds: float) -> float:
    """`optimal_seconds` without the -1 of each operation that has no price; right as long as the rest is below 1 s."""
    return optimal_seconds % 1.0 if optimal_seconds < 0 else optimal_seconds
