"""A frozen base in int8: each weight matrix as int8 values with a float32 scale for each output channel.

    {"kernel": float32 [D, K]}  ->  {"kernel": Quantized(values int8 [D, K], scale float32 [1, K])}, kernel ~ values * scale

A `Quantized` leaf takes the place of the array, in a tree that is otherwise the same. Our networks compute with the values
and scale what comes out (`product`, `rows`), so that a step holds no float copy of the base. It is also one of Flax's
boxes: any other network is given the float32 matrix when a layer asks for its parameter, inside `nn.scan` and `nn.remat` as
well. Such a matrix lives until the layer's backward pass, so that without `nn.remat` a training step holds all of them.

Plain jax, and not qwix (0.1.8, looked at in November 2026): qwix replaces jax's functions while a model runs, and a lookup
is none of those, so that an embedding stays in float; one that is the output layer too it stores transposed, and T5's
lookup fails.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from flax.core import meta

Array = jax.Array
Tree = Mapping[str, Any]

# {name of a weight: the axis whose entries share a scale}; leading axes are those of scanned layers.
SHARED = {"kernel": -2, "embedding": -1}
LEAST = 8  # where fewer entries share a scale, the scales would take what the values save
LARGEST = 127


class Quantized(struct.PyTreeNode, meta.AxisMetadata):
    """A weight in int8, `values * scale`.

    Attributes:
      values: int8, in the weight's shape.
      scale: float32, 1 long on the axis whose entries share it, so that both shard by the weight's axis names.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        return int(self.values.ndim)

    @property
    def size(self) -> int:
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.scale.nbytes)

    @property
    def T(self) -> "Quantized":
        return Quantized(self.values.T, self.scale.T)

    def unbox(self) -> Array:
        """The weight in float32."""
        return jnp.asarray(self.values, jnp.float32) * self.scale

    def replace_boxed(self, val: Any) -> Any:
        raise ValueError("A quantised parameter is frozen: it cannot be written.")

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        return self


def quantize(tree: Tree) -> dict[str, Any]:
    """A base with its kernels and embeddings in int8: symmetric, rounded to nearest, the largest of a channel at 127.

    The error of an entry is at most half of its scale, the largest entry of its channel over 254. A channel is a kernel's
    output (a kernel of more axes, as `nn.DenseGeneral` has, shares a scale along its last axis but one, which is finer) or
    an embedding's row. Norms, biases and position biases stay as they are.

    Args:
      tree: nested dict of host or device arrays; a scanned network's have leading axes.

    Returns:
      The same tree with `Quantized` leaves of host arrays.

    Raises:
      ValueError: nothing to quantise, or a weight that is not finite.
    """
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    found = {path: _quantized(path, leaf) for path, leaf in flat.items() if _is_weight(path, leaf)}
    if not found:
        names = ", ".join(sorted({path.rsplit("/", 1)[-1] for path in flat}))
        raise ValueError(
            f"int8 is for frozen weights named {' or '.join(SHARED)}, of two axes or more, {LEAST} entries or more to a "
            f"scale. There is none among what is frozen: {names or 'nothing'}."
        )
    return traverse_util.unflatten_dict({**flat, **found}, sep="/")


def _is_weight(path: str, leaf: Any) -> bool:
    axis = SHARED.get(path.rsplit("/", 1)[-1])
    if axis is None or getattr(leaf, "ndim", 0) < 2:
        return False
    return leaf.shape[axis] >= LEAST and jnp.issubdtype(leaf.dtype, jnp.floating)


def _quantized(path: str, leaf: Any) -> Quantized:
    axis = SHARED[path.rsplit("/", 1)[-1]]
    weight = np.asarray(leaf, np.float32)
    # Not by absolute values: they would be another copy.
    largest = np.maximum(weight.max(axis, keepdims=True), -weight.min(axis, keepdims=True))
    if not np.isfinite(largest).all():
        raise ValueError(f"The base's {path} holds numbers that are not finite.")
    scale = np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
    values = np.divide(weight, scale)
    return Quantized(np.rint(values, out=values).astype(np.int8), scale)


def is_quantized(tree: Any) -> bool:
    """Whether a tree has a `Quantized` leaf."""
    return any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf))


def dequantize(tree: Any) -> Any:
    """A tree with float32 arrays in place of `Quantized` leaves."""
    return jax.tree.map(lambda x: x.unbox() if _is_leaf(x) else x, tree, is_leaf=_is_leaf)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Quantized)


def product(x: Array, kernel: Any, dtype: Any) -> Array:
    """`x @ kernel`, both in `dtype`: `[..., D]` to `[..., K]`; the kernel `[D, K]` may be quantised."""
    if isinstance(kernel, Quantized):
        return _scaled_product(x.astype(dtype), kernel.values, kernel.scale[0])
    return jnp.dot(x.astype(dtype), kernel.astype(dtype))


# Of the kernel, what waits for the backward pass is its int8 values: the cast is done again there.
@jax.checkpoint
def _scaled_product(x: Array, values: Array, scale: Array) -> Array:
    return (jnp.dot(x, values.astype(x.dtype)) * scale).astype(x.dtype)


def rows(embedding: Any, ids: Array, dtype: Any) -> Array:
    """Rows of an embedding `[V, D]`, which may be quantised, in `dtype`: ids `[...]` to `[..., D]`."""
    if isinstance(embedding, Quantized):
        values, scale = (
            jnp.take(part, ids, axis=0) for part in (embedding.values, embedding.scale)
        )
        return (values * scale).astype(dtype)
    return jnp.take(embedding.astype(dtype), ids, axis=0)
