"""Places in an epoch, and the rows of each batch between two of them.

Always: a place is a few numbers and a mark; the batches of a shard are a function of the rows and of where it
starts; all shards take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

from mongotorch.data.marks import Marks
from mongotorch.data.rows import Piece, Rows


@final
@dataclass(frozen=True, kw_only=True)
class Place:
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
    marks: Marks | None = field(default=None, repr=False, compare=False)

    def state(self) -> dict[str, Any]:
        """The place as numbers and a text; the mark is made here, because few places are ever kept."""
        after = self.after if self.marks is None else self.marks.before(self.offset)
        return {"window": self.window, "offset": self.offset, "step": self.step, "after": after}

    def row(self, rows: Rows) -> int:
        """The first row behind the place in what is now in its window."""
        found = None if rows.marks is None or self.after is None else rows.marks.behind(self.after)
        return self.offset if found is None else found


@final
@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stream is: in which epoch, and how far."""

    epoch: int = 0
    place: Place = field(default_factory=Place)


def cut(
    windows: Iterator[tuple[int, Rows]],
    start: Place,
    *,
    batch_size: int,
    drop_last: bool,
    shard: tuple[int, int],
) -> Iterator[tuple[list[Piece], Place]]:
    """The pieces of one batch after the other, for one shard, each with the place behind it.

    `world` batches make a round, one for each rank; a round that the rows do not fill is dealt out evenly, so
    that all ranks take the same number of steps. Up to `world - 1` rows of an epoch are left over that way.

    Args:
        windows: The rows from `start.window` on.
        start: Where to start.
        batch_size: Rows of a batch.
        drop_last: Leave out a last round that is not full.
        shard: (rank, world).
    """
    rank, world = shard
    size = batch_size * world
    held: list[Piece] = []
    have, step = 0, start.step
    for window, rows in windows:
        at = start.row(rows) if window == start.window else 0
        while have + len(rows) - at >= size:
            end = at + size - have
            step += 1
            yield (
                _share([*held, (rows, at, end)], rank * batch_size, (rank + 1) * batch_size),
                Place(window=window, offset=end, step=step, marks=rows.marks),
            )
            held, have, at = [], 0, end
        if at < len(rows):
            held.append((rows, at, len(rows)))
            have += len(rows) - at
    each = have // world
    if each and not drop_last:
        yield _share(held, rank * each, (rank + 1) * each), Place(window=-1, offset=0, step=step + 1)


def _share(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """Rows `start` to `stop` of the pieces taken together."""
    chosen: list[Piece] = []
    seen = 0
    for rows, first, last in pieces:
        low, high = max(start - seen, 0), min(stop - seen, last - first)
        if low < high:
            chosen.append((rows, first + low, first + high))
        seen += last - first
    return chosen
