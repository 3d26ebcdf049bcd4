"""A network small enough to see through, a model around it, and an endless input."""

import dataclasses
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax import loop, optimizers, partitioning, trainer


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, name="base")(x)
        x = nn.Dropout(0.5 if train else 0.0, deterministic=not train)(x)
        return nn.Dense(4, name="adapter")(nn.relu(x))


@dataclasses.dataclass(frozen=True)
class Model:
    """Regression with per-row weights: the loss is a sum, or a mean per weight."""

    mean: bool = True
    dropout: bool = False

    def init(self, rng):
        return Tower().init(rng, jnp.zeros((1, 8)), False)["params"]

    def loss_sums(self, params, batch, rng):
        train = self.dropout and rng is not None
        rngs = {"dropout": rng} if train else None
        out = Tower().apply({"params": params}, batch["x"], train, rngs=rngs)
        loss = jnp.sum(jnp.square(out - batch["y"]).sum(-1) * batch["w"])
        weight = batch["w"].sum()
        draw = jnp.float32(0) if rng is None else jax.random.uniform(rng)
        return loss, {"loss": loss, "weight": weight, "draw": draw}

    def denominator(self, sums):
        return sums["weight"] if self.mean else jnp.float32(1)


class Batches:
    """An endless input whose position can be saved."""

    def __init__(self, rows=16, bad_at=None):
        self.rows, self.position, self.bad_at = rows, 0, bad_at
        self.index, self.count = jax.process_index(), jax.process_count()

    def __iter__(self):
        return self

    def __next__(self):
        draw = np.random.default_rng(self.position)
        self.position += 1
        x = draw.normal(size=(self.rows, 8)).astype(np.float32)
        if self.position == self.bad_at:
            x[3, 2] = np.nan
        y = np.abs(x[:, :4]).astype(np.float32)
        batch = {"x": x, "y": y, "w": draw.integers(0, 5, self.rows).astype(np.float32)}
        # Of each batch this process's rows, so that any number of processes trains on the same.
        return {name: np.split(rows, self.count)[self.index] for name, rows in batch.items()}

    def save(self, directory):
        if self.index == 0:
            np.save(os.path.join(directory, "position.npy"), self.position)

    def restore(self, directory):
        self.position = int(np.load(os.path.join(directory, "position.npy")))


def make(
    model=None, devices=None, model_parallel=1, microbatches=1, rate=1e-2, axes=None, algorithm=None
):
    model = Model() if model is None else model
    mesh = partitioning.make_mesh(model_parallel, jax.devices()[:1] if devices is None else devices)
    optimizer = optimizers.Optimizer(
        algorithm=optimizers.adamw() if algorithm is None else algorithm,
        learning_rate=rate,
        groups=(optimizers.Group("adapter/.*"), optimizers.Group(".*", train=False)),
    )
    params = model.init(jax.random.key(0))
    trained, frozen = optimizers.select(params, optimizer.groups)
    made = trainer.Trainer(model, optimizer, mesh, trained, frozen, axes, microbatches)
    state = made.init_state(trained, seed=1)
    return made, state, partitioning.place(frozen, made.frozen_sharding), params


def run(steps=3, batches=None, **options):
    made, state, frozen, params = make(**options)
    state, _ = loop.fit(made, state, frozen, batches or Batches(), steps)
    return jax.device_get(state.trained), frozen, params
