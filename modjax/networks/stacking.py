"""Layers one after the other: unrolled or scanned, rematerialised or not."""

from typing import Any

import flax.linen as nn
import jax
from flax.linen import partitioning

from modjax.networks.configuration import REMAT_POLICIES


def stack(
    layer: type[nn.Module],
    settings: tuple[Any, ...],
    depth: int,
    config: Any,
    x: Any,
    shared: tuple[Any, ...] = (),
    own: tuple[Any, ...] = (),
    *,
    remat: bool = True,
) -> Any:
    """Runs `x, _ = layer(*settings)(x, *shared, *own)` `depth` times; called inside a compact method.

    The layers are called `layers_<i>`; scanned, they are one module `layers` whose parameters and caches have a leading
    layer axis.

    Args:
      layer: its `__call__` returns (x, None).
      settings: its attributes.
      depth: how many there are.
      config: says `scan_layers` and `remat_policy`.
      x: what goes through them.
      shared: further arguments that are the same for all.
      own: further arguments with a leading layer axis.
      remat: whether `remat_policy` applies; not in decoding.
    """
    made: Any = layer
    if remat and config.remat_policy != "none":
        # Inside a scan the loop already keeps XLA from undoing the recomputation.
        policy = REMAT_POLICIES[config.remat_policy]
        made = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
    if config.scan_layers:
        scanned = partitioning.scan_with_axes(
            made,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={True: True},  # every stream, also those that only an adapter draws from
            in_axes=(nn.broadcast,) * len(shared) + (0,) * len(own),
            length=depth,
        )
        return scanned(*settings, name="layers")(x, *shared, *own)[0]
    for i in range(depth):
        mine = jax.tree.map(lambda array, i=i: array[i], own)
        x, _ = made(*settings, name=f"layers_{i}")(x, *shared, *mine)
    return x
