"""Rows in the order of the epoch, and batches cut from them.

Always: rows are ordered once a window and then only sliced; a batch is made from whole tensors where every
value of a field is alike, and value by value only where they are not; nothing here knows where rows come
from.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mongotorch.data.columns import Columns
from mongotorch.data.tensors import column_tensor, join, stack
from mongotorch.key import Key


class Rows(abc.ABC):
    """The rows of one window, in order."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """A field of some rows, or None where it has to be stacked value by value."""

    @abc.abstractmethod
    def columns(self, start: int, stop: int) -> Columns:
        """The columns of some rows."""


@final
class ColumnRows(Rows):
    """Rows that are columns of their own: tensors are made once a field and sliced."""

    def __init__(self, columns: Columns, *, owned: bool) -> None:
        self._columns = columns
        self._owned = owned  # else a batch is a copy, because the columns serve again
        self._tensors: dict[str, Tensor | None] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`."""
        if path not in self._tensors:
            self._tensors[path] = column_tensor(self._columns, path)
        whole = self._tensors[path]
        if whole is None:
            return None
        return whole[start:stop] if self._owned else whole[start:stop].clone()

    def columns(self, start: int, stop: int) -> Columns:
        """See `Rows.columns`."""
        return self._columns.slice(start, stop)


@final
class TableRows(Rows):
    """Rows of a table of tensors, by index."""

    def __init__(self, tensors: dict[str, Tensor], indices: npt.NDArray[np.int64]) -> None:
        self._tensors = tensors
        self.indices = torch.from_numpy(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def tensor(self, path: str, start: int, stop: int) -> Tensor | None:
        """See `Rows.tensor`; a copy."""
        return self._tensors[path].index_select(0, self.indices[start:stop])

    def columns(self, start: int, stop: int) -> Columns:
        """Never asked for: a table is made where no samples are built."""
        raise NotImplementedError(f"a table has no columns ({start}:{stop})")


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """A place between two rows of an epoch.

    Attributes:
        window: The window.
        offset: Rows of it that lie before.
        step: Batches (of all shards together: rounds) that lie before.
    """

    window: int = 0
    offset: int = 0
    step: int = 0


Piece = tuple[Rows, int, int]


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
        at = start.offset if window == start.window else 0
        while have + len(rows) - at >= size:
            end = at + size - have
            step += 1
            yield (
                _share([*held, (rows, at, end)], rank * batch_size, (rank + 1) * batch_size),
                Place(window=window, offset=end, step=step),
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


def columns_of(pieces: list[Piece]) -> Columns:
    """The columns of a batch's rows."""
    parts = [rows.columns(start, stop) for rows, start, stop in pieces]
    return parts[0] if len(parts) == 1 else Columns.concat(parts)


def batch_of(pieces: list[Piece], key: Key) -> Any:
    """The batch in the structure of the key, each field a tensor of shape (n, ...).

    Raises:
        ShapeError: Shapes differ; `field` and `document_id` name where.
        DataError: A value has no tensor.
    """
    return key.arrange(_once(lambda path: _field(pieces, path)))


def _once(value: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    known: dict[str, Tensor] = {}
    return lambda path: known[path] if path in known else known.setdefault(path, value(path))


def _field(pieces: list[Piece], path: str) -> Tensor:
    tensors = [rows.tensor(path, start, stop) for rows, start, stop in pieces]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) == len(tensors):
        return join(found, field=path)
    values: list[Any] = []
    ids: list[Any] = []
    for tensor, (rows, start, stop) in zip(tensors, pieces, strict=True):
        columns = rows.columns(start, stop)
        values.extend(columns[path].values() if tensor is None else tensor.unbind())
        ids.extend(columns.ids.values())
    return stack(values, field=path, ids=ids)
