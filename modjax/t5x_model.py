"""Our models as T5X's: `python -m t5x.train`, `t5x.eval` and `t5x.infer` drive any of them, with any method.

T5X asks a model for its variables, its loss with metrics, its predictions and scores, an optimizer and a feature
converter. `Model` answers around a model of `modjax.models`. Nothing here needs T5X to be imported; what only T5X uses
imports it where it is used. `gin_configs/t5x` has the files, `docs/t5x.md` says how to use them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import serialization, traverse_util
from flax.linen import partitioning as flax_partitioning

from modjax import initialize, launch, optimizers
from modjax.features import FeatureSpace, Unknown

SPACE_FILE = "feature_space.json"
Batch = Mapping[str, Any]


class Model:
    """A model of `modjax.models` under T5X's protocol (its `BaseModel`, by shape).

    Where a MODEL_DIR or a checkpoint has a feature space beside it, that is the model's, so that every name finds its
    own parameters; otherwise that of the mixture.

    Args:
      model: how it computes, without a feature space.
      mixture_or_task_name: what is trained on, or evaluated.
      mixture_or_task_module: the module(s) that register it.
      optimizer: what trains, by which algorithm; None to evaluate.
      features: which of the tasks' features a new feature space has; all of them if None.
      directories: where a feature space may lie, the first that has one: MODEL_DIRs, or checkpoints in them.
      unknown: what becomes of a value that the feature space lacks: an "error", or "none", as in evaluation on a new
        language.

    Raises:
      ValueError: the tasks do not fit the model, or the stored feature space.
    """

    def __init__(
        self,
        model: Any,
        mixture_or_task_name: str,
        mixture_or_task_module: str | Sequence[str] | None = None,
        optimizer: optimizers.Optimizer | None = None,
        features: Sequence[str] | None = None,
        directories: Sequence[str | None] = (),
        unknown: Unknown = "error",
    ):
        from modjax.data import checks, registry

        launch.import_tasks(mixture_or_task_module)
        tasks = registry.tasks_of(mixture_or_task_name)
        for task in tasks:
            checks.check_vocabularies(task, model)
        space = _space(model, mixture_or_task_name, features, directories, unknown)
        self._model = model if space is None else model.with_space(space)
        self._optimizer = optimizer
        self._unknown = unknown
        self.space = space

    @property
    def module(self) -> Any:
        """The network, adapted or not."""
        return self._model.module

    @property
    def adapted(self) -> Any:
        """The adapted module, or None for a plain network."""
        return self._model.adapted

    @property
    def FEATURE_CONVERTER_CLS(self) -> Any:
        """The feature converter, called as `cls(pack=..., use_custom_packing_ops=...)`."""
        if self.space is None:
            return self._model.converter.PLAIN
        return self._model.converter.bind(self.space, unknown=self._unknown)

    @functools.cached_property
    def layout(self) -> initialize.Layout:
        """What the parameters look like, and which of them train."""
        lengths = {"inputs": 1, "targets": 1}  # any will do
        batch = self._model.example_batch(lengths, self.space or FeatureSpace(()))
        groups = self._optimizer.groups if self._optimizer is not None else ()
        return initialize.layout(self._model, batch, groups)

    @functools.cached_property
    def optimizer_def(self) -> Any:
        """The optimizer, an `OptimizerDef` of T5X; needs T5X."""
        if self._optimizer is None:
            raise ValueError("t5x_model.Model has no optimizer, so it can be evaluated only.")
        return optimizer_def(transformation(self._optimizer, self.layout))

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> flax.core.FrozenDict:
        """{params, params_axes}: the base at random, the adapters as a run starts with them.

        Args:
          rng: key.
          input_shapes: of a batch's features.
          input_types: their dtypes; int32 where they are not said.
        """
        types = input_types or {}
        batch = {name: jnp.zeros(s, types.get(name, jnp.int32)) for name, s in input_shapes.items()}
        params = self._model.init(rng, batch)["params"]
        flat = traverse_util.flatten_dict(params, sep="/")
        named = {
            path: self.layout.axes.get(path, (None,) * leaf.ndim) for path, leaf in flat.items()
        }
        axes = {
            f"{path}_axes": flax_partitioning.AxisMetadata(names=jax.sharding.PartitionSpec(*names))
            for path, names in named.items()
        }
        nested = traverse_util.unflatten_dict(axes, sep="/")
        return flax.core.freeze({"params": params, "params_axes": nested})

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(loss, {name: a clu metric}); the frozen parameters have no gradient. `dropout_rng=None`: no dropout."""
        trained = set(traverse_util.flatten_dict(self.layout.trained, sep="/"))
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x if _name(path) in trained else jax.lax.stop_gradient(x), params
        )
        loss, sums = self._model.loss_fn(params, batch, dropout_rng)
        return loss, _metrics(loss, sums)

    def eval_fn(self, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch(self, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """The best prediction of each example, `[B, L]`."""
        return self._model.predict_batch(params, batch, rng)

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(predictions `[B, L]`, {"scores": `[B]`})."""
        return self._model.predict_batch_with_aux(params, batch, rng)

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ) -> jax.Array:
        """Log probability of each example's target, float32 `[B]`."""
        return self._model.score_batch(params, batch, return_intermediates)


def take_base(
    stored: Mapping[str, Any], state: Mapping[str, Any], *, model: Model, is_resuming: bool = False
) -> Mapping[str, Any]:
    """A `state_transformation_fn` of T5X: starts a run from a base's weights, with or without adapters in it.

    Adapters that the checkpoint lacks start as new ones, the optimizer and the count of steps start anew. A resumed run
    takes everything as it is.

    Args:
      stored: the checkpoint's state, its leaves unread.
      state: the run's.
      model: the run's.
      is_resuming: whether the checkpoint is the run's own.

    Raises:
      ValueError: the checkpoint lacks a parameter of the base.
    """
    if is_resuming:
        return stored
    names = model.adapted.names if model.adapted is not None else ()

    def lacks(path: str) -> bool:
        at: Any = stored["target"]
        for key in path.split("/"):
            if not isinstance(at, Mapping) or key not in at:
                return True
            at = at[key]
        return False

    missing = [
        path
        for path in traverse_util.flatten_dict(dict(state["target"]), sep="/")
        if lacks(path) and not set(path.split("/")) & set(names) and not initialize.is_head(path)
    ]
    if missing:
        more = f" ({len(missing)} in all)" if len(missing) > 6 else ""
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH lacks {', '.join(missing[:6])}{more}. Choose the gin file of the base that it "
            "holds; a network of scanned layers comes from `python -m modjax.hub import_t5x` and `export_t5x`."
        )
    return {"target": stored["target"]}


def get_dataset(
    cfg: Any,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Any,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
    *,
    model_dir: str,
) -> Any:
    """A `get_dataset_fn` of T5X: its own, whose position is restored from the run's own checkpoints only.

    T5X, told to save the data's position, also wants one in the checkpoint that a run starts from.
    """
    from clu.data.dataset_iterator import TfDatasetIterator
    from t5x import utils

    class Positioned(TfDatasetIterator):
        def restore(self, filename: Any) -> None:
            if epath.Path(model_dir) in epath.Path(filename).parents:
                super().restore(filename)

    dataset = utils.get_dataset(
        cfg, shard_id, num_shards, feature_converter_cls, num_epochs, continue_from_last_checkpoint
    )
    return Positioned(dataset, checkpoint=True)


def summarize(model_dir: str, summary_writer: Any, step: int, *, model: Model) -> None:
    """A `summarize_config_fn` of T5X: its own, and beside config.gin the feature space and what trains."""
    from t5x import gin_utils

    gin_utils.summarize_gin_config(model_dir, summary_writer, step)
    if jax.process_index() == 0 and model.space is not None:
        text = json.dumps(model.space.to_json(), indent=1, ensure_ascii=False)
        (epath.Path(model_dir) / SPACE_FILE).write_text(text + "\n")


def transformation(
    optimizer: optimizers.Optimizer, layout: initialize.Layout
) -> optax.GradientTransformation:
    """What an optimizer does to the trained parameters, for the whole tree: the others have no state and stay.

    Args:
      optimizer: the description.
      layout: of the model's parameters; its rates multiply the updates.

    Raises:
      ValueError: it is lazy, which takes a step that knows its batch.
    """
    if optimizer.lazy:
        raise ValueError("Optimizer.lazy works in train.py; T5X's optimizers do not see the batch.")
    inner = optimizer.build(layout.trained, layout.lazy)
    trained = set(traverse_util.flatten_dict(layout.trained, sep="/"))

    def part(tree: Any) -> Any:
        flat = traverse_util.flatten_dict(dict(tree), sep="/")
        mine = {path: x for path, x in flat.items() if path in trained}
        return traverse_util.unflatten_dict(mine, sep="/")

    def times(tree: Any, factors: Mapping[str, Any]) -> Any:
        flat = traverse_util.flatten_dict(tree, sep="/")
        flat |= {path: flat[path] * factor for path, factor in factors.items() if path in flat}
        return traverse_util.unflatten_dict(flat, sep="/")

    def init(params: Any) -> Any:
        return inner.init(part(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # What has rate 0 does not count for clipping either.
        moving = {path: factor != 0 for path, factor in layout.rates.items()}
        mine = None if params is None else part(params)
        updates, state = inner.update(times(part(grads), moving), state, mine)
        flat = traverse_util.flatten_dict(times(updates, layout.rates), sep="/")
        zeros = jax.tree_util.tree_map_with_path(
            lambda path, g: flat[_name(path)] if _name(path) in flat else jnp.zeros_like(g), grads
        )
        return zeros, state

    return optax.GradientTransformation(init, update)


def optimizer_def(transform: optax.GradientTransformation) -> Any:
    """An optax transformation as T5X's `OptimizerDef`, with any state; needs T5X.

    T5X's own wrapper knows the states of some transformations by name. Here a leaf of the state that mirrors a
    parameter, in path and in shape, shards as the parameter does, and all others are replicated.
    """
    from t5x import optimizers as t5x_optimizers

    empty = traverse_util.empty_node

    class Definition(t5x_optimizers.OptaxWrapper):
        def state_dict(self, target: Any, state: Any) -> dict[str, Any]:
            flat = traverse_util.flatten_dict(serialization.to_state_dict(state))
            # T5X joins keys with "/" and splits them again, so that no key may have one in it.
            nested = traverse_util.unflatten_dict(
                {"/".join(k): v for k, v in flat.items()}, sep="/"
            )
            return {"target": serialization.to_state_dict(target), "state": nested}

        def restore_state(self, target: Any, state: Any, stored: Any) -> tuple[Any, Any]:
            like = serialization.to_state_dict(state)
            flat = traverse_util.flatten_dict(like, keep_empty_nodes=True)
            found = traverse_util.flatten_dict(dict(stored["state"]), sep="/")
            missing = [
                "/".join(k) for k, v in flat.items() if v is not empty and "/".join(k) not in found
            ]
            if missing:
                raise ValueError(
                    f"The checkpoint's optimizer is another one: it lacks {', '.join(missing[:4])}."
                )
            filled = {k: v if v is empty else found["/".join(k)] for k, v in flat.items()}
            return (
                serialization.from_state_dict(target, stored["target"]),
                serialization.from_state_dict(state, traverse_util.unflatten_dict(filled)),
            )

        def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
            shapes = traverse_util.flatten_dict(dict(optimizer.target), sep="/")
            axes = traverse_util.flatten_dict(dict(param_logical_axes), sep="/")
            flat = traverse_util.flatten_dict(optimizer.state_dict()["state"], sep="/")

            def follow(path: str, leaf: Any) -> Any:
                keys = path.split("/")
                for start in range(len(keys)):
                    name = "/".join(keys[start:])
                    if name in shapes and shapes[name].shape == getattr(leaf, "shape", None):
                        return axes[name]
                return None

            state = {path: follow(path, leaf) for path, leaf in flat.items()}
            nested = traverse_util.unflatten_dict(state, sep="/")
            return optimizer.restore_state({"target": param_logical_axes, "state": nested})

    return Definition(transform)


def _space(
    model: Any,
    mixture: str,
    features: Sequence[str] | None,
    directories: Sequence[str | None],
    unknown: Unknown,
) -> FeatureSpace | None:
    """The feature space that lies in a directory, or that of the mixture; None if tasks are SeqIO's alone."""
    from modjax.data import carry, registry, seqio

    tasks = [seqio.TaskRegistry.get(name) for name in registry.tasks_of(mixture)]
    routed = any(
        rule.mixture.router.routes_by != ()
        for rule in (model.adapted.rules if model.adapted else ())
    )
    if not routed and any(carry.DATASET_KEY not in task.output_features for task in tasks):
        return None

    def derived() -> FeatureSpace:
        return registry.feature_space(mixture, features, model.looks_up_features)

    for directory in filter(None, directories):
        for folder in (epath.Path(directory), epath.Path(directory).parent):
            if (folder / SPACE_FILE).exists():
                stored = FeatureSpace.from_json(json.loads((folder / SPACE_FILE).read_text()))
                if unknown == "none":
                    return registry.with_room(stored, mixture)
                return initialize.resolve_space(derived(), stored, True, folder)
    if routed and unknown == "none":
        places = ", ".join(str(d) for d in directories if d)
        raise ValueError(
            f"no {SPACE_FILE} in {places or 'any directory'} or beside it: without it the ids that the adapters were "
            "trained with are not known. T5X writes it in MODEL_DIR, `export_t5x` beside a checkpoint."
        )
    return derived()


def _metrics(loss: jax.Array, sums: Mapping[str, jax.Array]) -> dict[str, Any]:
    """T5X's names for what a step is worth, as clu metrics that it adds up over steps."""
    from clu.metrics import Average

    def share(total: str, count: str) -> Average:
        return Average(total=sums[total], count=sums[count])

    metrics = {
        "loss": _per_step(loss),
        "z_loss": _per_step(sums["z_loss"]),
        "accuracy": share("correct", "weight"),
        "loss_per_nonpadding_target_token": share("loss", "weight"),
        "non_padding_fraction/loss_weights": share("weight", "target_positions"),
        "non_padding_fraction/overall": share("tokens", "positions"),
        "effective_batch_size": _per_step(sums["sequences"]),
    }
    if "consistency" in sums:
        metrics["consistency"] = share("consistency", "weight")
    return metrics


def _per_step(total: jax.Array) -> Any:
    """A step's total: by T5X's class, which knows that microbatches are parts of one step, where there is T5X."""
    try:
        from t5x.metrics import AveragePerStep
    except ImportError:
        from clu.metrics import Average

        return Average(total=total, count=jnp.ones((), jnp.int32))
    return AveragePerStep(total=total)


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(key.key) for key in path)
