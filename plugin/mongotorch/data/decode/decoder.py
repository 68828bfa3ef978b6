"""Decodes raw BSON documents into columns, without a Python object for each document.

Documents are walked a field at a time, all at once: there is a position for each. Where the next field of all has
the name that is expected, their types are read with one numpy operation, their values lie behind, and all
positions move on; a document that lacks the field stays where it is. Fields are expected in the order in which the
first document has them, or several do. Documents of which something is left over at the end, because their fields
come in another order, are walked again in an order that some of them have, a bounded number of times, and what is
left is decoded by `bson`.

Guarantees: the result is exactly what `bson.decode` gives, with stored arrays as numpy arrays. What is read is
never written to. It is the column's own memory, except an array that is at least half of its documents: that is a
view of them, so that a large value is copied once, to where it is used.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, final

import bson
import numpy as np
from bson.errors import BSONError

from mongotorch.codecs.arrays import restore
from mongotorch.data.decode.columns import Column, Columns, build, merge, number_column
from mongotorch.data.decode.raw_bson import (
    EXTRA_SIZES,
    FIXED_SIZES,
    SMALLEST_SIZES,
    Array,
    Bytes,
    Documents,
    Field,
    Mask,
    Octets,
    Positions,
    Reply,
    Rows,
    header,
    kept,
    offsets,
    other_names,
    sizes,
    starts_of,
    together,
)
from mongotorch.data.decode.values import DOCUMENT, NULL, NUMBER_SIZES, Part, matching, number_columns, read_field
from mongotorch.errors import DataError, FieldMissingError

ID = "_id"
_INT32 = struct.Struct("<i")
_REFERENCE = b"$ref"  # `bson` makes a DBRef of such a document
_WALKS = 6  # orders that are tried before the rest goes through `bson`
_FEW = 4  # documents, below which a walk costs more than `bson`
_RUN = 4  # fields that are numbers, from how many on they are read at once
_ATTEMPTS = 2  # at that in one walk, before it is given up
_TOGETHER = 2**13  # numbers, for which no memory has to be asked of the system
_SEEN = 16  # documents whose fields are put into one order
_MISSING = object()


def decode(
    raw: Reply | Sequence[Reply],
    paths: Sequence[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    few: int = _FEW,
) -> Columns:
    """Decode documents into columns.

    Args:
        raw: BSON documents, one after the other as `find_raw_batches` gives them or as `found` does, or a
            sequence of such.
        paths: Dotted paths of the fields to read. A path reaches into sub-documents, not into lists.
        defaults: Values of paths that a document lacks, or has as null.
        few: Fewer documents than that go through `bson`.

    Raises:
        FieldMissingError: A document lacks a path without a default; names the first such document and path.
        DataError: The bytes are not BSON documents.
    """
    documents = raw if isinstance(raw, bytes | memoryview | Documents) else together(raw)
    decoder = _Decoder(documents, tuple(dict.fromkeys(paths)), defaults or {})
    try:
        decoder.run(few)
    except (BSONError, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"documents that are not valid BSON, or beyond what Python can hold: {error}") from error
    return decoder.done()


def without_missing(
    raw: Sequence[Reply], paths: Sequence[str], *, defaults: Mapping[str, Any]
) -> tuple[list[Reply], int]:
    """The documents that have all of the paths, as `decode` takes them, and how many have not."""
    documents = together(raw)
    decoder = _Decoder(documents, tuple(dict.fromkeys(paths)), defaults)
    decoder.run(_FEW)
    cut = enumerate(offsets(documents))
    kept = [documents[start:end] for row, (start, end) in cut if row not in decoder.lacking]
    return [b"".join(kept)], len(decoder.lacking)


class _Decoder:
    """Collects the parts of the columns of one `decode`, each with the positions of its rows."""

    def __init__(self, raw: Reply, paths: tuple[str, ...], defaults: Mapping[str, Any]) -> None:
        self._octets = Octets(raw.content if isinstance(raw, Documents) else raw)
        self._paths = paths
        self._defaults = defaults if ID in paths else {ID: None, **defaults}
        self._tree = path_tree((*paths, ID))
        self._parts: dict[str, list[Part]] = {path: [] for path in (*paths, ID)}
        self._starts, self._lengths = _found(raw)
        self._missing: tuple[int, str, Any] | None = None
        self.lacking: set[int] = set()  # the documents that lack a field

    def run(self, few: int) -> None:
        """Decode all documents."""
        count = self._starts.total
        rows: Rows | None = None  # all that are left
        for _ in range(_WALKS):
            left = count if rows is None else len(rows)
            if left < max(few, 1):
                break
            rows = self._walk(rows, left)
        if rows is None and count:
            rows = np.arange(count)
        if rows is not None and len(rows):
            self._decode_each(rows)

    def done(self) -> Columns:
        """The columns. Raises: FieldMissingError."""
        if self._missing is not None:
            raise _field_missing(*self._missing[1:])
        fields = {path: merge(self._parts[path], identity=path == ID) for path in self._paths}
        return Columns(paths=self._paths, ids=merge(self._parts[ID], identity=True), fields=fields)

    def _walk(self, rows: Rows | None, count: int) -> Rows:
        """Decode the documents that are alike, and return the others."""
        starts = self._starts if rows is None else self._starts.select(rows)
        lengths = self._lengths if rows is None or isinstance(self._lengths, int) else self._lengths[rows]
        order = self._order(starts)
        walk = Walk(self._octets, starts, starts.moved(lengths - 1), self._tree, order)
        numbers = np.arange(self._starts.total) if rows is None else rows
        if walk.fit is not None and not walk.fit.any():
            return numbers
        fitting = rows if walk.fit is None else numbers[walk.fit]
        covered: dict[str, list[Part]] = {path: [] for path in self._parts}
        for path, found, column in walk.numbers:
            if walk.fit is not None:
                keep, found = kept(found, walk.fit)
                column = column.take(np.flatnonzero(keep))
            if len(column):
                covered[path].append((found, column))
        for path, values in walk.fields:
            chosen = values if walk.fit is None else values.only(walk.fit)
            if path in self._defaults:
                chosen = chosen.without(NULL)
            if chosen.at.total:
                covered[path].append((chosen.rows, read_field(self._octets, chosen, identity=path == ID)))
        self._collect(fitting, count if fitting is None else len(fitting), covered)
        return np.empty(0, np.intp) if walk.fit is None else numbers[~walk.fit]

    def _order(self, starts: Positions) -> Order:
        """The order in which fields are expected: that of the first document, or of several if they differ."""
        at = starts.values()
        two = at[[0, len(at) // 2]].tolist()
        names = [order_of(self._octets.content, [start], self._tree) for start in two]
        if names[0] == names[1] and list(names[0]) == list(names[1]):
            return names[0]
        return order_of(self._octets.content, at[:: -(-len(at) // _SEEN)].tolist(), self._tree)

    def _collect(self, rows: Rows | None, count: int, covered: dict[str, list[Part]]) -> None:
        """Keep what was found in these documents, and see what was not."""
        for path, parts in covered.items():
            lacking = _lacking(parts, count)
            if len(lacking) and path in self._defaults:
                parts.append((lacking, build([self._defaults[path]] * len(lacking))))
            elif len(lacking):
                self._miss(lacking if rows is None else rows[lacking], path)
            for found, column in parts:
                self._parts[path].append(
                    (found if rows is None else rows if found is None else rows[found], column)
                )

    def _decode_each(self, rows: Rows) -> None:
        """Decode documents through `bson`."""
        starts = self._starts.values()[rows].tolist()
        lengths = np.broadcast_to(self._lengths, self._starts.total)[rows].tolist()
        content = self._octets.content
        cut = [content[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        documents = bson.decode_all(b"".join(cut))
        for path, parts in self._parts.items():
            identity = path == ID
            values = [_lookup(document, path) for document in documents]
            if path in self._defaults:
                default = self._defaults[path]
                values = [default if value is _MISSING or value is None else value for value in values]
            if _MISSING in values:
                self._miss(rows[[value is _MISSING for value in values]], path)
                continue
            parts.append(
                (rows, build(values if identity else [restore(value) for value in values], identity=identity))
            )

    def _miss(self, rows: Rows, path: str) -> None:
        """Remember the first document that lacks a field, the same one whatever way it was decoded, and all."""
        self.lacking.update(rows.tolist())
        row, order = int(rows[0]), list(self._parts)
        known = self._missing
        if known is None or (row, order.index(path)) < (known[0], order.index(known[1])):
            start = int(self._starts.values()[row])
            (length,) = _INT32.unpack_from(self._octets.content, start)
            document = bson.decode(self._octets.content[start : start + length])
            self._missing = (row, path, document)


def _found(raw: Reply) -> tuple[Positions, int | np.ndarray[Any, Any]]:
    """Where each document starts, and its length: one number where all have the same.

    Raises:
        DataError: The lengths in the documents do not add up.
    """
    if isinstance(raw, Documents):
        base = np.array(raw.starts, np.int64)
        return Positions(len(base), 0, base=base), np.array(raw.ends, np.int64) - base
    if not len(raw):
        return Positions(0, 0), 0
    (length,) = _INT32.unpack_from(raw) if len(raw) > 4 else (0,)
    count, rest = divmod(len(raw), length) if length > 4 else (0, 1)
    if not rest:
        starts = Positions(count, 0, stride=length)
        matrix = Octets(raw).rows(starts, 4)
        if (matrix == matrix[0]).all():
            return starts, length
    base = np.array(starts_of(raw), np.int64)
    return Positions(len(base), 0, base=base), np.diff(base, append=len(raw))


def _lacking(parts: list[Part], count: int) -> Rows:
    """Which of `count` rows are in none of the parts."""
    if any(rows is None for rows, _ in parts):
        return np.empty(0, np.intp)
    found = np.zeros(count, np.bool_)
    for rows, _ in parts:
        found[rows] = True
    return np.flatnonzero(~found)


def _field_missing(path: str, document: dict[str, Any]) -> FieldMissingError:
    document_id = document.get(ID)
    advice = "give every document the field, or leave those without it out of the select."
    parents = path.split(".")[:-1]
    if parents:
        advice += (
            " A path is the names of fields from the outside in, joined by dots; a field whose own name has a dot "
            "is read by a pipeline that gives it another one with $getField."
        )
    for depth in range(1, len(parents) + 1):
        outer = ".".join(parents[:depth])
        if isinstance(_lookup(document, outer), list):
            advice = (
                f"{outer!r} is a list, and a path does not reach into lists. A path is the names of fields from "
                f"the outside in, joined by dots; read {outer!r} and take it apart in a transform, or rewrite the "
                "documents with a pipeline."
            )
    return FieldMissingError(
        f"The document with _id {document_id!r} has no field {path!r}: {advice}",
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
class PathTree:
    """The names of the fields to read, as a tree."""

    path: str | None = None
    below: dict[bytes, PathTree] = field(default_factory=dict)


@lru_cache(maxsize=64)
def path_tree(paths: tuple[str, ...]) -> PathTree:
    """The tree of these dotted paths."""
    root = PathTree()
    for path in paths:
        node = root
        *parents, leaf = path.encode().split(b".")
        for name in parents:
            node = node.below.setdefault(name, PathTree())
        known = node.below.get(leaf)
        node.below[leaf] = PathTree(path=path, below=known.below if known else {})
    return root


Order = dict[bytes, "Order"]
"""The names of fields in the order in which documents have them, each with those below that are read."""


def order_of(content: bytes | memoryview, starts: Sequence[int], tree: PathTree) -> Order:
    """The names of the fields of the documents at `starts`, each behind those that are before it in any of them.

    A document that cannot be walked adds nothing.
    """
    seen: list[list[bytes]] = []
    below: dict[bytes, list[int]] = {}
    for start in starts:
        try:
            fields = _fields(content, start)
        except (struct.error, IndexError, ValueError, KeyError):  # it goes through `bson`
            continue
        seen.append([name for name, _, _ in fields])
        for name, kind, value in fields:
            node = tree.below.get(name)
            if kind == DOCUMENT and node is not None and node.below:
                below.setdefault(name, []).append(value)
    names = _merged(seen)
    return {name: order_of(content, below[name], tree.below[name]) if name in below else {} for name in names}


def _merged(seen: list[list[bytes]]) -> Iterable[bytes]:
    """All names in an order that the first documents have, and each further one that does not contradict them."""
    if all(names == seen[0] for names in seen):
        return dict.fromkeys(seen[0]) if seen else ()
    try:
        return _sorted(seen)
    except CycleError:
        agreeing: list[list[bytes]] = []
        for names in seen:
            with contextlib.suppress(CycleError):
                _sorted([*agreeing, names])
                agreeing.append(names)
        return _sorted(agreeing)


def _sorted(seen: list[list[bytes]]) -> list[bytes]:
    sorter: TopologicalSorter[bytes] = TopologicalSorter()
    for names in seen:
        for name in names[:1]:
            sorter.add(name)
        for before, name in pairwise(names):
            sorter.add(name, before)
    return list(sorter.static_order())


def _fields(content: bytes | memoryview, at: int) -> list[tuple[bytes, int, int]]:
    """The name, the type and the start of the value of each field of a document."""
    end = at + _INT32.unpack_from(content, at)[0] - 1
    at += 4
    found = []
    while at < end:
        kind, name = content[at], _name(content, at + 1)
        value = at + len(name) + 2
        found.append((name, kind, value))
        fixed = FIXED_SIZES.get(kind)
        at = value + (_size(content, kind, value) if fixed is None else fixed)
    return found


def _size(content: bytes | memoryview, kind: int, value: int) -> int:
    """The bytes of a value that begins with its length."""
    (length,) = _INT32.unpack_from(content, value)
    if length < SMALLEST_SIZES[kind]:
        raise ValueError("a value that is shorter than its type can be")
    return EXTRA_SIZES[kind] + int(length)


def _name(content: bytes | memoryview, at: int) -> bytes:
    if isinstance(content, bytes):
        return content[at : content.index(0, at)]
    width = 32
    while b"\0" not in (found := bytes(content[at : at + width])):
        if len(found) < width:
            raise ValueError("a name without an end")
        width *= 8
    return found.split(b"\0", 1)[0]


def _pin(
    content: bytes | memoryview, at: int, tree: PathTree, pinned: Bytes, found: list[tuple[str, int, int]]
) -> None:
    """Mark which bytes of a document say how it is laid out, and find what is to be read in it.

    Args:
        content: The document, or the one around it.
        at: Where it starts.
        tree: What to read.
        pinned: Set to 255 for those bytes.
        found: Gets path, type and start of each value.

    Raises:
        struct.error, IndexError, ValueError, KeyError: It cannot be walked, or `bson` reads it in its own way.
    """
    end = at + _INT32.unpack_from(content, at)[0] - 1
    pinned[at : at + 4] = pinned[end] = 255
    at += 4
    seen: set[bytes] = set()
    for name, kind, value in _fields(content, at - 4):
        if name == _REFERENCE or name in seen:
            raise ValueError(name)
        seen.add(name)
        fixed = FIXED_SIZES.get(kind)
        pinned[at : value if fixed is not None else value + 4] = 255
        at = value + (_size(content, kind, value) if fixed is None else fixed)
        if (node := tree.below.get(name)) is None:
            continue
        if node.path is not None:
            found.append((node.path, kind, value))
        if node.below and kind == DOCUMENT:
            _pin(content, value, node, pinned, found)
    if at != end or content[end]:
        raise ValueError("a document that does not end where it says")


@final
class Walk:
    """Finds the fields of documents.

    Args:
        octets: The bytes.
        at: Where each document starts; one at least.
        ends: Where the last byte of each is.
        tree: What to read.
        order: The names that are expected.

    Attributes:
        numbers: The columns of numbers, with path and rows; read at once, while they are in the cache.
        fields: Everything else that was found, with its path. In documents that are not fit it means nothing.
        fit: Which documents have nothing else; None: all of them.
    """

    def __init__(self, octets: Octets, at: Positions, ends: Positions, tree: PathTree, order: Order) -> None:
        self._octets = octets
        self._unfit: Mask = np.zeros(at.total, np.bool_)
        self.fields: list[tuple[str, Field]] = []
        self.numbers: list[tuple[str, Rows | None, Column]] = []
        self._attempts = _ATTEMPTS
        if at.base is not None or not self._alike(at, tree):
            self._document(at.moved(4), ends, None, tree, order)
        self.fit: Mask | None = ~self._unfit if self._unfit.any() else None

    def _alike(self, at: Positions, tree: PathTree) -> bool:
        """Find the fields of documents that are all laid out as the first one is; whether they are."""
        size, content = at.stride, self._octets.content[at.start : at.start + at.stride]
        pinned = np.zeros(size, np.uint8)
        found: list[tuple[str, int, int]] = []
        try:
            _pin(content, 0, tree, pinned, found)
        except (struct.error, IndexError, ValueError, KeyError):
            return False
        if 4 * np.count_nonzero(pinned) < size:  # fewer comparisons than bytes lie in between
            return False
        if matching(self._octets.rows(at, size), np.frombuffer(content, np.uint8), pinned) is not None:
            return False
        for path, kind, offset in found:
            values = at.moved(offset)
            self._add(path, Field(None, kind, values, self._octets.rows(values, 8)))
        return True

    def _document(self, at: Positions, ends: Positions, rows: Rows | None, tree: PathTree, order: Order) -> None:
        names = [name for name in order if name != _REFERENCE]
        number = 0
        while number < len(names):
            passed, at = self._numbers(at, rows, tree, names[number:])
            number += passed
            if number < len(names):
                at = self._field(at, rows, tree, names[number], order[names[number]])
                number += 1
        self._finished(at, ends, rows)

    def _field(self, at: Positions, rows: Rows | None, tree: PathTree, name: bytes, below: Order) -> Positions:
        """Find the field of a name, where it is the next one; where the one behind it is."""
        head = header(name)
        matrix = self._octets.rows(at, head.width)
        kinds = head.kinds(matrix)
        if isinstance(kinds, int) and not kinds:
            return at
        values = matrix[:, head.size : head.size + 8]
        size, wrong = sizes(kinds, values)
        self._exclude(rows, wrong)
        step = size + head.size
        field = Field(rows, kinds, at.moved(head.size), values)
        if not isinstance(kinds, int) and np.count_nonzero(kinds) < len(kinds):
            step = np.where(kinds, step, 0)
            field = _where(field, kinds != 0)
        if (node := tree.below.get(name)) is not None:
            self._found(node, field, below)
        return at.moved(step)

    def _numbers(
        self, at: Positions, rows: Rows | None, tree: PathTree, names: list[bytes]
    ) -> tuple[int, Positions]:
        """Read several fields at once where the next ones are numbers; how many, and where the one behind is."""
        if not self._attempts or at.base is None or len(names) < _RUN:
            return 0, at
        if not NUMBER_SIZES[self._octets.array.take(self._octets.first(at), mode="clip")]:
            return 0, at
        found = [at.values()]
        for name in names:
            step = NUMBER_SIZES.take(self._octets.array.take(found[-1], mode="clip"))
            if not np.minimum.reduce(step):
                break
            found.append(found[-1] + (step + (len(name) + 2)))
        read = names[: len(found) - 1]
        columns = self._same_names(read, found, rows) if len(read) >= _RUN else None
        if columns is None:
            self._attempts -= 1
            return 0, at
        for name, column in columns:
            if (node := tree.below.get(name)) is not None and node.path is not None:
                self.numbers.append((node.path, rows, column))
        return len(read), Positions(at.total, 0, base=found[-1])

    def _same_names(
        self, names: list[bytes], at: list[Array], rows: Rows | None
    ) -> list[tuple[bytes, Column]] | None:
        """The columns of numbers; None where many documents have other names, or not all are columns."""
        most = max(_TOGETHER // len(at[0]), 1)
        lengths: dict[tuple[int, int], list[int]] = {}
        for number, name in enumerate(names):
            lengths.setdefault((len(name), number // most), []).append(number)
        unfit = np.zeros(len(at[0]), np.bool_)
        columns: list[tuple[bytes, Column]] = []
        for numbers in lengths.values():
            heads = [header(names[number]) for number in numbers]
            base = np.concatenate([at[number] for number in numbers])
            matrix = self._octets.rows(Positions(len(base), 0, base=base), heads[0].width)
            wrong = other_names(heads, matrix)
            if wrong is not None:
                unfit |= wrong
                if np.count_nonzero(unfit) * _RUN > len(unfit):
                    return None
            found = number_columns(matrix[:, 0], matrix[:, heads[0].size : heads[0].size + 8], len(heads))
            if found is None:
                return None
            columns += zip((names[number] for number in numbers), found, strict=True)
        if unfit.any():
            self._exclude(rows, unfit)
        return columns

    def _finished(self, at: Positions, ends: Positions, rows: Rows | None) -> None:
        same = at.same(ends)
        self._exclude(rows, None if same is None else ~same)
        left = self._octets.rows(ends, 1)[:, 0]
        self._exclude(rows, left != 0 if np.count_nonzero(left) else None)

    def _exclude(self, rows: Rows | None, wrong: Mask | None) -> None:
        if wrong is not None:
            self._unfit[wrong if rows is None else rows[wrong]] = True

    def _add(self, path: str, found: Field) -> None:
        column = number_column(found.kinds, found.head)
        if column is None:
            self.fields.append((path, found))
        else:
            self.numbers.append((path, found.rows, column))

    def _found(self, node: PathTree, found: Field, below: Order) -> None:
        if node.path is not None:
            self._add(node.path, found)
        if not node.below:
            return
        if not isinstance(found.kinds, int):
            found = _where(found, found.kinds == DOCUMENT)
        elif found.kinds != DOCUMENT:
            return
        if found.at.total:
            lengths, _ = sizes(DOCUMENT, found.head)
            ends = found.at.moved(lengths - 1)
            self._document(found.at.moved(4), ends, found.rows, node, below)


def _where(found: Field, chosen: Mask) -> Field:
    keep = np.flatnonzero(chosen)
    return found.part(keep, keep if found.rows is None else found.rows[keep])
