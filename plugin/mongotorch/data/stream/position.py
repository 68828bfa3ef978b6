"""Places in an epoch, and the rows of each batch between two of them.

Always: a place is a few numbers and a mark; the batches of a shard are a function of the rows and of where it
starts; all shards take the same number of steps.

Which row of a window was the last one yielded, said in a way that rows which come or go cannot shift.

Always: a mark is a short text (under 600 characters) of what a row is, not of how many lie before it. In a
shuffled window rows lie in the order of their hashes, else in the order of their `_id`s, so the place behind a
mark is found even where the marked row itself is gone.
"""

from __future__ import annotations

import abc
import bisect
from dataclasses import dataclass, field
from typing import Any, final

import bson
import numpy as np

from mongotorch.data.decode.column import Column
from mongotorch.data.decode.ids import U64, sort_key

_LONGEST = 256  # bytes of an `_id` that a state may hold


class RowMarkers(abc.ABC):
    """The marks of the rows of one window, in their order."""

    @abc.abstractmethod
    def before(self, row: int) -> str | None:
        """The mark of the row before this one; None where there is none."""

    @abc.abstractmethod
    def behind(self, mark: str) -> int | None:
        """The first row that was not yielded when this mark was made; None for a mark of another kind."""


@final
class HashMarkers(RowMarkers):
    """Rows in the ascending order of their hashes.

    Args:
        ranks: uint64 of shape (rows,), ascending.
    """

    def __init__(self, ranks: U64) -> None:
        self._ranks = ranks

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the hash, and how many rows of that very hash lie before."""
        if row < 1:
            return None
        rank = self._ranks[row - 1]
        return f"{int(rank):016x}:{row - int(np.searchsorted(self._ranks, rank))}"

    def behind(self, mark: str) -> int | None:
        """See `RowMarkers.behind`."""
        rank, colon, equal = mark.partition(":")
        if not colon:
            return None
        value = np.uint64(int(rank, 16))
        first, last = (int(np.searchsorted(self._ranks, value, side)) for side in ("left", "right"))
        return min(first + int(equal), last)


@final
class IdMarkers(RowMarkers):
    """Rows in the ascending order of their `_id`s.

    Args:
        ids: The `_id`s.
    """

    def __init__(self, ids: Column) -> None:
        self._ids = ids

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the `_id` as BSON; None also for one that is too long for a state."""
        encoded = bson.encode({"": self._ids[row - 1]}) if row > 0 else b""
        return encoded.hex() if 0 < len(encoded) <= _LONGEST else None

    def behind(self, mark: str) -> int | None:
        """See `RowMarkers.behind`."""
        if ":" in mark:
            return None
        last: Any = sort_key(bson.decode(bytes.fromhex(mark))[""])
        return bisect.bisect_right(self._ids.values(), last, key=sort_key)


@final
@dataclass(frozen=True, kw_only=True)
class EpochOffset:
    """A place between two rows of an epoch.

    Attributes:
        window: The window.
        offset: Rows of it that lie before.
        step: Batches (of all shards together: rounds) that lie before.
        after: The mark of the last row before; it counts where it is there, `offset` where it is not.
        marks: Those of the window, to make `after` of.
    """

    window: int = 0
    offset: int = 0
    step: int = 0
    after: str | None = None
    marks: RowMarkers | None = field(default=None, repr=False, compare=False)

    def state(self) -> dict[str, Any]:
        """The place as numbers and a text; the mark is made here, because few places are ever kept."""
        after = self.after if self.marks is None else self.marks.before(self.offset)
        return {"window": self.window, "offset": self.offset, "step": self.step, "after": after}

    def row(self, marks: RowMarkers | None) -> int:
        """The first row behind the place in what is now in its window, which has these marks."""
        found = None if marks is None or self.after is None else marks.behind(self.after)
        return self.offset if found is None else found


@final
@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stream is: in which epoch, and how far."""

    epoch: int = 0
    place: EpochOffset = field(default_factory=EpochOffset)
