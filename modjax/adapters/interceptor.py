"""The interceptor: what happens at each layer of the base network during one forward pass of `Adapted`."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters.routing import Mix, Shares
from modjax.adapters.rules import Mixture, Rule, RuleError
from modjax.errors import nearest

Array = jax.Array

# How many levels above a layer its routing lives.
LEVELS = {"layer": 0, "sublayer": 1, "block": 2, "stack": 3}


class _Linear(NamedTuple):
    """How a linear layer was called: `[*lead, D] -> [*lead, K]`, with its trailing axes flattened."""

    lead: tuple[int, ...]
    width: int
    features: int


class Interceptor:
    """Adds the adapters' updates to the outputs of the layers it meets during one forward pass.

    A routing is computed where all layers that share it can see it: before the network runs, or when the part of the
    network that its router names is entered, which may be inside the traces of nn.scan and nn.remat.
    """

    def __init__(self, adapted: Any, mix: Mix):
        self.adapted = adapted
        self.mix = mix
        self.modules = {r.mixture: r.mixture.modules(adapted.space) for r in adapted.rules}
        self.streams: dict[str | None, Any] = {None: None}
        if mix.segments is not None:
            self.streams = dict(mix.segments.items())
        self.linear: dict[str, list[Rule]] = {}
        self.other: set[str] = set()
        # (mixture, the path of the place that shares it) -> its gates for each stream; None while initialising.
        self.gates: dict[tuple[Mixture, str], Any] = {}
        self.wanted: set[tuple[Mixture, str]] = set()
        self.levels = {m: LEVELS.get(m.router.granularity) for m in self.modules}
        for mixture, level in self.levels.items():
            if level is None:
                # Drawn here, so that an example's dropped features are the same in all layers.
                self.gates[mixture, ""] = self._route(mixture, adapted.scope, "features", "")

    def _route(
        self, mixture: Mixture, scope: Any, stream: str, path: str, make: bool = True
    ) -> dict[str | None, Any]:
        """The mixture's gates for each stream of tokens, its router's parameters and draws taken from `scope`.

        Without `make`, zeros stand for parameters that are not there yet.
        """
        inside = None

        def own() -> Any:
            nonlocal inside
            # Pushed only if needed: a push takes the name in the scope of a network that knows nothing of it.
            inside = scope.push(mixture.name, reuse=True) if inside is None else inside
            return inside

        def make_rng() -> Array:
            if not scope.has_rng(stream):
                raise ValueError(
                    f"The router of {mixture.name!r} draws from the rng stream {stream!r}"
                    + (f" in {path!r}" if path else "")
                    + f": pass rngs={{{stream!r}: key, ...}}, or Mix(train=False)."
                )
            return own().make_rng(stream)

        def parameter(name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Array:
            return own().param(name, init, shape) if make else jnp.zeros(shape)

        routing = mixture.router.route(self.mix, self.adapted.space, make_rng, parameter)
        modules = self.modules[mixture]
        return {
            name: mixture.module.prepare(routing, modules, segments, mixture.composes)
            for name, segments in self.streams.items()
        }

    @contextlib.contextmanager
    def enter(self, scope: Any, path: str) -> Iterator[None]:
        """While inside, layers find the routings that belong to this part of the network."""
        before = dict(self.gates)
        for mixture, level in self.levels.items():
            if level:  # 0: the layer's own; None: the whole network's
                known = scope.has_variable(
                    "params", mixture.name
                ) and "logits" in scope.get_variable("params", mixture.name)
                self.gates[mixture, path] = (
                    self._route(mixture, scope, "dropout", path) if known else None
                )
        yield
        if self.adapted.is_initializing():
            for mixture in self.modules:
                if (mixture, path) in self.wanted and self.gates[mixture, path] is None:
                    self._route(mixture, scope, "dropout", path)
        self.gates = before

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or isinstance(layer, type(self.adapted)):
            return next_fun(*args, **kwargs)
        path = "/".join(layer.path)
        with self.enter(layer.scope, path):
            return self._call(next_fun, args, kwargs, layer, path)

    def _call(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layer: nn.Module,
        path: str,
    ) -> Any:
        rules = [rule for rule in self.adapted.rules if rule.matches(path)]
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        # A layer that has not been called yet has no kernel, so that it cannot be known to be linear.
        shape = _linear_shape(layer, x) if rules else None
        if shape is not None and any(r.mixture.module.acts_on == "input" for r in rules):
            for rule in rules:
                if rule.mixture.module.acts_on == "input":
                    x = self._apply(rule.mixture, layer, path, x, None, shape)
            if args:
                args = (x, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): x}
        output = next_fun(*args, **kwargs)
        met = _linear_shape(layer, x, output)
        if met is None:
            self.other.add(path)
            return output
        self.linear[path] = rules
        for rule in rules:
            if rule.mixture.module.acts_on == "output":
                output = self._apply(rule.mixture, layer, path, x, output, met)
            elif shape is None:
                self._apply(rule.mixture, layer, path, x, None, met)  # makes the parameters
        return output

    def _apply(
        self,
        mixture: Mixture,
        layer: nn.Module,
        path: str,
        x: Array,
        y: Array | None,
        shape: _Linear,
    ) -> Array:
        """What the mixture makes of the layer's output `y` or, if that is None, of its input `x`."""
        lead, width, features = shape
        batch, length = (lead[0] if lead else 1), int(np.prod(lead[1:]))
        gates = self._gates(mixture, layer, path)[self._stream(path, length)]
        rows, heads = _rows_and_heads(gates)
        if rows not in (1, batch):
            raise ValueError(
                f"Layer {path!r} computes {batch} rows, but the batch has features for {rows} "
                "examples."
            )
        mixture.module.check_site(path, heads, width, features)
        # The scope, not the module, is the bank's parent: it serves layers without a compact method as well.
        scope = layer.scope.push(mixture.name, reuse=True)  # type: ignore[union-attr]
        bank = mixture.module.bank(self.modules[mixture], scope, _kernel_axes(layer))
        result, dtype = (x, x.dtype) if y is None else (y, y.dtype)
        x = x.astype(dtype).reshape(batch, length, width)
        if y is not None:
            y = y.reshape(batch, length, features)
        return bank(x, y, gates, self.mix.train).reshape(result.shape)

    def _gates(self, mixture: Mixture, layer: nn.Module, path: str) -> Any:
        """The gates that hold for a layer, for each stream."""
        level = self.levels[mixture]
        if level == 0:
            return self._route(mixture, layer.scope, "dropout", path)
        place = "" if level is None else "/".join(path.split("/")[:-level])
        found = self.gates.get((mixture, place))
        if found is not None:
            return found
        if not self.adapted.is_initializing() or (mixture, place) not in self.gates:
            raise ValueError(
                f"Layer {path!r} shares its routing of {mixture.name!r} with all of {place or 'the network'!r}, and "
                "the network's parts are not called that way. Choose another granularity of the router."
            )
        # Its parameters are made when the place is left, once it is known that a layer wants them.
        self.wanted.add((mixture, place))
        return self._route(mixture, layer.scope, "dropout", path, make=False)

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
        names = (re.sub(r"\d+", "<n>", path) or "'' (the whole network)" for path in self.linear)
        return f"Linear layers: {', '.join(dict.fromkeys(names)) or 'none'}."


def _rows_and_heads(gates: Any) -> tuple[int, int]:
    if isinstance(gates, Shares):
        return gates.down.shape[0], gates.down.shape[2]
    return gates.rows, 1


def _kernel_axes(layer: nn.Module) -> tuple[str, str] | None:
    """The logical names of a 2-D kernel's axes, where a layer says them as T5X's do."""
    axes = tuple(getattr(layer, "kernel_axes", None) or ())
    return (axes[0], axes[1]) if len(axes) == 2 and all(axes) else None


def _linear_shape(layer: nn.Module, x: Any, output: Any = None) -> _Linear | None:
    """The shapes, if the layer maps trailing axes of `x` to those of `output` by a kernel, else None.

    Before the layer is called there is no output, and what can be known without it is checked.
    """
    if not isinstance(x, (jax.Array, np.ndarray)) or not layer.has_variable("params", "kernel"):
        return None
    if output is not None and not isinstance(output, jax.Array):
        return None
    kernel: Any = layer.get_variable("params", "kernel")
    axis = getattr(layer, "axis", -1)
    axes = sorted(a % x.ndim for a in ((axis,) if isinstance(axis, int) else tuple(axis)))
    if axes != list(range(x.ndim - len(axes), x.ndim)):
        return None
    lead = x.shape[: x.ndim - len(axes)]
    width = int(np.prod(x.shape[len(lead) :]))
    size = getattr(kernel, "size", None)
    if not size or size % width:
        return None
    linear = _Linear(lead, width, size // width)
    if output is None:
        return linear
    fits = output.shape[: len(lead)] == lead
    return linear if fits and int(np.prod(output.shape[len(lead) :])) == linear.features else None
