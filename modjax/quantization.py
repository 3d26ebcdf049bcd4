"""A frozen base in int8: each weight matrix as int8 values with a float32 scale for each output channel.

    {"kernel": float32 [D, K]} -> {"kernel": Quantized(values int8 [D, K], rest uint8 [D/8, K], scale float32 [1, K])}

A weight is `scale * (value + 1/4)` or `scale * (value - 1/4)`: a ninth bit says on which side of the value it lay.
Without it the logits of small trained networks are 1 to 2 % off, with it half of that, for an eighth of a byte.

A `Quantized` leaf takes the array's place in a tree that is otherwise the same. Our networks compute with the values
and scale what comes out (`product`, `rows`), so that no program needs a float copy of the base; `benchmarks/README.md`
has figures. (XLA makes one all the same on CPU if the network is unrolled: it casts all kernels first.) It is also one
of Flax's boxes: a network that knows nothing of it is given the float32 matrix when a layer asks for its parameter,
inside `nn.scan` and `nn.remat` as well. That lives until the layer's backward pass, so that training such a network
holds all of them, unless it rematerialises its layers.

Plain jax and not qwix (0.1.8, tried in November 2026): qwix replaces jax's functions while a model runs, and a lookup
is none of them. So an embedding stays in float, and one that is the output layer too is stored transposed, where T5's
lookup fails.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from flax.core import meta

from modjax import partitioning

Array = jax.Array
Tree = Mapping[str, Any]

# {name of a weight: the axis whose entries share a scale}; leading axes are those of scanned layers.
SHARED = {"kernel": -2, "embedding": -1}
LEAST = 8  # where fewer entries share a scale, the scales would take what the values save
LARGEST = 127.25


class Quantized(struct.PyTreeNode, meta.AxisMetadata):
    """A weight in int8 and a bit: `scale * (values + 1/4 or - 1/4)`.

    All three have the weight's axes, in its order, so that they shard by its axis names.

    Attributes:
      values: int8, in the weight's shape.
      rest: uint8, an eighth as long (rounded up) on the axis whose entries share a scale: their ninth bits, lowest
        first; 1 adds.
      scale: float32, 1 long on that axis.
    """

    values: Any
    rest: Any
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
    def T(self) -> "Quantized":
        return Quantized(self.values.T, self.rest.T, self.scale.T)

    def steps(self, dtype: Any) -> Array:
        """The weight in steps of its scale."""
        rest = jnp.asarray(self.rest)
        axis = next(i for i, n in enumerate(self.shape) if n != rest.shape[i])
        # Not jnp.unpackbits, which does not take an empty array, as the rows of no tokens are.
        places = jnp.arange(8, dtype=rest.dtype).reshape(8, *(1,) * (rest.ndim - axis - 1))
        bits = jnp.expand_dims(rest, axis + 1) >> places & 1
        bits = bits.reshape(*rest.shape[:axis], 8 * rest.shape[axis], *rest.shape[axis + 1 :])
        bits = jax.lax.slice_in_dim(bits, 0, self.shape[axis], axis=axis)
        return jnp.asarray(self.values).astype(dtype) + (bits.astype(dtype) / 2 - 0.25)

    def unbox(self) -> Array:
        """The weight in float32."""
        return self.steps(jnp.float32) * self.scale

    def replace_boxed(self, val: Any) -> Any:
        raise ValueError("A quantised parameter is frozen: it cannot be written.")

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        return self


def quantize(tree: Tree) -> dict[str, Any]:
    """A base with its kernels and embeddings in int8 and a bit.

    An entry is off by at most a quarter of its scale: the largest entry of its channel, over 509. A channel is an
    output of a kernel (one of more axes, as `nn.DenseGeneral` has, shares a scale along the last axis but one, which is
    finer) or a row of an embedding. Norms, biases and position biases stay as they are.

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
        names = ", ".join(sorted({path.rsplit("/", 1)[-1] for path in flat})) or "nothing"
        raise ValueError(
            f"int8 is for frozen weights named {' or '.join(SHARED)}, with two axes or more and at "
            f"least {LEAST} entries to a scale. None is among what is frozen: {names}."
        )
    return traverse_util.unflatten_dict({**flat, **found}, sep="/")


def shapes(tree: Tree) -> dict[str, Any]:
    """The shapes of `quantize(tree)`, for a tree of shapes."""

    def small(path: str, leaf: Any) -> Any:
        if not _is_weight(path, leaf):
            return leaf
        axis = SHARED[path.rsplit("/", 1)[-1]] % leaf.ndim
        long = {"values": leaf.shape[axis], "rest": -(-leaf.shape[axis] // 8), "scale": 1}
        dtypes = {"values": np.int8, "rest": np.uint8, "scale": np.float32}
        return Quantized(
            **{
                name: jax.ShapeDtypeStruct(
                    (*leaf.shape[:axis], length, *leaf.shape[axis + 1 :]), dtypes[name]
                )
                for name, length in long.items()
            }
        )

    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    return traverse_util.unflatten_dict({p: small(p, x) for p, x in flat.items()}, sep="/")


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
    scale = (largest / LARGEST).astype(np.float32)
    steps = weight / np.where(scale > 0, scale, 1)
    values = np.rint(steps).astype(np.int8)
    return Quantized(values, np.packbits(steps >= values, axis=axis, bitorder="little"), scale)


def is_quantized(tree: Any) -> bool:
    """Whether a tree has a `Quantized` leaf."""
    return any(_is_leaf(leaf) for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf))


def dequantize(tree: Any) -> Any:
    """A tree with float32 arrays in place of `Quantized` leaves."""
    return jax.tree.map(lambda x: x.unbox() if _is_leaf(x) else x, tree, is_leaf=_is_leaf)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Quantized)


def product(x: Array, kernel: Any, dtype: Any) -> Array:
    """`x @ kernel`, both in `dtype`: `[..., D]` to `[..., K]`; the kernel `[D, K]` may be quantised."""
    if isinstance(kernel, Quantized):
        return _scaled_product(x.astype(dtype), kernel)
    half = x.dtype == kernel.dtype == jnp.bfloat16
    if half and jnp.dtype(dtype) == jnp.float32 and partitioning.platform() == "gpu":
        return _wide_product(x, kernel)
    return jnp.dot(x.astype(dtype), kernel.astype(dtype))


@jax.custom_vjp
def _wide_product(x: Array, kernel: Array) -> Array:
    """The float32 product of bfloat16 matrices, as exact as that of the same numbers in float32.

    GPUs multiply bfloat16 several times as fast, and no float32 copy of the kernel is made. Backward, what
    comes in is rounded to bfloat16, as the gradients that leave are.
    """
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _wide_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_product(x, kernel), (x, kernel)


def _wide_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = kept
    slope = slope.astype(x.dtype)
    columns = x.reshape(-1, x.shape[-1]).T
    return jnp.dot(slope, kernel.T), jnp.dot(columns, slope.reshape(-1, slope.shape[-1]))


_wide_product.defvjp(_wide_forward, _wide_backward)


# Of the kernel, what waits for the backward pass is its int8 form: the steps are made again there.
@jax.checkpoint
def _scaled_product(x: Array, kernel: Quantized) -> Array:
    return (jnp.dot(x, kernel.steps(x.dtype)) * kernel.scale[0]).astype(x.dtype)


def rows(embedding: Any, ids: Array, dtype: Any) -> Array:
    """Rows of an embedding `[V, D]`, which may be quantised, in `dtype`: ids `[...]` to `[..., D]`."""
    if isinstance(embedding, Quantized):
        taken: Quantized = jax.tree.map(lambda part: jnp.take(part, ids, axis=0), embedding)
        return taken.unbox().astype(dtype)
    return jnp.take(embedding.astype(dtype), ids, axis=0)
