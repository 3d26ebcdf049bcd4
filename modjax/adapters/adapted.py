"""Adapted: small modules attached from outside to the linear layers of a network that knows nothing of them.

    params = {"encoder": {"layers_0": {"attention": {"query": {"kernel": ...,                     the base
                                                               "flix": {"a": ..., "b": ...}}}}}}  its adapter

A rule names layers by a regular expression over their paths, and the mixture (a module and a router) to attach there.
`Adapted` enters Flax's method interception inside its own methods, so that it is part of whatever program is traced
around it, and shares the network's scope, so that the base's parameters keep their paths. It works under `nn.scan` and
`nn.remat`, on networks that somebody else wrote.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from modjax.adapters.modules import LowRank
from modjax.adapters.routers import Features, Mix, ModuleName, Single
from modjax.errors import nearest
from modjax.features import FeatureSpace

Array = jax.Array

# Which stream's tokens a layer computes from, by its path: encoder-decoder networks as they are commonly named.
ENCODER_DECODER_STREAMS = (
    (r".*encoder_decoder_attention/(key|value)", "encoder"),
    (r"(.*/)?encoder(/.*)?", "encoder"),
    (r"(.*/)?decoder(/.*)?", "decoder"),
)


class RuleError(ValueError):
    """Rules that do not fit the network."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What is attached to a layer: a bank of modules, and a router that says which of them an example uses.

    Attributes:
      name: of the parameters' place: `<layer>/<name>/...`.
      module: what is added.
      router: who is used.
    """

    name: str
    module: LowRank = LowRank()
    router: Single | Features = Single()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise ValueError(f"Mixture.name must be an identifier, got {self.name!r}.")

    def modules(self, space: FeatureSpace | None) -> tuple[ModuleName, ...]:
        """The names of the bank's modules."""
        modules = self.router.modules(space)
        self.module.check(modules)
        return modules


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


class _Linear(NamedTuple):
    """How a linear layer was called: `[*lead, D] -> [*lead, K]`, with its trailing axes flattened."""

    lead: tuple[int, ...]
    width: int
    features: int


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

    def __call__(self, *args: Any, mix: Mix | None = None, **kwargs: Any) -> Any:
        """The network's `__call__`, adapted."""
        return self.call("__call__", *args, mix=mix, **kwargs)

    def call(self, method: str, *args: Any, mix: Mix | None = None, **kwargs: Any) -> Any:
        """The network's method of that name, adapted."""
        interceptor = _Interceptor(self, Mix() if mix is None else mix)
        with nn.intercept_methods(interceptor):
            result = getattr(self.network, method)(*args, **kwargs)
        if self.is_initializing() and method == "__call__":
            interceptor.check()
        return result

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the mixtures, each once."""
        return tuple(dict.fromkeys(rule.mixture.name for rule in self.rules))

    def rule_for(self, path: str, name: str) -> Rule:
        """The rule that put mixture `name` at the layer `path`."""
        for rule in self.rules:
            if rule.mixture.name == name and rule.matches(path):
                return rule
        raise RuleError(f"No rule puts {name!r} at layer {path!r}.")


class _Interceptor:
    """Adds the adapters' updates to the outputs of the layers it meets during one forward pass."""

    def __init__(self, adapted: Adapted, mix: Mix):
        self.adapted = adapted
        self.mix = mix
        self.modules = {r.mixture: r.mixture.modules(adapted.space) for r in adapted.rules}
        # Drawn here, before the network runs, so that an example's dropped features are the same in all layers.
        self.routing = {
            mixture: mixture.router.route(mix, adapted.space, self._draw)
            for mixture in self.modules
        }
        # Likewise the gates: under nn.scan and nn.remat the layers are traced inside other traces, and what they
        # share has to come from outside.
        streams: dict[str | None, Any] = {None: None}
        if mix.segments is not None:
            streams = dict(mix.segments.items())
        self.gates = {
            (mixture, stream): mixture.module.prepare(self.routing[mixture], modules, segments)
            for mixture, modules in self.modules.items()
            for stream, segments in streams.items()
        }
        self.linear: dict[str, list[Rule]] = {}
        self.other: set[str] = set()

    def _draw(self) -> Array:
        if not self.adapted.has_rng("features"):
            raise ValueError(
                "Feature dropout draws from the rng stream 'features': pass rngs={'features': key, ...}, "
                "or Mix(train=False)."
            )
        return self.adapted.make_rng("features")

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        output = next_fun(*args, **kwargs)
        if context.method_name != "__call__" or isinstance(context.module, Adapted):
            return output
        layer = context.module
        path = "/".join(layer.path)
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        shape = _linear_shape(layer, x, output)
        if shape is None:
            self.other.add(path)
            return output
        rules = self.linear.setdefault(path, [])
        rules[:] = [rule for rule in self.adapted.rules if rule.matches(path)]
        for rule in rules:
            output = output + self._update(rule.mixture, layer, path, x, output, shape)
        return output

    def _update(
        self,
        mixture: Mixture,
        layer: nn.Module,
        path: str,
        x: Array,
        output: Array,
        shape: _Linear,
    ) -> Array:
        lead, width, features = shape
        batch, length = (lead[0] if lead else 1), int(np.prod(lead[1:]))
        gates = self.gates[mixture, self._stream(path, length)]
        if gates.rows not in (1, batch):
            raise ValueError(
                f"Layer {path!r} computes {batch} rows, but the batch has features for {gates.rows} "
                "examples."
            )
        # The scope, not the module, is the bank's parent: it serves layers without a compact method as well.
        scope = layer.scope.push(mixture.name, reuse=True)  # type: ignore[union-attr]
        bank = mixture.module.bank(self.modules[mixture], scope)
        x = x.astype(output.dtype).reshape(batch, length, width)
        return bank(x, features, gates, self.mix.train).reshape(output.shape)

    def _stream(self, path: str, length: int) -> str | None:
        """The stream whose segment ids the layer's tokens have; None when rows are examples."""
        segments = self.mix.segments
        if segments is None:
            return None
        found = (name for pattern, name in self.adapted.streams if re.fullmatch(pattern, path))
        stream = next(found, next(iter(segments)) if len(segments) == 1 else "")
        if stream not in segments:
            raise ValueError(
                f"Packed input: layer {path!r} belongs to stream {stream!r}, whose segment ids the "
                "batch does not have. Set Adapted.streams." + nearest(stream, segments)
            )
        if segments[stream].shape[1] != length:
            raise ValueError(
                f"Packed input: layer {path!r} has {length} tokens a row and its stream "
                f"{stream!r} {segments[stream].shape[1]}. Set Adapted.streams."
            )
        return stream

    def check(self) -> None:
        """Raises RuleError where the rules do not fit the layers that were met."""
        if not self.adapted.rules:
            raise RuleError("Adapted has no rules, so it would train nothing. " + self._paths())
        for path, rules in self.linear.items():
            names = [rule.mixture.name for rule in rules]
            for name in names:
                if names.count(name) > 1:
                    patterns = [r.pattern for r in rules if r.mixture.name == name]
                    raise RuleError(
                        f"Rules {patterns} all put a mixture named {name!r} at layer {path!r}. Narrow the patterns, "
                        f"or give the mixtures different names to add them up. {self._paths()}"
                    )
                if name in path.split("/"):
                    raise RuleError(
                        f"Mixture name {name!r} is also the name of a part of the network ({path!r}). Choose another."
                    )
        for rule in self.adapted.rules:
            if not any(rule in rules for rules in self.linear.values()):
                also = [path for path in sorted(self.other) if rule.matches(path)]
                hint = f" It matches {also[0]!r}, which is not linear." if also else ""
                raise RuleError(
                    f"Rule {rule.pattern!r} matches no linear layer.{hint} {self._paths()}"
                )

    def _paths(self) -> str:
        paths = dict.fromkeys(re.sub(r"\d+", "<n>", path) for path in self.linear)
        return f"Linear layers: {', '.join(paths)}."


def _linear_shape(layer: nn.Module, x: Any, output: Any) -> _Linear | None:
    """The shapes, if the layer maps trailing axes of `x` to those of `output` by a kernel, else None."""
    if not isinstance(x, (jax.Array, np.ndarray)) or not isinstance(output, jax.Array):
        return None
    if not layer.has_variable("params", "kernel"):
        return None
    kernel: Any = layer.get_variable("params", "kernel")
    axis = getattr(layer, "axis", -1)
    axes = sorted(a % x.ndim for a in ((axis,) if isinstance(axis, int) else tuple(axis)))
    if axes != list(range(x.ndim - len(axes), x.ndim)):
        return None
    lead = x.shape[: x.ndim - len(axes)]
    if output.shape[: len(lead)] != lead:
        return None
    width = int(np.prod(x.shape[len(lead) :]))
    features = int(np.prod(output.shape[len(lead) :]))
    size = getattr(kernel, "size", None)
    return _Linear(lead, width, features) if size == width * features else None
