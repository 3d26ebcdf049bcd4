"""What travels from a batch to the modules: who is active, and how much.

Legend, here and in the routers: `B` batch, `S` segments of a packed row (1 when not packed), `M` modules of the bank,
`A` active modules of an example, `H` routing heads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np

from modjax.features import FeatureSpace

Array = jax.Array

DATASET = "dataset"  # routes by batch["tasks"], as if the dataset's name were one more feature
SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class ModuleName:
    """The name of one module of a bank: its group (a feature's name), its value within the group, and which copy."""

    group: str
    value: str = ""
    copy: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What a setting may call it, the most particular first: `task=parse#0`, `task=parse`, `task`."""
        whole = f"{self.group}={self.value}" if self.value else self.group
        copy = () if self.copy is None else (f"{whole}#{self.copy}",)
        return (*copy, whole, self.group)

    def __str__(self) -> str:
        return self.names[0]


@flax.struct.dataclass
class Mix:
    """What travels with a batch to the adapters.

    Attributes:
      features: int32 `[B, S, F]`, ids of the feature space's values, 0 = none.
      tasks: int32 `[B, S]`, ids of datasets, 0 = none.
      segments: for packed batches, int32 `[B, L]` segment ids of each stream ("encoder", "decoder"), 0 = padding;
        None when every row is one example.
      train: whether routers draw at random (feature dropout).
    """

    features: Array | None = None
    tasks: Array | None = None
    segments: Mapping[str, Array] | None = None
    train: bool = flax.struct.field(pytree_node=False, default=False)

    def repeat(self, times: int) -> "Mix":
        """The same with every example `times` times in a row, as beams are laid out."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


@flax.struct.dataclass
class Routing:
    """Mixing weights of a batch, as a short list of active modules per segment.

    Attributes:
      index: int32 `[B, S, A]`, a module's position in the bank, -1 = none. `B` and `S` may be 1 to broadcast.
      gate: float32 `[B, S, A]`, its weight; 0 where `index` is -1.
      slots: for each of the `A` positions, the range of modules it can name (static).
    """

    index: Array
    gate: Array
    slots: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)

    def weights(self, num_modules: int) -> Array:
        """The same as a dense float32 `[B, S, M]`."""
        one_hot = self.index[..., None] == jnp.arange(num_modules)
        return jnp.sum(one_hot * self.gate[..., None], axis=-2)


@flax.struct.dataclass
class Shares:
    """Mixing weights of a batch over interchangeable modules, all of which may be active.

    A head is a block of a layer's input, or of its output, with weights of its own (Poly-S, arXiv 2211.03831).

    Attributes:
      down: float32 `[B, S, H, M]`, for the parameters that meet the input; `B` and `S` may be 1 to broadcast.
      up: float32 `[B, S, H, M]`, for those that make the output; the same as `down` unless drawn apart (AdaMix).
    """

    down: Array
    up: Array


def as_shares(routing: Routing | Shares, num_modules: int) -> Shares:
    """Any routing as shares; a `Routing` has one head."""
    if isinstance(routing, Shares):
        return routing
    weights = routing.weights(num_modules)[..., None, :]
    return Shares(weights, weights)


class Router(Protocol):
    """What the rest needs of a router; a hashable description, without parameters in it.

    Attributes:
      composition: what weights mean unless a mixture says otherwise: "sum" (of the modules' updates) or "average" (of
        the modules' parameters).
      granularity: which layers share a routing: "layer", "sublayer", "block", "stack" or "model"; a router without
        parameters or draws of its own in a layer says "model".
      lazy: whether a module without a gradient in a step keeps its value and its optimizer state.
      routes_by: the features (or "dataset") that it looks up; None for all of the feature space.
    """

    @property
    def composition(self) -> str: ...

    @property
    def granularity(self) -> str: ...

    @property
    def lazy(self) -> bool: ...

    @property
    def routes_by(self) -> tuple[str, ...] | None: ...

    def rows(self, space: FeatureSpace | None) -> tuple[str, ...]:
        """Whose rows its parameter `logits [T, H, M]` has, T names; none if it has no parameter."""
        ...

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules, in order."""
        ...

    def route(
        self,
        mix: Mix,
        space: FeatureSpace | None,
        make_rng: Callable[[], Array],
        parameter: Callable[..., Array],
    ) -> Routing | Shares:
        """The weights of a batch; `parameter(name, init, shape)` gives the router's own parameters."""
        ...

    def active(
        self, space: FeatureSpace | None, features: Mapping[str, Any], logits: Any = None
    ) -> np.ndarray:
        """The weights `[M]` or `[..., H, M]` of one dataset in evaluation; `logits` is the router's parameter."""
        ...


class WithoutLogits:
    """What routers without parameters have in common."""

    @property
    def routes_by(self) -> tuple[str, ...] | None:
        """No feature is looked up, unless a router says otherwise."""
        return ()

    def rows(self, space: FeatureSpace | None) -> tuple[str, ...]:
        """None has logits."""
        del space
        return ()
