"""How a module's parameter is made, and how it is found once it is there."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
from flax.core import meta
from flax.linen import partitioning


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: Sequence[str] | None = None,
    unbox: bool = True,
) -> Any:
    """Flax's `param`, or `param_with_axes`, without tracing how a parameter that is there would have been made.

    Flax does so in every pass to learn its shape, which took a tenth of the time to trace a step.

    Args:
      module: whose it is.
      name: its name.
      init: makes it of a key, the shape and, with axes, float32.
      shape: what it must have.
      axes: logical names of its axes, noted in the collection "params_axes".
      unbox: give what a box holds.

    Raises:
      flax.errors.ScopeParamShapeError: what is there has another shape.
    """
    if not module.has_variable("params", name):
        if axes is None:
            return module.param(name, init, shape)
        dtype = jax.numpy.float32
        return partitioning.param_with_axes(
            name, init, shape, dtype, axes=tuple(axes), module=module, unbox=unbox
        )
    value: Any = module.get_variable("params", name)
    if tuple(value.shape) != tuple(shape):
        raise flax.errors.ScopeParamShapeError(
            name, "/".join(module.path), tuple(value.shape), tuple(shape)
        )
    value = meta.unbox(value) if unbox else value
    if axes is None:
        return value
    # As Flax does, for whoever has set its logical axis rules.
    return partitioning.with_sharding_constraint(value, jax.sharding.PartitionSpec(*axes))
