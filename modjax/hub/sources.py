"""Where a parameter of ours lies in somebody else's files, and the way back."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from modjax.hub.errors import HubError
from modjax.hub.safetensors_io import TensorFiles


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: a tensor of the files, and what is done to it.

    Attributes:
      tensor: its name in the files.
      transpose: reverse its axes.
      factor: multiply by it.
      part: `(start, stop)` of the last axis, after a transposition, for a tensor that holds several
        parameters side by side (GPT-2's query, key and value).
    """

    tensor: str
    transpose: bool = False
    factor: float = 1.0
    part: tuple[int, int] | None = None

    def shape(self, of_tensor: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, given the tensor's."""
        shape = of_tensor[::-1] if self.transpose else of_tensor
        if self.part is None or not shape:
            return shape
        start, stop = self.part
        return (*shape[:-1], max(0, min(stop, shape[-1]) - start))

    def fill(self, out: np.ndarray, files: TensorFiles) -> None:
        """Writes the parameter into `out`, which has its shape and any dtype, some rows of the tensor at a time.

        Raises:
          HubError: the tensor holds values that are not finite.
        """
        last = out.ndim - 1
        # The tensor's rows lie along the first axis of the parameter, or along the last one if it is transposed.
        axis = last if self.transpose else 0
        start, stop = self.part or (0, files.shapes[self.tensor][0 if axis == last else -1])
        at = 0
        for rows in files.rows(self.tensor):
            if not np.isfinite(rows).all():
                raise HubError(
                    f"{files.directory}: tensor {self.tensor} holds values that are not finite."
                )
            there = slice(at, at + len(rows))
            piece = rows.T if self.transpose else rows
            if axis == last:
                low, high = max(at, start), max(start, min(there.stop, stop))
                there = slice(low - start, high - start)
                piece = piece[..., max(low - at, 0) : max(high - at, 0)]
            else:
                piece = piece[..., start:stop]
            if self.factor != 1.0:
                piece = piece.astype(np.float32) * np.float32(self.factor)
            out[(slice(None),) * axis + (there,)] = piece
            at += len(rows)


@dataclasses.dataclass(frozen=True)
class Target:
    """What one of their tensors is made of.

    Attributes:
      parameters: ours, side by side along the last axis, before a transposition.
      transpose: reverse the axes.
      factor: multiply by it.
    """

    parameters: tuple[str, ...]
    transpose: bool = False
    factor: float = 1.0

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape, given the parameters'."""
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return shape[::-1] if self.transpose else shape

    def make(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of these parameters; where it is one of them as it is, a view."""
        tensor = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
        if self.factor != 1.0:
            tensor = tensor.astype(np.float32) * np.float32(self.factor)
        return tensor.T if self.transpose else tensor


def targets(sources: Mapping[str, Source]) -> dict[str, Target]:
    """The way back of `sources`, {our parameter: where it comes from}: {their tensor: what it is made of}."""
    found: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for name, source in sources.items():
        found.setdefault(source.tensor, []).append((source.part or (0, 0), name))
    made = {}
    for tensor, parts in found.items():
        names = tuple(name for _, name in sorted(parts))
        source = sources[names[0]]
        made[tensor] = Target(names, source.transpose, 1.0 / source.factor)
    return made
