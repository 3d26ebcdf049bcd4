"""Adapted: small modules attached from outside to the linear layers of a network that knows nothing of them.

    params = {"encoder": {"layers_0": {"attention": {"query": {"kernel": ...,                     the base
                                                               "flix": {"a": ..., "b": ...}}}}}}  its adapter

A rule names layers by a regular expression over their paths, and the mixture (a module and a router) to attach there.
`Adapted` enters Flax's method interception inside its own methods, so that it is part of whatever program is traced
around it, and shares the network's scope, so that the base's parameters keep their paths. It works under `nn.scan` and
`nn.remat`, on networks that somebody else wrote.
"""

from typing import Any

import flax.linen as nn
from flax.core import Scope

from modjax.adapters.interceptor import Interceptor
from modjax.adapters.routing import Mix
from modjax.adapters.rules import Rule, RuleError
from modjax.features import FeatureSpace

# Which stream's tokens a layer computes from, by its path: encoder-decoder networks as they are commonly named.
ENCODER_DECODER_STREAMS = (
    (r".*encoder_decoder_attention/(key|value)", "encoder"),
    (r"(.*/)?encoder(/.*)?", "encoder"),
    (r"(.*/)?decoder(/.*)?", "decoder"),
)


class Adapted(nn.Module):
    """A network with adapters. Called as the network is, with `mix` for what the routers need.

    Attributes:
      network: the base; its methods see nothing of the adapters.
      rules: where to attach what. Several may apply to one layer under different names; their updates add up.
      space: the names behind the ids; needed by routers that go by features.
      streams: ordered (regex over paths, stream name): whose segment ids a layer's tokens have in a packed batch.

    Raises:
      RuleError: when initialised, if a rule matches no linear layer, two rules of one name meet at a layer, a name is
        taken in the network, or there is no rule. The paths there are are listed.
    """

    network: nn.Module
    rules: tuple[Rule, ...]
    space: FeatureSpace | None = None
    streams: tuple[tuple[str, str], ...] = ENCODER_DECODER_STREAMS

    def setup(self) -> None:
        nn.share_scope(self, self.network)
        _move(self.network)

    def __call__(self, *args: Any, mix: Mix | None = None, **kwargs: Any) -> Any:
        """The network's `__call__`, adapted."""
        return self.call("__call__", *args, mix=mix, **kwargs)

    def call(self, method: str, *args: Any, mix: Mix | None = None, **kwargs: Any) -> Any:
        """The network's method of that name, adapted."""
        interceptor = Interceptor(self, Mix() if mix is None else mix)
        with nn.intercept_methods(interceptor), interceptor.enter(self.scope, ""):
            result = getattr(self.network, method)(*args, **kwargs)
        if self.is_initializing() and method == "__call__":
            interceptor.check()
        return result

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the mixtures, each once."""
        return tuple(dict.fromkeys(rule.mixture.name for rule in self.rules))

    @property
    def routes_by(self) -> tuple[str, ...]:
        """The features (and "dataset") that its routers look up, each once."""
        names = self.space.names if self.space else ()
        found = (rule.mixture.router.routes_by for rule in self.rules)
        return tuple(dict.fromkeys(n for some in found for n in (names if some is None else some)))

    def rule_for(self, path: str, name: str) -> Rule:
        """The rule that put mixture `name` at the layer `path`."""
        for rule in self.rules:
            if rule.mixture.name == name and rule.matches(path):
                return rule
        raise RuleError(f"No rule puts {name!r} at layer {path!r}.")


def _move(module: nn.Module) -> None:
    """Gives the parts that a module was made with, as nn.Sequential is, the paths and draws of their new place.

    nn.share_scope gives them a new parent, and leaves what they had below the attribute `network`.
    """
    for part in module._state.children.values():
        if isinstance(part, nn.Module) and isinstance(part.scope, Scope) and part.scope.parent:
            made = part.scope.parent.push(part.scope.name, reuse=True)
            part.scope.path, part.scope.rngs = made.path, made.rngs
            _move(part)
