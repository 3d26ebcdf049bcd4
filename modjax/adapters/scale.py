"""IA3 (arXiv 2205.05638): a learned factor for each unit of a layer's output, or of its input, as a bank of many.

Legend as in `low_rank.py`, with `W` the width that is scaled: K of an output, D of an input.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters import banks
from modjax.adapters.banks import Leaf
from modjax.adapters.routing import ModuleName, Routing, Shares, as_shares
from modjax.errors import nearest
from modjax.parameters import parameter

Array = jax.Array
SIDES = ("output", "input")


@dataclasses.dataclass(frozen=True)
class Scale:
    """A bank of factors: `y * (1 + sum_m w_m (l_m - 1))`, or the same for the layer's input.

    With weights that sum to one (one module, averages) that is `y * sum_m w_m l_m`; with the weights of features, what
    is not active changes nothing. So sum and average are one here. `scale [M, W]` starts at ones: step 0 is the base.

    Attributes:
      acts_on: "output" (IA3's keys and values) or "input" (of the layer that reads the feed-forward's hidden units).
      learning_rate: factor on the optimizer's update, of all or `{group or "group=value": factor}`; 0 freezes.
    """

    acts_on: str = "output"
    learning_rate: Any = 1.0

    settings: ClassVar[tuple[str, ...]] = ("learning_rate",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rate", banks.frozen(self.learning_rate))
        banks.check_positive("Scale.learning_rate", self.learning_rate, zero=True)
        if self.acts_on not in SIDES:
            raise ValueError(
                f"Scale.acts_on: unknown {self.acts_on!r}." + nearest(self.acts_on, SIDES)
            )

    def check(self, modules: Sequence[ModuleName], composition: str) -> None:
        """Raises ValueError where the settings do not fit the router's modules."""
        del composition
        banks.check_groups("Scale.learning_rate", self.learning_rate, modules)

    def check_site(self, path: str, heads: int, width: int, features: int) -> None:
        """Raises ValueError where a layer of these widths cannot be adapted."""
        banks.check_heads(path, heads, features if self.acts_on == "output" else width)

    def rates(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: the learning rate factor of each module."""
        return np.array(banks.each(self.learning_rate, modules, 1.0), np.float32)

    def leaves(self, modules: Sequence[ModuleName]) -> dict[str, Leaf]:
        """The parameters, and which module owns what of them."""
        side = "out" if self.acts_on == "output" else "in"
        return {"scale": Leaf(-2, tuple((str(m), 1) for m in modules), (None, side))}

    def prepare(
        self,
        routing: Routing | Shares,
        modules: Sequence[ModuleName],
        segments: Array | None,
        composition: str,
    ) -> Shares:
        """Turns a routing into weights per token, for one stream. See `LowRank.prepare`."""
        del composition
        return banks.per_token(as_shares(routing, len(modules)), segments)

    def bank(
        self, modules: Sequence[ModuleName], parent: Any, axes: tuple[str, str] | None = None
    ) -> "ScaleBank":
        """The Flax module that holds the parameters, in the scope `parent`."""
        del axes
        return ScaleBank(len(modules), self.acts_on, parent=parent)

    def compose(
        self,
        leaves: Mapping[str, Array],
        modules: Sequence[ModuleName],
        weights: np.ndarray,
        composition: str,
    ) -> tuple["Scale", dict[str, Array]]:
        """The one factor per unit that equals the weighted bank, with weights `[..., H, M]`."""
        del modules, composition
        moved = leaves["scale"] - 1
        *lead, count, width = moved.shape
        blocks = moved.reshape(*lead, count, weights.shape[-2], -1)
        mixed = jnp.einsum("...mhw,...hm->...hw", blocks, jnp.asarray(weights))
        return Scale(self.acts_on), {"scale": 1 + mixed.reshape(*lead, 1, width)}

    def merge(self, leaves: Mapping[str, Array], kernel: Array, bias: Array | None) -> Any:
        """(kernel, bias) in float32 with one composed factor multiplied in; `kernel [..., D, K]`."""
        factor = jnp.asarray(leaves["scale"], jnp.float32)  # [..., 1, W]
        if self.acts_on == "input":
            return kernel * jnp.swapaxes(factor, -1, -2), bias
        return kernel * factor, None if bias is None else bias * factor[..., 0, :]


class ScaleBank(nn.Module):
    """The parameter `scale [M, W]` of a bank of factors, and what it makes of a layer's output or input."""

    num_modules: int
    acts_on: str = "output"

    @nn.compact
    def __call__(self, x: Array, y: Array | None, gates: Shares, train: bool) -> Array:
        """The scaled output `y [B, L, K]` or, acting on the input, the scaled `x [B, L, D]`, in its dtype."""
        del train
        units = x if self.acts_on == "input" else y
        assert units is not None
        *lead, width = units.shape
        weights = gates.down.astype(units.dtype)
        scale = parameter(self, "scale", nn.initializers.ones, (self.num_modules, width))
        moved = (scale - 1).astype(units.dtype)
        blocks = moved.reshape(self.num_modules, weights.shape[-2], -1)
        factor = 1 + jnp.einsum("blhm,mhw->blhw", weights, blocks).reshape(
            *weights.shape[:2], width
        )
        return units * factor
