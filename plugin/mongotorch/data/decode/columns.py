"""Holds decoded documents as columns, each in the cheapest form that keeps the exact BSON meaning of its values.

Numbers of one BSON meaning and one shape are one numpy array; what does not fit stays a list of what `bson.decode`
gives, with stored arrays as numpy arrays.

Guarantees: the form depends on the values alone, not on how they were decoded, sliced or joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, Literal

import numpy as np
from bson import Int64, ObjectId
from numpy.typing import NDArray

from mongotorch.codecs.arrays import BFloat16, dtype_name

Array = NDArray[Any]
Kind = Literal["number", "array", "date", "oid", "object"]
_EPOCH = datetime(1970, 1, 1)  # BSON dates decode to naive UTC
_MILLISECOND = timedelta(milliseconds=1)
_INTEGERS = frozenset({int, Int64})
_SAMPLED = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """The values of one field in n documents.

    Attributes:
        kind: `number` (plain BSON numbers, booleans and rectangular lists of them), `array` (BSON vectors and
            `{dtype, shape, data}` sub-documents), `date` (int64 milliseconds since 1970, UTC), `oid` ((n, 12)
            uint8) or `object` (a list).
        data: An array of n rows, or a list of n values.
        dtype: The name of the element type; `bfloat16` for such arrays, whose `data` is uint16 bit patterns.
    """

    kind: Kind
    data: Array | list[Any]
    dtype: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        """One value, as `bson.decode` gives it (stored arrays as numpy arrays)."""
        if isinstance(self.data, list):
            return self.data[row]
        at = range(len(self))[row]  # so that negative rows count from the end
        return self._listed(self.data[at : at + 1])[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())

    @property
    def plain(self) -> bool:
        """Whether these are BSON numbers or booleans, rather than arrays with a dtype of their own."""
        return self.kind == "number"

    @property
    def nbytes(self) -> int:
        """Bytes held; for a list, an estimate from a few evenly spaced values."""
        if not isinstance(self.data, list):
            return int(self.data.nbytes)
        if not self.data:
            return 0
        sample = self.data[:: max(1, len(self.data) // _SAMPLED)]
        return sum(map(_size, sample)) * len(self.data) // len(sample)

    def values(self) -> list[Any]:
        """All values, as `bson.decode` gives them (stored arrays as numpy arrays)."""
        return self.data if isinstance(self.data, list) else self._listed(self.data)

    def array(self) -> Array | None:
        """The values as one numeric array, or None where they have no such form."""
        if isinstance(self.data, list) or self.kind not in ("number", "array"):
            return None
        return self.data

    def numbers(self) -> Array | None:
        """Like `array`, and integers mixed with doubles as float64 as well."""
        if not isinstance(self.data, list):
            return self.array()
        flat = _flatten(self.data)
        if flat is None or not set(map(type, flat[0])) <= _INTEGERS | {float}:
            return None
        return np.array(flat[0], np.float64).reshape(flat[1])

    def take(self, rows: Array, *, identity: bool = False) -> Column:
        """The rows at these positions, in their order; for `identity` see `build`."""
        if isinstance(self.data, list):
            return build([self.data[row] for row in rows.tolist()], identity=identity)
        return self._like(self.data.take(rows, axis=0))

    def slice(self, start: int, stop: int, *, identity: bool = False) -> Column:
        """Rows from `start` to before `stop`; arrays are shared, not copied. For `identity` see `build`."""
        if isinstance(self.data, list):
            return build(self.data[start:stop], identity=identity)
        return self._like(self.data[start:stop])

    def owned(self) -> Column:
        """The same values in memory of their own, which does not keep the documents they were read from."""
        if isinstance(self.data, list) or self.data.base is None:
            return self
        return self._like(self.data.copy())

    def _like(self, data: Array) -> Column:
        return Column(kind=self.kind, data=data, dtype=self.dtype)

    def _listed(self, data: Array) -> list[Any]:
        if self.kind == "number":
            return list(data.tolist())
        if self.kind == "date":
            return list(data.astype("M8[ms]").tolist())
        if self.kind == "oid":
            joined = data.tobytes()
            return [ObjectId(joined[at : at + 12]) for at in range(0, len(joined), 12)]
        if self.dtype == "bfloat16":
            data = data.view(BFloat16)
        return [data[row, ...] for row in range(len(data))]


def build(values: list[Any], *, identity: bool = False) -> Column:
    """The column of these decoded values.

    Args:
        values: As `bson.decode` gives them, stored arrays already numpy arrays.
        identity: They are `_id`s: a list is one value, never a row of numbers.
    """
    found = None
    if values:
        maker = _MAKERS.get(type(values[0]), _numbers)
        found = None if identity and isinstance(values[0], list) else maker(values)
    return found or Column(kind="object", data=values, dtype="object")


def merge(parts: Sequence[tuple[Array | None, Column]], *, identity: bool = False) -> Column:
    """One column of the rows of all parts.

    Args:
        parts: (positions of its rows in the result, column); positions None: the rows follow each other.
        identity: They are `_id`s, see `build`.
    """
    parts = [part for part in parts if len(part[1])]
    if not parts:
        return build([])
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    first = parts[0][1]
    rows = [rows for rows, _ in parts if rows is not None]
    order = np.argsort(np.concatenate(rows)) if rows else None
    forms = {_form(column) for _, column in parts}
    if len(forms) > 1 or isinstance(first.data, list):
        listed = list(chain.from_iterable(column.values() for _, column in parts))
        return build(listed if order is None else [listed[at] for at in order], identity=identity)
    joined = np.concatenate([np.asarray(column.data) for _, column in parts])
    return Column(kind=first.kind, data=joined if order is None else joined[order], dtype=first.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Some documents, as one column for each path.

    Attributes:
        paths: The dotted paths, in the order asked for.
        ids: The `_id`s (None for documents without one).
        fields: The column of each path.
    """

    paths: tuple[str, ...]
    ids: Column
    fields: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, path: str) -> Column:
        """The column of one path with its kind and dtype name."""
        return self.fields[path]

    def column(self, path: str) -> Array | list[Any]:
        """The values of one path.

        Returns:
            An (n, *shape) array: doubles float64, integers int64, booleans bool, stored arrays in their dtype
            (bfloat16 as uint16 bit patterns, see `Column.dtype`). A list of n decoded values for all else:
            strings, dates, mixed types, lists or arrays of different lengths.
        """
        column = self.fields[path]
        array = column.array()
        return column.values() if array is None else array

    def plain(self, path: str) -> bool:
        """Whether the column is of BSON numbers, rather than of arrays with a dtype of their own."""
        return self.fields[path].plain

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; estimated for columns that are lists."""
        return self.ids.nbytes + sum(column.nbytes for column in self.fields.values())

    def take(self, indices: NDArray[Any]) -> Columns:
        """The rows at these positions, in their order, copied."""
        rows = np.asarray(indices, np.intp)
        taken = {path: column.take(rows) for path, column in self.fields.items()}
        return Columns(paths=self.paths, ids=self.ids.take(rows, identity=True), fields=taken)

    def slice(self, start: int, stop: int) -> Columns:
        """Rows from `start` to before `stop`; arrays are shared, not copied."""
        cut = {path: column.slice(start, stop) for path, column in self.fields.items()}
        return Columns(paths=self.paths, ids=self.ids.slice(start, stop, identity=True), fields=cut)

    def owned(self) -> Columns:
        """The same rows in memory of their own, none of them a view of the documents."""
        fields = {path: column.owned() for path, column in self.fields.items()}
        return Columns(paths=self.paths, ids=self.ids.owned(), fields=fields)

    @classmethod
    def concat(cls, parts: Sequence[Columns]) -> Columns:
        """The rows of all parts, one after the other.

        Raises:
            ValueError: There are no parts, or their paths differ.
        """
        if len({part.paths for part in parts}) != 1:
            raise ValueError("columns to join must be at least one, and of the same paths")
        paths = parts[0].paths
        joined = {path: merge([(None, part.fields[path]) for part in parts]) for path in paths}
        ids = merge([(None, part.ids) for part in parts], identity=True)
        return cls(paths=paths, ids=ids, fields=joined)


def _form(column: Column) -> tuple[str, str, tuple[int, ...]]:
    shape = () if isinstance(column.data, list) else column.data.shape[1:]
    return column.kind, column.dtype, shape


def _flatten(values: list[Any]) -> tuple[list[Any], tuple[int, ...]] | None:
    """The scalars of rectangular nested lists and their shape; None where they are ragged or empty."""
    shape = [len(values)]
    while values and all(type(value) is list for value in values):
        lengths = set(map(len, values))
        if len(lengths) > 1 or 0 in lengths:
            return None
        shape.append(lengths.pop())
        values = list(chain.from_iterable(values))
    return values, tuple(shape)


def _numbers(values: list[Any]) -> Column | None:
    flat = _flatten(values)
    if flat is None:
        return None
    types = set(map(type, flat[0]))
    dtype = next((name for known, name in _NUMBER_TYPES if types <= known), None)
    if dtype is None:
        return None
    return Column(kind="number", data=np.array(flat[0], dtype).reshape(flat[1]), dtype=dtype)


def _dates(values: list[Any]) -> Column | None:
    if not all(type(value) is datetime and value.tzinfo is None for value in values):
        return None
    data = np.array([(value - _EPOCH) // _MILLISECOND for value in values], np.int64)
    return Column(kind="date", data=data, dtype="int64")


def _object_ids(values: list[Any]) -> Column | None:
    if not all(type(value) is ObjectId for value in values):
        return None
    joined = b"".join([value.binary for value in values])
    return Column(kind="oid", data=np.frombuffer(joined, np.uint8).reshape(-1, 12), dtype="uint8")


def _arrays(values: list[Any]) -> Column | None:
    first = values[0]
    form = (type(first), first.dtype, first.shape)
    for value in values:
        if not isinstance(value, np.ndarray) or (type(value), value.dtype, value.shape) != form:
            return None
    stacked = np.stack([np.asarray(value) for value in values])
    return Column(kind="array", data=stacked, dtype=dtype_name(first))


def _no_array(_values: list[Any]) -> Column | None:
    return None


_NUMBER_TYPES: tuple[tuple[frozenset[type], str], ...] = (
    (frozenset({float}), "float64"),
    (_INTEGERS, "int64"),
    (frozenset({bool}), "bool"),
)
_MAKERS: dict[type, Callable[[list[Any]], Column | None]] = {
    datetime: _dates,
    ObjectId: _object_ids,
    np.ndarray: _arrays,
    BFloat16: _arrays,
    str: _no_array,
    bytes: _no_array,
    dict: _no_array,
    type(None): _no_array,
}


def _size(value: Any) -> int:
    if isinstance(value, list):
        return 56 + sum(8 + _size(item) for item in value)
    if isinstance(value, dict):
        return 64 + sum(64 + _size(item) for item in value.values())
    if isinstance(value, np.ndarray):
        return 112 + value.nbytes
    return 56 + (len(value) if isinstance(value, str | bytes) else 0)
