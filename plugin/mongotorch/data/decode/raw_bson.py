"""Takes BSON apart as bytes: a reply into its documents, and the same field of many documents at a time.

The driver's `find_raw_batches` makes a Python object of each document before it hands over their bytes. Here the
reply stays bytes. Documents of one length are put one behind the other, without the headers that their array has
between them; others stay where they are in the reply, and where that is is found once.

A field is read at a position in each document. Documents of one layout keep one distance: positions are then a
start and a stride, and reading copies nothing.

Guarantees: documents come out whole, in order, byte for byte; only bytes of the buffer are read, whatever the
documents say of their lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, final

import bson
import numpy as np
from numpy.typing import NDArray

from mongotorch.errors import DataError

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]
FIXED_SIZES = {0x01: 8, 0x06: 0, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16}
FIXED_SIZES |= {0x7F: 0, 0xFF: 0}
"""Bytes of a value, by its type."""
EXTRA_SIZES = {0x02: 4, 0x03: 0, 0x04: 0, 0x05: 5, 0x0C: 16, 0x0D: 4, 0x0E: 4, 0x0F: 0}
"""For types whose values begin with their length (int32): bytes of a value besides that many."""
SMALLEST_SIZES = {0x02: 1, 0x03: 5, 0x04: 5, 0x05: 0, 0x0C: 1, 0x0D: 1, 0x0E: 1, 0x0F: 14}
"""The least that these lengths can be."""
_VARIABLE, _UNKNOWN = -1, -2  # types whose values begin with their length, and types that cannot be walked over
_SIZES = np.full(256, _UNKNOWN, np.int64)
_SIZES[0] = 0
_SIZES[list(FIXED_SIZES)] = list(FIXED_SIZES.values())
_SIZES[list(EXTRA_SIZES)] = _VARIABLE
_SIZE_LIST: list[int] = _SIZES.tolist()
_SIZE_TABLE = _SIZES.astype(np.int8).tobytes()
_EXTRA, _SMALLEST = np.zeros(256, np.int64), np.zeros(256, np.int64)
_EXTRA[list(EXTRA_SIZES)] = list(EXTRA_SIZES.values())
_SMALLEST[list(SMALLEST_SIZES)] = list(SMALLEST_SIZES.values())
_INT32 = struct.Struct("<i")
_INT64 = struct.Struct("<q")
_SMALLEST_DOCUMENT = 5


@final
class Documents:
    """BSON documents in a buffer that has other bytes between them; what is cut out of it are bytes of the buffer.

    Args:
        content: The buffer.
        starts: Where each document starts; one at least.
        ends: Where each ends.
    """

    def __init__(self, content: bytes | memoryview, starts: list[int], ends: list[int]) -> None:
        self.content, self.starts, self.ends = content, starts, ends

    def __len__(self) -> int:
        """Bytes of all documents."""
        return sum(self.ends) - sum(self.starts)

    def __getitem__(self, part: slice) -> bytes | memoryview:
        return self.content[part]

    def __bytes__(self) -> bytes:
        """The documents, one after the other."""
        view = memoryview(self.content)
        return b"".join([view[start:end] for start, end in offsets(self)])


Reply = bytes | memoryview | Documents
"""BSON documents: one after the other, or where a reply of the server has them."""


def together(replies: Sequence[Reply]) -> Reply:
    """The documents of several replies; those of a single one as they are."""
    if len(replies) == 1:
        return replies[0]
    return b"".join([bytes(one) if isinstance(one, Documents) else one for one in replies])


def starts_of(raw: Reply) -> list[int]:
    """Where each document starts.

    Raises:
        DataError: A document is longer or shorter than it says.
    """
    if isinstance(raw, Documents):
        return raw.starts
    length_at, start, size = _INT32.unpack_from, 0, len(raw)
    starts = []
    try:
        while start < size:
            starts.append(start)
            (length,) = length_at(raw, start)
            if length < _SMALLEST_DOCUMENT:
                break
            start += length
    except struct.error:
        pass
    if start != size:
        raise _wrong_lengths()
    return starts


def _wrong_lengths() -> DataError:
    return DataError("documents that are not valid BSON: one is longer or shorter than it says")


def offsets(raw: Reply) -> Iterator[tuple[int, int]]:
    """Where each document starts and ends. Raises: see `starts_of`."""
    if isinstance(raw, Documents):
        return zip(raw.starts, raw.ends, strict=True)
    return pairwise([*starts_of(raw), len(raw)])


def last_id(raw: Reply) -> tuple[Any]:
    """The `_id` of the last document, in a tuple because it may be None."""
    end = raw.ends[-1] if isinstance(raw, Documents) else len(raw)
    return (bson.decode(raw[starts_of(raw)[-1] : end])["_id"],)


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """The content of a reply to `find`.

    Attributes:
        documents: Its documents: one after the other in memory of their own, or in that of the reply.
        cursor: The id of the cursor that has more; 0 where there is no more.
    """

    documents: Reply
    cursor: int


def found(reply: bytes | memoryview) -> Found:
    """The content of the reply to a `find` command.

    Raises:
        DataError: It is no such reply, or a document is longer or shorter than it says.
    """
    try:
        view = memoryview(reply)
        _, start, _ = _element(view, 0, b"cursor")
        _, number, _ = _element(view, start, b"id")
        _, first, stop = _element(view, start, b"firstBatch")
        return Found(documents=documents(reply, first, stop), cursor=int(_INT64.unpack_from(view, number)[0]))
    except (struct.error, IndexError, KeyError) as error:
        raise DataError(f"the server's reply to a find is not understood: {error!r}") from error


def documents(reply: bytes | memoryview, start: int, stop: int) -> Reply:
    """The documents of the BSON array of documents that a reply has there. Raises: see `found`."""
    if stop - start == 5:
        return b""
    alike = _alike(memoryview(reply)[start:stop])
    return alike if alike is not None else _each(reply, start, stop)


def _alike(array: memoryview) -> Reply | None:
    """The documents where all are of one length: the headers between them have the width of their number."""
    size = int(_INT32.unpack_from(array, 7)[0])
    if size < _SMALLEST_DOCUMENT:
        return None
    octets = np.frombuffer(array, np.uint8)
    parts = []
    at, digits, end = 4, 1, len(array) - 1
    while at < end:
        head = 2 + digits
        count, rest = divmod(end - at, head + size)
        most = 10**digits - 10 ** (digits - 1) + (digits == 1)
        if count < most and rest:
            return None
        count = min(count, most)
        rows = octets[at : at + count * (head + size)].reshape(count, head + size)
        lengths = rows[:, head : head + 4]
        if (rows[:, 0] != 0x03).any() or rows[:, head - 1].any() or (lengths != lengths[0]).any():
            return None
        if int(_INT32.unpack_from(array, at + head)[0]) != size:
            return None
        parts.append(rows[:, head:])
        at, digits = at + count * (head + size), digits + 1
    whole = np.empty((sum(map(len, parts)), size), np.uint8)
    np.concatenate(parts, out=whole)
    return whole.reshape(-1).data


def _each(reply: bytes | memoryview, start: int, stop: int) -> Documents:
    length_at, end = _INT32.unpack_from, stop - 1
    starts: list[int] = []
    ends: list[int] = []
    at, number, digits = start + 4, 0, 1
    while at < end:
        head = 2 + digits  # the type and the key, which is the number
        for _ in range(10**digits - number):
            first = at + head
            (length,) = length_at(reply, first)
            at = first + length
            if length < _SMALLEST_DOCUMENT or at > end:
                raise _wrong_lengths()
            starts.append(first)
            ends.append(at)
            if at == end:
                break
        number, digits = 10**digits, digits + 1
    return Documents(reply, starts, ends)


def _element(view: memoryview, at: int, field: bytes) -> tuple[int, int, int]:
    """Type, start and end of the value of a field of the document that starts at `at`."""
    end = at + int(_INT32.unpack_from(view, at)[0]) - 1
    at += 4
    while at < end:
        kind, name = view[at], _name(view, at + 1)
        start = at + len(name) + 2
        size = FIXED_SIZES.get(kind)
        if size is None:
            size = EXTRA_SIZES[kind] + int(_INT32.unpack_from(view, start)[0])
        stop = start + size
        if stop < start:
            raise IndexError(f"{name.decode(errors='replace')} has {size} bytes")
        if name == field:
            return kind, start, stop
        at = stop
    raise KeyError(field.decode())


def _name(view: memoryview, at: int) -> bytes:
    # A field name of a reply is short: looked for in a copy of its neighbourhood, not of megabytes.
    return bytes(view[at : at + 64]).split(b"\0", 1)[0]


def find_command(collection: Any, where: Any, projection: Any, batch_size: int, **options: Any) -> dict[str, Any]:
    """The command of a `find` by `_id`, with the read concern of the collection."""
    concern = collection.read_concern.document
    return {
        "find": collection.name,
        "filter": where,
        "projection": dict(projection),
        "sort": {"_id": 1},
        "batchSize": batch_size,
        **({"readConcern": concern} if concern else {}),
        **options,
    }


@final
class Positions(NamedTuple):
    """A position in each of `total` documents: `start` plus `base`, or plus a multiple of `stride`."""

    total: int
    start: int
    stride: int = 0
    base: Array | None = None

    def values(self) -> Array:
        """All of them, int64 of shape (total,)."""
        if self.base is not None:
            return self.base + self.start
        return np.arange(self.total, dtype=np.int64) * self.stride + self.start

    def moved(self, by: int | Array) -> Positions:
        """Each moved on, by one number or by one a document."""
        if not isinstance(by, np.ndarray):
            return Positions(self.total, self.start + by, stride=self.stride, base=self.base)
        if self.base is not None:
            return Positions(self.total, self.start, base=self.base + by)
        return Positions(self.total, 0, base=self.values() + by)

    def select(self, rows: Array) -> Positions:
        """Those of some documents, by number or by a mask."""
        base = self.values()[rows]
        return Positions(len(base), 0, base=base)

    def same(self, others: Positions) -> Mask | None:
        """Where both are equal; None: everywhere."""
        if self.base is None and others.base is None and self.stride == others.stride:
            return None if self.start == others.start else np.zeros(self.total, np.bool_)
        equal: Mask = self.values() == others.values()
        return None if np.count_nonzero(equal) == len(equal) else equal


@lru_cache(maxsize=256)
def _item(size: int) -> np.dtype[Any]:
    return np.dtype((np.void, size))


@final
class Octets:
    """The bytes of documents, read at many positions at once.

    Attributes:
        content: The bytes.
        array: The same, uint8 of shape (size,).
        size: How many they are.
    """

    def __init__(self, content: bytes | memoryview) -> None:
        self.content, self.size = content, len(content)
        self.array: Bytes = np.frombuffer(content, np.uint8)

    def rows(self, at: Positions, size: int) -> Bytes:
        """`size` bytes from each position on, (total, size): a view where positions have a stride.

        Outside of the buffer are zeros: a damaged document may say of a field that it begins there.
        """
        if at.base is None:
            if at.start + (at.total - 1) * at.stride + size <= self.size:
                return np.ndarray((at.total, size), np.uint8, self.content, at.start, (at.stride, 1))
        elif (reach := self.size - size - at.start + 1) > 0:
            items: Array = np.ndarray((reach,), _item(size), self.content, at.start, (1,))
            try:
                return items[at.base].view(np.uint8).reshape(at.total, size)
            except IndexError:
                pass
        return self._padded(at.values(), size)

    def _padded(self, at: Array, size: int) -> Bytes:
        last = self.size - size
        if last < 0:
            matrix = np.zeros((len(at), size), np.uint8)
        else:
            matrix = self.rows(Positions(len(at), 0, base=np.clip(at, 0, last)), size)
        for row in np.flatnonzero((at < 0) | (at > last)).tolist():
            rest = self.content[at[row] : at[row] + size] if at[row] >= 0 else b""
            matrix[row, : len(rest)] = np.frombuffer(rest, np.uint8)
            matrix[row, len(rest) :] = 0
        return matrix

    def first(self, at: Positions) -> int:
        """The first of these positions."""
        return int(at.start if at.base is None else at.base[0] + at.start)


class Header:
    """What a field begins with: its type, of any value, and its name.

    Args:
        name: Of the field, or the number of an element of a list.

    Attributes:
        size: Bytes of it.
        width: Bytes to read for the header and the first eight of the value.
        words: It as numbers of eight bytes, the type 0, and the bits of them that count.
    """

    def __init__(self, name: bytes) -> None:
        self.name, self.size = name, len(name) + 2
        words = -(-self.size // 8)
        self.width = max(8 * words, self.size + 8)
        padded = b"\0" + name + bytes(8 * words - self.size + 1)
        masks = b"\xff" * self.size + bytes(8 * words - self.size)
        self.words = tuple(zip(np.frombuffer(padded, "<u8"), np.frombuffer(masks, "<u8"), strict=True))

    def kinds(self, matrix: Bytes) -> int | Bytes:
        """The type in each row of an (n, width) matrix: one number where all are alike, else an array.

        It is 0 where the name is another.
        """
        (want, mask), *more = self.words
        found = word(matrix, 0) & mask
        first = int(found[0])
        kinds: int | Bytes = first ^ int(want)
        if np.count_nonzero(found == first) < len(found):
            found ^= want
            if np.maximum.reduce(found) > 255:
                found[found > 255] = 0
            kinds = found.astype(np.uint8)
        elif kinds > 255:
            return 0
        for n, (want, mask) in enumerate(more, 1):
            other = (word(matrix, 8 * n) & mask) != want
            if np.count_nonzero(other):
                kinds = np.where(other, np.uint8(0), np.uint8(kinds) if isinstance(kinds, int) else kinds)
        return kinds


def other_names(heads: Sequence[Header], matrix: Bytes) -> Mask | None:
    """Which of n documents have another name than expected in any of several fields; None: none of them.

    Args:
        heads: Of the fields, whose names have one length.
        matrix: What is there, (fields x n, width), the fields one after the other.
    """
    wrong = np.zeros((len(heads), len(matrix) // len(heads)), np.bool_)
    for number, words in enumerate(zip(*(head.words for head in heads), strict=True)):
        want, mask = (np.array(part, np.uint64)[:, None] for part in zip(*words, strict=True))
        if not number:
            mask &= ~np.uint64(0xFF)  # the type
        wrong |= ((word(matrix, 8 * number).reshape(wrong.shape) ^ want) & mask) != 0
    return np.logical_or.reduce(wrong, axis=0) if np.count_nonzero(wrong) else None


def word(matrix: Bytes, offset: int, dtype: str = "<u8", size: int = 8) -> Array:
    """The number of `size` bytes at an offset in each row of a matrix; a view, of shape (n,)."""
    return matrix[:, offset : offset + size].view(dtype)[:, 0]


def sizes(kinds: int | Bytes, values: Bytes) -> tuple[int | Array, Mask | None]:
    """How many bytes the values take, and where that cannot be said (None: nowhere).

    Args:
        kinds: Their types, see `Header.kinds`.
        values: The first eight bytes of each.
    """
    found: Array
    if isinstance(kinds, int):
        fixed = _SIZE_LIST[kinds]
        if fixed >= 0:
            return fixed, None
        lengths = word(values, 0, "<i4", 4)
        first = int(lengths[0])
        if fixed == _VARIABLE and first >= _SMALLEST[kinds] and np.count_nonzero(lengths == first) == len(lengths):
            return first + int(_EXTRA[kinds]), None
        found = np.full(len(values), fixed)
    else:
        found = np.frombuffer(kinds.tobytes().translate(_SIZE_TABLE), np.int8)  # three times as fast as `take`
    if np.minimum.reduce(found) >= 0:
        return found, None
    lengths = word(values, 0, "<i4", 4).astype(np.int64)
    wrong = (found == _UNKNOWN) | ((found == _VARIABLE) & (lengths < _SMALLEST[kinds]))
    found = np.where(found == _VARIABLE, lengths + _EXTRA[kinds], found)
    if not np.count_nonzero(wrong):
        return found, None
    found[wrong] = 0
    return found, wrong


@final
class Field(NamedTuple):
    """The values of one field in some of the documents.

    Attributes:
        rows: In which documents; None: in all.
        kinds: Their BSON types, one number where all are alike.
        at: Where they are.
        head: The first eight bytes of each, (n, 8).
    """

    rows: Rows | None
    kinds: int | Bytes
    at: Positions
    head: Bytes

    def only(self, fit: Mask) -> Field:
        """The values in documents that are fit, numbered among these; `fit` is of all documents."""
        keep, rows = kept(self.rows, fit)
        return self.part(keep, rows)

    def without(self, kind: int) -> Field:
        """The values that are not of one type."""
        rest = np.flatnonzero(np.broadcast_to(self.kinds, self.at.total) != kind)
        if len(rest) == self.at.total:
            return self
        return self.part(rest, rest if self.rows is None else self.rows[rest])

    def part(self, keep: Array, rows: Rows | None) -> Field:
        """Some of the values, in documents of these numbers."""
        kinds = self.kinds if isinstance(self.kinds, int) else self.kinds[keep]
        return Field(rows, kinds, self.at.select(keep), self.head[keep])


def kept(rows: Rows | None, fit: Mask) -> tuple[Mask, Rows | None]:
    """Which of these documents are fit, and their numbers among those that are."""
    if rows is None:
        return fit, None
    keep = fit[rows]
    return keep, (np.cumsum(fit) - 1)[rows[keep]]


@lru_cache(maxsize=4096)
def header(name: bytes) -> Header:
    """The header of this name."""
    return Header(name)
