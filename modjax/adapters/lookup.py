"""Columns of a bank, looked up for each row of a batch, and how they and their gradient lie on a mesh.

A bank's width may be divided over the devices that share a copy of the base, and a batch's rows are divided over all.
Each device looks up its slice of the width for all rows of those devices, and they hand the rows out; backward, rows
come back likewise, and each device makes its slice of the bank's gradient, so that the devices that hold the same slice
add up no more than that. What was handed out is kept by a network that recomputes its layers. Left to itself, XLA makes
the whole gradient on each device and adds up those.

Legend: `B` batch, `D` width, `R` columns of the bank, `N` columns of a row.
"""

import jax
import jax.numpy as jnp

from modjax import partitioning

Array = jax.Array


def columns(table: Array, index: Array, axis: str | None) -> Array:
    """`[D, R]` at columns int32 `[B, N]`: `[D, B, N]`.

    Args:
      table: the bank.
      index: the columns of each row.
      axis: the logical name of D; None leaves to XLA how the result lies.
    """
    if axis is not None:
        # Devices tell each other the ids, or some of the table, or the matrix of `_adjoint`, would travel for them.
        index = partitioning.constrain(index, ("lookup", None))
    found = _columns(table, index)
    if axis is not None:
        found = partitioning.move(found, (axis, "lookup", None), (None, "batch", None))
    return found


def rows(table: Array, index: Array, axis: str | None) -> Array:
    """`[R, D]` at rows int32 `[B, N]`: `[B, N, D]`; the same for the other side of a bank."""
    if axis is not None:
        index = partitioning.constrain(index, ("lookup", None))
    found = _rows(table, index)
    if axis is not None:
        found = partitioning.move(found, ("lookup", None, axis), ("batch", None, axis))
    return found


def _adjoint(equation: str, cotangent: Array, index: Array, size: int) -> Array:
    """The gradient of a table as a product with a matrix of zeros and ones, exactly.

    Nothing is divided over a mesh more simply. On one device the scattered addition of rows to zeros takes less time.
    """
    used = (index[..., None] == jnp.arange(size)).astype(cotangent.dtype)
    used = partitioning.constrain(used, ("lookup", None, None))
    return jnp.einsum(equation, cotangent, used, precision="highest")


@jax.custom_vjp
def _columns(table: Array, index: Array) -> Array:
    return table[:, index]


def _columns_forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[:, index], (table, index)


def _columns_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, index = saved
    if partitioning.rows_are_divided():
        return _adjoint("dbn,bnr->dr", cotangent, index, table.shape[1]), None
    return jnp.zeros_like(table).at[:, index].add(cotangent), None


_columns.defvjp(_columns_forward, _columns_backward)


@jax.custom_vjp
def _rows(table: Array, index: Array) -> Array:
    return table[index]


def _rows_forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[index], (table, index)


def _rows_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, index = saved
    if partitioning.rows_are_divided():
        return _adjoint("bnd,bnr->rd", cotangent, index, table.shape[0]), None
    return jnp.zeros_like(table).at[index].add(cotangent), None


_rows.defvjp(_rows_forward, _rows_backward)
