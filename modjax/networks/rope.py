"""Rotary position embedding, with the ways of stretching it that published decoders use.

A head's dimensions are taken in pairs `(i, i + head_dim / 2)`, and pair `i` is turned by `position * frequency[i]`
(RoFormer, arXiv 2104.09864), so that the product of a query and a key depends on their distance. Shapes: `B` batch,
`Q` positions, `H` heads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from modjax.errors import nearest

Array = jax.Array

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The frequencies of a rotary embedding.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: "default"; "linear" divides all frequencies by `factor` (position interpolation, arXiv 2306.15595);
        "llama3" divides those whose wavelength exceeds `original_length / low_freq_factor` and blends towards the
        unchanged ones below `original_length / high_freq_factor` (Llama 3.1); "yarn" blends by the number of turns
        within `original_length` (arXiv 2309.00071).
      factor: by how much the context was stretched.
      original_length: context before stretching, in tokens (llama3, yarn).
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow: of yarn: turns above which a pair is unchanged, and below which it is divided.
      truncate: of yarn: whether the bounds of the blend are rounded outwards to whole pairs.
      attention_factor: of yarn: multiplies cosines and sines, so that attention logits grow by its square.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Rope.kind: unknown {self.kind!r}." + nearest(self.kind, KINDS))
        if not self.theta > 1.0:
            raise ValueError(f"Rope.theta must be above 1, got {self.theta}.")
        if not self.factor > 0.0:
            raise ValueError(f"Rope.factor must be positive, got {self.factor}.")
        if self.kind in ("llama3", "yarn") and self.original_length < 1:
            raise ValueError(
                f"Rope of kind {self.kind!r} needs original_length, the context before stretching; "
                f"got {self.original_length}."
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "Rope of kind 'llama3' needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair, float32 `[head_dim / 2]`."""
        pairs = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.float32(self.theta) ** pairs
        if self.kind == "default":
            return plain
        stretched = plain / np.float32(self.factor)
        if self.kind == "linear":
            return stretched
        if self.kind == "llama3":
            turns = self.original_length * plain / np.float32(2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            first, last = self._pair(self.beta_fast, head_dim), self._pair(self.beta_slow, head_dim)
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            width = last - first or 0.001  # one pair is kept and the next one divided
            keep = 1.0 - (np.arange(head_dim // 2, dtype=np.float32) - first) / width
        keep = np.clip(keep, 0.0, 1.0).astype(np.float32)
        return (1 - keep) * stretched + keep * plain

    def _pair(self, turns: float, head_dim: int) -> float:
        """The pair, not rounded, that makes so many turns within the original context."""
        wavelength = self.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    def table(self, positions: Array, head_dim: int) -> Array:
        """Cosines and sines of positions int `[B, Q]`: float32 `[2, B, Q, head_dim / 2]`."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * np.float32(self.attention_factor)


def rotate(x: Array, table: Array) -> Array:
    """Turns heads `[B, Q, H, head_dim]` by a `table [2, B, Q, head_dim / 2]`, in float32; keeps the dtype."""
    cos, sin = table[0][:, :, None], table[1][:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
