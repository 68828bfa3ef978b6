"""Decodes raw BSON documents into columns, without a Python object for each document.

Documents of one shape are a two-dimensional array of bytes, and their fields are strided views of it. The
structural bytes of every row are compared with the first row's; rows that differ are tried again as a group of
their own, a bounded number of times, and what is left is decoded by `bson`.

Guarantees: the result is exactly what `bson.decode` gives, with stored arrays as numpy arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bson
import numpy as np
from bson.errors import BSONError
from numpy.typing import NDArray

from mongotorch.codecs.arrays import restore
from mongotorch.data.decode.column import Array, Column, build, merge
from mongotorch.data.decode.ids import id_keys
from mongotorch.data.decode.layout import ID, Bytes, Layout, LayoutError, PathTree
from mongotorch.data.decode.replies import Group, Reply, Rows, by_length
from mongotorch.errors import DataError, FieldMissingError

_MISSING = object()


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

    def id_keys(self) -> NDArray[np.uint64]:
        """A stable 64-bit key for each `_id`, equal for ids that are equal in MongoDB; (n,) uint64."""
        return id_keys(self.ids)

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
