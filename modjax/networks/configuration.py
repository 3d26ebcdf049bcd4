"""What the networks' configurations have in common: fields that a run chooses, and how fields are checked."""

import contextlib
import dataclasses
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from modjax import partitioning
from modjax.errors import check_bool, is_number, nearest
from modjax.networks import fused, layers

_sent = jax.checkpoint_policies.save_only_these_names(partitioning.SENT)


def _minimal(primitive: Any, *args: Any, **params: Any) -> Any:
    """Keeps products with weights, and what attention makes where it is one kernel: neither is large."""
    if primitive.name == fused.FORWARD:
        return True
    dots = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    return dots(primitive, *args, **params) or _sent(primitive, *args, **params)


# What is kept beside a layer's input; all keep what devices have sent each other for a row (`partitioning.move`).
REMAT_POLICIES = {
    "none": None,
    "full": _sent,
    "minimal": _minimal,
}
# T5-family activations overflow float16.
DTYPES = ("float32", "bfloat16")


def require(config: Any, good: bool, name: str, what: str) -> None:
    """Raises ValueError, naming the field and its value, unless `good`."""
    if not good:
        raise ValueError(f"{type(config).__name__}.{name} {what}, got {getattr(config, name)!r}.")


def require_integer(config: Any, name: str) -> None:
    """Raises ValueError unless a field is an integer."""
    require(config, isinstance(getattr(config, name), numbers.Integral), name, "must be an integer")


def require_known(config: Any, name: str, known: Collection[str]) -> None:
    """Raises ValueError, naming the nearest known value, unless each value of a field is a known one."""
    value = getattr(config, name)
    for one in [value] if isinstance(value, str) else value:
        if one not in known:
            raise ValueError(
                f"{type(config).__name__}.{name}: unknown {one!r}." + nearest(str(one), known)
            )


def check(config: Any, sizes: Sequence[str]) -> None:
    """Brings the fields that all configurations have into their form, and checks them.

    Args:
      config: a frozen dataclass with `mlp_activations`, `dropout_rate`, `remat_policy`, `attention` and `dtype`; called
        from its `__post_init__`.
      sizes: the names of fields that must be at least 1.

    Raises:
      ValueError: a field out of range or unknown; it is named.
    """
    object.__setattr__(config, "mlp_activations", tuple(config.mlp_activations))
    with contextlib.suppress(TypeError):  # what is no type is refused below
        object.__setattr__(config, "dtype", jnp.dtype(config.dtype).name)
    require(config, config.dtype in DTYPES, "dtype", f"must be one of {DTYPES}")
    for field in dataclasses.fields(config):
        if isinstance(field.default, bool):
            check_bool(f"{type(config).__name__}.{field.name}", getattr(config, field.name))
    for name in sizes:
        require_integer(config, name)
        require(config, getattr(config, name) >= 1, name, "must be at least 1")
    require(config, bool(config.mlp_activations), "mlp_activations", "must name at least one")
    require_known(config, "mlp_activations", layers.ACTIVATIONS)
    require_known(config, "remat_policy", REMAT_POLICIES)
    require_known(config, "attention", fused.CHOICES)
    rate = config.dropout_rate
    require(config, is_number(rate) and 0.0 <= rate < 1.0, "dropout_rate", "must be in [0, 1)")
