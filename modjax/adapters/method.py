"""A method as JSON-able data, kept with a checkpoint, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from modjax.adapters.adapted import Adapted
from modjax.adapters.rules import Mixture, Rule
from modjax.adapters.trees import ROUTER_LEAF
from modjax.errors import nearest

# How a product is computed and how fast it is trained, not what it is: a run may go on with another.
NOT_OF_THE_METHOD = ("form", "learning_rate")
# How parameters start, and what only training draws: what a trained method computes does not depend on it.
OF_TRAINING = ("dropout", "relaxed", "temperature", "init_scale", "spread")
PARTS = ("module", "router")


def describe_method(adapted: Adapted) -> dict[str, Any]:
    """The method as JSON-able data: the rules, and how each parameter is divided among modules, or tasks."""
    rules = []
    for rule in adapted.rules:
        mixture = rule.mixture
        bank = {
            leaf: [spec.axis, [list(part) for part in spec.parts]]
            for leaf, spec in mixture.leaves(adapted.space).items()
        }
        if rows := mixture.router.rows(adapted.space):
            bank[ROUTER_LEAF] = [-3, [[row, 1] for row in rows]]
        rules.append(
            {
                "pattern": rule.pattern,
                "name": mixture.name,
                "module": _describe(mixture.module),
                "router": _describe(mixture.router),
                "composition": mixture.composes,
                "bank": bank,
            }
        )
    return {"rules": rules}


def of_evaluation(method: Any) -> Any:
    """A described method without what only its training depends on."""
    if not isinstance(method, Mapping):  # "full"
        return method

    def part(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in OF_TRAINING}

    rules = method["rules"]
    return {"rules": [{k: part(v) if k in PARTS else v for k, v in r.items()} for r in rules]}


def _describe(part: Any) -> dict[str, Any]:
    names = (f.name for f in dataclasses.fields(part) if f.name not in NOT_OF_THE_METHOD)
    fields = {name: getattr(part, name) for name in names}
    plain = {k: [list(x) for x in v] if _pairs(v) else v for k, v in fields.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    return {"type": type(part).__name__, **plain}


def _pairs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(x, tuple) for x in value)


def rules_of(method: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules that `describe_method` described.

    Raises:
      ValueError: a part that is not one of modjax's.
    """
    return tuple(
        Rule(
            rule["pattern"],
            Mixture(
                rule["name"], _part(rule["module"]), _part(rule["router"]), rule["composition"]
            ),
        )
        for rule in method["rules"]
    )


def _part(description: Mapping[str, Any]) -> Any:
    from modjax import adapters

    # Every module and router stands there.
    parts: dict[str, Any] = {
        name: value
        for name, value in vars(adapters).items()
        if dataclasses.is_dataclass(value) and (hasattr(value, "bank") or hasattr(value, "route"))
    }
    fields = dict(description)
    kind = fields.pop("type")
    if kind not in parts:
        raise ValueError(
            f"The checkpoint's method has a part {kind!r} that modjax/adapters/__init__.py does not name: a method's "
            f"routers and modules must be named there.{nearest(kind, parts)}"
        )
    return parts[kind](**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
