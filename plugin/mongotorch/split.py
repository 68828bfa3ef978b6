"""Divides documents into those for training and for validation, as values: `ByHash`, `ByTime`, `ByGroup`, `KFold`.

A split gives the filter of each fold, which the server computes while it reads: nothing is written to documents.
Hashes are those of MongoDB's hashed indexes (`$toHashedIndexKey`), taken modulo one million.

Guarantees: no document is in both folds; the folds of a document follow from its own fields alone, so they are the
same in every process and whatever the setting `valid_fraction` says.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, final

from mongotorch.errors import ParameterError

Fold = Literal["train", "valid"]
FOLD_FIELD: Final = "_fold"
FOLDS: Final[tuple[Fold, ...]] = ("train", "valid")
PARTS: Final = 1_000_000
"""Folds are decided in millionths, in whole numbers, because those are exact everywhere."""
DEFAULT_VALID: Final = 0.05
"""Share of the documents without a stored fold that are in `valid`."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedPart:
    """Which documents a hash puts into `valid`.

    Attributes:
        path: The field that is hashed.
        low: The first part of `PARTS` that is in `valid`.
        high: The first one behind it that is not.
        stored: Whether a stored `_fold` comes before the hash.
    """

    path: str
    low: int
    high: int
    stored: bool = False

    def holds(self, fold: Fold) -> dict[str, Any]:
        """The expression that is true for the documents of a fold."""
        # `$mod` keeps the sign of its first argument: what is added makes it Python's `%` of (hash - low).
        added = PARTS + -self.low % PARTS
        part = {"$mod": [{"$add": [{"$mod": [{"$toHashedIndexKey": f"${self.path}"}, PARTS]}, added]}, PARTS]}
        return {"$expr": {"$lt" if fold == "valid" else "$gte": [part, self.high - self.low]}}


class Split(abc.ABC):
    """Divides documents into the folds `train` and `valid`; its subclasses are frozen values."""

    __mongotorch_value__: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def fields(self) -> tuple[str, ...]:
        """The fields that decide; a pipeline that sets one of them comes before the split."""

    @abc.abstractmethod
    def condition(self, fold: Fold) -> dict[str, Any]:
        """The filter of a fold, for a server."""

    @property
    def hashed(self) -> HashedPart | None:
        """The same as a hash, for where no server computes it; None: `condition` needs none."""
        return None

    @property
    def undecided(self) -> dict[str, Any] | None:
        """The filter of the documents that are in no fold; None where there are none."""
        return None

    @property
    def share(self) -> float | None:
        """About how many of the documents are in `valid`, from 0 to 1; None where that is not known."""
        part = self.hashed
        return None if part is None else (part.high - part.low) / PARTS

    def to_document(self) -> dict[str, Any]:
        """The split as a plain document."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"by": type(self).__name__, **fields}


@final
@dataclasses.dataclass(frozen=True)
class ByStoredFold(Split):
    """By the field `_fold`; documents without are in `valid` if the hash of their `_id` says so.

    Args:
        hashes: Whether documents without a stored fold are in one. A server that has no `$toHashedIndexKey` reads
            those with one only.
    """

    hashes: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """See `Split.fields`."""
        return (FOLD_FIELD, "_id")

    @property
    def hashed(self) -> HashedPart | None:
        """See `Split.hashed`."""
        return HashedPart(path="_id", low=0, high=threshold(DEFAULT_VALID), stored=True) if self.hashes else None

    def condition(self, fold: Fold) -> dict[str, Any]:
        """See `Split.condition`."""
        stored = {FOLD_FIELD: fold}
        if self.hashed is None:
            return stored
        # `$exists` is cheaper than null: a server looks at the field alone and seldom at the hash.
        return {"$or": [stored, {FOLD_FIELD: {"$exists": False}, **self.hashed.holds(fold)}]}

    @property
    def undecided(self) -> dict[str, Any]:
        """See `Split.undecided`: something else under `_fold`."""
        other: dict[str, Any] = {FOLD_FIELD: {"$nin": list(FOLDS)}}
        return {"$and": [other, {FOLD_FIELD: {"$exists": True}}]} if self.hashes else other


@final
@dataclasses.dataclass(frozen=True)
class ByHash(Split):
    """By the hash of `_id`, whatever `_fold` says.

    A larger share only moves documents from `train` to `valid`.

    Args:
        valid: The share that is in `valid`, 0 to 1, in steps of one millionth.

    Raises:
        ParameterError: A share outside of 0 to 1.
    """

    valid: float = DEFAULT_VALID

    def __post_init__(self) -> None:
        threshold(self.valid, "valid")

    @property
    def fields(self) -> tuple[str, ...]:
        """See `Split.fields`."""
        return ("_id",)

    @property
    def hashed(self) -> HashedPart:
        """See `Split.hashed`."""
        return HashedPart(path="_id", low=0, high=threshold(self.valid))

    def condition(self, fold: Fold) -> dict[str, Any]:
        """See `Split.condition`."""
        return self.hashed.holds(fold)


@final
@dataclasses.dataclass(frozen=True)
class ByGroup(Split):
    """By the hash of a field: the documents of one group, that is of one value, are in one fold.

    Documents without the field are one group. Numbers that differ behind the point only are one group as well.

    Args:
        field: The field, such as `user` or `user.id`.
        valid: The share of the groups that is in `valid`, 0 to 1, in steps of one millionth.

    Raises:
        ParameterError: No name of a field, or a share outside of 0 to 1.
    """

    field: str
    valid: float = DEFAULT_VALID

    def __post_init__(self) -> None:
        _check_field(self.field)
        threshold(self.valid, "valid")

    @property
    def fields(self) -> tuple[str, ...]:
        """See `Split.fields`."""
        return (self.field,)

    @property
    def hashed(self) -> HashedPart:
        """See `Split.hashed`."""
        return HashedPart(path=self.field, low=0, high=threshold(self.valid))

    def condition(self, fold: Fold) -> dict[str, Any]:
        """See `Split.condition`."""
        return self.hashed.holds(fold)


@final
@dataclasses.dataclass(frozen=True)
class KFold(Split):
    """One of several parts of about equal size, by the hash of `_id`: part `k` is `valid`, the others are `train`.

    The parts of `KFold(n, k=0)` to `KFold(n, k=n - 1)` are a partition: each document is `valid` in one of them.

    Args:
        n: How many parts there are, from 2 on.
        k: Which part is `valid`, from 0 on.

    Raises:
        ParameterError: Numbers that are none of these.
    """

    n: int
    k: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (("n", self.n, 2, PARTS), ("k", self.k, 0, max(_whole(self.n), 1) - 1)):
            if _whole(value) != value or isinstance(value, bool) or not low <= value <= high:
                raise ParameterError(
                    f"KFold(n={self.n!r}, k={self.k!r}): {name} must be a whole number from {low} to {high}",
                    field=name,
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """See `Split.fields`."""
        return ("_id",)

    @property
    def hashed(self) -> HashedPart:
        """See `Split.hashed`."""
        low, high = (PARTS * part // self.n for part in (self.k, self.k + 1))
        return HashedPart(path="_id", low=low, high=high)

    def condition(self, fold: Fold) -> dict[str, Any]:
        """See `Split.condition`."""
        return self.hashed.holds(fold)


@final
@dataclasses.dataclass(frozen=True)
class ByTime(Split):
    """By a time, or anything else that MongoDB orders: later documents are `valid`.

    Documents whose field is missing, or of another type than `after`, are in no fold; a run refuses them.

    Args:
        field: The field, such as `when`.
        after: Documents with a larger value are `valid`, those with this one or a smaller one `train`.

    Raises:
        ParameterError: No name of a field, or nothing under `after` that could be compared.
    """

    field: str
    after: Any

    def __post_init__(self) -> None:
        _check_field(self.field)
        if self.after is None or isinstance(self.after, Mapping | list | tuple | set):
            raise ParameterError(
                f"after={self.after!r}: give a time, a number, a text or an ObjectId", field="after"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """See `Split.fields`."""
        return (self.field,)

    def condition(self, fold: Fold) -> dict[str, Any]:
        """See `Split.condition`."""
        later = {self.field: {"$gt": self.after}}
        if fold == "valid":
            return later
        # An array may hold an earlier and a later value: it is `valid`.
        return {"$and": [{self.field: {"$lte": self.after}}, {"$nor": [later]}]}

    @property
    def undecided(self) -> dict[str, Any]:
        """See `Split.undecided`."""
        return {"$nor": [{self.field: {"$gt": self.after}}, {self.field: {"$lte": self.after}}]}


DEFAULT: Final[Split] = ByStoredFold()
_KINDS: Final[Mapping[str, type[Split]]] = {
    kind.__name__: kind for kind in (ByStoredFold, ByHash, ByGroup, KFold, ByTime)
}


def as_split(given: Split | float) -> Split:
    """A split as it is, a number from 0 to 1 as `ByHash`. Raises: ParameterError for anything else."""
    if isinstance(given, Split):
        return given
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ParameterError(
            f"split={given!r}: give the share of the documents that is for validation, such as 0.1, or ByHash, "
            "ByTime, ByGroup or KFold",
            field="split",
        )
    return ByHash(given)


def split_from_document(document: Mapping[str, Any]) -> Split:
    """The split of a document that `Split.to_document` gave. Raises: KeyError, TypeError, ParameterError."""
    fields = dict(document)
    return _KINDS[fields.pop("by")](**fields)


def threshold(share: float, field: str = "valid_fraction") -> int:
    """A share in parts of `PARTS`. Raises: ParameterError for one outside of 0 to 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ParameterError(f"{field}={share!r}: it must be from 0 to 1", field=field)
    return round(share * PARTS)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _check_field(field: Any) -> None:
    if not isinstance(field, str) or not field or field.startswith("$") or "\0" in field or ".." in field:
        raise ParameterError(
            f"field={field!r}: give the name of a field, such as 'user' or 'user.id'", field="field"
        )
