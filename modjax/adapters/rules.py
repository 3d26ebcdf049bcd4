"""Rules: what is attached where. A mixture is a module and a router; a rule puts it at some layers."""

import dataclasses
import functools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from modjax.adapters import banks
from modjax.adapters.low_rank import LowRank
from modjax.adapters.routers import Single
from modjax.adapters.routing import ModuleName, Router, Routing, Shares
from modjax.errors import nearest
from modjax.features import FeatureSpace

Array = jax.Array


class Module(Protocol):
    """What `Adapted` and the parameter trees need of a module; a hashable description of a bank."""

    @property
    def acts_on(self) -> str:
        """Whether a layer's "output" is changed, or its "input"."""
        ...

    @property
    def settings(self) -> tuple[str, ...]:
        """The attributes that may differ between groups and modules: `{group or "group=value": value}`, frozen."""
        ...

    def check(self, modules: Sequence[ModuleName], composition: str) -> None:
        """Raises ValueError where the settings do not fit the router's modules."""
        ...

    def check_site(self, path: str, heads: int, width: int, features: int) -> None:
        """Raises ValueError where a layer of these widths cannot be adapted."""
        ...

    def rates(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: factors on the learning rate."""
        ...

    def leaves(self, modules: Sequence[ModuleName]) -> dict[str, banks.Leaf]:
        """The parameters, and which module owns what of them."""
        ...

    def prepare(
        self,
        routing: Routing | Shares,
        modules: Sequence[ModuleName],
        segments: Array | None,
        composition: str,
    ) -> Any:
        """A routing as weights per token, for one stream."""
        ...

    def bank(
        self, modules: Sequence[ModuleName], parent: Any, axes: tuple[str, str] | None = None
    ) -> Any:
        """The Flax module with the parameters: called with (x, y, gates, train) it gives the new y, or the new x.

        `axes` are the logical names of the adapted kernel's input and output, where they are known.
        """
        ...

    def compose(
        self,
        leaves: Mapping[str, Array],
        modules: Sequence[ModuleName],
        weights: np.ndarray,
        composition: str,
    ) -> tuple[Any, dict[str, Array]]:
        """One module that equals the weighted bank, and its parameters."""
        ...

    def merge(self, leaves: Mapping[str, Array], kernel: Array, bias: Array | None) -> Any:
        """(kernel, bias) of the layer with one composed module in it."""
        ...


class RuleError(ValueError):
    """Rules that do not fit the network."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What is attached to a layer: a bank of modules, and a router that says which of them an example uses.

    Attributes:
      name: of the parameters' place: `<layer>/<name>/...`.
      module: what is added: `LowRank`, `Bottleneck`, `Scale`, or another `Module`.
      router: who is used: `Single`, `Features`, `Skills`, `Uniform`, `Stochastic`, or another `Router`.
      composition: "sum" of the modules' updates, or "average" of their parameters; None = as the router's method does.
    """

    name: str
    module: Module = LowRank()
    router: Router = Single()
    composition: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise ValueError(f"Mixture.name must be an identifier, got {self.name!r}.")
        for field, part in (("module", self.module), ("router", self.router)):
            if isinstance(part, (type, types.FunctionType)):  # what gin makes of it
                raise ValueError(
                    f"Mixture.{field} is the class {part.__name__}, not an object of it: write "
                    f"@adapters.{part.__name__}(), with parentheses."
                )
        if self.composition not in (None, *banks.COMPOSITIONS):
            raise ValueError(
                f"Mixture.composition: unknown {self.composition!r}."
                + nearest(str(self.composition), banks.COMPOSITIONS)
            )

    @property
    def composes(self) -> str:
        """ "sum" or "average"."""
        return self.composition or self.router.composition

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules."""
        return _divided(self, space)[0]

    def leaves(self, space: FeatureSpace | None) -> Mapping[str, banks.Leaf]:
        """The parameters of the bank, and which module owns what of them."""
        return _divided(self, space)[1]


# Every layer asks, and a feature may have thousands of values.
@functools.lru_cache(maxsize=32)
def _divided(
    mixture: Mixture, space: FeatureSpace | None
) -> tuple[tuple[ModuleName, ...], Mapping[str, banks.Leaf]]:
    modules = mixture.router.modules(space)
    mixture.module.check(modules, mixture.composes)
    return modules, mixture.module.leaves(modules)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Attach `mixture` to every linear layer whose whole path matches `pattern`."""

    pattern: str
    mixture: Mixture

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise RuleError(f"Rule pattern {self.pattern!r} is no regular expression: {e}.") from e

    def matches(self, path: str) -> bool:
        """Whether the rule is for the layer at `path`."""
        return re.fullmatch(self.pattern, path) is not None
