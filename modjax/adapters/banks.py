"""What the modules share: settings by group, parameters with owners, and the two ways to weigh a bank.

Legend: `B` batch, `L` tokens, `S` segments, `D`/`K` width in/out, `M` modules, `H` heads, `r` rank of each module.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax import partitioning
from modjax.adapters.routing import ModuleName, Routing, Shares
from modjax.errors import is_number, nearest

Array = jax.Array
COMPOSITIONS = ("sum", "average")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter of a bank belongs to its modules.

    Attributes:
      axis: the trailing axis (negative) along which modules lie side by side; None if all own it together.
      parts: for each module its name, and how much of the axis it owns.
      axes: logical names of the trailing axes; "in" and "out" stand for those of the adapted kernel.
    """

    axis: int | None
    parts: tuple[tuple[str, int], ...]
    axes: tuple[str | None, ...]

    def spread(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """One value per module as an array that broadcasts over the parameter's trailing axes."""
        assert self.axis is not None
        along = np.repeat(np.asarray(values, np.float32), [size for _, size in self.parts])
        return along.reshape((-1,) + (1,) * (-self.axis - 1))


# Settings that may differ between groups of modules.


def frozen(value: Any) -> Any:
    """A setting as something hashable: mappings become sorted tuples of pairs."""
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


def items(value: Any) -> tuple[tuple[str, Any], ...]:
    """(group, value) pairs of a setting; the group of a setting for all is ""."""
    return value if isinstance(value, tuple) else (("", value),)


def each(value: Any, modules: Sequence[ModuleName], default: Any) -> tuple[Any, ...]:
    """A setting's value for every module: by its name, else by its group, else `default`."""
    if not isinstance(value, tuple):
        return (value,) * len(modules)
    table = dict(value)
    return tuple(
        next((table[name] for name in module.names if name in table), default) for module in modules
    )


def check_positive(where: str, value: Any, integer: bool = False, zero: bool = False) -> None:
    """Raises ValueError unless a setting, or all of its groups', is a positive number."""
    for key, number in items(value):
        name = where + (f"[{key!r}]" if key else "")
        if integer and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}.")
        if not is_number(number) or not (0 < number < math.inf or (zero and number == 0)):
            kind = "positive or 0" if zero else "positive"
            raise ValueError(f"{name} must be {kind}, got {number!r}.")


def check_groups(where: str, value: Any, modules: Sequence[ModuleName]) -> None:
    """Raises ValueError where a setting names a group that the bank does not have."""
    if not isinstance(value, tuple):
        return
    known = {name for module in modules for name in module.names}
    for key, _ in value:
        if key not in known:
            raise ValueError(
                f"{where}: the router has no module {key!r}." + nearest(key, sorted(known))
            )


def sizes(where: str, value: Any, modules: Sequence[ModuleName]) -> tuple[int, ...]:
    """Each module's size (rank, bottleneck)."""
    found = each(value, modules, None)
    if None in found:
        module, setting = modules[found.index(None)], where.rpartition(".")[2]
        raise ValueError(
            f"{where} gives no {setting} for {str(module)!r}."
            + nearest(module.group, [key for key, _ in items(value)])
        )
    return found


def equal_size(where: str, found: Sequence[int]) -> int:
    """The one size of modules that are to be averaged. Raises ValueError if they differ."""
    if len(set(found)) != 1:
        raise ValueError(
            f"{where}: modules whose parameters are averaged need one size, got {sorted(set(found))}."
        )
    return found[0]


# Per token.


def summable(routing: Routing | Shares) -> Routing:
    """Any routing as one for a sum of updates. Raises ValueError if it has heads, or draws for down and up apart."""
    if isinstance(routing, Routing):
        return routing
    heads, modules = routing.down.shape[-2:]
    if heads != 1 or routing.up is not routing.down:
        raise ValueError(
            "A sum of modules takes one weight for each: use composition='average' with this router."
        )
    index = jnp.broadcast_to(jnp.arange(modules), routing.down[..., 0, :].shape)
    return Routing(index, routing.down[..., 0, :], tuple((m, m + 1) for m in range(modules)))


def product(x: Array, w: Array) -> Array:
    """`x [B, L, D] @ w [D, K]`: `[B, L, K]`.

    Tokens are one axis, so that the gradient of `w` is a product of two matrices. With three axes XLA's CPU compiler
    first transposes the wider operand, which took a third of a step of LoRA.
    """
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def belongs(segments: Array | None, num_segments: int, rows: int) -> Array | None:
    """float32 `[B, L, S]`, 1 where a token is of a segment; None if weights hold for whole rows.

    Raises:
      ValueError: several segments per row without segment ids.
    """
    if segments is None and num_segments != 1:
        raise ValueError(
            f"The batch has {num_segments} rows of features per example but no segment ids: "
            "give the segment ids of a packed batch, or one row of features."
        )
    if segments is None or (rows, num_segments) == (1, 1):
        return None  # the same for all of the row, or for everybody
    return (segments[..., None] == jnp.arange(1, num_segments + 1)).astype(jnp.float32)


def per_token(shares: Shares, segments: Array | None) -> Shares:
    """Shares `[B, S, H, M]` as those of each token, `[B, L or 1, H, M]`."""
    own = belongs(segments, shares.down.shape[1], shares.down.shape[0])
    if own is None:
        return shares
    down = jnp.einsum("bls,bshm->blhm", own, shares.down)
    if shares.up is shares.down:
        return Shares(down, down)
    return Shares(down, jnp.einsum("bls,bshm->blhm", own, shares.up))


# The product of averages, `x (sum_m w_m A_m)` and `h (sum_m w_m B_m)`, without a matrix per example
# (arXiv 2211.03831 builds them; this is the same sum in another order).


def check_heads(path: str, heads: int, *widths: int) -> None:
    """Raises ValueError where the heads do not divide a layer's widths."""
    if any(width % heads for width in widths):
        raise ValueError(
            f"Layer {path!r} has widths {' and '.join(map(str, widths))}, which {heads} heads do not divide. Choose "
            "a number of heads that divides them, or leave the layer out of the rule."
        )


def average_down(x: Array, a: Array, weights: Array) -> Array:
    """`x (sum_m w_m a_m)`: `[B, L, r]`.

    Args:
      x: `[B, L, D]`.
      a: `[D, M * r]`, module by module.
      weights: `[B, L or 1, H, M]`, B may be 1; head h weighs the h-th of H blocks of rows.
    """
    heads, modules = weights.shape[-2:]
    width, columns = a.shape
    weights = weights.astype(x.dtype)
    if weights.shape[:2] == (1, 1):  # all alike: average the modules, at the cost of one
        blocks = a.reshape(heads, width // heads, modules, -1)
        mean = jnp.einsum("hdmr,hm->hdr", blocks, weights[0, 0])
        return product(x, mean.reshape(width, -1))
    # No size is left to be inferred: there may be no token, as in the empty prompt that makes a decoder's cache.
    blocks = x.reshape(*x.shape[:2], heads, width // heads)
    each = _by_head(blocks, a.reshape(heads, -1, columns))
    each = each.reshape(*x.shape[:2], heads, modules, columns // modules)
    return jnp.sum(each * weights[..., None], axis=(2, 3))


def average_up(h: Array, b: Array, weights: Array) -> Array:
    """`h (sum_m w_m b_m)`: `[B, L, K]`.

    Args:
      h: `[B, L, r]`.
      b: `[M * r, K]`, module by module.
      weights: as in `average_down`; head h weighs the h-th of H blocks of columns.
    """
    heads, modules = weights.shape[-2:]
    rows, features = b.shape
    weights = weights.astype(h.dtype)
    if weights.shape[:2] == (1, 1):
        blocks = b.reshape(modules, -1, heads, features // heads)
        mean = jnp.einsum("mrhk,hm->rhk", blocks, weights[0, 0])
        return product(h, mean.reshape(-1, features))
    each = weights[..., None] * h[:, :, None, None, :]  # [B, L, H, M, r]
    each = each.reshape(*each.shape[:3], rows)
    blocks = _by_head(each, b.reshape(rows, heads, -1).swapaxes(0, 1))
    return blocks.reshape(*h.shape[:2], features)


def _by_head(x: Array, w: Array) -> Array:
    """`x[:, :, h] @ w[h]` of each head: `x [B, L, H, D]`, `w [H, D, K]`, `[B, L, H, K]`.

    On a CPU one product after the other: what XLA makes of one with a batch axis took up to twice as long there.
    """
    heads = w.shape[0]
    if heads == 1 or partitioning.platform() == "cpu":
        return jnp.stack([product(x[:, :, head], w[head]) for head in range(heads)], axis=2)
    return jnp.einsum("blhd,hdk->blhk", x, w)


# The same for one dataset, with weights `[..., H, M]`, whose leading axes are a scanned network's layers.


def composed_down(a: Array, weights: np.ndarray) -> Array:
    """`sum_m w_m a_m` `[..., D, r]` of `a [..., D, M * r]`."""
    heads, modules = weights.shape[-2:]
    *lead, width, _ = a.shape
    blocks = a.reshape(*lead, heads, width // heads, modules, -1)
    mixed = jnp.einsum("...hdmr,...hm->...hdr", blocks, jnp.asarray(weights), precision="highest")
    return mixed.reshape(*lead, width, -1)


def composed_up(b: Array, weights: np.ndarray) -> Array:
    """`sum_m w_m b_m` `[..., r, K]` of `b [..., M * r, K]`."""
    heads, modules = weights.shape[-2:]
    *lead, _, features = b.shape
    blocks = b.reshape(*lead, modules, -1, heads, features // heads)
    mixed = jnp.einsum("...mrhk,...hm->...rhk", blocks, jnp.asarray(weights), precision="highest")
    return mixed.reshape(*lead, -1, features)
