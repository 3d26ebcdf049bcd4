"""Which parameters train, by which algorithm, at which rate.

An `Optimizer` is a description (an algorithm, a schedule, decay, clipping, an ordered list of
groups). `select` divides a parameter tree by the groups in a trained and a frozen part;
`Optimizer.build` makes the optax transformation of the trained part. The frozen part never meets
optax: it has no state and no gradient.

Trees are nested dicts; a path is its keys joined with "/", as in
"encoder/layers_0/attention/query/lora/a".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from modjax import errors, resting

Params = Mapping[str, Any]
Schedule = Callable[[jax.Array], jax.Array]
DECAYS = ("constant", "linear", "cosine", "rsqrt")
HEAD = r"(.*/)?(head|classifier)/.*"  # a task's own output layer, which no base has trained


def schedule(
    peak: float,
    warmup: float = 0,
    decay: str = "constant",
    total_steps: int | None = None,
    final: float = 0.0,
    hold: float = 0,
) -> Schedule:
    """A learning rate as a function of the step (0-based): linear warm-up from 0 to `peak`, then a
    decay.

    Args:
      peak: the rate at the end of the warm-up.
      warmup: how many steps the warm-up takes; a number below 1 is a share of `total_steps`.
      decay: "constant"; "linear" or "cosine" to `final` at `total_steps`; "rsqrt", peak *
        sqrt(warmup / step).
      total_steps: steps of the whole run; needed by "linear", "cosine" and a warm-up given as a
        share.
      final: the rate at `total_steps`.
      hold: until when, warm-up included, the rate stays at `peak` before a linear or cosine decay;
        a number below 1 is a share of `total_steps`. While it lasts, the length of the run can
        still be changed.

    Raises:
      ValueError: a number that is negative or text, an unknown decay, a missing `total_steps`, or a
        warm-up longer than the run.
    """
    numbers = {"peak": peak, "warmup": warmup, "final": final, "hold": hold}
    for name, value in numbers.items():
        errors.check_not_negative(f"schedule.{name}", value)
    if total_steps is not None:
        errors.check_integer("schedule.total_steps", total_steps)
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}.{errors.nearest(str(decay), DECAYS)}")
    needs_total = decay in ("linear", "cosine") or 0 < warmup < 1
    if needs_total and not total_steps:
        raise ValueError(
            f"schedule(decay={decay!r}, warmup={warmup}) needs total_steps, the run's length"
        )
    steps = round(warmup * (total_steps or 0)) if 0 < warmup < 1 else int(warmup)
    if steps < 0 or (total_steps is not None and needs_total and steps > total_steps):
        raise ValueError(f"the warm-up of {steps} steps does not fit in {total_steps} steps")
    start = max(steps, hold * (total_steps or 0) if 0 < hold < 1 else hold)
    if decay in ("linear", "cosine") and start >= (total_steps or 0):
        raise ValueError(
            f"warm-up and hold take {start:g} of {total_steps} steps: nothing is left for the decay"
        )
    span = max((total_steps or 0) - start, 1)

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        value = jnp.full_like(step, peak)
        done = jnp.clip((step - start) / span, 0.0, 1.0)
        if decay == "linear":
            value = peak + (final - peak) * done
        elif decay == "cosine":
            value = final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * done))
        elif decay == "rsqrt":
            value = peak * jnp.sqrt(max(steps, 1) / jnp.maximum(step, max(steps, 1)))
        return value * jnp.minimum(1.0, step / steps) if steps else value

    return rate


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction (arXiv 1412.6980); decoupled decay and the rate are added by `Optimizer`."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def adafactor(
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    momentum: float | None = None,
    min_dim_size_to_factor: int = 128,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Adafactor's direction (arXiv 1804.04235), defaults as T5: factored second moment, update
    clipping, scaled by RMS.

    Turn `multiply_by_parameter_scale` off for adapters whose zero start is not their scale
    (methods.md's recipes do).
    """
    steps = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps
        )
    ]
    if clipping_threshold is not None:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    if multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False))
    return optax.chain(*steps)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose whole path matches `pattern`, and how they are treated; the first group that
    matches decides.

    Attributes:
      pattern: regular expression over the whole path.
      train: False freezes them: no gradient, no optimizer state, not in checkpoints.
      multiplier: factor on the learning rate.
      learning_rate: a rate or schedule of their own instead of the optimizer's.
      weight_decay: a decay of their own instead of the optimizer's.
      name: what its learning rate is logged as, "learning_rate/<name>".
      optional: whether the pattern may match nothing, as that of a task head that only some models have.
    """

    pattern: str
    train: bool = True
    multiplier: float = 1.0
    learning_rate: float | Schedule | None = None
    weight_decay: float | None = None
    optional: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        errors.check_bool(f"Group({self.pattern!r}).train", self.train)
        numbers = {"multiplier": self.multiplier, "weight_decay": self.weight_decay}
        if not callable(self.learning_rate):
            numbers["learning_rate"] = self.learning_rate
        for name, value in numbers.items():
            if value is not None or name == "multiplier":
                errors.check_not_negative(f"Group({self.pattern!r}).{name}", value)


def assign(groups: Sequence[Group], paths: Collection[str]) -> dict[str, int]:
    """Gives each path the index of the first group whose pattern matches it.

    Raises:
      ValueError: a pattern that is not a regular expression, one that matches no path (or none that
        an earlier group left; a closing ".*" may be left empty), or a path that no group covers.
    """
    owners: dict[str, int] = {}
    for index, group in enumerate(groups):
        try:
            compiled = re.compile(group.pattern)
        except re.error as error:
            raise ValueError(
                f"group {index}: {group.pattern!r} is not a regular expression: {error}"
            ) from error
        matches = [path for path in paths if compiled.fullmatch(path)]
        mine = [path for path in matches if path not in owners]
        if not mine and group.pattern != ".*" and not group.optional:
            why = "earlier groups take all it matches" if matches else "matches no parameter"
            raise ValueError(
                f"group {index}: the pattern {group.pattern!r} {why}; it must match a whole path."
                f"{errors.nearest(group.pattern, paths)}"
            )
        owners.update(dict.fromkeys(mine, index))
    missing = [path for path in paths if path not in owners]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters are in no group, so it is not said whether they train: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; "
            "close the list with Group('.*', train=False) to freeze the rest"
        )
    return owners


def select(
    params: Params, groups: Sequence[Group] = (), adapter_paths: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a tree in what trains and what is frozen.

    Args:
      params: base and adapters, one nested dict.
      groups: the ordered groups. Without any, the adapters and a task's head train, or everything if there are no
        adapters.
      adapter_paths: the paths of the adapters' parameters.

    Returns:
      (trained, frozen): two nested dicts that together hold every leaf once.

    Raises:
      ValueError: as `assign`, or if nothing is left to train.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    if groups:
        owners = assign(groups, list(flat))
        chosen = {path for path in flat if groups[owners[path]].train}
    else:
        heads = {path for path in flat if re.fullmatch(HEAD, path)}
        chosen = set(adapter_paths) | heads if adapter_paths else set(flat)
    trained = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    if not trained:
        raise ValueError("nothing would train: every parameter is in a frozen group")
    return (
        traverse_util.unflatten_dict(trained, sep="/"),
        traverse_util.unflatten_dict(frozen, sep="/"),
    )


def combine(first: Params, second: Params) -> dict[str, Any]:
    """The one tree that `select` divided: the union of two nested dicts with no common leaf."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = combine(merged[key], value) if key in merged else value
    return merged


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A description of how the trained parameters are updated.

    Attributes:
      algorithm: the direction of the update, `adamw()` or `adafactor()`, or any optax
        transformation without a rate.
      learning_rate: a number or a schedule.
      weight_decay: decoupled decay, multiplied by the learning rate (arXiv 1711.05101).
      no_decay: regular expression; paths it is found in do not decay: norms, biases, position biases and routers'
        logits by default.
      clip_norm: gradients of larger global norm over all trained parameters are scaled down to it.
      groups: see `Group`; empty means that the adapters train.
      lazy: modules (and routers' rows) of values that no example of a batch has are left as they are by its step, with
        their moments: no momentum, no decay, and their memory is not touched. Bias corrections count all steps. So do
        torch.optim.SparseAdam and TensorFlow Addons' LazyAdam; it is not Adam, whose momentum moves a module on when
        its value has not come up. For algorithms that work element by element, as `adamw`.
    """

    algorithm: optax.GradientTransformation = dataclasses.field(default_factory=adamw)
    learning_rate: float | Schedule = 1e-3
    weight_decay: float = 0.0
    no_decay: str = r"(scale|bias|rel_embedding|(^|/)logits)$"
    clip_norm: float | None = None
    groups: Sequence[Group] = ()
    lazy: bool = False

    def __post_init__(self) -> None:
        if not callable(self.learning_rate):
            errors.check_not_negative("Optimizer.learning_rate", self.learning_rate)
        errors.check_not_negative("Optimizer.weight_decay", self.weight_decay)
        errors.check_bool("Optimizer.lazy", self.lazy)
        clip = self.clip_norm
        if clip is not None and (not errors.is_number(clip) or not clip > 0):
            raise errors.ConfigError(
                f"Optimizer.clip_norm must be a number above 0, or None for no clipping, got {clip!r}."
            )

    def build(
        self, trained: Params, lazy: Mapping[str, Any] | None = None
    ) -> optax.GradientTransformation:
        """The optax transformation for a trained tree, as `select` gives it (only its paths are
        looked at).

        Args:
          trained: the tree.
          lazy: parameters whose modules rest in a step without a gradient, see `modjax.resting`.
        """
        lazy = lazy or {}
        paths = list(traverse_util.flatten_dict(dict(trained), sep="/"))
        if len(self.groups) < 2:
            group = self.groups[0] if self.groups else Group(".*")
            update = self._chain(group, lazy)
        else:
            owners = {path: self._owner(path) for path in paths}
            used = sorted(set(owners.values()))
            update = optax.multi_transform(
                {str(index): self._chain(self.groups[index], lazy) for index in used},
                traverse_util.unflatten_dict({p: str(i) for p, i in owners.items()}, sep="/"),
            )
        update = resting.still(update, lazy)
        if self.clip_norm is None:
            return update
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), update)

    def rates(self, step: jax.Array, paths: Collection[str]) -> dict[str, jax.Array]:
        """The learning rate at a step, one per group that has some of the trained paths: {"learning_rate": [],
        "learning_rate/1": [], "learning_rate/<name>": [], ...}.
        """
        used = sorted({self._owner(path) for path in paths}) if self.groups else []
        found: dict[str, jax.Array] = {}
        for group in [self.groups[i] for i in used] or [Group(".*")]:
            label = f"learning_rate/{group.name or len(found)}"
            if not group.name and "learning_rate" not in found:
                label = "learning_rate"
            found[label] = self._rate(group)(step)
        return found

    def _owner(self, path: str) -> int:
        for index, group in enumerate(self.groups):
            if re.fullmatch(group.pattern, path):
                return index
        raise ValueError(f"the trained parameter {path} is in no group")

    def _rate(self, group: Group) -> Schedule:
        base = self.learning_rate if group.learning_rate is None else group.learning_rate

        def rate(step: jax.Array) -> jax.Array:
            value = base(step) if callable(base) else base
            return jnp.asarray(value, jnp.float32) * group.multiplier

        return rate

    def _chain(self, group: Group, lazy: Mapping[str, Any]) -> optax.GradientTransformation:
        decay = self.weight_decay if group.weight_decay is None else group.weight_decay
        steps = [resting.per_module(self.algorithm, lazy)]
        if decay:
            steps.append(optax.add_decayed_weights(decay, mask=self._decays))
        steps.append(optax.scale_by_learning_rate(self._rate(group)))
        return optax.chain(*steps)

    def _decays(self, tree: Params) -> Params:
        def decays(path: tuple[Any, ...], _: Any) -> bool:
            return re.search(self.no_decay, "/".join(str(key.key) for key in path)) is None

        return jax.tree_util.tree_map_with_path(decays, tree)
