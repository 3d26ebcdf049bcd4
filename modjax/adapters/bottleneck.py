"""The bottleneck adapter (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247) as a bank of many.

It stands after the layer that ends a block of the network (attention's or the feed-forward's output projection),
before dropout, residual and norm: `y + up(act(down(y)))`. Legend as in `low_rank.py`, with `R` the sum of the
bottlenecks' sizes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters import banks
from modjax.adapters.banks import Leaf
from modjax.adapters.low_rank import Gates, column_gates
from modjax.adapters.routing import ModuleName, Routing, Shares, as_shares
from modjax.errors import nearest
from modjax.parameters import parameter

Array = jax.Array
ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """A bank of bottlenecks after a layer, with residual.

    Summed: `y + sum_m w_m (act(y d_m + e_m) u_m + v_m)`. Averaged: `y + act(y d + e) u + v` with
    `d = sum_m w_m d_m`, `e` likewise, and `u = sum_m w'_m u_m`, `v` likewise (AdaMix, arXiv 2205.12410).

    Parameters: `down [K, R]`, `down_bias [R]`, `up [R, K]`, `up_bias [M, K]`. `down` starts uniform in +-1/sqrt(K), the
    others at zero, so that step 0 is the base model.

    Attributes:
      size: of every bottleneck, or `{group or "group=value": size}`.
      activation: "gelu" or "relu".
      learning_rate: factor on the optimizer's update of a group's parameters, likewise; 0 freezes them.
      share_up: the modules share `up` and `up_bias` (AdaMix's released runs); for averages only.
    """

    size: Any = 48
    activation: str = "gelu"
    learning_rate: Any = 1.0
    share_up: bool = False

    acts_on: ClassVar[str] = "output"
    settings: ClassVar[tuple[str, ...]] = ("size", "learning_rate")

    def __post_init__(self) -> None:
        for name in self.settings:
            object.__setattr__(self, name, banks.frozen(getattr(self, name)))
        banks.check_positive("Bottleneck.size", self.size, integer=True)
        banks.check_positive("Bottleneck.learning_rate", self.learning_rate, zero=True)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Bottleneck.activation: unknown {self.activation!r}."
                + nearest(self.activation, ACTIVATIONS)
            )

    def check(self, modules: Sequence[ModuleName], composition: str) -> None:
        """Raises ValueError where the settings do not fit the router's modules."""
        for setting in self.settings:
            banks.check_groups(f"Bottleneck.{setting}", getattr(self, setting), modules)
        if composition == "average":
            banks.equal_size("Bottleneck.size", self.sizes(modules))
        elif self.share_up:
            raise ValueError(
                "Bottleneck.share_up is for modules that are averaged; their sum needs an up projection each."
            )

    def check_site(self, path: str, heads: int, width: int, features: int) -> None:
        """Raises ValueError where a layer of these widths cannot be adapted."""
        del width, features
        if heads != 1:
            raise ValueError(
                f"Layer {path!r}: a bottleneck has no {heads} heads, since its activation ties the blocks of its input "
                "together. Use LowRank or Scale, or one head."
            )

    def sizes(self, modules: Sequence[ModuleName]) -> tuple[int, ...]:
        """Each module's bottleneck; they sum to R."""
        return banks.sizes("Bottleneck.size", self.size, modules)

    def rates(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: the learning rate factor of each module."""
        return np.array(banks.each(self.learning_rate, modules, 1.0), np.float32)

    def leaves(self, modules: Sequence[ModuleName]) -> dict[str, Leaf]:
        """The parameters, and which module owns what of them."""
        parts = tuple((str(m), s) for m, s in zip(modules, self.sizes(modules), strict=True))
        ones = tuple((str(m), 1) for m in modules)
        own = not self.share_up
        return {
            "down": Leaf(-1, parts, ("out", "rank")),
            "down_bias": Leaf(-1, parts, ("rank",)),
            "up": Leaf(-2 if own else None, parts, ("rank", "out")),
            "up_bias": Leaf(-2 if own else None, ones, (None, "out")),
        }

    def prepare(
        self,
        routing: Routing | Shares,
        modules: Sequence[ModuleName],
        segments: Array | None,
        composition: str,
    ) -> Gates | Shares:
        """Turns a routing into weights per token, for one stream. See `LowRank.prepare`."""
        if composition == "average":
            return banks.per_token(as_shares(routing, len(modules)), segments)
        ones = np.ones(len(modules), np.float32)
        return column_gates(banks.summable(routing), self.sizes(modules), ones, segments)

    def bank(
        self, modules: Sequence[ModuleName], parent: Any, axes: tuple[str, str] | None = None
    ) -> "BottleneckBank":
        """The Flax module that holds the parameters, in the scope `parent`."""
        del axes
        sizes = self.sizes(modules)
        return BottleneckBank(
            len(modules), sum(sizes), self.activation, self.share_up, parent=parent
        )

    def compose(
        self,
        leaves: Mapping[str, Array],
        modules: Sequence[ModuleName],
        weights: np.ndarray,
        composition: str,
    ) -> tuple["Bottleneck", dict[str, Array]]:
        """The one bottleneck that equals the weighted bank.

        Args:
          leaves: as the class says, with the leading axes of a scanned network.
          weights: float `[..., H, M]`; modules of weight 0 are left out of a sum.

        Returns:
          (its module, its parameters).
        """
        down, up = leaves["down"], leaves["up"]
        bias, up_bias = leaves["down_bias"], leaves["up_bias"]
        if composition == "average":
            flat = weights[..., 0, :]
            bias = jnp.einsum(
                "...mr,...m->...r", bias.reshape(*bias.shape[:-1], len(modules), -1), flat
            )
            down = banks.composed_down(down, weights)
            if not self.share_up:
                up = banks.composed_up(up, weights)
                up_bias = jnp.einsum("...mk,...m->...k", up_bias, flat)[..., None, :]
        else:
            flat = weights[..., 0, :]
            owner = np.repeat(np.arange(len(modules)), self.sizes(modules))
            factor = flat[..., owner]
            used = np.flatnonzero(factor.any(axis=tuple(range(factor.ndim - 1))))
            down, bias = down[..., used], bias[..., used]
            up = up[..., used, :] * factor[..., used, None].astype(up.dtype)
            up_bias = jnp.einsum("...mk,...m->...k", up_bias, flat)[..., None, :]
        return Bottleneck(down.shape[-1], self.activation), {
            "down": down,
            "down_bias": bias,
            "up": up,
            "up_bias": up_bias,
        }

    def merge(self, leaves: Mapping[str, Array], kernel: Array, bias: Array | None) -> Any:
        """Raises ValueError: a bottleneck has no merge."""
        raise ValueError(
            "A bottleneck does not merge into a linear layer: there is an activation between its two projections. "
            "Use `compose`, whose result costs one bottleneck."
        )


class BottleneckBank(nn.Module):
    """Parameters of a bank of bottlenecks, and their update of a layer's output.

    Attributes:
      num_modules: M.
      num_columns: R.
      activation, share_up: see `Bottleneck`.
    """

    num_modules: int
    num_columns: int
    activation: str = "gelu"
    share_up: bool = False

    @nn.compact
    def __call__(self, x: Array, y: Array, gates: Gates | Shares, train: bool) -> Array:
        """`y [B, L, K]` with the bottlenecks after it, in its dtype; the layer's input `x` is not used."""
        del x, train
        features = y.shape[-1]
        bound = 1.0 / math.sqrt(features)

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        zeros = nn.initializers.zeros
        modules = 1 if self.share_up else self.num_modules
        rows = self.num_columns // self.num_modules if self.share_up else self.num_columns
        down = parameter(self, "down", uniform, (features, self.num_columns)).astype(y.dtype)
        bias = parameter(self, "down_bias", zeros, (self.num_columns,)).astype(y.dtype)
        up = parameter(self, "up", zeros, (rows, features)).astype(y.dtype)
        up_bias = parameter(self, "up_bias", zeros, (modules, features)).astype(y.dtype)
        act = ACTIVATIONS[self.activation]
        if isinstance(gates, Gates):
            hidden = act(banks.product(y, down) + bias) * gates.dense.astype(y.dtype)
            return y + banks.product(hidden, up) + gates.modules.astype(y.dtype) @ up_bias
        weights = gates.down[..., 0, :].astype(y.dtype)  # one head
        hidden = banks.average_down(y, down, gates.down)
        hidden = act(hidden + weights @ bias.reshape(self.num_modules, -1))
        if self.share_up:
            return y + banks.product(hidden, up) + up_bias[0]
        weights = gates.up[..., 0, :].astype(y.dtype)
        return y + banks.average_up(hidden, up, gates.up) + weights @ up_bias
