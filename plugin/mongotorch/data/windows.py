"""Windows of rows put together from blocks, here or in a worker process.

Always: a window is a function of its blocks and the order of the epoch, wherever it is put together; a worker
sends tensors through shared memory, not through a pipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np

from mongotorch.data.access import Access
from mongotorch.data.columns import Columns
from mongotorch.data.marks import IdMarks, RankMarks
from mongotorch.data.memory import gathered, ordered
from mongotorch.data.order import Order
from mongotorch.data.rows import NO_ROWS, Rows
from mongotorch.data.source import PlannedSource, Source


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of some blocks, in the order of an epoch.

    Attributes:
        number: Which window of the epoch.
        rows: Its rows.
        lengths: Pairs of (index of a block, documents that it had).
    """

    number: int
    rows: Rows
    lengths: list[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.nbytes


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A window to read.

    Attributes:
        order: Of the epoch.
        number: Which window.
        indices: Of its blocks.
        ahead: Whether blocks are read while others are decoded.
    """

    order: Order
    number: int
    indices: list[int]
    ahead: bool


def put_together(
    source: Source, order: Order, number: int, indices: Iterable[int], blocks: Iterable[Columns], *, samples: bool
) -> Window:
    """The window of these blocks; fewer blocks than indices where the source ends.

    Args:
        source: Where the blocks are from.
        order: Of the epoch.
        number: Which window.
        indices: Of the blocks.
        blocks: The blocks.
        samples: Whether samples are built of the rows, which needs the values and not just tensors.
    """
    pairs = [(int(index), block) for index, block in zip(indices, blocks, strict=False)]
    lengths = [(index, len(block)) for index, block in pairs]
    pairs = [pair for pair in pairs if len(pair[1])]
    parts = [block for _, block in pairs]
    if not parts:
        return Window(number=number, rows=NO_ROWS, lengths=lengths)
    permutation, ranks = None, None
    if order.shuffle:
        permutation, ranks = order.rows(np.concatenate([source.keys(*pair) for pair in pairs]))
    rows = ordered(parts, permutation, owned=True) if samples else gathered(parts, permutation)
    if ranks is not None:
        rows.marks = RankMarks(ranks)
    elif source.by_id:
        rows.marks = IdMarks(parts[0].ids)
    return Window(number=number, rows=rows, lengths=lengths)


@final
class WindowReader:
    """Reads windows in a worker process, through a client of its own.

    Args:
        access: The database.
        source: Whose ranges are read.
        most_bytes: Bytes that may be under way from the server.
    """

    def __init__(self, access: Access, source: PlannedSource, most_bytes: int) -> None:
        self._access = access
        self._plan, self._paths = source.plan, source.paths
        self._most_bytes = most_bytes

    def __call__(self, task: Task) -> Window:
        """The window of a task."""
        source = PlannedSource(self._access.reader, self._plan, self._paths)
        indices = task.indices
        blocks = source.ahead(indices, self._most_bytes) if task.ahead else source.blocks(indices)
        return put_together(source, task.order, task.number, indices, list(blocks), samples=False)
