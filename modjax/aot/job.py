"""A gin job as programs for a mesh of chips that need not exist: shapes only, no weight is ever made."""

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from modjax import hub, initialize, launch, optimizers, partitioning, profiling, quantization
from modjax.features import FeatureSpace
from modjax.hub.base import open_base
from modjax.trainer import Trainer, TrainState

# What every run has to be told and no program depends on.
PLACEHOLDERS = ("MODEL_DIR = ''", "TRAIN_STEPS = 1000")
Tree = Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What a training run compiles.

    Attributes:
      model: bound to its feature space.
      optimizer, partitioner, batch_size, microbatches, base_dtype: see `train.train`.
      lengths: {"inputs": L, "targets": L}.
      segments: of a packed row; None if rows are examples.
    """

    model: Any
    optimizer: optimizers.Optimizer
    partitioner: partitioning.Partitioner
    lengths: Mapping[str, int]
    batch_size: int
    microbatches: int
    base_dtype: str | None
    segments: int | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that has been traced and not compiled.

    Attributes:
      lowered: see `jax.stages.Lowered`.
      held: {what: bytes of it on one chip} of its arguments.
      rows: of its batch.
      tokens: positions of its batch, padding included, all streams; of a decoding program those that it writes.
      trips: of a loop whose condition gives no bound.
    """

    lowered: jax.stages.Lowered
    held: Mapping[str, int]
    rows: int
    tokens: int
    trips: int = 1


def from_gin(
    flags: launch.Flags, features: Mapping[str, int] | None = None, segments: int | None = None
) -> Job:
    """The job of a command line as `train.py` takes it.

    Args:
      flags: the gin files and bindings.
      features: {feature: number of values} instead of those of the mixture, which then need not exist.
      segments: of a packed row; found as in training if None, 0 for rows that are examples.

    Raises:
      ConfigError: as `launch.load_gin`, or the job has no network.
    """
    import gin

    given = {binding.partition(" = ")[0] for binding in flags.bindings}
    placeholders = [p for p in PLACEHOLDERS if p.partition(" = ")[0] not in given]
    if features is not None and "MIXTURE_OR_TASK_NAME" not in given:
        placeholders.append("MIXTURE_OR_TASK_NAME = ''")
    bindings = (*placeholders, *flags.bindings)
    launch.load_gin(dataclasses.replace(flags, bindings=bindings), "train")
    import train

    defaults = inspect.signature(train.train).parameters

    def ask(name: str) -> Any:
        try:
            return copy.deepcopy(gin.query_parameter(f"train.train.{name}"))
        except ValueError:
            if name in ("model", "optimizer", "task_feature_lengths", "batch_size"):
                raise launch.ConfigError(
                    f"no gin file sets train.train.{name}: a job is a base, a method and a run "
                    "(--gin_file=F each)"
                ) from None
            return defaults[name].default

    model = ask("model")
    if model is None:
        raise launch.ConfigError("the job has no MODEL: give a file of gin_configs/bases")
    lengths = ask("task_feature_lengths")
    if features is None:
        from modjax.data import registry

        launch.import_tasks(ask("mixture_or_task_module"))
        space = registry.feature_space(
            ask("mixture_or_task_name"), ask("features"), model.looks_up_features
        )
    else:
        space = generated_space(features)
    if segments is None:
        pack, segments = ask("pack"), ask("max_segments")
        if not (model.PACKS if pack is None else pack):
            segments = 0
        elif segments is None:
            from modjax.data import converters

            segments = converters.default_max_segments(lengths)
    return Job(
        model.with_space(space),
        ask("optimizer"),
        ask("partitioner"),
        lengths,
        ask("batch_size"),
        ask("microbatches"),
        ask("base_dtype") or _dtype_of(ask("base")),
        segments or None,
    )


def _dtype_of(base: str | None) -> str | None:
    """That of a base's files, which a run keeps the base in; None, as what a network declares, where there are none."""
    if not base or not hub.is_base(base):
        return None
    kinds = [
        k for k in open_base(base).files.dtypes.values() if jax.numpy.issubdtype(k, np.floating)
    ]
    return functools.reduce(np.promote_types, kinds).name


def generated_space(features: Mapping[str, int]) -> FeatureSpace:
    """A feature space with so many values of each feature, and a dataset for each value of the last."""
    values = {name: tuple(f"{name}{i}" for i in range(count)) for name, count in features.items()}
    most = max(features.values(), default=1)
    return FeatureSpace(tuple(values.items()), tuple(f"dataset{i}" for i in range(most)))


def training(job: Job, devices: Sequence[Any]) -> Program:
    """One step of the job on a mesh of devices.

    Raises:
      ValueError: devices or batch that do not divide.
    """
    mesh = job.partitioner.mesh(devices)
    partitioning.check_batch(job.batch_size, mesh, job.microbatches)
    space = _space(job)
    batch = job.model.example_batch(job.lengths, space, job.segments, rows=job.batch_size)
    layout = initialize.layout(job.model, batch, job.optimizer.groups, job.partitioner)
    frozen = to_dtype(layout.frozen, job.base_dtype)
    trainer = Trainer(
        job.model,
        job.optimizer,
        mesh,
        layout.trained,
        frozen,
        layout.axes,
        job.microbatches,
        layout.rates,
        layout.lazy,
        job.partitioner.all_rules,
    )
    shaped = jax.ShapeDtypeStruct
    state = TrainState(
        step=shaped((), np.int32),  # type: ignore[arg-type]
        trained=layout.trained,
        opt_state=jax.eval_shape(trainer.transform.init, layout.trained),
        rng=shaped((2,), np.uint32),  # type: ignore[arg-type]
    )
    stop = shaped((mesh.size,), np.int32)
    homes = trainer.state_sharding
    held = {
        "base": bytes_per_chip(frozen, trainer.frozen_sharding),
        "trained": bytes_per_chip(state.trained, homes.trained),
        "optimizer": bytes_per_chip(state.opt_state, homes.opt_state),
    }
    lowered = trainer.train_step.lower(state, frozen, batch, stop)
    return Program(lowered, held, job.batch_size, _positions(batch))


def decoding(job: Job, devices: Sequence[Any], **options: Any) -> Program:
    """The prediction of one batch, all steps of it. Raises as `training`."""
    mesh = job.partitioner.mesh(devices)
    partitioning.check_batch(job.batch_size, mesh)
    batch = job.model.example_batch(job.lengths, _space(job), rows=job.batch_size)
    layout = initialize.layout(job.model, batch, job.optimizer.groups, job.partitioner)
    params = optimizers.combine(layout.trained, to_dtype(layout.frozen, job.base_dtype))
    rules = job.partitioner.all_rules
    homes = partitioning.shardings(params, layout.axes, mesh, rules)
    targets = job.lengths["targets"]
    if job.model.STREAMS == ("decoder",):
        # As evaluation gives them: prompts and answers apart.
        batch = {name: batch[name] for name in ("features", "tasks")}
        for name, length in (("prompt", job.lengths["inputs"]), ("answer", targets)):
            batch[f"decoder_{name}_tokens"] = jax.ShapeDtypeStruct(
                (job.batch_size, length), np.int32
            )

    def compute(params: Tree, batch: Tree) -> jax.Array:
        with partitioning.in_force(mesh, rules):
            return job.model.predict_batch(params, batch, jax.random.key(0), **options)

    step = jax.jit(
        compute,
        in_shardings=(homes, partitioning.rows(mesh)),
        out_shardings=partitioning.replicated(mesh),
    )
    held = {"parameters": bytes_per_chip(params, homes)}
    lowered = step.lower(params, batch)
    return Program(lowered, held, job.batch_size, job.batch_size * targets, targets)


def to_dtype(tree: Tree, dtype: str | None) -> Tree:
    """`initialize.to_dtype` for shapes."""
    if dtype is None or not tree:
        return tree
    if dtype == "int8":
        return quantization.shapes(tree)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, dtype if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x.dtype
        ),
        tree,
    )


def bytes_per_chip(tree: Tree, homes: Tree) -> int:
    """Bytes of a tree of arrays or shapes on one device."""
    sizes = jax.tree.map(
        lambda x, home: math.prod(home.shard_shape(tuple(x.shape))) * np.dtype(x.dtype).itemsize,
        tree,
        homes,
    )
    return sum(jax.tree.leaves(sizes))


def _positions(batch: Mapping[str, Any]) -> int:
    names = ("encoder_input_tokens", "decoder_target_tokens")
    return sum(math.prod(batch[name].shape) for name in names if name in batch)


def _space(job: Job) -> FeatureSpace:
    adapted = job.model.adapted
    return FeatureSpace((), ()) if adapted is None else adapted.space


def model_flops(job: Job) -> float:
    """Operations of a step that no layout, recomputation or method changes: products of the base, forward, and
    backward to its activations, and to its weights where nothing is frozen. What adapters add is overhead.
    """
    plain = {"consistency": 0.0, "loss_chunk": None}
    model = dataclasses.replace(job.model, module=job.model.network, **plain)
    batch = model.example_batch(job.lengths, FeatureSpace((), ()), job.segments, job.batch_size)
    params = initialize.variable_shapes(model, batch)["params"]
    traced = jax.make_jaxpr(lambda params, batch: model.loss_sums(params, batch, None)[0])
    forward = traced(params, batch)
    weights, others = (profiling.product_flops(forward, batched) for batched in (False, True))
    return weights * (2 if job.model.adapted is not None else 3) + 3 * others
