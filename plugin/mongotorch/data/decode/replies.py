"""Takes replies of the server apart as bytes: the documents of a `find`, and documents of one length together.

The driver's `find_raw_batches` makes a Python object of each document before it hands over their bytes. Here the
reply stays bytes: its array of documents is cut out, and the array's own headers are removed.

Guarantees: documents come out whole, in order, byte for byte; each is in exactly one group or among the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import bson
import numpy as np
from numpy.typing import NDArray

from mongotorch.errors import DataError

Bytes = NDArray[np.uint8]
Reply = bytes | memoryview  # concatenated BSON documents
Rows = NDArray[np.intp]
Group = tuple[Rows | None, Bytes]  # positions of the rows (None: all, in order) and the rows
FIXED_SIZES = {0x01: 8, 0x06: 0, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16}
FIXED_SIZES |= {0x7F: 0, 0xFF: 0}
"""Bytes of a value, by its type."""
EXTRA_SIZES = {0x02: 4, 0x03: 0, 0x04: 0, 0x05: 5, 0x0C: 16, 0x0D: 4, 0x0E: 4, 0x0F: 0}
"""For types whose values begin with their length (int32): bytes of a value besides that many."""
_INT32 = struct.Struct("<i")
_INT64 = struct.Struct("<q")
_SMALLEST_DOCUMENT = 5


def offsets(raw: Reply) -> Iterator[tuple[int, int]]:
    """Where each document of concatenated BSON starts and ends.

    Raises:
        DataError: A document is longer or shorter than it says.
    """
    length_at, start, size = _INT32.unpack_from, 0, len(raw)
    while start < size:
        try:
            (length,) = length_at(raw, start)
        except struct.error:
            length = 0
        if length < _SMALLEST_DOCUMENT or start + length > size:
            raise DataError("documents that are not valid BSON: one is longer or shorter than it says")
        yield start, start + length
        start += length


def last_id(raw: Reply) -> tuple[Any]:
    """The `_id` of the last document of concatenated BSON, in a tuple because it may be None."""
    start, end = max(offsets(raw))
    return (bson.decode(raw[start:end])["_id"],)


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """The content of a reply to `find`.

    Attributes:
        documents: Concatenated BSON, in memory of its own.
        cursor: The id of the cursor that has more; 0 where there is no more.
    """

    documents: Reply
    cursor: int


def found(reply: bytes | memoryview) -> Found:
    """The content of the reply to a `find` command.

    Raises:
        DataError: It is no such reply.
    """
    try:
        view = memoryview(reply)
        _, start, _ = _element(view, 0, b"cursor")
        _, number, _ = _element(view, start, b"id")
        _, first, stop = _element(view, start, b"firstBatch")
        return Found(documents=documents(view[first:stop]), cursor=int(_INT64.unpack_from(view, number)[0]))
    except (struct.error, IndexError, KeyError) as error:
        raise DataError(f"the server's reply to a find is not understood: {error!r}") from error


def documents(array: memoryview) -> Reply:
    """The documents of a BSON array of documents, one after the other."""
    if len(array) == 5:
        return b""
    alike = _alike(array)
    return alike if alike is not None else b"".join(_each(array))


def _alike(array: memoryview) -> Reply | None:
    """The documents where all are of one length: the headers between them have the width of their number."""
    size = int(_INT32.unpack_from(array, 7)[0])
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


def _each(array: memoryview) -> Iterator[memoryview]:
    at, end, number = 4, len(array) - 1, 0
    while at < end:
        start = at + 2 + len(str(number))  # after the type and the key, which is the number
        at = start + int(_INT32.unpack_from(array, start)[0])
        number += 1
        yield array[start:at]


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


def by_length(content: Reply, smallest: int, most: int) -> tuple[list[Group], tuple[Rows, bytes]]:
    """The documents as groups of one length, and those of rare lengths as they are.

    Args:
        content: Concatenated BSON.
        smallest: Documents of one length that make a group.
        most: The most groups.

    Returns:
        The groups, and (positions, concatenated documents) of the rest.

    Raises:
        DataError: The lengths in the documents do not add up.
    """
    octets = np.frombuffer(content, np.uint8)
    _, length = next(offsets(content), (0, 1))
    if len(content) % length == 0:
        matrix = octets.reshape(-1, length)
        if (matrix[:, :4] == matrix[:1, :4]).all():
            return ([(None, matrix)] if content else []), (np.empty(0, np.intp), b"")
    starts = np.array([start for start, _ in offsets(content)], np.intp)
    lengths = np.diff(starts, append=len(content))
    sizes, counts = np.unique(lengths, return_counts=True)
    common = sizes[np.argsort(-counts, kind="stable")[:most]][: np.count_nonzero(counts >= smallest)]
    groups: list[Group] = []
    for size in common.tolist():
        rows = np.flatnonzero(lengths == size)
        # A window at every byte: indexing it copies whole documents, not single bytes.
        windows: NDArray[Any] = np.ndarray((len(content) - size + 1,), np.dtype((np.void, size)), content, 0, (1,))
        groups.append((rows, windows[starts[rows]].view(np.uint8).reshape(-1, size)))
    rare = np.flatnonzero(~np.isin(lengths, common))
    spans = zip(starts[rare].tolist(), lengths[rare].tolist(), strict=True)
    return groups, (rare, b"".join([content[start : start + size] for start, size in spans]))
