"""The training state, the two jitted steps, and the loop around them.

The frozen base is an argument of the steps, never part of the state: it is not differentiated, not donated, not saved.
The loop never waits for the step it has just started. It keeps a few steps in flight, reads the sums of the oldest one
(whose copy to the host was started when it was dispatched), and so knows at which step a loss stopped being finite.
"""

import collections
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax import optimizers, partitioning

Batch = Mapping[str, Any]
Sums = dict[str, Any]
IN_FLIGHT = 4


class Model(Protocol):
    """What training needs of a model, see `modjax.models`."""

    def loss_sums(
        self, params: Any, batch: Any, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, Sums]: ...

    def denominator(self, sums: Sums) -> jax.Array: ...


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient was not a finite number; `step` says in which step (1-based, as in the logs)."""

    def __init__(self, step: int, what: str):
        super().__init__(
            f"{what} is not finite at step {step}; nothing was saved after it. Lower the learning rate, clip gradients "
            "(clip_norm), or compute in float32, and start again from the last checkpoint"
        )
        self.step = step


@flax.struct.dataclass
class TrainState:
    """What a training step reads and replaces.

    Attributes:
      step: int32 [], steps done.
      trained: nested dict, the parameters that train.
      opt_state: optax's state of them.
      rng: uint32 [2], the run's key; a step draws from fold_in(rng, step), so a resumed run draws the same.
    """

    step: jax.Array
    trained: Any
    opt_state: Any
    rng: jax.Array


def _gradients(
    model: Model, trained: Any, frozen: Any, batch: Batch, rng: jax.Array, microbatches: int
) -> tuple[Any, Sums]:
    """Gradients of the trained part and the batch's sums, accumulated over microbatches by a scan.

    Each microbatch takes every `microbatches`-th row, so that it is spread over all devices. Sums are added, and divided
    once by what the model says for the whole batch, so that the result is that of the one big batch.
    """

    def loss_sum(trained: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Sums]:
        return model.loss_sums(optimizers.combine(trained, frozen), batch, rng)

    grad = jax.grad(loss_sum, has_aux=True)
    if microbatches == 1:
        grads, sums = grad(trained, batch, rng)
    else:
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), dict(batch)
        )
        rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(microbatches))

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(trained, *part)), None

        shapes = jax.eval_shape(grad, trained, *jax.tree.map(lambda x: x[0], (parts, rngs)))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, (parts, rngs))
    scale = 1.0 / model.denominator(sums)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), sums


def train_step(
    model: Model,
    optimizer: optimizers.Optimizer,
    transform: optax.GradientTransformation,
    microbatches: int,
    factors: Mapping[str, Any],
    state: TrainState,
    frozen: Any,
    batch: Batch,
    stop: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      factors: {path: what the update of that parameter is multiplied by}.
      stop: int32 [data shards], 1 where a process was asked to stop; its maximum comes back, so that all agree.

    Returns:
      The next state, and scalars: the model's sums, `grad_norm`, `stop`, and the learning rates of the step.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    grads, sums = _gradients(model, state.trained, frozen, batch, rng, microbatches)
    updates, opt_state = transform.update(grads, state.opt_state, state.trained)
    if factors:
        flat = traverse_util.flatten_dict(updates, sep="/")
        flat.update({path: flat[path] * factor for path, factor in factors.items()})
        updates = traverse_util.unflatten_dict(flat, sep="/")
    scalars = dict(sums)
    scalars.update(optimizer.rates(state.step))
    scalars["grad_norm"] = optax.global_norm(grads)
    scalars["stop"] = jnp.max(stop)
    trained = optax.apply_updates(state.trained, updates)
    return state.replace(step=state.step + 1, trained=trained, opt_state=opt_state), scalars


class Trainer:
    """The jitted steps of one model, optimizer and mesh.

    Args:
      model: see `Model`.
      optimizer: what trains and how; its groups have already been applied to `trained`.
      mesh: see `partitioning.make_mesh`.
      trained: the trained parameters, arrays or shapes.
      frozen: the frozen parameters, arrays or shapes.
      axes: logical axis names by path, for both.
      microbatches: parts that a batch is computed in, to save memory.
      rates: nested dict of factors on the updates of some trained parameters, broadcast to their shapes.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optimizers.Optimizer,
        mesh: Mesh,
        trained: Any,
        frozen: Any,
        axes: Mapping[str, Any] | None = None,
        microbatches: int = 1,
        rates: Mapping[str, Any] | None = None,
    ):
        self.mesh = mesh
        self.microbatches = microbatches
        self.transform = optimizer.build(trained)
        mine = traverse_util.flatten_dict(dict(trained), sep="/")
        factors = traverse_util.flatten_dict(dict(rates or {}), sep="/")
        factors = {path: factor for path, factor in factors.items() if path in mine}
        whole = partitioning.replicated(mesh)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        homes = partitioning.shardings(trained, axes or {}, mesh)
        opt_shapes = jax.eval_shape(self.transform.init, trained)
        self.state_sharding = TrainState(
            step=whole,  # type: ignore[arg-type]
            trained=homes,
            opt_state=partitioning.like_params(opt_shapes, trained, homes, mesh),
            rng=whole,  # type: ignore[arg-type]
        )
        self.frozen_sharding = partitioning.shardings(frozen, axes or {}, mesh)

        def step(state: TrainState, frozen: Any, batch: Batch, stop: jax.Array) -> Any:
            return train_step(
                model, optimizer, self.transform, microbatches, factors, state, frozen, batch, stop
            )

        def evaluate(trained: Any, frozen: Any, batch: Batch) -> Sums:
            return model.loss_sums(optimizers.combine(trained, frozen), batch, None)[1]

        self.train_step = jax.jit(
            step,
            in_shardings=(self.state_sharding, self.frozen_sharding, rows, rows),
            out_shardings=(self.state_sharding, whole),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            evaluate, in_shardings=(homes, self.frozen_sharding, rows), out_shardings=whole
        )

    def init_state(self, trained: Any, seed: int) -> TrainState:
        """The state at step 0 for trained parameters that lie on the host or the devices."""
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        trained = partitioning.place(trained, self.state_sharding.trained)
        # A copy, because the step donates its state and the caller may still hold these arrays.
        copy = jax.jit(
            lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=self.state_sharding.trained
        )
        init = jax.jit(self.transform.init, out_shardings=self.state_sharding.opt_state)
        trained = copy(trained)
        return TrainState(
            step=partitioning.place(np.int32(0), self.state_sharding.step),
            trained=trained,
            opt_state=init(trained),
            rng=partitioning.place(key, self.state_sharding.rng),
        )

    def evaluate(self, state: TrainState, frozen: Any, batches: Iterable[Batch]) -> Sums:
        """The sums over batches (host arrays, this process's rows), without dropout."""
        total: collections.Counter[str] = collections.Counter()
        for batch in batches:
            sums = self.eval_step(state.trained, frozen, partitioning.place_batch(batch, self.mesh))
            total.update({name: float(value) for name, value in jax.device_get(sums).items()})
        return dict(total)


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
) -> tuple[TrainState, int]:
    """Trains until `train_steps` steps are done in all, or until asked to stop.

    Args:
      batches: this process's rows, one dict of host arrays per step; exactly one is taken per step.
      log: called with a step and the sums since the last call, `seconds` and `steps` added.
      save: called every `save_every` steps, and with the last state (also when stopped).
      evaluate: called every `eval_every` steps, and at the end unless stopped.

    Returns:
      The last state and its step.

    Raises:
      NonFiniteLossError: names the step.
      ValueError: if the input ends before the training does.
    """
    step = int(jax.device_get(state.step))
    reader = _Reader(step, log_every, log)
    flags = [_flag(trainer.mesh, value) for value in (0, 1)]
    saved = step

    def keep(step: int) -> None:
        nonlocal saved
        if save is not None and saved != step:
            reader.drain()
            save(step, state)
            saved = step

    while step < train_steps:
        try:
            batch = partitioning.place_batch(next(batches), trainer.mesh)
        except StopIteration:
            raise ValueError(
                f"the input ended at step {step} of {train_steps}: let it repeat, or train fewer steps"
            ) from None
        asked = stop is not None and stop.received is not None
        state, scalars = trainer.train_step(state, frozen, batch, flags[asked])
        step += 1
        reader.push(step, scalars)
        # One process knows at once. Several follow the flag that the step itself brought to all of them.
        if reader.stopped or (asked and jax.process_count() == 1):
            keep(step)
            return state, step
        if save_every and step % save_every == 0:
            keep(step)
        if eval_every and evaluate is not None and (step % eval_every == 0 or step == train_steps):
            reader.drain()
            evaluate(step, state)
            reader.start_clock()
    reader.drain()
    keep(step)
    return state, step


def _flag(mesh: Mesh, value: int) -> jax.Array:
    """int32 [data shards], this process's part full of `value`."""
    home = NamedSharding(mesh, PartitionSpec("data"))
    shape = (mesh.shape["data"],)
    part = np.full(shape, value, np.int32)
    return jax.make_array_from_callback(shape, home, lambda index: part[index])


class _Reader:
    """Reads the scalars of steps that are still in flight, oldest first, and adds them up between two log lines."""

    def __init__(
        self, step: int, every: int, log: Callable[[int, dict[str, float]], None] | None
    ) -> None:
        self.stopped = False
        self._every, self._log = every, log
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._totals: dict[str, float] = {}
        self._steps = 0
        self.start_clock()

    def start_clock(self) -> None:
        self._clock = time.monotonic()

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
        for name, value in values.items():
            if name.startswith("learning_rate"):
                self._totals[name] = value
            else:
                self._totals[name] = self._totals.get(name, 0.0) + value
        if self._every and step % self._every == 0 and self._log is not None:
            now = time.monotonic()
            self._log(step, self._totals | {"seconds": now - self._clock, "steps": self._steps})
            self._totals, self._steps, self._clock = {}, 0, now
