"""FeatureSpace: the one place where the names of features become ids, and ids become names again.

A dataset is described by named features, `{"task": "parse", "language": "sw"}`. Networks see
integers: ids that count from 1 within each feature, and 0 for "none" (no value, padding, or an
unknown value where those are allowed). Legend: `F` the columns of an example's row of ids.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modjax.errors import nearest

NONE_ID = 0
FORMAT = "modjax.feature_space"
VERSION = 1

Value = str | Sequence[str] | None
Unknown = Literal["error", "none"]


class UnknownFeatureError(ValueError):
    """A feature, value or dataset that the feature space has no id for."""


def as_values(value: Value, where: str) -> tuple[str, ...]:
    """The values an example has at once for one feature: none, one, or several.

    Raises:
      ValueError: a value is empty, not text, or named twice; `where` says whose it is.
    """
    if value is None:
        return ()
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise ValueError(f"{where}: a value is a string or a list of strings, not {value!r}.")
    for v in values:
        if not isinstance(v, str) or not v.strip():
            raise ValueError(f"{where}: a value is a string that is not empty, not {v!r}.")
    if len(set(values)) != len(values):
        raise ValueError(f"{where}: {value!r} names a value twice.")
    return tuple(values)


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """Ordered named features, their values, and the names of the datasets. Immutable and hashable.

    Attributes:
      features: `((name, (value, ...)), ...)`; the position of a value plus 1 is its id.
      datasets: names for `batch["tasks"]`; the position plus 1 is the id.
      slots: for each feature, how many values one example may have at once (1 each unless given).

    Raises:
      ValueError: a name is empty or given twice, or `slots` does not fit.
    """

    features: tuple[tuple[str, tuple[str, ...]], ...]
    datasets: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()

    def __post_init__(self):
        features = self.features.items() if isinstance(self.features, Mapping) else self.features
        features = tuple((n, as_values(v, f"feature {n!r}")) for n, v in features)
        names = as_values(tuple(n for n, _ in features), "features of a FeatureSpace")
        slots = tuple(operator.index(s) for s in self.slots) or (1,) * len(names)
        if len(slots) != len(names) or any(s < 1 for s in slots):
            raise ValueError(
                f"slots={slots} must give one number >= 1 for each feature: {', '.join(names)}."
            )
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "datasets", as_values(tuple(self.datasets), "datasets"))
        object.__setattr__(self, "slots", slots)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Mapping[str, Value]]) -> "FeatureSpace":
        """The space of some datasets: features and values in the order of first sight.

        Args:
          metadata: `{dataset name: {feature name: value or values}}`.

        Raises:
          ValueError: two datasets name different features (both are named), or a value is invalid.
        """
        values: dict[str, dict[str, None]] = {}
        slots: dict[str, int] = {}
        first = None
        for dataset, row in metadata.items():
            first = dataset if first is None else first
            if set(row) != set(metadata[first]):
                raise ValueError(
                    f"Datasets {first!r} and {dataset!r} have different features: "
                    f"{list(metadata[first])} and {list(row)}. Datasets that are used together "
                    "need the same ones; say None for a feature that a dataset does not have."
                )
            for name, value in row.items():
                some = as_values(value, f"feature {name!r} of {dataset!r}")
                values.setdefault(name, {}).update(dict.fromkeys(some))
                slots[name] = max(slots.get(name, 1), len(some))
        return cls(
            features=tuple((n, tuple(v)) for n, v in values.items()),
            datasets=tuple(metadata),
            slots=tuple(slots.values()),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The features, in order."""
        return tuple(n for n, _ in self.features)

    @property
    def num_slots(self) -> int:
        """F, the length of an example's row of ids."""
        return sum(self.slots)

    @property
    def slot_features(self) -> tuple[str, ...]:
        """The feature that each of the F columns belongs to."""
        return tuple(n for n, s in zip(self.names, self.slots, strict=True) for _ in range(s))

    def values(self, name: str) -> tuple[str, ...]:
        """The values of a feature, in the order of their ids."""
        for n, v in self.features:
            if n == name:
                return v
        raise UnknownFeatureError(f"Unknown feature {name!r}.{nearest(name, self.names)}")

    def size(self, name: str) -> int:
        """The number of values of a feature, "none" not counted."""
        return len(self.values(name))

    def id(self, name: str, value: str, *, where: str = "") -> int:
        """The id, from 1, of a value. Raises UnknownFeatureError with the nearest name."""
        values = self.values(name)
        if value not in values:
            raise UnknownFeatureError(
                f"{where and where + ': '}unknown value {value!r} of feature {name!r}."
                f"{nearest(str(value), values)}"
            )
        return values.index(value) + 1

    def encode(
        self, metadata: Mapping[str, Value], *, unknown: Unknown = "error", where: str = "metadata"
    ) -> np.ndarray:
        """Ids of a dataset's features.

        Args:
          metadata: feature name to its value, values (as many as the feature has slots), or None.
          unknown: what becomes of a feature left out, or of a value that the space has no id for:
            "error", or "none": id 0, which contributes nothing. A feature that the space does not
            have is always an error.
          where: begins the message of an error: whose metadata this is.

        Returns:
          int32 `[F]`.

        Raises:
          UnknownFeatureError: see `unknown`.
          ValueError: a feature has more values than slots, or an invalid one.
        """
        _check_unknown(unknown)
        for name in metadata:
            if name not in self.names:
                raise UnknownFeatureError(
                    f"{where}: unknown feature {name!r}.{nearest(str(name), self.names)}"
                )
        row: list[int] = []
        for name, slots in zip(self.names, self.slots, strict=True):
            if name not in metadata and unknown == "error":
                raise UnknownFeatureError(
                    f"{where}: no feature {name!r} in {dict(metadata)}; say {name!r}: None if so."
                )
            values = as_values(metadata.get(name), f"{where}, feature {name!r}")
            if unknown == "none":
                values = tuple(v for v in values if v in self.values(name))
            if len(values) > slots:
                raise ValueError(
                    f"{where}: feature {name!r} has {len(values)} values, {list(values)}, "
                    f"but an example has room for {slots}; raise the feature's slots."
                )
            ids = [self.id(name, v, where=where) for v in values]
            row += ids + [NONE_ID] * (slots - len(ids))
        return np.asarray(row, np.int32)

    def decode(self, row: Sequence[int] | np.ndarray) -> dict[str, str | tuple[str, ...] | None]:
        """The inverse of `encode`: a tuple for a feature of several slots, else a value or None.

        Raises:
          ValueError: the row has another length than F, or an id that the space does not have.
        """
        row = [int(i) for i in row]
        if len(row) != self.num_slots:
            raise ValueError(f"A row of {self.num_slots} ids is needed, not of {len(row)}.")
        found: dict[str, list[str]] = {n: [] for n in self.names}
        for name, i in zip(self.slot_features, row, strict=True):
            if not 0 <= i <= self.size(name):
                raise ValueError(f"Feature {name!r} has ids 0 to {self.size(name)}, not {i}.")
            if i != NONE_ID:
                found[name].append(self.values(name)[i - 1])
        return {
            n: tuple(found[n]) if s > 1 else (found[n][0] if found[n] else None)
            for n, s in zip(self.names, self.slots, strict=True)
        }

    def dataset_id(self, name: str, unknown: Unknown = "error") -> int:
        """The id, from 1, of a dataset; 0 for an unknown one if `unknown` is "none"."""
        _check_unknown(unknown)
        if name in self.datasets:
            return self.datasets.index(name) + 1
        if unknown == "none":
            return NONE_ID
        raise UnknownFeatureError(f"Unknown dataset {name!r}.{nearest(name, self.datasets)}")

    def extend(
        self,
        features: Mapping[str, Sequence[str]] | None = None,
        datasets: Iterable[str] = (),
        slots: Mapping[str, int] | None = None,
    ) -> "FeatureSpace":
        """A space with more values, features or datasets; the old ones keep their ids.

        Names that are there already are left as they are, so extending twice is extending once.

        Args:
          features: feature name to values to add; a new name adds a feature.
          datasets: names to add.
          slots: feature name to how many values an example may have at once, where that grows.
        """
        values = {n: dict.fromkeys(v) for n, v in self.features}
        for name, new in (features or {}).items():
            values.setdefault(name, {}).update(dict.fromkeys(as_values(new, f"feature {name!r}")))
        room = dict(zip(self.names, self.slots, strict=True))
        for name, number in (slots or {}).items():
            if name not in values:
                raise UnknownFeatureError(f"Unknown feature {name!r}.{nearest(name, values)}")
            room[name] = max(number, room.get(name, 1))
        return FeatureSpace(
            features=tuple((n, tuple(v)) for n, v in values.items()),
            datasets=tuple(dict.fromkeys((*self.datasets, *datasets))),
            slots=tuple(room.get(n, 1) for n in values),
        )

    def merge(self, other: "FeatureSpace") -> "FeatureSpace":
        """This space extended by everything in `other`: a checkpoint's space, then a new run's."""
        slots = dict(zip(other.names, other.slots, strict=True))
        return self.extend(dict(other.features), other.datasets, slots)

    def require(self, other: "FeatureSpace", where: str = "the feature space") -> None:
        """Checks that every feature and value of `other` has an id here (datasets may differ).

        Raises:
          UnknownFeatureError: one message for all that `where` lacks.
        """
        lacking = []
        for name, values in other.features:
            if name not in self.names:
                lacking.append(f"feature {name!r}{nearest(name, self.names)}")
                continue
            mine = self.values(name)
            lacking += [f"{name} {v!r}{nearest(v, mine)}" for v in values if v not in mine]
        if lacking:
            raise UnknownFeatureError(f"{where} has no " + "\n  nor ".join(lacking))

    def to_json(self) -> dict[str, Any]:
        """A form that `json.dumps` takes and `from_json` reads."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "features": [{"name": n, "values": list(v)} for n, v in self.features],
            "slots": list(self.slots),
            "datasets": list(self.datasets),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureSpace":
        """The space that `to_json` wrote. Raises ValueError for another format or version."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"Not a feature space: 'format' is not {FORMAT!r} in {data!r:.200}.")
        if data.get("version") != VERSION:
            raise ValueError(
                f"Feature space of version {data.get('version')!r}; this code reads {VERSION}."
            )
        try:
            features = tuple((f["name"], tuple(f["values"])) for f in data["features"])
            return cls(features, tuple(data["datasets"]), tuple(data["slots"]))
        except (KeyError, TypeError) as e:
            raise ValueError(f"Damaged feature space ({e!r}): {data!r:.200}.") from e


def _check_unknown(unknown: str) -> None:
    if unknown not in ("error", "none"):
        raise ValueError(f"unknown={unknown!r}.{nearest(str(unknown), ('error', 'none'))}")
