"""Where a stream is, as a few numbers and a row marker that rows which come or go cannot shift.

A row marker is a short text (under 600 characters) that says which row of a window was yielded last, not how many
lie before it. In a shuffled window rows lie in the order of their hashes, else in the order of their `_id`s, so
the first row behind a marker is found even where the marked row itself is gone.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

import bson
import numpy as np

from mongotorch.data.decode import U64, Column, sort_key

_LONGEST = 256  # bytes of an `_id` that a state may hold


class RowMarkers(abc.ABC):
    """The markers of the rows of one window, in their order."""

    @abc.abstractmethod
    def before(self, row: int) -> str | None:
        """The marker of the row before this one; None where there is none."""

    @abc.abstractmethod
    def behind(self, marker: str) -> int | None:
        """The first row that was not yielded when this marker was made; None for a marker of another kind."""


@final
class HashMarkers(RowMarkers):
    """Markers of rows in the ascending order of their hashes.

    Args:
        hashes: uint64 of shape (rows,), ascending.
    """

    def __init__(self, hashes: U64) -> None:
        self._hashes = hashes

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the hash, and how many rows of that very hash lie before."""
        if row < 1:
            return None
        value = self._hashes[row - 1]
        return f"{int(value):016x}:{row - int(np.searchsorted(self._hashes, value))}"

    def behind(self, marker: str) -> int | None:
        """See `RowMarkers.behind`."""
        digits, colon, equal = marker.partition(":")
        if not colon:
            return None
        value = np.uint64(int(digits, 16))
        first, last = (int(np.searchsorted(self._hashes, value, side)) for side in ("left", "right"))
        return min(first + int(equal), last)


@final
class IdMarkers(RowMarkers):
    """Markers of rows in the ascending order of their `_id`s.

    Args:
        ids: The `_id`s.
    """

    def __init__(self, ids: Column) -> None:
        self._ids = ids

    def before(self, row: int) -> str | None:
        """See `RowMarkers.before`: the `_id` as BSON; None also for one that is too long for a state."""
        encoded = bson.encode({"": self._ids[row - 1]}) if row > 0 else b""
        return encoded.hex() if 0 < len(encoded) <= _LONGEST else None

    def behind(self, marker: str) -> int | None:
        """See `RowMarkers.behind`."""
        if ":" in marker:
            return None
        last: Any = sort_key(bson.decode(bytes.fromhex(marker))[""])
        return bisect.bisect_right(self._ids.values(), last, key=sort_key)


@final
@dataclass(frozen=True, kw_only=True)
class Position:
    """A position between two rows of an epoch.

    Attributes:
        epoch: The epoch.
        window: The window.
        offset: Rows of the window that lie before.
        step: Batches (of all shards together: rounds) that lie before.
        after: The marker of the last row before; it counts where it is there, `offset` where it is not.
        markers: Those of the window, to make `after` of.
    """

    epoch: int = 0
    window: int = 0
    offset: int = 0
    step: int = 0
    after: str | None = None
    markers: RowMarkers | None = field(default=None, repr=False, compare=False)

    def state(self) -> dict[str, Any]:
        """The position as numbers and a text; the marker is made here, because few positions are ever kept."""
        after = self.after if self.markers is None else self.markers.before(self.offset)
        numbers = {name: getattr(self, name) for name in ("epoch", "window", "offset", "step")}
        return {**numbers, "after": after}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The position that `state` gave; what else is in the state is left out."""
        return cls(**{name: state[name] for name in ("epoch", "window", "offset", "step", "after")})

    def row(self, markers: RowMarkers | None) -> int:
        """The first row behind the position in what is now in its window, which has these markers."""
        found = None if markers is None or self.after is None else markers.behind(self.after)
        return self.offset if found is None else found
