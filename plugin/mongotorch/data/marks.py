"""Which row of a window was the last one yielded, said in a way that rows which come or go cannot shift.

Always: a mark is a short text (under 600 characters) of what a row is, not of how many lie before it. In a
shuffled window rows lie in the order of their hashes, else in the order of their `_id`s, so the place behind a
mark is found even where the marked row itself is gone.
"""

from __future__ import annotations

import abc
import bisect
import struct
from typing import Any, final

import bson
import numpy as np

from mongotorch.data.bsonorder import sort_key
from mongotorch.data.column import Column
from mongotorch.data.order import U64

_LONGEST = 256  # bytes of an `_id` that a state may hold


class Marks(abc.ABC):
    """The marks of the rows of one window, in their order."""

    @abc.abstractmethod
    def before(self, row: int) -> str | None:
        """The mark of the row before this one; None where there is none."""

    @abc.abstractmethod
    def behind(self, mark: str) -> int | None:
        """The first row that was not yielded when this mark was made; None for a mark of another kind."""


@final
class RankMarks(Marks):
    """Rows in the ascending order of their hashes.

    Args:
        ranks: uint64 of shape (rows,), ascending.
    """

    def __init__(self, ranks: U64) -> None:
        self._ranks = ranks

    def before(self, row: int) -> str | None:
        """See `Marks.before`: the hash, and how many rows of that very hash lie before."""
        if row < 1:
            return None
        rank = self._ranks[row - 1]
        return f"{int(rank):016x}:{row - int(np.searchsorted(self._ranks, rank))}"

    def behind(self, mark: str) -> int | None:
        """See `Marks.behind`."""
        rank, colon, equal = mark.partition(":")
        if not colon:
            return None
        value = np.uint64(int(rank, 16))
        first, last = (int(np.searchsorted(self._ranks, value, side)) for side in ("left", "right"))
        return min(first + int(equal), last)


@final
class IdMarks(Marks):
    """Rows in the ascending order of their `_id`s.

    Args:
        ids: The `_id`s.
    """

    def __init__(self, ids: Column) -> None:
        self._ids = ids

    def before(self, row: int) -> str | None:
        """See `Marks.before`: the `_id` as BSON; None also for one that is too long for a state."""
        encoded = bson.encode({"": self._ids[row - 1]}) if row > 0 else b""
        return encoded.hex() if 0 < len(encoded) <= _LONGEST else None

    def behind(self, mark: str) -> int | None:
        """See `Marks.behind`."""
        if ":" in mark:
            return None
        last: Any = sort_key(bson.decode(bytes.fromhex(mark))[""])
        return bisect.bisect_right(self._ids.values(), last, key=sort_key)


def pack_ids(ids: Column) -> bytes:
    """Documents that hold an `_id` and nothing else, as concatenated BSON; numbers that are equal stay equal."""
    width, tag = {"oid": (12, 7), "int64": (8, 0x12), "float64": (8, 1)}.get(
        "oid" if ids.kind == "oid" else ids.dtype if ids.kind == "number" else "", (0, 0)
    )
    if not width or not isinstance(ids.data, np.ndarray):
        return b"".join(bson.encode({"_id": document_id}) for document_id in ids.values())
    frame = struct.pack("<iB", width + 10, tag) + b"_id\0" + bytes(width + 1)
    rows = np.tile(np.frombuffer(frame, np.uint8), (len(ids), 1))
    rows[:, 9 : 9 + width] = np.ascontiguousarray(ids.data).view(np.uint8).reshape(len(ids), width)
    return rows.tobytes()
