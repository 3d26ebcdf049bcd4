"""Modules: what is added to a layer. Here the low-rank pair, as a bank of many with ragged ranks.

A module knows a layer's input and output and how much of each bank member a token uses; it knows nothing of features,
tasks or networks. Legend: `B` batch, `L` tokens, `S` segments, `D`/`K` width in/out, `M` modules, `R` columns (the sum
of the modules' ranks), `N` active columns of a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters.routers import ModuleName, Routing
from modjax.errors import nearest

Array = jax.Array
FORMS = ("auto", "dense", "gathered")

# Measured by benchmarks/lowrank_forms.py; see choose_form.
DENSE_UP_TO_COLUMNS = 512
GATHERED_TRAFFIC_WEIGHT = 8.0


@flax.struct.dataclass
class Gates:
    """A routing prepared for the columns of a low-rank bank, once per forward pass and stream.

    It is prepared for both forms of the product; the one that no layer uses is dropped by the compiler.

    Attributes:
      dense: float32 `[B, L or 1, R]`: what each token multiplies each column's hidden value by.
      columns: int32 `[B, N]`: the columns that a row uses.
      gathered: float32 `[B, L or 1, N]`: the same as `dense`, for those columns.
    """

    dense: Array
    columns: Array
    gathered: Array

    @property
    def rows(self) -> int:
        """B, or 1 where all rows are treated alike."""
        return self.dense.shape[0]


def choose_form(num_columns: int, active_columns: int, batch: int, length: int) -> str:
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
    """
    if num_columns <= DENSE_UP_TO_COLUMNS:
        return "dense"
    gathered = active_columns * (length + GATHERED_TRAFFIC_WEIGHT)
    return "gathered" if gathered < num_columns * length and batch else "dense"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A bank of low-rank pairs: `y += sum_m w_m s_m (x a_m) b_m`, with `s_m = alpha_m / r_m` (LoRA, FLix).

    The pairs lie side by side in `a [D, R]` and `b [R, K]`; a static list names each column's owner. `a` starts
    uniform in +-1/sqrt(D) and `b` at zero, so that step 0 is the base model.

    Attributes:
      rank: of every module, or `{group or "group=value": rank}` where groups are feature names, "shared", "dataset".
      alpha: numerator of the scale, likewise; None = the module's rank, so that the scale is 1.
      dropout: of the input to the update, in training.
      learning_rate: factor on the optimizer's update of a group's columns, likewise.
      form: "dense" (all columns, masked), "gathered" (the active columns of each row) or "auto" (`choose_form`).
    """

    rank: Any = 4
    alpha: Any = None
    dropout: float = 0.0
    learning_rate: Any = 1.0
    form: str = "auto"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, tuple(sorted(value.items())))
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            for key, number in value if isinstance(value, tuple) else (("", value),):
                where = f"LowRank.{name}" + (f"[{key!r}]" if key else "")
                if name == "alpha" and number is None:
                    continue
                if name == "rank" and (not isinstance(number, int) or number < 1):
                    raise ValueError(f"{where} must be an integer of at least 1, got {number!r}.")
                if not number > 0:
                    raise ValueError(f"{where} must be positive, got {number!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LowRank.dropout must be in [0, 1), got {self.dropout}.")
        if self.form not in FORMS:
            raise ValueError(f"LowRank.form: unknown {self.form!r}." + nearest(self.form, FORMS))

    # Static facts about a bank.

    def _setting(self, setting: str, module: ModuleName) -> Any:
        value = getattr(self, setting)
        if not isinstance(value, tuple):
            return value
        table = dict(value)
        for key in (str(module), module.group):
            if key in table:
                return table[key]
        if setting == "rank":
            raise ValueError(
                f"LowRank.rank gives no rank for {str(module)!r}." + nearest(module.group, table)
            )
        return None if setting == "alpha" else 1.0

    def check(self, modules: Sequence[ModuleName]) -> None:
        """Raises ValueError where a setting names a group that the bank does not have."""
        known = {str(m) for m in modules} | {m.group for m in modules}
        for setting in ("rank", "alpha", "learning_rate"):
            value = getattr(self, setting)
            for key, _ in value if isinstance(value, tuple) else ():
                if key not in known:
                    raise ValueError(
                        f"LowRank.{setting}: the router has no module {key!r}."
                        + nearest(key, sorted(known))
                    )

    def ranks(self, modules: Sequence[ModuleName]) -> tuple[int, ...]:
        """Each module's rank; they sum to R."""
        return tuple(self._setting("rank", m) for m in modules)

    def owner(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """int32 `[R]`: the module that each column belongs to."""
        ranks = self.ranks(modules)
        return np.repeat(np.arange(len(ranks)), ranks).astype(np.int32)

    def scales(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[M]`: alpha / rank of each module."""
        ranks = self.ranks(modules)
        alphas = [self._setting("alpha", m) for m in modules]
        pairs = zip(alphas, ranks, strict=True)
        return np.array([1.0 if a is None else a / r for a, r in pairs], np.float32)

    def column_rates(self, modules: Sequence[ModuleName]) -> np.ndarray:
        """float32 `[R]`: the learning rate factor of each column."""
        rates = np.array([self._setting("learning_rate", m) for m in modules], np.float32)
        return rates[self.owner(modules)]

    # The computation.

    def prepare(
        self, routing: Routing, modules: Sequence[ModuleName], segments: Array | None
    ) -> Gates:
        """Turns a routing into gates per token and column, for one stream.

        Args:
          routing: the batch's.
          modules: the bank's.
          segments: int32 `[B, L]` of the stream, or None when every row is one example.

        Raises:
          ValueError: several segments per row without segment ids.
        """
        batch, num_segments = routing.index.shape[:2]
        if segments is None and num_segments != 1:
            raise ValueError(
                f"The batch has {num_segments} rows of features per example but no segment ids: "
                "give the segment ids of a packed batch, or one row of features."
            )
        if (batch, num_segments) == (1, 1):
            segments = None  # the same for everybody
        own = None
        if segments is not None:
            own = (segments[..., None] == jnp.arange(1, num_segments + 1)).astype(jnp.float32)

        # Dense: what each column's owner weighs.
        owner, scales = self.owner(modules), self.scales(modules)
        weights = routing.weights(len(modules)) * scales
        if own is not None:
            weights = jnp.einsum("bls,bsm->blm", own, weights)
        dense = weights[..., owner]

        # Gathered: each slot of an example opens the columns of the module that it names.
        ranks = np.array(self.ranks(modules))
        first = np.concatenate([[0], np.cumsum(ranks)[:-1]])
        columns, gates = [], []
        for slot, (start, stop) in enumerate(routing.slots):
            module = jnp.maximum(routing.index[..., slot], 0)
            gate = routing.gate[..., slot] * jnp.asarray(scales)[module]
            step = np.arange(ranks[start:stop].max())
            inside = step < jnp.asarray(ranks)[module][..., None]
            columns.append(jnp.where(inside, jnp.asarray(first)[module][..., None] + step, 0))
            gates.append(inside * gate[..., None])
        column, gate = jnp.concatenate(columns, -1), jnp.concatenate(gates, -1)  # [B, S, n]
        if own is not None:
            # A row's columns are those of all its segments; a token opens those of its own.
            gate = own[..., None] * gate[:, None]  # [B, L, S, n]
            gate = gate.reshape(*gate.shape[:2], -1)
        return Gates(dense=dense, columns=column.reshape(batch, -1), gathered=gate)

    def bank(self, modules: Sequence[ModuleName], parent: Any) -> "LowRankBank":
        """The Flax module that holds the parameters, in the scope `parent`."""
        columns = sum(self.ranks(modules))
        return LowRankBank(columns, self.dropout, self.form, parent=parent)

    # A dataset's composition.

    def compose(
        self, leaves: Mapping[str, Array], modules: Sequence[ModuleName], weights: np.ndarray
    ) -> dict[str, Array]:
        """The one pair that equals the weighted bank, with the scales folded into `b`.

        Args:
          leaves: `a [..., D, R]` and `b [..., R, K]`.
          weights: float `[M]`; modules of weight 0 are left out.

        Returns:
          `a [..., D, r]`, `b [..., r, K]` with r the sum of the ranks of the modules used.
        """
        owner = self.owner(modules)
        columns = np.flatnonzero(weights[owner])
        factor = (weights * self.scales(modules))[owner][columns]
        a, b = leaves["a"], leaves["b"]
        return {"a": a[..., columns], "b": b[..., columns, :] * factor[:, None].astype(b.dtype)}


class LowRankBank(nn.Module):
    """Parameters `a [D, R]`, `b [R, K]` of a low-rank bank, and its update of a layer's output."""

    num_columns: int
    dropout: float = 0.0
    form: str = "auto"

    @nn.compact
    def __call__(self, x: Array, features: int, gates: Gates, train: bool) -> Array:
        """The update `[B, L, K]` for the layer's input `x [B, L, D]`, in the dtype of `x`."""
        width = x.shape[-1]
        bound = 1.0 / math.sqrt(width)

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        a = self.param("a", uniform, (width, self.num_columns)).astype(x.dtype)
        b = self.param("b", nn.initializers.zeros, (self.num_columns, features)).astype(x.dtype)
        if self.dropout and train:
            x = nn.Dropout(self.dropout)(x, deterministic=False)
        form = self.form
        if form == "auto":
            form = choose_form(self.num_columns, gates.columns.shape[1], *x.shape[:2])
        if form == "dense":
            return ((x @ a) * gates.dense.astype(x.dtype)) @ b
        if gates.columns.shape[0] == 1:  # all rows use the same columns
            rows = gates.columns[0]
            hidden = (x @ a[:, rows]) * gates.gathered.astype(x.dtype)
            return hidden @ b[rows]
        hidden = jnp.einsum("bld,bnd->bln", x, a.T[gates.columns])
        return jnp.einsum("bln,bnk->blk", hidden * gates.gathered.astype(x.dtype), b[gates.columns])
