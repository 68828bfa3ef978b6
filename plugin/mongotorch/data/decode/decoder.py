"""Decodes raw BSON documents into columns, without a Python object for each document.

Documents of one shape are a two-dimensional array of bytes, and their fields are strided views of it. A document
whose structural bytes (types, names, lengths, array headers) equal those of the first row holds every value at the
same offset, in the same type: one `Layout` reads them all. Rows that differ are tried again as a group of their
own, a bounded number of times, and what is left is decoded by `bson`. A value without a fixed form is cut out as a
small document of its own and decoded by `bson`.

Guarantees: the result is exactly what `bson.decode` gives, with stored arrays as numpy arrays. What is read is
never written to. It is the column's own memory, except an array that is at least half of its documents: that is a
view of them, so that a large value is copied once, to where it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import bson
import numpy as np
from bson.binary import VECTOR_SUBTYPE
from bson.errors import BSONError
from numpy.typing import NDArray

from mongotorch.codecs.arrays import dtype_name, restore, stored_array, vector_type
from mongotorch.data.decode.columns import Column, Columns, build, merge
from mongotorch.data.decode.replies import EXTRA_SIZES, FIXED_SIZES, Bytes, Group, Reply, Rows, by_length
from mongotorch.errors import DataError, FieldMissingError

ID = "_id"
# The type bytes of BSON that are named below; the tables in `replies` know all of them.
_DOCUMENT, _ARRAY, _BINARY, _OBJECT_ID, _DATE, _NULL, _REGEX = 0x03, 0x04, 0x05, 0x07, 0x09, 0x0A, 0x0B
_NUMBERS: dict[int, np.dtype[Any]] = {
    0x01: np.dtype("<f8"),
    0x08: np.dtype("u1"),
    0x10: np.dtype("<i4"),
    0x12: np.dtype("<i8"),
}
_INT32 = struct.Struct("<i")
_REFERENCE = b"$ref"
_FEW = 16  # runs of structural bytes that are worth comparing one by one
_DATE_RANGE = (-62_135_596_800_000, 253_402_300_799_999)  # years 1 to 9999: what Python can say
_MISSING = object()


def decode(
    raw: bytes | memoryview | Sequence[Reply],
    paths: Sequence[str],
    *,
    smallest_group: int = 32,
    most_layouts: int = 16,
) -> Columns:
    """Decode documents into columns.

    Args:
        raw: Concatenated BSON documents, as `find_raw_batches` gives them, or a sequence of such.
        paths: Dotted paths of the fields to read. A path reaches into sub-documents, not into lists.
        smallest_group: Rows of one shape that are worth a layout; fewer go through `bson`.
        most_layouts: How many shapes are tried before the rest goes through `bson`.

    Raises:
        FieldMissingError: A document lacks a path; names the first such document and path.
        DataError: The bytes are not BSON documents.
    """
    if isinstance(raw, bytes | memoryview):
        content: bytes | memoryview = raw
    else:
        content = raw[0] if len(raw) == 1 else b"".join(raw)
    builder = _ColumnBuilder(tuple(dict.fromkeys(paths)))
    try:
        groups, rest = by_length(content, smallest_group, most_layouts)
        for _ in range(most_layouts):
            if not groups or len(groups[0][1]) < smallest_group:
                break
            groups = sorted(groups[1:] + builder.decode_alike(*groups[0]), key=lambda group: -len(group[1]))
        for rows, matrix in groups:
            builder.decode_each(rows, matrix.tobytes())
        builder.decode_each(*rest)
    except (BSONError, struct.error) as error:
        raise DataError(f"documents that are not valid BSON, or beyond what Python can hold: {error}") from error
    return builder.done()


class _ColumnBuilder:
    """Collects the parts of the columns of one `decode`, each with the positions of its rows."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._tree = PathTree.of((*paths, ID))
        self._parts: dict[str, list[tuple[Rows | None, Column]]] = {path: [] for path in (*paths, ID)}
        self._missing: tuple[int, str, Any] | None = None

    def decode_alike(self, rows: Rows | None, matrix: Bytes) -> list[Group]:
        """Decode the rows that look like the first one; return the others, as a group."""
        try:
            layout = Layout(matrix[0].tobytes(), self._tree)
        except LayoutError:
            self.decode_each(rows, matrix.tobytes())
            return []
        alike = layout.matching(matrix)
        rest: list[Group] = []
        if alike is not None:
            rows = np.arange(len(matrix)) if rows is None else rows
            rest = [(rows[~alike], matrix[~alike])]
            rows, matrix = rows[alike], matrix[alike]
        for path in self._parts:
            if path in layout.fields:
                self._parts[path].append((rows, layout.column(path, matrix)))
            elif path == ID and ID not in self._paths:
                self._parts[path].append((rows, build([None] * len(matrix))))
            else:
                ids = layout.column(ID, matrix[:1])[0] if ID in layout.fields else None
                self._miss(0 if rows is None else int(rows[0]), path, ids)
        return rest

    def decode_each(self, rows: Rows | None, content: bytes) -> None:
        """Decode rows through `bson`."""
        documents = bson.decode_all(content) if content else []
        for path, parts in self._parts.items():
            values = [_lookup(document, path) for document in documents]
            if path == ID and ID not in self._paths:
                values = [None if value is _MISSING else value for value in values]
            if _MISSING in values:
                at = next(row for row, value in enumerate(values) if value is _MISSING)
                self._miss(at if rows is None else int(rows[at]), path, documents[at].get(ID))
                continue
            identity = path == ID
            values = values if identity else [restore(value) for value in values]
            parts.append((rows, build(values, identity=identity)))

    def done(self) -> Columns:
        """The columns. Raises: FieldMissingError."""
        if self._missing is not None:
            raise _field_missing(self._missing[1], self._missing[2])
        fields = {path: merge(self._parts[path], identity=path == ID) for path in self._paths}
        return Columns(paths=self._paths, ids=merge(self._parts[ID], identity=True), fields=fields)

    def _miss(self, row: int, path: str, document_id: Any) -> None:
        """Remember the first document that lacks a field, the same one whatever way it was decoded."""
        order = list(self._parts)
        known = self._missing
        if known is None or (row, order.index(path)) < (known[0], order.index(known[1])):
            self._missing = (row, path, document_id)


def _field_missing(path: str, document_id: Any) -> FieldMissingError:
    return FieldMissingError(
        f"The document with _id {document_id!r} has no field {path!r}: give every document the field, or "
        "leave those without it out of the select.",
        document_id=document_id,
        field=path,
    )


def _lookup(document: Any, path: str) -> Any:
    for name in path.split("."):
        if type(document) is not dict or name not in document:
            return _MISSING
        document = document[name]
    return document


@dataclass(frozen=True, kw_only=True)
class FieldReader:
    """Reads one value of every document of a layout.

    Attributes:
        form: `number`, `array`, `date`, `oid` at a fixed offset, `list` (numbers among their keys), `null`,
            or `opaque` (a whole element, from its type byte).
        start: Offset of the first byte in the document.
        stop: Offset after the last byte.
        dtype: The type of the numbers as stored.
        shape: The shape of an array.
        name: The dtype name of an array; the field's own name for an opaque element.
        runs: For a list: (offset, first index, count, stride) of each run of keys of one width.
    """

    form: Literal["number", "array", "date", "oid", "list", "null", "opaque"]
    start: int
    stop: int
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    name: str = ""
    runs: tuple[tuple[int, int, int, int], ...] = ()

    def read(self, rows: Bytes, *, identity: bool) -> Column:
        """The values in rows, an (n, length) array of documents.

        Args:
            rows: Contiguous documents that all have the layout of this reader.
            identity: These are `_id`s: kept as `bson.decode` gives them.
        """
        if self.form == "null":
            return build([None] * len(rows))
        if self.form == "opaque":
            return self._opaque(rows, identity=identity)
        if self.form == "list":
            return self._list(rows)
        if self.form == "number":
            return _number(self._strided(rows, self.start))
        if self.form == "array":
            return self._array(rows)
        data = rows[:, self.start : self.stop].copy()
        if self.form == "oid":
            return Column(kind="oid", data=data, dtype="uint8")
        return self._dates(rows, data.view("<i8")[:, 0], identity=identity)

    def _strided(self, rows: Bytes, offset: int, *runs: tuple[int, int]) -> NDArray[Any]:
        """Numbers where they lie: one a row, or (count, stride) of them."""
        shape = (len(rows), *(count for count, _ in runs))
        strides = (rows.strides[0], *(stride for _, stride in runs))
        return np.ndarray(shape, self.dtype, rows.data, offset, strides)

    def _list(self, rows: Bytes) -> Column:
        _, first, count, _ = self.runs[-1]
        data = np.empty((len(rows), first + count), self.dtype)
        for offset, begin, size, stride in self.runs:
            data[:, begin : begin + size] = self._strided(rows, offset, (size, stride))
        return _number(data)

    def _array(self, rows: Bytes) -> Column:
        data = rows[:, self.start : self.stop]
        if data.shape[1] * 2 < rows.shape[1]:
            data = data.copy()
        shape = (len(rows), *self.shape)
        shaped = data.view(np.dtype(self.dtype)).reshape(shape) if data.size else np.empty(shape, self.dtype)
        return Column(kind="array", data=shaped, dtype=self.name)

    def _dates(self, rows: Bytes, data: NDArray[np.int64], *, identity: bool) -> Column:
        if _DATE_RANGE[0] <= data.min() and data.max() <= _DATE_RANGE[1]:
            return Column(kind="date", data=data, dtype="int64")
        element = self.start - len(self.name.encode()) - 2
        opaque = FieldReader(form="opaque", start=element, stop=self.stop, name=self.name)
        return opaque.read(rows, identity=identity)

    def _opaque(self, rows: Bytes, *, identity: bool) -> Column:
        """Decode an element alone: cut out of each row as a document with this one field."""
        size = self.stop - self.start + 5
        cut = np.zeros((len(rows), size), np.uint8)
        cut[:, :4] = np.frombuffer(struct.pack("<i", size), np.uint8)
        cut[:, 4:-1] = rows[:, self.start : self.stop]
        found = [document[self.name] for document in bson.decode_all(cut.tobytes())]
        return build(found if identity else [restore(value) for value in found], identity=identity)


def _number(data: NDArray[Any]) -> Column:
    wide = np.dtype(np.bool_ if data.dtype.itemsize == 1 else np.int64 if data.dtype.kind == "i" else np.float64)
    owned = data.astype(wide, copy=data.base is not None)
    return Column(kind="number", data=owned, dtype=wide.name)


class LayoutError(ValueError):
    """A document that has to be decoded whole: a database reference, a type unknown here."""


@dataclass(frozen=True, kw_only=True)
class PathTree:
    """The names of the fields to read, as a tree."""

    path: str | None = None
    below: dict[bytes, PathTree] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathTree:
        """The tree of these dotted paths."""
        root = cls()
        for path in paths:
            node = root
            *parents, leaf = path.encode().split(b".")
            for name in parents:
                node = node.below.setdefault(name, cls())
            known = node.below.get(leaf)
            node.below[leaf] = cls(path=path, below=known.below if known else {})
        return root

    def paths(self) -> list[str]:
        """Every path at or under this node."""
        own = [] if self.path is None else [self.path]
        return own + [path for node in self.below.values() for path in node.paths()]


class Layout:
    """Where the values lie in one document, and in all that match it.

    Args:
        row: The document.
        tree: The fields to read.

    Attributes:
        fields: The reader of each path that the document has.

    Raises:
        LayoutError: The document has to be decoded whole.
    """

    def __init__(self, row: bytes, tree: PathTree) -> None:
        self._row = row
        self._first = np.frombuffer(row, np.uint8)
        self._mask = np.zeros(len(row), np.uint8)
        self.fields: dict[str, FieldReader] = {}
        try:
            self._document(0, tree)
        except (struct.error, IndexError, ValueError) as error:
            raise LayoutError(str(error)) from error

    def matching(self, rows: Bytes) -> NDArray[np.bool_] | None:
        """Which rows (an (n, length) array) have this layout; None: all of them."""
        runs = self._runs()
        if len(runs) > _FEW:
            differing = np.bitwise_xor(rows, self._first)
            np.bitwise_and(differing, self._mask, out=differing)
            return np.equal(differing.max(axis=1), 0) if differing.any() else None
        # Few structural bytes between large values: only they are looked at.
        equal = [rows[:, start:stop] == self._first[start:stop] for start, stop in runs]
        if all(part.all() for part in equal):
            return None
        alike = np.ones(len(rows), np.bool_)
        for part in equal:
            alike &= part.all(axis=1)
        return alike

    def _runs(self) -> list[tuple[int, int]]:
        """Where structural bytes start and stop; they are compared as a whole or not at all."""
        edges = np.flatnonzero(np.diff(self._mask, prepend=0, append=0))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def column(self, path: str, rows: Bytes) -> Column:
        """The values of one path in rows that all have this layout."""
        return self.fields[path].read(rows, identity=path == ID)

    def _document(self, at: int, tree: PathTree) -> None:
        row, mask = self._row, self._mask
        end = at + _INT32.unpack_from(row, at)[0] - 1
        mask[at : at + 4] = mask[end] = 0xFF
        at += 4
        while at < end:
            name_end = row.index(0, at + 1)
            kind, name, value = row[at], row[at + 1 : name_end], name_end + 1
            if name == _REFERENCE:
                raise LayoutError("a database reference")
            mask[at:value] = 0xFF
            after = self._skip(kind, value)
            node = tree.below.get(name)
            if node is not None:
                self._add_field(node, kind, at, value, after)
            at = after
        if at != end:
            raise LayoutError("a document that does not end where it says")

    def _skip(self, kind: int, value: int) -> int:
        """Where the value ends; what its length depends on becomes structural."""
        fixed = FIXED_SIZES.get(kind)
        if fixed is not None:
            return value + fixed
        extra = EXTRA_SIZES.get(kind)
        if extra is not None:
            self._mask[value : value + 4] = 0xFF
            return int(value + extra + _INT32.unpack_from(self._row, value)[0])
        if kind != _REGEX:
            raise LayoutError(f"BSON type {kind:#04x}")
        after = self._row.index(0, self._row.index(0, value) + 1) + 1
        self._mask[value:after] = 0xFF
        return after

    def _add_field(self, node: PathTree, kind: int, at: int, value: int, after: int) -> None:
        for path in node.paths():
            self.fields.pop(path, None)  # of two fields of one name the last one counts
        if node.path is not None:
            opaque = FieldReader(form="opaque", start=at, stop=after, name=self._row[at + 1 : value - 1].decode())
            self.fields[node.path] = self._reader(node.path, kind, value, after) or opaque
        if node.below and kind == _DOCUMENT:
            self._document(value, node)

    def _reader(self, path: str, kind: int, value: int, after: int) -> FieldReader | None:
        if kind in _NUMBERS:
            return FieldReader(form="number", start=value, stop=after, dtype=_NUMBERS[kind])
        if kind == _NULL:
            return FieldReader(form="null", start=value, stop=after)
        if kind == _OBJECT_ID:
            return FieldReader(form="oid", start=value, stop=after)
        if kind == _DATE:
            return FieldReader(form="date", start=value, stop=after, name=path.rpartition(".")[2])
        if path == ID:
            return None  # an `_id` is never an array
        if kind == _ARRAY:
            return self._list(value, after)
        if kind == _BINARY:
            return self._vector(value, after)
        return self._array(value, after) if kind == _DOCUMENT else None

    def _list(self, value: int, after: int) -> FieldReader | None:
        dtype = _NUMBERS.get(self._row[value + 4])
        if dtype is None:
            return None
        found = _skeleton(self._row[value + 4], dtype.itemsize, after - value)
        if found is None:
            return None
        content, mask, runs = found
        if np.bitwise_and(np.bitwise_xor(content, self._first[value:after]), mask).any():
            return None
        self._mask[value:after] = mask
        moved = tuple((value + offset, first, count, stride) for offset, first, count, stride in runs)
        return FieldReader(form="list", start=value, stop=after, dtype=dtype, runs=moved)

    def _vector(self, value: int, after: int) -> FieldReader | None:
        start = value + 7
        dtype = vector_type(self._row[value + 5 : start], after - start)
        if self._row[value + 4] != VECTOR_SUBTYPE or dtype is None:
            return None
        self._mask[value:start] = 0xFF
        shape = ((after - start) // dtype.itemsize,)
        return FieldReader(form="array", start=start, stop=after, dtype=dtype, shape=shape, name=dtype.name)

    def _array(self, value: int, after: int) -> FieldReader | None:
        parts = bson.decode(self._row[value:after])
        array = stored_array(parts)
        if array is None:
            return None
        start = after - 1 - array.nbytes
        header = b"\x05data\x00" + _INT32.pack(array.nbytes) + b"\x00"
        if self._row[start - len(header) : start] != header:
            return None  # the same keys in another order
        self._mask[value:start] = self._mask[after - 1] = 0xFF
        name = dtype_name(array)
        return FieldReader(
            form="array", start=start, stop=after - 1, dtype=array.dtype, shape=array.shape, name=name
        )


@lru_cache(maxsize=64)
def _skeleton(
    kind: int, width: int, size: int
) -> tuple[Bytes, Bytes, tuple[tuple[int, int, int, int], ...]] | None:
    """What a list of so many bytes looks like if it holds only this type: content, mask, runs of values.

    The keys of a BSON list are "0", "1", ...: the stride of the values grows with the digits of the key.
    """
    content, mask = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    content[:4] = np.frombuffer(_INT32.pack(size), np.uint8)
    mask[:4] = mask[-1] = 0xFF
    at, first, digits = 4, 0, 1
    runs = []
    while at < size - 1:
        head = 2 + digits
        count, rest = divmod(size - 1 - at, head + width)
        most = 10**digits - first
        if rest and count < most:
            return None
        count = min(count, most)
        end = at + count * (head + width)
        rows, covered = content[at:end].reshape(count, -1), mask[at:end].reshape(count, -1)
        rows[:, 0], covered[:, :head] = kind, 0xFF
        for digit in range(digits):
            rows[:, 1 + digit] = np.arange(first, first + count) // 10 ** (digits - 1 - digit) % 10 + 0x30
        runs.append((at + head, first, count, head + width))
        at, first, digits = end, first + count, digits + 1
    return (content, mask, tuple(runs)) if runs else None
