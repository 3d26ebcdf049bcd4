"""Routers over interchangeable modules ("skills"): learned per task, constant, or drawn at random.

Legend: `B` batch, `S` segments, `T` tasks, `H` heads, `M` modules.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters.routing import DATASET, Mix, ModuleName, Shares, WithoutLogits
from modjax.errors import check_not_negative, is_number, nearest
from modjax.features import FeatureSpace

Array = jax.Array
GRANULARITIES = ("layer", "sublayer", "block", "stack", "model")
EPSILON = 1e-12  # of the normalisation, as in the reference code


def skill_names(count: int) -> tuple[ModuleName, ...]:
    """Names of interchangeable modules: they have a number, and mean nothing."""
    return tuple(ModuleName("skill", str(i)) for i in range(count))


def _check_count(router: Any) -> None:
    count = router.num_modules
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        where = type(router).__name__
        raise ValueError(f"{where}.num_modules must be an integer of at least 1, got {count!r}.")


@dataclasses.dataclass(frozen=True)
class Skills:
    """Polytropon (arXiv 2202.13914), and with several heads Poly-S, also called MHR (arXiv 2211.03831).

    A task has logits `z [H, M]` over the modules, and weighs them by `m / (sum of m over the modules + 1e-12)` in each
    head. In training `m = sigmoid((z + log u - log(1 - u)) / temperature)` with u uniform, fresh for each example,
    layer, head and module (a relaxed Bernoulli); in evaluation, or not relaxed, `m = sigmoid(z)`. An unknown task
    (id 0) weighs all modules exactly alike: it owns no logits, so that training cannot move them.

    Attributes:
      num_modules: M, "K" in the papers.
      heads: H; the input and output widths of every adapted layer must be multiples of it.
      by: whose logits an example uses: "dataset" (one row per dataset), or a feature's name (one row per value).
      relaxed: draw in training.
      temperature: of the draw.
      straight_through: round `m` to 0 or 1 in the forward pass, and not in the backward pass.
      granularity: which layers share logits (and draws): "layer" shares none; "sublayer", "block" and "stack" those in
        the same part of the network one, two or three levels up; "model" all.
      spread: logits start uniform in +-spread.
    """

    num_modules: int = 8
    heads: int = 1
    by: str = DATASET
    relaxed: bool = True
    temperature: float = 1.0
    straight_through: bool = False
    granularity: str = "layer"
    spread: float = 1e-3

    composition: ClassVar[str] = "average"
    lazy: ClassVar[bool] = False

    @property
    def routes_by(self) -> tuple[str, ...]:
        """The one name that it looks up."""
        return (self.by,)

    def __post_init__(self) -> None:
        _check_count(self)
        if not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"Skills.heads must be an integer of at least 1, got {self.heads!r}.")
        if not is_number(self.temperature) or not self.temperature > 0:
            raise ValueError(f"Skills.temperature must be positive, got {self.temperature!r}.")
        check_not_negative("Skills.spread", self.spread)
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Skills.granularity: unknown {self.granularity!r}."
                + nearest(self.granularity, GRANULARITIES)
            )

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules."""
        del space
        return skill_names(self.num_modules)

    def rows(self, space: FeatureSpace | None) -> tuple[str, ...]:
        """Whose logits each row holds: names of datasets, or values of the feature `by`; T of them.

        Raises:
          ValueError: no feature space, an unknown feature, one of which an example may have several values, or none.
        """
        if space is None:
            raise ValueError(
                "The router Skills needs a feature space: bind one with Adapted(..., space=space) "
                "or model.with_space(space)."
            )
        if self.by == DATASET:
            rows = space.datasets
        elif self.by not in space.names:
            known = (*space.names, DATASET)
            raise ValueError(
                f"Router Skills: by={self.by!r} is no feature." + nearest(self.by, known)
            )
        else:
            if space.slot_features.count(self.by) > 1:
                raise ValueError(
                    f"Router Skills: an example may have several values of {self.by!r}, so none of them alone can "
                    "route it. Choose another feature, or 'dataset'."
                )
            rows = space.values(self.by)
        if not rows:
            raise ValueError(f"Router Skills: the feature space has no {self.by}s, so no logits.")
        return rows

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array],
    ) -> Shares:
        """The weights of each example, from the parameter `logits [T, H, M]`."""

        def spread(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -self.spread, self.spread)

        shape = (len(self.rows(space)), self.heads, self.num_modules)
        logits = parameter("logits", spread, shape).astype(jnp.float32)
        ids = self._ids(mix, space)
        known = (ids > 0) & (ids <= shape[0])
        z = logits[jnp.where(known, ids - 1, 0)]  # [B, S, H, M]
        if mix.train and self.relaxed:
            z = (z + jax.random.logistic(make_rng(), z.shape)) / self.temperature
        weights = normalised(jax.nn.sigmoid(z), self.straight_through)
        uniform = jnp.full_like(weights, 1.0 / self.num_modules)
        weights = jnp.where(known[..., None, None], weights, uniform)
        return Shares(weights, weights)

    def _ids(self, mix: Mix, space: FeatureSpace | None) -> Array:
        source = mix.tasks if self.by == DATASET else mix.features
        if source is None:
            field = "tasks" if self.by == DATASET else "features"
            raise ValueError(
                f"Router Skills routes by {self.by!r} and needs batch[{field!r}], which the batch has not."
            )
        if self.by == DATASET:
            return source
        assert space is not None
        return source[..., space.slot_features.index(self.by)]

    def active(
        self, space: FeatureSpace | None, features: Mapping[str, Any], logits: np.ndarray | None
    ) -> np.ndarray:
        """The weights float32 `[..., H, M]` for the dataset that `features` describe.

        Args:
          space: the feature space.
          features: `{feature: value}`; without the one that routes, the weights are those of an unknown task.
          logits: `[..., T, H, M]`.
        """
        rows = self.rows(space)
        value = features.get(self.by)
        if value is None:
            return np.full((self.heads, self.num_modules), 1 / self.num_modules, np.float32)
        if value not in rows:
            raise ValueError(f"Unknown value {value!r} of {self.by!r}." + nearest(value, rows))
        assert logits is not None
        z = jnp.asarray(logits, jnp.float32)[..., rows.index(value), :, :]
        return np.asarray(normalised(jax.nn.sigmoid(z), self.straight_through))


def normalised(m: Array, straight_through: bool = False) -> Array:
    """`m / (sum of m over the modules + 1e-12)`, `m [..., M]` rounded first where asked for.

    Where all of a head's m round to 0, they are left as they are: 0 / 1e-12 would have no useful gradient [ours].
    """
    if straight_through:
        hard = jnp.round(m)
        hard = jnp.where(jnp.any(hard > 0, axis=-1, keepdims=True), hard, m)
        m = m + jax.lax.stop_gradient(hard - m)
    return m / (jnp.sum(m, axis=-1, keepdims=True) + EPSILON)


@dataclasses.dataclass(frozen=True)
class Uniform(WithoutLogits):
    """All modules weigh 1 / M, for every example: Poly-mu (arXiv 2211.03831), AdaMix's average (arXiv 2205.12410)."""

    num_modules: int = 8

    composition: ClassVar[str] = "average"
    granularity: ClassVar[str] = "model"
    lazy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_count(self)

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules."""
        del space
        return skill_names(self.num_modules)

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array] | None = None,
    ) -> Shares:
        """The constant weights."""
        del mix, space, make_rng, parameter
        return average(self.num_modules)

    def active(
        self, space: FeatureSpace | None, features: Mapping[str, Any], logits: Any = None
    ) -> np.ndarray:
        """The weights float32 `[1, M]`, of any dataset."""
        del space, features, logits
        return np.full((1, self.num_modules), 1 / self.num_modules, np.float32)


@dataclasses.dataclass(frozen=True)
class Stochastic(Uniform):
    """AdaMix (arXiv 2205.12410): in training a forward pass uses one module, drawn anew for each layer, and in
    evaluation the average of all.

    The draw is one for the whole batch, and independent for the parameters that meet the input and those that make the
    output. Modules that a step did not draw do not move in it.

    Attributes:
      num_modules: M; 4 for adapters and 8 for LoRA in the reference code.
    """

    num_modules: int = 4

    granularity: ClassVar[str] = "layer"
    lazy: ClassVar[bool] = True

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array] | None = None,
    ) -> Shares:
        """One module in training, the average in evaluation."""
        del space, parameter
        return draw(make_rng(), self.num_modules) if mix.train else average(self.num_modules)


def draw(key: Array, num_modules: int) -> Shares:
    """One module for the way down and one for the way up, the same for the whole batch."""
    chosen = jax.random.randint(key, (2,), 0, num_modules)
    down, up = jax.nn.one_hot(chosen, num_modules)[:, None, None, None, :]
    return Shares(down, up)


def average(num_modules: int) -> Shares:
    """The same weight for every module and example."""
    weights = jnp.full((1, 1, 1, num_modules), 1.0 / num_modules)
    return Shares(weights, weights)
