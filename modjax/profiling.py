"""What a run spends: what its step costs before it runs, a trace of some steps, and where the time went.

A step is compiled once, ahead of its first run, so that its operations and its memory are known when training begins.
"""

import collections
import contextlib
import ctypes
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from modjax.logging import duration
from modjax.networks import fused

# Operations a second of one device in bfloat16 without sparsity, by `device_kind`: as the vendors state them, written
# down from memory and not checked against their pages.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """The peak of a device, None if it is not in the table: the longest name in it that the kind begins with."""
    found = [name for name in PEAK_FLOPS if kind == name or kind.startswith(f"{name}-")]
    if kind.startswith("NVIDIA"):  # "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
        found = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


# Matrix products of `[B, Q, H, K]` with `[B, L, G, K]` in attention that is one kernel (`networks.fused`): its logits
# and the mean of its values; and backward the logits again, the gradients of queries, keys, values and weights.
ATTENTION = {fused.FORWARD: 2, fused.BACKWARD: 5}


def product_flops(jaxpr: Any, batched: bool | None = None) -> float:
    """Operations of the matrix products in a traced program, two for each multiply-add.

    If `batched` is given, only of the products that have batch dimensions, or only of those that have none: products of
    activations with each other, and with weights.

    Loops of known length count as often as they run, where XLA's own analysis counts their bodies once, and of a
    condition's branches the dearest. A while loop's body counts once. What is recomputed counts again.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (shared, _) = eqn.params["dimension_numbers"]
            if batched is not None and batched != bool(shared):
                continue
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
            continue
        if eqn.primitive.name in ATTENTION:
            if batched is not False:
                query, key = (variable.aval.shape for variable in eqn.invars[:2])
                total += ATTENTION[eqn.primitive.name] * 2.0 * math.prod(query) * key[1]
            continue
        inner = [
            product_flops(value, batched)
            for given in eqn.params.values()
            for value in (given if isinstance(given, tuple | list) else (given,))
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if inner:
            both = max(inner) if eqn.primitive.name == "cond" else sum(inner)
            total += both * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      call: runs it.
      flops: of its matrix products, on all devices together.
      arguments, temporary, output: bytes on each device; None where the compiler does not say. Outputs that take the
        place of arguments are not among `output`.
    """

    call: Any
    flops: float
    arguments: int | None = None
    temporary: int | None = None
    output: int | None = None

    def describe(self) -> str:
        """The line that a run begins with."""
        text = f"a step: {self.flops:.3g} FLOPs in matrix products"
        if self.arguments is None or self.temporary is None or self.output is None:
            return text
        whole = self.arguments + self.temporary + self.output
        return (
            f"{text}; expected memory {in_bytes(whole)} on each device ({in_bytes(self.arguments)} parameters, state "
            f"and batch, {in_bytes(self.temporary)} temporary)"
        )


def compile_program(function: Any, *args: Any) -> Program:
    """Compiles a jitted function for arguments, arrays or shapes."""
    traced = function.trace(*args)
    compiled = traced.lower().compile()
    release_freed_memory()
    memory = compiled.memory_analysis()
    if memory is None:
        return Program(compiled, product_flops(traced.jaxpr))
    return Program(
        compiled,
        product_flops(traced.jaxpr),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


def release_freed_memory() -> None:
    """Gives the host memory that was freed back to the system, where its C library can (glibc).

    A compilation frees hundreds of MB, which otherwise stay with the process, beside what the step then takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def in_bytes(size: float) -> str:
    """A number of bytes as "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def describe_job(mesh: Any, state: Any, frozen: Any) -> str:
    """Devices, mesh, and what is held on them: the lines that a run begins with."""
    devices = mesh.devices.flat
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    parts = [
        f"{name} {sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)):,} "
        f"({in_bytes(sum(x.nbytes for x in jax.tree.leaves(tree)))})"
        for name, tree in (
            ("trained", state.trained),
            ("frozen", frozen),
            ("optimizer", state.opt_state),
        )
    ]
    return (
        f"{len(devices)} device(s) {devices[0].device_kind}, {jax.process_count()} process(es), mesh {axes}\n"
        f"parameters: {', '.join(parts)}"
    )


class Spent:
    """Where the time of a run goes, in seconds since it was made.

    Attributes:
      seconds: of "compilation", "checkpoints", "evaluation", and "input": waiting for a batch while no step was in
        flight, so that the devices were idle.
      steps, tokens: done, the tokens without padding.
    """

    def __init__(self) -> None:
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.steps = 0
        self.tokens = 0.0
        self._began = time.monotonic()

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Counts the time inside under a name."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - began

    @property
    def total(self) -> float:
        return time.monotonic() - self._began

    def describe(self, flops: float, devices: Any) -> str:
        """The lines that a run ends with.

        Args:
          flops: of a step, on all devices.
          devices: of the mesh.
        """
        total = self.total
        lost = ("compilation", "checkpoints", "evaluation", "input")
        parts = ", ".join(
            f"{name} {self.seconds[name]:.1f}s ({100 * self.seconds[name] / max(total, 1e-9):.1f} %)"
            for name in lost
        )
        # Idle for want of input is part of training: it is what MFU is to show.
        training = max(total - sum(self.seconds[name] for name in lost[:-1]), 1e-9)
        kind, peak = devices[0].device_kind, peak_flops(devices[0].device_kind)
        if peak is None:
            mfu = f"MFU unknown, for the peak of {kind!r} is ({flops * self.steps / training:.3g} FLOP/s were reached)"
        else:
            share = flops * self.steps / training / (peak * len(devices))
            mfu = f"MFU {100 * share:.1f} % of {peak * len(devices):.3g} FLOP/s in bfloat16"
        return (
            f"{self.steps} step(s) in {duration(total)}, of which {parts}\n"
            f"while training: {self.tokens / training:,.0f} tokens/s, {self.steps / training:.3g} steps/s, {mfu}"
        )


class Trace:
    """A trace of some steps, in xprof's format: `tensorboard --logdir FOLDER`, or `xprof FOLDER`.

    Args:
      folder: where it is written.
      first: how many steps of this run are done before it.
      count: how many steps it holds.
      steps: how many steps this run has; of one with fewer, the last ones are traced.

    Raises:
      ValueError: numbers that make no trace.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int, count: int, steps: int):
        if first < 0 or count < 1:
            raise ValueError(
                f"profile_steps=({first}, {count}) must be how many steps are done before the trace, 0 or more, and "
                "how many it holds, 1 or more."
            )
        count = min(count, steps)
        first = min(first, steps - count)
        self._folder, self._edges = os.fspath(folder), (first, first + count)
        self._on = False

    def due(self, done: int) -> bool:
        """Whether the trace begins or ends when so many steps are done; the caller waits for them, then turns it."""
        return done in self._edges

    def turn(self) -> None:
        """Begins the trace, or writes it."""
        if self._on:
            self.close()
        else:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def close(self) -> None:
        """Writes a trace that has begun."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
