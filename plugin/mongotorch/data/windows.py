"""Windows of rows put together from blocks, here or in a worker process.

Always: a window is a function of its blocks and the order of the epoch, wherever it is put together; a worker
sends tensors through shared memory, not through a pipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import final

import numpy as np

from mongotorch.data.access import Access
from mongotorch.data.columns import Columns
from mongotorch.data.demand import Demand
from mongotorch.data.marks import IdMarks, RankMarks
from mongotorch.data.memory import gathered, ordered
from mongotorch.data.order import Order
from mongotorch.data.prefetch import close_iterator
from mongotorch.data.rows import NO_ROWS, Rows
from mongotorch.data.source import PlannedSource, Source
from mongotorch.data.tasks import Errand, Task, tasks_of
from mongotorch.errors import MongotorchError


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of some blocks, in the order of an epoch.

    Attributes:
        number: Which window of the epoch.
        rows: Its rows.
        lengths: Pairs of (index of a block, documents that it had).
        last: Whether it ends its epoch, see `Task`.
        complete: Whether no block was missing, because the source ends.
    """

    number: int
    rows: Rows
    lengths: list[tuple[int, int]]
    last: bool
    complete: bool

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.nbytes


@final
@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came of an errand.

    Attributes:
        windows: Those that were read, in order.
        error: Why the next one was not; None where all were.
    """

    windows: list[Window]
    error: MongotorchError | None


def put_together(source: Source, task: Task, blocks: list[Columns], *, samples: bool) -> Window:
    """The window of these blocks; fewer blocks than indices where the source ends.

    Args:
        source: Where the blocks are from.
        task: Which window.
        blocks: The blocks.
        samples: Whether samples are built of the rows, which needs the values and not just tensors.
    """
    order = task.order
    pairs = list(zip(task.indices, blocks, strict=False))
    lengths = [(index, len(block)) for index, block in pairs]
    complete = len(lengths) == len(task.indices)
    pairs = [pair for pair in pairs if len(pair[1])]
    parts = [block for _, block in pairs]
    if not parts:
        return Window(number=task.number, rows=NO_ROWS, lengths=lengths, last=task.last, complete=complete)
    permutation, ranks = None, None
    if order.shuffle:
        permutation, ranks = order.rows(np.concatenate([source.keys(*pair) for pair in pairs]))
    rows = ordered(parts, permutation, owned=True) if samples else gathered(parts, permutation)
    if ranks is not None:
        rows.marks = RankMarks(ranks)
    elif source.by_id:
        rows.marks = IdMarks(parts[0].ids)
    return Window(number=task.number, rows=rows, lengths=lengths, last=task.last, complete=complete)


def assembled(
    source: Source, tasks: Iterator[Task], blocks: Iterator[Columns], *, samples: bool
) -> Iterator[Window]:
    """The windows of these tasks, put together from the blocks that follow one another."""
    try:
        for task in tasks:
            # Nothing is named here: a name would keep the blocks, and the window, while the next one is read.
            window = [put_together(source, task, list(islice(blocks, len(task.indices))), samples=samples)]
            complete = window[0].complete
            yield window.pop()
            if not complete:
                return
    finally:
        close_iterator(blocks)


def brought(errands: Iterator[Brought]) -> Iterator[Window]:
    """The windows that workers bring, and their errors where those belong."""
    try:
        for one in errands:
            while one.windows:
                yield one.windows.pop(0)
            if one.error is not None:
                raise one.error
    finally:
        close_iterator(errands)


def read_epochs(
    source: Source,
    epochs: Iterable[tuple[Order, int]],
    demand: Demand | None,
    *,
    most_bytes: int,
    samples: bool,
) -> Iterator[Window]:
    """The windows of epochs one after the other, read in this process.

    Blocks are read ahead inside an epoch only: those of a small one may be all that is read ahead. Nothing here
    may refer to who takes the windows: a thread works on it.

    Args:
        source: What is read.
        epochs: Each with the window where it starts, see `orders`.
        demand: How hard to read blocks ahead, and until when; None reads them when they are asked for.
        most_bytes: Bytes that may be under way from the server.
        samples: Whether samples are built of the rows.
    """
    turn = 0 if demand is None else demand.turn
    for epoch in epochs:
        indices = (index for task in tasks_of(source, *epoch) for index in task.indices)
        if demand is None:
            blocks = source.blocks(indices)
        else:
            blocks = source.ahead(demand.wanted(indices, turn), most_bytes, demand)
        yield from assembled(source, tasks_of(source, *epoch), blocks, samples=samples)


@final
class WindowReader:
    """Reads windows in a worker process, through a client of its own.

    Args:
        access: The database.
        source: Whose ranges are read.
        most_bytes: Bytes that may be under way from the server.
        demand: How hard to read ahead, and until when.
    """

    def __init__(self, access: Access, source: PlannedSource, most_bytes: int, demand: Demand) -> None:
        self._access = access
        self._plan, self._paths = source.plan, source.paths
        self._most_bytes = most_bytes
        self._demand = demand

    def __call__(self, errand: Errand) -> Brought:
        """The windows of an errand; an error waits behind those that were read before it."""
        source, tasks = PlannedSource(self._access.reader, self._plan, self._paths), errand.tasks
        indices = self._demand.wanted((index for task in tasks for index in task.indices), errand.turn)
        blocks = source.ahead(indices, self._most_bytes, self._demand)
        windows: list[Window] = []
        try:
            windows.extend(assembled(source, iter(tasks), blocks, samples=False))
        except MongotorchError as error:
            return Brought(windows=windows, error=error)
        return Brought(windows=windows, error=None)
