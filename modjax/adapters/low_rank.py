"""The low-rank pair (LoRA, arXiv 2106.09685) as a bank of many, summed or averaged.

A module knows a layer's input and output and how much of each bank member a token uses; it knows nothing of features,
tasks or networks. Legend: `B` batch, `L` tokens, `S` segments, `D`/`K` width in/out, `M` modules, `R` columns (the sum
of the modules' ranks), `N` active columns of a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax import partitioning
from modjax.adapters import banks, lookup
from modjax.adapters.banks import Leaf, belongs
from modjax.adapters.routing import ModuleName, Routing, Shares, as_shares
from modjax.errors import is_number, nearest
from modjax.parameters import parameter

Array = jax.Array
FORMS = ("auto", "dense", "gathered")

# Measured by benchmarks/lowrank_forms.py; see choose_form.
DENSE_UP_TO_COLUMNS = 512
GATHERED_TRAFFIC_WEIGHT = 8.0


@flax.struct.dataclass
class Gates:
    """A sum over modules prepared for the columns of a bank, once per forward pass and stream.

    It is prepared for both forms of the product; the one that no layer uses is dropped by the compiler.

    Attributes:
      dense: float32 `[B, L or 1, R]`: what each token multiplies each column's hidden value by.
      columns: int32 `[B, N]`: the columns that a row uses.
      gathered: float32 `[B, L or 1, N]`: the same as `dense`, for those columns.
      modules: float32 `[B, L or 1, M]`: the weights of the modules.
    """

    dense: Array
    columns: Array
    gathered: Array
    modules: Array

    @property
    def rows(self) -> int:
        """B, or 1 where all rows are treated alike."""
        return self.dense.shape[0]


def choose_form(
    num_columns: int, active_columns: int, batch: int, length: int, platform: str = "tpu"
) -> str:
    """ "dense" or "gathered", whichever is expected to take less time for one low-rank bank.

    The dense form multiplies every token with all `num_columns`; the gathered form multiplies with the row's
    `active_columns` only, but first copies those columns for each row of the batch, and adds their gradients back.
    Per unit of width: dense costs `batch * length * num_columns` multiply-adds, gathered
    `batch * active_columns * (length + w)` with w the measured price of moving a column, in tokens.

    Args:
      num_columns: R, of the bank.
      active_columns: N, of a row.
      batch: rows.
      length: tokens of a row.
      platform: of the devices, as jax calls it. Accelerators multiply with a few hundred columns as fast as with a few;
        on a "cpu" gathering pays with any number of columns (benchmarks/growth).
    """
    if platform != "cpu" and num_columns <= DENSE_UP_TO_COLUMNS:
        return "dense"
    gathered = active_columns * (length + GATHERED_TRAFFIC_WEIGHT)
    return "gathered" if gathered < num_columns * length and batch else "dense"


def column_gates(
    routing: Routing, ranks: Sequence[int], scales: np.ndarray, segments: Array | None
) -> Gates:
    """Turns a routing into gates per token and column, for one stream.

    Args:
      routing: the batch's.
      ranks: how many columns each module has.
      scales: float32 `[M]`, a factor of each module.
      segments: int32 `[B, L]` of the stream, or None when every row is one example.
    """
    batch, num_segments = routing.index.shape[:2]
    own = belongs(segments, num_segments, batch)

    # Dense: what each column's owner weighs.
    owner = np.repeat(np.arange(len(ranks)), ranks)
    weights = routing.weights(len(ranks)) * scales
    if own is not None:
        weights = jnp.einsum("bls,bsm->blm", own, weights)
    dense = weights[..., owner]

    # Gathered: each slot of an example opens the columns of the module that it names.
    first = np.concatenate([[0], np.cumsum(ranks)[:-1]])
    columns, gates = [], []
    for slot, (start, stop) in enumerate(routing.slots):
        module = jnp.maximum(routing.index[..., slot], 0)
        gate = routing.gate[..., slot] * jnp.asarray(scales)[module]
        step = np.arange(max(ranks[start:stop]))
        inside = step < jnp.asarray(ranks)[module][..., None]
        columns.append(jnp.where(inside, jnp.asarray(first)[module][..., None] + step, 0))
        gates.append(inside * gate[..., None])
    column, gate = jnp.concatenate(columns, -1), jnp.concatenate(gates, -1)  # [B, S, n]
    if own is not None:
        # A row's columns are those of all its segments; a token opens those of its own.
        gate = own[..., None] * gate[:, None]  # [B, L, S, n]
        gate = gate.reshape(*gate.shape[:2], -1)
    return Gates(dense, column.reshape(batch, -1), gate, weights)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A bank of low-rank pairs beside a linear layer.

    Summed: `y += sum_m w_m s_m (x a_m) b_m` (LoRA, FLix). Averaged: `y += s (x sum_m w_m a_m) (sum_m w'_m b_m)`
    (Polytropon, AdaMix), with weights per head where the router has heads. `s = alpha / rank`.

    The pairs lie side by side in `a [D, R]` and `b [R, K]`; a static list names each column's owner. `a` starts
    uniform in +-init_scale/sqrt(D) and `b` at zero, so that step 0 is the base model.

    Attributes:
      rank: of every module, or `{group or "group=value": rank}` where groups are feature names, "shared", "dataset".
      alpha: numerator of the scale, likewise; None = the module's rank, so that the scale is 1.
      dropout: of the input to the update, in training.
      learning_rate: factor on the optimizer's update of a group's columns, likewise; 0 freezes them.
      form: of a sum: "dense" (all columns, masked), "gathered" (the active columns of each row) or "auto"
        (`choose_form`).
      init_scale: see above; 1/sqrt(3) in Polytropon's reference code.
      share_up: the modules share `b [rank, K]` (AdaMix's released runs); for averages only.
    """

    rank: Any = 4
    alpha: Any = None
    dropout: float = 0.0
    learning_rate: Any = 1.0
    form: str = "auto"
    init_scale: float = 1.0
    share_up: bool = False

    acts_on: ClassVar[str] = "output"
    settings: ClassVar[tuple[str, ...]] = ("rank", "alpha", "learning_rate")

    def __post_init__(self) -> None:
        for name in self.settings:
            object.__setattr__(self, name, banks.frozen(getattr(self, name)))
        banks.check_positive("LowRank.rank", self.rank, integer=True)
        if self.alpha is not None:
            banks.check_positive("LowRank.alpha", self.alpha)
        banks.check_positive("LowRank.learning_rate", self.learning_rate, zero=True)
        banks.check_positive("LowRank.init_scale", self.init_scale)
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LowRank.dropout must be in [0, 1), got {self.dropout!r}.")
        if self.form not in FORMS:
            raise ValueError(f"LowRank.form: unknown {self.form!r}." + nearest(self.form, FORMS))

    # Static facts about a bank.

    def check(self, modules: Sequence[ModuleName], composition: str) -> None:
        """Raises ValueError where the settings do not fit the router's modules."""
        for setting in self.settings:
            banks.check_groups(f"LowRank.{setting}", getattr(self, setting), modules)
        if composition == "average":
            banks.equal_size("LowRank.rank", self.ranks(modules))
            if len(set(self.scales(modules).tolist())) != 1:
                raise ValueError("LowRank.alpha: modules that are averaged have one scale.")
        elif self.share_up:
            raise ValueError(
                "LowRank.share_up is for modules that are averaged; their sum needs a b each."
            )

    def check_site(self, path: str, heads: int, width: int, features: int) -> None:
        """Raises ValueError where a layer of these widths cannot be adapted."""
        banks.check_heads(path, heads, width, features)

    def ranks(self, modules: Sequence[ModuleName]) -> tuple[int, ...]:
        """Each module's rank; they sum to R."""
        return banks.sizes("LowRank.rank", self.rank, modules)

    def scales(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: alpha / rank of each module."""
        ranks = self.ranks(modules)
        pairs = zip(banks.each(self.alpha, modules, None), ranks, strict=True)
        return np.array([1.0 if a is None else a / r for a, r in pairs], np.float32)

    def rates(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: the learning rate factor of each module."""
        return np.array(banks.each(self.learning_rate, modules, 1.0), np.float32)

    def leaves(self, modules: Sequence[ModuleName]) -> dict[str, Leaf]:
        """The parameters, and which module owns what of them."""
        parts = tuple((str(m), r) for m, r in zip(modules, self.ranks(modules), strict=True))
        return {
            "a": Leaf(-1, parts, ("in", "rank")),
            "b": Leaf(None if self.share_up else -2, parts, ("rank", "out")),
        }

    # The computation.

    def prepare(
        self,
        routing: Routing | Shares,
        modules: Sequence[ModuleName],
        segments: Array | None,
        composition: str,
    ) -> Gates | Shares:
        """Turns a routing into weights per token, for one stream.

        Args:
          routing: the batch's.
          modules: the bank's.
          segments: int32 `[B, L]` of the stream, or None when every row is one example.
          composition: "sum" or "average".

        Raises:
          ValueError: several segments per row without segment ids.
        """
        if composition == "average":
            return banks.per_token(as_shares(routing, len(modules)), segments)
        return column_gates(
            banks.summable(routing), self.ranks(modules), self.scales(modules), segments
        )

    def bank(
        self, modules: Sequence[ModuleName], parent: Any, axes: tuple[str, str] | None = None
    ) -> "LowRankBank":
        """The Flax module that holds the parameters, in the scope `parent`; `axes` as in `LowRankBank`."""
        ranks = self.ranks(modules)
        rows = ranks[0] if self.share_up else sum(ranks)
        return LowRankBank(
            sum(ranks),
            rows,
            float(self.scales(modules)[0]),
            self.dropout,
            self.form,
            self.init_scale,
            axes,
            parent=parent,
        )

    # A dataset's composition.

    def compose(
        self,
        leaves: Mapping[str, Array],
        modules: Sequence[ModuleName],
        weights: np.ndarray,
        composition: str,
    ) -> tuple["LowRank", dict[str, Array]]:
        """The one pair that equals the weighted bank, with the scales folded into `b`.

        Args:
          leaves: `a [..., D, R]` and `b [..., R, K]`.
          weights: float `[..., H, M]`; modules of weight 0 are left out of a sum.

        Returns:
          (its module, {`a [..., D, r]`, `b [..., r, K]`}): r is the sum of the ranks of the modules used, or the one
          rank of an average.
        """
        a, b = leaves["a"], leaves["b"]
        if composition == "average":
            scale = self.scales(modules)[0]
            a = banks.composed_down(a, weights)
            b = (b if self.share_up else banks.composed_up(b, weights)) * scale
        else:
            owner = np.repeat(np.arange(len(modules)), self.ranks(modules))
            factor = (weights[..., 0, :] * self.scales(modules))[..., owner]
            used = np.flatnonzero(factor.any(axis=tuple(range(factor.ndim - 1))))
            a = a[..., used]
            b = b[..., used, :] * factor[..., used, None].astype(b.dtype)
        return LowRank(a.shape[-1]), {"a": a, "b": b}

    def merge(self, leaves: Mapping[str, Array], kernel: Array, bias: Array | None) -> Any:
        """(kernel, bias) in float32 with one composed pair added; `kernel [..., D, K]`."""
        a, b = (jnp.asarray(leaves[k], jnp.float32) for k in ("a", "b"))
        return kernel + jnp.einsum("...dr,...rk->...dk", a, b, precision="highest"), bias


class LowRankBank(nn.Module):
    """Parameters `a [D, R]`, `b [R, K]` of a low-rank bank, and its update of a layer's output.

    Attributes:
      num_columns: R.
      num_rows: of `b`; R, or the rank of all modules if they share it.
      scale: of an average.
      dropout, form, init_scale: see `LowRank`.
      axes: logical names of the layer's input and output, which say how columns that are looked up lie on a mesh.
    """

    num_columns: int
    num_rows: int
    scale: float = 1.0
    dropout: float = 0.0
    form: str = "auto"
    init_scale: float = 1.0
    axes: tuple[str, str] | None = None

    @nn.compact
    def __call__(self, x: Array, y: Array, gates: Gates | Shares, train: bool) -> Array:
        """The layer's output `y [B, L, K]` with the update for its input `x [B, L, D]`, in its dtype."""
        width, features = x.shape[-1], y.shape[-1]
        bound = self.init_scale / math.sqrt(width)

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        a = parameter(self, "a", uniform, (width, self.num_columns)).astype(x.dtype)
        b = parameter(self, "b", nn.initializers.zeros, (self.num_rows, features)).astype(x.dtype)
        if self.dropout and train:
            x = nn.Dropout(self.dropout)(x, deterministic=False)
        if isinstance(gates, Shares):
            h = banks.average_down(x, a, gates.down) * self.scale
            shared = self.num_rows != self.num_columns
            return y + (banks.product(h, b) if shared else banks.average_up(h, b, gates.up))
        return y + self._sum(x, a, b, gates)

    def _sum(self, x: Array, a: Array, b: Array, gates: Gates) -> Array:
        form = self.form
        if form == "auto":
            (batch, length), active = x.shape[:2], gates.columns.shape[1]
            where = partitioning.platform()
            form = choose_form(self.num_columns, active, batch, length, where)
        if form == "dense":
            return banks.product(banks.product(x, a) * gates.dense.astype(x.dtype), b)
        if gates.columns.shape[0] == 1:  # all rows use the same columns
            rows = gates.columns[0]
            hidden = banks.product(x, a[:, rows]) * gates.gathered.astype(x.dtype)
            return banks.product(hidden, b[rows])
        # Not of the transposed `a`, or the gradient would be one, and the optimizer would read it across.
        width, features = self.axes or (None, None)
        down = lookup.columns(a, gates.columns, width)
        up = lookup.rows(b, gates.columns, features)
        hidden = jnp.einsum("bld,dbn->bln", x, down)
        return jnp.einsum("bln,bnk->blk", hidden * gates.gathered.astype(x.dtype), up)
