"""Holds decoded documents as columns, each in the cheapest form that keeps the exact BSON meaning of its values.

Numbers of one shape are one numpy array, and lists of numbers of different lengths one array and where each ends;
integers among doubles are marked. What does not fit stays a list of what `bson.decode` gives, with stored arrays
as numpy arrays.

Guarantees: the form depends on the values alone, not on how they were decoded, sliced or joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, pairwise
from typing import Any, Final, Literal

import numpy as np
from bson import Int64, ObjectId
from numpy.typing import NDArray

from mongotorch.codecs.arrays import BFloat16, dtype_name
from mongotorch.errors import DtypeError

Array = NDArray[Any]
Kind = Literal["number", "ragged", "array", "date", "oid", "object"]
DOUBLE, BOOL, INT32, INT64 = 0x01, 0x08, 0x10, 0x12
NUMBERS: dict[int, np.dtype[Any]] = {
    DOUBLE: np.dtype("<f8"),
    BOOL: np.dtype("u1"),
    INT32: np.dtype("<i4"),
    INT64: np.dtype("<i8"),
}
PLAIN: dict[str, tuple[str, np.dtype[Any]]] = {  # by the type as stored: dtype in columns
    "d": ("float64", np.dtype(np.float64)),
    "B": ("bool", np.dtype(np.bool_)),
    "i": ("int64", np.dtype(np.int64)),
    "l": ("int64", np.dtype(np.int64)),
    "q": ("int64", np.dtype(np.int64)),
}
FLOAT: Final = "float"
"""Of a field with floats: integers in it become floats too, and batches have torch's default dtype."""
_NAMES = {"?": "bool", **{char: name for char, (name, _) in PLAIN.items()}}  # `dtype.name` is slow
_PLAIN_NAMES = (FLOAT, "int64", "bool")
_MIXED = bytes([DOUBLE, INT32, INT64])
_EPOCH = datetime(1970, 1, 1)  # BSON dates decode to naive UTC
_MILLISECOND = timedelta(milliseconds=1)
_INTEGERS = frozenset({int, Int64})
_SAMPLED = 32
_SHOWN = 80  # characters of a value in an error
_EXACT = 2**53  # up to here float64 holds every integer


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """The values of one field in n documents.

    Attributes:
        kind: `number` (plain BSON numbers, booleans and rectangular lists of them), `ragged` (lists of them, of
            different lengths), `array` (BSON vectors and `{dtype, shape, data}` sub-documents), `date` (int64
            milliseconds since 1970, UTC), `oid` ((n, 12) uint8) or `object` (a list).
        data: An array of n rows, or a list of n values; for `ragged` the numbers of all rows, one after the other.
        dtype: The name of the element type; `bfloat16` for such arrays, whose `data` is uint16 bit patterns.
        whole: Where integers are stored among doubles (then `data` is float64, and holds them exactly), a boolean
            array of the shape of `data`; else None.
        offsets: For `ragged`, where each row starts in `data`, and where the last one ends: int64, (n + 1,).
    """

    kind: Kind
    data: Array | list[Any]
    dtype: str
    whole: NDArray[np.bool_] | None = None
    offsets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.data) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, row: int) -> Any:
        """One value, as `bson.decode` gives it (stored arrays as numpy arrays)."""
        if isinstance(self.data, list):
            return self.data[row]
        at = range(len(self))[row]  # so that negative rows count from the end
        return self.slice(at, at + 1).values()[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())

    @property
    def plain(self) -> bool:
        """Whether these are BSON numbers or booleans, rather than arrays with a dtype of their own."""
        return self.kind in ("number", "ragged")

    @property
    def nbytes(self) -> int:
        """Bytes held; for a list, an estimate from a few evenly spaced values."""
        if not isinstance(self.data, list):
            return sum(part.nbytes for part in (self.data, self.whole, self.offsets) if part is not None)
        if not self.data:
            return 0
        sample = self.data[:: max(1, len(self.data) // _SAMPLED)]
        return sum(map(_size, sample)) * len(self.data) // len(sample)

    def values(self) -> list[Any]:
        """All values, as `bson.decode` gives them (stored arrays as numpy arrays)."""
        data = self.data
        if isinstance(data, list):
            return data
        if self.kind == "date":
            return list(data.astype("M8[ms]").tolist())
        if self.kind == "oid":
            joined = data.tobytes()
            return [ObjectId(joined[at : at + 12]) for at in range(0, len(joined), 12)]
        if self.kind == "array":
            data = data.view(BFloat16) if self.dtype == "bfloat16" else data
            return [data[row, ...] for row in range(len(data))]
        if self.whole is not None:
            exact = data.astype(object)
            exact[self.whole] = data[self.whole].astype(np.int64)
            data = exact
        listed: list[Any] = data.tolist()
        if self.offsets is None:
            return listed
        return [listed[start:stop] for start, stop in pairwise(self.offsets.tolist())]

    def array(self) -> Array | None:
        """The values as one numeric array, or None where they have no such form."""
        return None if self.whole is not None else self.numbers()

    def numbers(self) -> Array | None:
        """Like `array`, and integers mixed with doubles as float64 as well."""
        if isinstance(self.data, list) or self.kind not in ("number", "array"):
            return None
        return self.data

    def take(self, rows: Array, *, identity: bool = False) -> Column:
        """The rows at these positions, in their order; for `identity` see `build`."""
        if isinstance(self.data, list):
            return build([self.data[row] for row in rows.tolist()], identity=identity)
        if self.offsets is None:
            return self._like(self.data.take(rows, axis=0), _taken(self.whole, rows))
        starts, lengths = self.offsets[:-1][rows], np.diff(self.offsets)[rows]
        offsets = ends_of(lengths)
        at = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return ragged(self._like(self.data.take(at), _taken(self.whole, at)), offsets)

    def slice(self, start: int, stop: int, *, identity: bool = False) -> Column:
        """Rows from `start` to before `stop`; arrays are shared, not copied. For `identity` see `build`."""
        if isinstance(self.data, list):
            return build(self.data[start:stop], identity=identity)
        if self.offsets is None:
            return self._like(self.data[start:stop], None if self.whole is None else self.whole[start:stop])
        offsets = self.offsets[start : stop + 1]
        cut = slice(*offsets[[0, -1]].tolist()) if len(offsets) else slice(0)
        offsets = offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)
        return ragged(self._like(self.data[cut], None if self.whole is None else self.whole[cut]), offsets)

    def owned(self) -> Column:
        """The same values in memory of their own, which does not keep the documents they were read from."""
        if isinstance(self.data, list) or self.data.base is None or self.offsets is not None:
            return self
        return self._like(self.data.copy(), self.whole)

    def _like(self, data: Array, whole: NDArray[np.bool_] | None) -> Column:
        if whole is not None:
            return numbers(data, whole)
        return Column(kind="number" if self.kind == "ragged" else self.kind, data=data, dtype=self.dtype)


def _taken(values: NDArray[np.bool_] | None, rows: Array) -> NDArray[np.bool_] | None:
    return None if values is None else values.take(rows, axis=0)


def ends_of(lengths: Array) -> NDArray[np.int64]:
    """Where rows of these lengths start, one after the other, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def numbers(data: Array, whole: NDArray[np.bool_] | None = None) -> Column:
    """The column of plain numbers: float64, int64 or bool, of shape (n, ...); for `whole` see `Column`."""
    count = 0 if whole is None else np.count_nonzero(whole)
    if whole is not None and not count:
        whole = None
    elif whole is not None and count == whole.size:
        data, whole = data.astype(np.int64), None
    return Column(kind="number", data=data, dtype=_NAMES[data.dtype.char], whole=whole)


def number_column(kinds: int | Array, values: Array) -> Column | None:
    """The column of plain numbers; None where some are none, or are integers among doubles that it does not hold.

    Args:
        kinds: Their BSON types; one number where all are alike.
        values: The eight bytes from each number on, (n, 8).
    """
    if isinstance(kinds, int):
        dtype = NUMBERS.get(kinds)
        if dtype is None or (kinds == BOOL and np.count_nonzero(values[:, 0] > 1)):
            return None
        return plain_numbers(_first(values, dtype))
    if kinds.tobytes().translate(None, _MIXED):
        return None
    whole, long = kinds != DOUBLE, kinds == INT64
    if np.count_nonzero(whole) == len(whole):
        return numbers(np.where(long, _first(values, NUMBERS[INT64]), _first(values, NUMBERS[INT32])))
    data = _first(values, NUMBERS[DOUBLE]).astype(np.float64)
    at = np.flatnonzero(whole)
    data[at] = _first(values, NUMBERS[INT32])[at]
    if np.count_nonzero(long):
        at = np.flatnonzero(long)
        integers = _first(values, NUMBERS[INT64])[at]
        if not exact(integers):
            return None
        data[at] = integers
    return Column(kind="number", data=data, dtype="float64", whole=whole)


def _first(values: Array, dtype: np.dtype[Any]) -> Array:
    return values[:, : dtype.itemsize].view(dtype)[:, 0]


def plain_numbers(data: Array) -> Column:
    """The column of numbers as they are stored, in memory of its own."""
    name, dtype = PLAIN[data.dtype.char]
    return Column(kind="number", data=data.astype(dtype), dtype=name)


def ragged(flat: Column, offsets: NDArray[np.int64]) -> Column:
    """The column of lists of plain numbers that are these, one after the other; see `Column.offsets`."""
    length = int(offsets[1]) if len(offsets) > 1 else 0
    if (np.diff(offsets) == length).all():
        if not length:
            return Column(kind="object", data=[[] for _ in offsets[1:]], dtype="object")
        return shaped(flat, (len(offsets) - 1, length))
    return replace(flat, kind="ragged", offsets=offsets)


def shaped(column: Column, shape: tuple[int, ...]) -> Column:
    """The same numbers in another shape."""
    whole = None if column.whole is None else column.whole.reshape(shape)
    kind: Kind = "number" if column.dtype in _NAMES.values() else "array"
    return replace(column, kind=kind, data=np.asarray(column.data).reshape(shape), whole=whole)


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
    columns = [column for _, column in parts]
    placed = [rows for rows, _ in parts if rows is not None]
    order = np.argsort(np.concatenate(placed)) if placed else None
    if (joined := _joined(columns)) is not None:
        return joined if order is None else joined.take(order, identity=identity)
    listed = list(chain.from_iterable(column.values() for column in columns))
    return build(listed if order is None else [listed[at] for at in order], identity=identity)


def _joined(columns: list[Column]) -> Column | None:
    """The rows of all, one after the other; None where they have to become one list."""
    first = columns[0]
    if isinstance(first.data, list):
        return None
    data = [column.data for column in columns if not isinstance(column.data, list)]
    forms = {(column.kind, column.dtype, one.shape[1:]) for column, one in zip(columns, data, strict=False)}
    if len(data) < len(columns):
        return None
    if len(forms) == 1 and first.kind != "ragged" and all(column.whole is None for column in columns):
        return Column(kind=first.kind, data=np.concatenate(data), dtype=first.dtype)
    dtypes = {column.dtype for column in columns}
    if not all(column.plain for column in columns) or (len(dtypes) > 1 and not dtypes <= {"int64", "float64"}):
        return None
    return _joined_numbers(columns, data, mixed=len(dtypes) > 1 or any(c.whole is not None for c in columns))


def _joined_numbers(columns: list[Column], data: list[Array], *, mixed: bool) -> Column | None:
    lists = any(column.kind == "ragged" for column in columns) or len({one.shape[1:] for one in data}) > 1
    if lists and any(column.kind == "number" and one.ndim != 2 for column, one in zip(columns, data, strict=True)):
        return None
    whole = None
    if mixed:
        if not all(one.dtype.kind == "f" or exact(one) for one in data):
            return None
        masks = [
            np.full(one.shape, one.dtype.kind == "i") if column.whole is None else column.whole
            for column, one in zip(columns, data, strict=True)
        ]
        whole = np.concatenate([mark.reshape(-1) if lists else mark for mark in masks])
    joined = np.concatenate([one.reshape(-1) if lists else one for one in data])  # integers become float64 here
    if not lists:
        return numbers(joined, whole)
    lengths = [
        np.full(len(one), one.shape[1]) if column.offsets is None else np.diff(column.offsets)
        for column, one in zip(columns, data, strict=True)
    ]
    return ragged(columns[0]._like(joined, whole), ends_of(np.concatenate(lengths)))


def convert(column: Column, dtype: str) -> tuple[Column, int | None]:
    """The numbers of a column in one dtype, where nothing is lost by that; and the first row that does not fit.

    Args:
        column: One row at least. What is neither number nor list of numbers stays.
        dtype: FLOAT, `int64`, `bool`, or another dtype of numpy's that was asked for: then floats are rounded to
            it, and the column is an array.
    """
    data = column.data
    if isinstance(data, list):
        return _convert_each(column, data, dtype)
    if column.kind == "array" and dtype not in (FLOAT, "bfloat16") and column.dtype != "bfloat16":
        return replace(column, data=data.astype(dtype), dtype=dtype), None
    if not column.plain:
        return column, None
    target = np.dtype(np.float64 if dtype == FLOAT else dtype)
    if dtype in _PLAIN_NAMES and data.dtype == target and column.whole is None:
        return column, None
    wrong = _misfits(data, target, rounded=dtype != FLOAT)
    if wrong is not None:
        first = int(np.flatnonzero(wrong.reshape(-1))[0])
        if column.offsets is not None:
            return column, int(np.searchsorted(column.offsets, first, side="right")) - 1
        return column, first // max(data[0].size, 1)
    kind: Kind = column.kind if dtype in _PLAIN_NAMES or column.kind == "ragged" else "array"
    name = "float64" if dtype == FLOAT else dtype  # `target.name` is slow
    return Column(kind=kind, data=data.astype(target, copy=False), dtype=name, offsets=column.offsets), None


def _misfits(data: Array, target: np.dtype[Any], *, rounded: bool) -> NDArray[np.bool_] | None:
    """Which numbers a dtype cannot hold; None: none of them."""
    wrong: NDArray[np.bool_]
    if target.kind == "f":
        if rounded or data.dtype.kind != "i" or exact(data):
            return None
        with np.errstate(invalid="ignore"):  # the largest are no int64 after rounding
            wrong = data.astype(np.float64).astype(np.int64) != data
        return wrong if wrong.any() else None
    if data.dtype == target:
        return None
    low, high = (0, 1) if target.kind == "b" else (int(np.iinfo(target).min), int(np.iinfo(target).max))
    if data.dtype.kind == "f":
        wrong = ~((data == np.floor(data)) & (data >= low) & (data < float(high) + (high < _EXACT)))
    else:
        wide = data.astype(np.int64)
        wrong = (wide < low) | (wide > high)
    return wrong if wrong.any() else None


def _convert_each(column: Column, values: list[Any], dtype: str) -> tuple[Column, int | None]:
    """The same for a list of values: numbers in lists become Python numbers of that meaning."""
    target = np.dtype(np.float64 if dtype == FLOAT else dtype)
    make = {"b": bool, "i": int, "u": int}.get(target.kind, float)
    rounded = make is float and dtype != FLOAT

    def converted(value: Any) -> Any:
        if isinstance(value, list):
            return [converted(item) for item in value]
        if not isinstance(value, bool | int | float):
            return value
        if not rounded and make(value) != value and not (make is float and value != value):
            raise ValueError(value)
        if make is int:
            np.array(int(value), target)  # it raises where the number is too large
        return make(value)

    found = []
    for row, value in enumerate(values):
        try:
            found.append(converted(value))
        except (ValueError, OverflowError):  # a NaN or an infinity is no integer
            return column, row
    alike = build(found)
    return (alike, None) if isinstance(alike.data, list) else convert(alike, dtype)


def _does_not_fit(path: str, dtype: str, value: Any, document_id: Any) -> DtypeError:
    kind = "floats" if dtype == FLOAT else "integers" if dtype == "int64" else dtype
    shown = repr(value)
    shown = shown if len(shown) < _SHOWN else shown[:_SHOWN] + "..."
    return DtypeError(
        f"field {path!r} of document {document_id!r} holds {shown}, which is not exact in the dtype that the "
        f"field has for the whole run ({kind}); name another one, such as "
        f'`dtypes={{"{path}": "float32"}}`, or convert the documents',
        document_id=document_id,
        field=path,
    )


def exact(integers: Array) -> bool:
    """Whether all of these are the same as float64."""
    return not integers.size or (int(integers.min()) >= -_EXACT and int(integers.max()) <= _EXACT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Some documents, as one column for each path.

    Attributes:
        paths: The dotted paths, in the order asked for.
        ids: The `_id`s (None for documents without one).
        fields: The column of each path.
        skipped: How many documents were left out beside these because they do not fit.
        why: What is wrong with the first of them.
    """

    paths: tuple[str, ...]
    ids: Column
    fields: Mapping[str, Column]
    skipped: int = 0
    why: str = ""

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

    def typed(self, dtypes: Mapping[str, str]) -> Columns:
        """The same rows, each field in the dtype that it has for a run, see `convert`.

        Raises:
            DtypeError: A value does not fit; names the first document of the field.
        """
        fields = dict(self.fields)
        for path, dtype in dtypes.items():
            if (column := fields.get(path)) is not None and len(column):
                fields[path], misfit = convert(column, dtype)
                if misfit is not None:
                    raise _does_not_fit(path, dtype, column[misfit], self.ids[misfit])
        return Columns(paths=self.paths, ids=self.ids, fields=fields)

    def owned(self) -> Columns:
        """The same rows in memory of their own, none of them a view of the documents."""
        fields = {path: column.owned() for path, column in self.fields.items()}
        return replace(self, ids=self.ids.owned(), fields=fields)

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
        return cls(paths=paths, ids=merge([(None, part.ids) for part in parts], identity=True), fields=joined)


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
        return _ragged(values)
    known = _number_array(flat[0])
    if known is None:
        return None
    return shaped(numbers(*known), flat[1])


def _ragged(values: list[Any]) -> Column | None:
    if not all(type(value) is list for value in values):
        return None
    known = _number_array(list(chain.from_iterable(values)))
    return None if known is None else ragged(numbers(*known), ends_of(np.array(list(map(len, values)))))


def _number_array(values: list[Any]) -> tuple[Array, NDArray[np.bool_] | None] | None:
    """Numbers of one meaning as an array, or as float64 and where integers are among them."""
    types = set(map(type, values))
    dtype = next((name for known, name in _NUMBER_TYPES if types <= known), None)
    if dtype is not None:
        return np.array(values, dtype), None
    if not types <= _INTEGERS | {float}:
        return None
    whole = np.array([type(value) is not float for value in values])
    if not all(-_EXACT <= value <= _EXACT for value in values if type(value) is not float):
        return None
    return np.array(values, np.float64), whole


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
