"""The loop around the training step.

It never waits for the step it has just started. It keeps a few steps in flight, reads the sums of
the oldest one (whose copy to the host was started when it was dispatched), and so knows at which
step a loss stopped being finite.
"""

import collections
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from modjax import partitioning, profiling
from modjax.trainer import Batch, Trainer, TrainState

IN_FLIGHT = 4


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient was not a finite number; `step` says in which step (1-based, as in the
    logs).
    """

    def __init__(self, step: int, what: str):
        super().__init__(
            f"{what} is not finite at step {step}; nothing was saved after it. Lower the learning "
            "rate, clip gradients (clip_norm), or compute in float32, and start again from the "
            "last checkpoint"
        )
        self.step = step


class StopSignal:
    """Notes a SIGTERM or SIGINT while it is entered; a second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fit(
    trainer: Trainer,
    state: TrainState,
    frozen: Any,
    batches: Iterator[Batch],
    train_steps: int,
    *,
    log_every: int = 100,
    log: Callable[[int, dict[str, float]], None] | None = None,
    save_every: int = 0,
    save: Callable[[int, TrainState], None] | None = None,
    eval_every: int = 0,
    evaluate: Callable[[int, TrainState], None] | None = None,
    stop: StopSignal | None = None,
    begin: Callable[[profiling.Program], None] | None = None,
    spent: profiling.Spent | None = None,
    trace: profiling.Trace | None = None,
) -> tuple[TrainState, int]:
    """Trains until `train_steps` steps are done in all, or until asked to stop.

    Args:
      batches: this process's rows, one dict of host arrays per step; exactly one is taken per step.
      log: called every `log_every` steps and at the end, with a step and the sums since the last call, `seconds` and
        `steps` added.
      save: called every `save_every` steps, and with the last state (also when stopped).
      evaluate: called every `eval_every` steps, and at the end unless stopped.
      begin: called with the compiled step before it runs for the first time.
      spent: is told where the time goes.
      trace: of some of the steps.

    Returns:
      The last state and its step.

    Raises:
      NonFiniteLossError: names the step.
      ValueError: if the input ends before the training does.
    """
    first = step = int(jax.device_get(state.step))
    spent = profiling.Spent() if spent is None else spent
    reader = _Reader(step, log_every, log, spent)
    flags = [_flag(trainer.mesh, value) for value in (0, 1)]
    saved = step

    def keep(step: int) -> None:
        nonlocal saved
        if save is not None and saved != step:
            reader.drain()
            with spent.on("checkpoints"):
                save(step, state)
            saved = step

    program = None
    while step < train_steps:
        if trace is not None and trace.due(step - first):
            reader.drain()
            trace.turn()
        asking = time.monotonic()
        try:
            batch = partitioning.place_batch(next(batches), trainer.mesh)
        except StopIteration:
            raise ValueError(
                f"the input ended at step {step} of {train_steps}: let it repeat, or train less"
            ) from None
        if reader.idle:
            spent.seconds["input"] += time.monotonic() - asking
        asked = stop is not None and stop.received is not None
        if program is None:
            with spent.on("compilation"):
                program = trainer.program(state, frozen, batch, flags[asked])
            if begin is not None:
                begin(program)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, scalars = program.call(state, frozen, batch, flags[asked])
        step += 1
        reader.push(step, scalars)
        # One process knows at once. Several follow the flag that the step itself brought to all of
        # them.
        if reader.stopped or (asked and jax.process_count() == 1):
            reader.drain()
            reader.finish()
            keep(step)
            return state, step
        if save_every and step % save_every == 0:
            keep(step)
        if eval_every and evaluate is not None and (step % eval_every == 0 or step == train_steps):
            reader.drain()
            began = time.monotonic()
            with spent.on("evaluation"):
                evaluate(step, state)
            reader.leave_out(time.monotonic() - began)
    reader.drain()
    reader.finish()
    if trace is not None:
        trace.close()
    keep(step)
    return state, step


def _flag(mesh: Mesh, value: int) -> jax.Array:
    """int32 [devices], this process's part full of `value`."""
    part = np.full(mesh.size, value, np.int32)
    home = partitioning.one_per_device(mesh)
    return jax.make_array_from_callback(part.shape, home, lambda index: part[index])


class _Reader:
    """Reads the scalars of steps that are still in flight, oldest first, and adds them up between
    two log lines.
    """

    def __init__(
        self,
        step: int,
        every: int,
        log: Callable[[int, dict[str, float]], None] | None,
        spent: profiling.Spent,
    ) -> None:
        self.stopped = False
        self._spent = spent
        self._every, self._log = every, log
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._totals: dict[str, float] = {}
        self._step, self._steps = step, 0
        self._clock = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no step is in flight."""
        if not self._pending:
            return True
        newest: Any = self._pending[-1][1]["loss"]
        return bool(newest.is_ready())

    def leave_out(self, seconds: float) -> None:
        """Takes time that was not spent training from the next log line."""
        self._clock += seconds

    def push(self, step: int, scalars: dict[str, jax.Array]) -> None:
        for value in scalars.values():
            value.copy_to_host_async()
        self._pending.append((step, scalars))
        while len(self._pending) > IN_FLIGHT:
            self._read()

    def drain(self) -> None:
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, scalars = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                what = "the loss" if name == "loss" else "the gradient"
                raise NonFiniteLossError(step, what)
        self.stopped |= bool(values.pop("stop"))
        self._steps += 1
        self._spent.steps += 1
        self._spent.tokens += values.get("tokens", 0.0)
        for name, value in values.items():
            if name.startswith("learning_rate"):
                self._totals[name] = value
            else:
                self._totals[name] = self._totals.get(name, 0.0) + value
        self._step = step
        if self._every and step % self._every == 0:
            self._tell()

    def finish(self) -> None:
        """Logs what came after the last line; no step may be in flight."""
        if self._every and self._steps:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if self._log is not None:
            sums = self._totals | {"seconds": now - self._clock, "steps": self._steps}
            self._log(self._step, sums)
        self._totals, self._steps, self._clock = {}, 0, now
