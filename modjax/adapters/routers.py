"""Routers by names: a module that is always on, and modules that belong to the values of features.

A router knows the batch's ids and the feature space, and nothing of layers or of what a module computes. See
`skills.py` for routers over interchangeable modules, and `routing.py` for what a router gives.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters.routing import DATASET, SHARED, Mix, ModuleName, Routing, WithoutLogits
from modjax.errors import is_number, nearest
from modjax.features import FeatureSpace, as_values

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Single(WithoutLogits):
    """One module, always on: plain LoRA (arXiv 2106.09685), or any other module by itself."""

    composition: ClassVar[str] = "sum"
    granularity: ClassVar[str] = "model"
    lazy: ClassVar[bool] = False

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules, in order."""
        del space
        return (ModuleName("all"),)

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array] | None = None,
    ) -> Routing:
        """Full weight on the one module, for every example."""
        del mix, space, make_rng, parameter
        return Routing(jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1)), ((0, 1),))

    def active(
        self, space: FeatureSpace | None, features: Mapping[str, Any], logits: Any = None
    ) -> np.ndarray:
        """The weights float32 `[M]` for the dataset that `features` describe."""
        del space, features, logits
        return np.ones(1, np.float32)


@dataclasses.dataclass(frozen=True)
class Features(WithoutLogits):
    """FLix (arXiv 2402.17934): every value of every feature owns a module, and an example uses those of its values.

    An id of 0 (none, or a value that the space does not know) adds nothing, and the others still do.

    Attributes:
      features: the features (or the one) that own modules, in order; None = all of the space. The name "dataset" stands
        for the example's dataset: one module per dataset, chosen by `tasks`.
      shared: also one module that every example uses (a baseline of the paper).
      dropout: in training, the rate at which an active feature is dropped, independently for each example and each of
        its features, and the same in all layers; no rescaling. A rate for all, or `{feature: rate}` with 0 for those
        not named. The paper gives no rate: any value is our choice.
      copies: M, of every module; with more than one, AdaMix (arXiv 2205.12410) within each feature [ours]. In training
        a feature uses one copy, drawn anew for each layer and feature and the same for the whole batch; in evaluation
        each copy weighs 1 / M, so that an example's update is the sum of its features' mean updates. Copies that a
        step did not draw do not move in it. Feature dropout is then drawn for each layer, too.
    """

    features: tuple[str, ...] | None = None
    shared: bool = False
    dropout: Any = 0.0
    copies: int = 1

    composition: ClassVar[str] = "sum"

    @property
    def granularity(self) -> str:
        """Draws are one for all layers, but for those of copies."""
        return "model" if self.copies == 1 else "layer"

    @property
    def lazy(self) -> bool:
        """Whether modules rest: copies do."""
        return self.copies > 1

    @property
    def routes_by(self) -> tuple[str, ...] | None:
        """The features that own modules; None = all of the space."""
        return self.features

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "features", as_values(self.features, "Features.features"))
            if not self.features and not self.shared:
                raise ValueError("Features(features=()) has no module: name at least one feature.")
        if isinstance(self.dropout, Mapping):
            object.__setattr__(self, "dropout", tuple(sorted(self.dropout.items())))
        rates = [r for _, r in self.dropout] if isinstance(self.dropout, tuple) else [self.dropout]
        if not all(is_number(r) and 0.0 <= r < 1.0 for r in rates):
            raise ValueError(
                f"Features.dropout must be in [0, 1), got {self.dropout!r}: at 1 a feature's modules would never "
                "train; leave it out of Features.features instead."
            )
        if not isinstance(self.copies, int) or isinstance(self.copies, bool) or self.copies < 1:
            raise ValueError(
                f"Features.copies must be an integer of at least 1, got {self.copies!r}."
            )

    def _names(self, space: FeatureSpace | None) -> tuple[str, ...]:
        if space is None:
            raise ValueError(
                "The router Features needs a feature space: bind one with Adapted(..., space=space) "
                "or model.with_space(space)."
            )
        names = space.names if self.features is None else self.features
        for name in names:
            if name not in space.names and name != DATASET:
                raise ValueError(
                    f"Router Features: unknown feature {name!r}."
                    + nearest(name, (*space.names, DATASET))
                )
        if isinstance(self.dropout, tuple):
            for name, _ in self.dropout:
                if name not in (*names, SHARED):
                    raise ValueError(
                        f"Features.dropout: unknown feature {name!r}."
                        + nearest(name, (*names, SHARED))
                    )
        return names

    def _values(self, space: FeatureSpace, name: str) -> tuple[str, ...]:
        return space.datasets if name == DATASET else space.values(name)

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules, in order: feature by feature, value by value, then the shared one.

        Copies are neighbours, and named `task=parse#0`, `task=parse#1`.
        """
        names = self._names(space)
        assert space is not None
        modules = [ModuleName(n, v) for n in names for v in self._values(space, n)]
        if self.shared:
            modules.append(ModuleName(SHARED))
        if not modules:
            raise ValueError("Router Features: the feature space has no values, so no module.")
        if self.copies > 1:
            numbers = range(self.copies)
            modules = [ModuleName(m.group, m.value, i) for m in modules for i in numbers]
        return tuple(modules)

    def _slots(self, space: FeatureSpace) -> list[tuple[str, int | None, int, int]]:
        """(feature, column of `features` or None for `tasks`, first module, one past the last)."""
        slots: list[tuple[str, int | None, int, int]] = []
        start = 0
        for name in self._names(space):
            stop = start + len(self._values(space, name))
            if start == stop:  # every dataset has None here
                continue
            if name == DATASET:
                slots.append((name, None, start, stop))
            else:
                columns = [i for i, n in enumerate(space.slot_features) if n == name]
                slots.extend((name, i, start, stop) for i in columns)
            start = stop
        return slots

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array] | None = None,
    ) -> Routing:
        """One active module for each feature value of an example, weights 1, or 0 where dropped."""
        del parameter
        self._names(space)
        assert space is not None
        slots = self._slots(space)
        ids = []
        for name, column, _, _ in slots:
            source = mix.tasks if column is None else mix.features
            if source is None:
                field = "tasks" if column is None else "features"
                raise ValueError(
                    f"Router Features needs batch[{field!r}] for feature {name!r}, and the batch has none."
                )
            if column is not None and source.shape[-1] != space.num_slots:
                raise ValueError(
                    f"batch['features'] has {source.shape[-1]} columns, and the feature space "
                    f"{space.num_slots}: {', '.join(space.slot_features)}."
                )
            ids.append(source if column is None else source[..., column])
        if ids:
            index = jnp.stack(ids, axis=-1) - 1
        else:
            known = mix.features if mix.tasks is None else mix.tasks
            if known is None:
                raise ValueError('Router Features needs batch["features"] or batch["tasks"].')
            index = jnp.zeros((*known.shape[:2], 0), jnp.int32)
        sizes = np.array([stop - start for _, _, start, stop in slots], np.int32)
        starts = np.array([start for _, _, start, _ in slots], np.int32)
        index = jnp.where((index >= 0) & (index < sizes), index + starts, -1)
        names = [name for name, *_ in slots]
        ranges = tuple((start, stop) for _, _, start, stop in slots)
        if self.shared:
            # Padding segments have no example: they need no exception, since their tokens count for nothing.
            last = ranges[-1][1] if ranges else 0
            everywhere = jnp.full((*index.shape[:-1], 1), last, index.dtype)
            index = jnp.concatenate([index, everywhere], axis=-1)
            names, ranges = [*names, SHARED], (*ranges, (last, last + 1))
        gate = (index >= 0).astype(jnp.float32)
        rates = np.array([self._rate(name) for name in names], np.float32)
        if mix.train and rates.any():
            gate = gate * jax.random.bernoulli(make_rng(), 1.0 - rates, gate.shape)
        if self.copies > 1:
            index, gate, ranges = self._copied(index, gate, ranges, make_rng if mix.train else None)
        return Routing(index, gate, ranges)

    def _copied(
        self,
        index: Array,
        gate: Array,
        ranges: tuple[tuple[int, int], ...],
        make_rng: Callable[[], Array] | None,
    ) -> tuple[Array, Array, tuple[tuple[int, int], ...]]:
        """A routing to modules as one to their copies: a drawn one of each slot, or all of them."""
        count = self.copies
        ranges = tuple((start * count, stop * count) for start, stop in ranges)
        first = jnp.where(index >= 0, index * count, -1)
        if make_rng is not None:
            drawn = jax.random.randint(make_rng(), index.shape[-1:], 0, count)
            return jnp.where(index >= 0, first + drawn, -1), gate, ranges
        every = jnp.where(index[..., None] >= 0, first[..., None] + jnp.arange(count), -1)
        every = every.reshape(*index.shape[:-1], -1)
        ranges = tuple(pair for pair in ranges for _ in range(count))
        return every, jnp.repeat(gate / count, count, axis=-1), ranges

    def _rate(self, name: str) -> float:
        if isinstance(self.dropout, tuple):
            return dict(self.dropout).get(name, 0.0)
        return 0.0 if name == SHARED else self.dropout

    def active(
        self, space: FeatureSpace | None, features: Mapping[str, Any], logits: Any = None
    ) -> np.ndarray:
        """The weights float32 `[M]` for the dataset that `features` describe.

        Args:
          space: the feature space.
          features: `{feature: value or values}`, `dataset` among them where it owns modules; a feature left out or
            None is off. `{feature: {value: weight}}` mixes values, as several languages for one that has no module.

        Raises:
          ValueError: an unknown feature or value (the nearest known one is named), or a weight that is no number.
        """
        del logits
        names = self._names(space)
        assert space is not None
        for name in features:
            if name not in (*space.names, DATASET):
                raise ValueError(
                    f"Unknown feature {name!r}." + nearest(name, (*space.names, DATASET))
                )
        parts = []
        for name in names:
            known = self._values(space, name)
            weights = np.zeros(len(known), np.float32)
            values = features.get(name)
            values = (values,) if isinstance(values, str) else values or ()
            shares = values if isinstance(values, Mapping) else dict.fromkeys(values, 1.0)
            for value, share in shares.items():
                if value not in known:
                    raise ValueError(
                        f"Unknown value {value!r} of feature {name!r}." + nearest(value, known)
                    )
                if not is_number(share) or not np.isfinite(share):
                    raise ValueError(
                        f"The weight of {value!r} in feature {name!r} must be a number, got {share!r}."
                    )
                weights[known.index(value)] = share
            parts.append(weights)
        weights = np.concatenate([*parts, np.ones(int(self.shared), np.float32)])
        return np.repeat(weights, self.copies) / np.float32(self.copies)
