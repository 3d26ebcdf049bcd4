"""The training state and the two jitted steps.

The frozen base is an argument of the steps, never part of the state: it is not differentiated, not
donated, not saved.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from modjax import adapters, optimizers, partitioning, profiling

Batch = Mapping[str, Any]
Sums = dict[str, Any]


class Model(Protocol):
    """What training needs of a model, see `modjax.models`."""

    def loss_sums(
        self, params: Any, batch: Any, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, Sums]: ...

    def denominator(self, sums: Sums) -> jax.Array: ...


@flax.struct.dataclass
class TrainState:
    """What a training step reads and replaces.

    Attributes:
      step: int32 [], steps done.
      trained: nested dict, the parameters that train.
      opt_state: optax's state of them.
      rng: uint32 [2], the run's key; a step draws from fold_in(rng, step), so a resumed run draws
        the same.
    """

    step: jax.Array
    trained: Any
    opt_state: Any
    rng: jax.Array


def _gradients(
    model: Model, trained: Any, frozen: Any, batch: Batch, rng: jax.Array, microbatches: int
) -> tuple[Any, Sums]:
    """Gradients of the trained part and the batch's sums, accumulated over microbatches by a scan.

    Each microbatch takes every `microbatches`-th row, so that it is spread over all devices. Sums
    are added, and divided once by what the model says for the whole batch, so that the result is
    that of the one big batch.
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


def _times(tree: Any, factors: Mapping[str, Any]) -> Any:
    """A nested dict with the leaves at some paths multiplied."""
    if not factors:
        return tree
    flat = traverse_util.flatten_dict(tree, sep="/")
    flat.update({path: flat[path] * factor for path, factor in factors.items()})
    return traverse_util.unflatten_dict(flat, sep="/")


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
    active: adapters.ActiveModules | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      factors: {path: what the update of that parameter is multiplied by}.
      stop: int32 [devices], 1 where a process was asked to stop; its maximum comes back, so
        that all agree.
      active: if given, the step reads and writes the modules alone that the batch uses.

    Returns:
      The next state, and scalars: the model's sums, `grad_norm`, `stop`, and the learning rates of
        the step.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    frozen_parts: Mapping[str, Any] = {
        path: factor != 0 for path, factor in factors.items() if (factor == 0).any()
    }
    trained, opt_state = state.trained, state.opt_state
    if active is not None:
        model, batch, index = active.narrow(batch)
        trained, opt_state = active.take((trained, opt_state), index)
        frozen_parts, factors = active.factors(frozen_parts, index), active.factors(factors, index)
    grads, sums = _gradients(model, trained, frozen, batch, rng, microbatches)
    # Not only their updates: clipping goes by the norm of what trains.
    grads = _times(grads, frozen_parts)
    updates, opt_state = transform.update(grads, opt_state, trained)
    updates = _times(updates, factors)
    scalars = dict(sums)
    scalars.update(optimizer.rates(state.step, traverse_util.flatten_dict(state.trained, sep="/")))
    scalars["grad_norm"] = optax.global_norm(grads)
    scalars["stop"] = jnp.max(stop)
    trained = optax.apply_updates(trained, updates)
    if active is not None:
        before = (state.trained, state.opt_state)
        trained, opt_state = active.put(before, (trained, opt_state), index)
    step = state.step + 1
    return dataclasses.replace(state, step=step, trained=trained, opt_state=opt_state), scalars


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
      rates: nested dict of factors on the updates of some trained parameters, broadcast to their
        shapes; where a factor is 0, the parameter is frozen.
      lazy: parameters whose modules rest in a step that does not use them, see `modjax.resting`.
      rules: what the names of `axes`, and those of activations, mean on the mesh.
      eval_model: the model bound to the feature space of the batches that are evaluated, if that has room for more
        values at once.
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
        lazy: Mapping[str, Any] | None = None,
        rules: partitioning.Rules = partitioning.RULES,
        eval_model: Model | None = None,
    ):
        self.mesh = mesh
        evaluated = model if eval_model is None else eval_model
        self.microbatches = microbatches
        self._programs: dict[Any, profiling.Program] = {}
        self.transform = optimizer.build(trained, lazy)
        mine = traverse_util.flatten_dict(dict(trained), sep="/")
        factors = traverse_util.flatten_dict(dict(rates or {}), sep="/")
        factors = {path: factor for path, factor in factors.items() if path in mine}
        whole = partitioning.replicated(mesh)
        rows = partitioning.rows(mesh)
        homes = partitioning.shardings(trained, axes or {}, mesh, rules)
        opt_shapes = jax.eval_shape(self.transform.init, trained)
        self.state_sharding = TrainState(
            step=whole,  # type: ignore[arg-type]
            trained=homes,
            opt_state=partitioning.like_params(opt_shapes, trained, homes, mesh),
            rng=whole,  # type: ignore[arg-type]
        )
        active = None
        if optimizer.lazy:
            active = adapters.ActiveModules(model, trained)
            active.check_state(opt_shapes)
        self.frozen_sharding = partitioning.shardings(frozen, axes or {}, mesh, rules)

        def step(state: TrainState, frozen: Any, batch: Batch, stop: jax.Array) -> Any:
            fixed = (model, optimizer, self.transform, microbatches, factors)
            with partitioning.in_force(mesh, rules):
                return train_step(*fixed, state, frozen, batch, stop, active)

        def evaluate(trained: Any, frozen: Any, batch: Batch) -> Sums:
            with partitioning.in_force(mesh, rules):
                return evaluated.loss_sums(optimizers.combine(trained, frozen), batch, None)[1]

        self.train_step = jax.jit(
            step,
            in_shardings=(
                self.state_sharding,
                self.frozen_sharding,
                rows,
                partitioning.one_per_device(mesh),
            ),
            out_shardings=(self.state_sharding, whole),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            evaluate, in_shardings=(homes, self.frozen_sharding, rows), out_shardings=whole
        )

    def program(
        self, state: TrainState, frozen: Any, batch: Batch, stop: jax.Array
    ) -> profiling.Program:
        """The training step, compiled for batches like this one; compiled once for each shape."""
        key = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
        if key not in self._programs:
            self._programs[key] = profiling.compile_program(
                self.train_step, state, frozen, batch, stop
            )
        return self._programs[key]

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
