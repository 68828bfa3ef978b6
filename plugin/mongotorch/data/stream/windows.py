"""Windows of rows put together from blocks, here or in a worker process.

Always: a window is a function of its blocks and the order of the epoch, wherever it is put together; a worker
sends tensors through shared memory, not through a pipe.

Which windows are read, in which order, and which of them in one go.

Always: the windows of an epoch are those of its `Order`, wherever reading starts; reading on into the next epoch
changes when they are read, never what they are; no epoch is begun before the one before it is served.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

import numpy as np

from mongotorch.data.decode.decoder import Columns
from mongotorch.data.prefetch import ReadPressure, close_iterator
from mongotorch.data.read.reader import DatabaseAccess
from mongotorch.data.read.source import PlannedSource, Source
from mongotorch.data.stream.order import Order
from mongotorch.data.stream.position import HashMarkers, IdMarkers
from mongotorch.data.stream.rows import NO_ROWS, Rows, gathered, ordered
from mongotorch.errors import MongotorchError


@final
@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """A window to read.

    Attributes:
        order: Of its epoch.
        number: Which window.
        indices: Of its blocks.
        last: Whether it ends its epoch; False as well where that is not known.
        size: What it counts, in blocks, against the bound of two windows for what is read ahead. An epoch counts
            that much at least, so that a small one is not read before the one before it is served.
    """

    order: Order
    number: int
    indices: list[int]
    last: bool
    size: int


@final
@dataclass(frozen=True, kw_only=True)
class WindowRequest:
    """What a worker is sent for in one go.

    Attributes:
        tasks: The windows.
        turn: See `ReadPressure.turn`.
    """

    tasks: list[WindowSpec]
    turn: int


def orders(order: Order, start: int, *, onward: bool) -> Iterator[tuple[Order, int]]:
    """An epoch with the window where it starts, and with `onward` all later ones."""
    yield order, start
    for epoch in itertools.count(order.epoch + 1) if onward else ():
        yield replace(order, epoch=epoch), 0


def tasks_of(source: Source, order: Order, start: int) -> Iterator[WindowSpec]:
    """The windows of an epoch from window `start` on."""
    numbered = enumerate(schedule(source, order, source.count, start), start)
    blocks = 0
    following = next(numbered, None)
    while following is not None:
        (number, indices), following = following, next(numbered, None)
        last = following is None
        size = max(len(indices), 2 * order.window - blocks) if last else len(indices)
        blocks += len(indices)
        yield WindowSpec(order=order, number=number, indices=[int(i) for i in indices], last=last, size=size)


def errands(tasks: Iterator[WindowSpec], most: int, demand: ReadPressure) -> Iterator[WindowRequest]:
    """The windows as what a worker is sent for.

    The last window of an epoch and the first ones of the next are small: they go together, so that they last as
    long as reading what follows. Those of the very first epoch go alone, because somebody waits for them.

    Args:
        tasks: The windows.
        most: The size that windows have together at most.
        demand: For them.
    """
    held: list[WindowSpec] = []
    first: Order | None = None
    turn = demand.turn
    for task in tasks:
        first = first or task.order
        joins = task.order != first and sum(t.size for t in held) + task.size <= most
        if held and not joins:
            yield WindowRequest(tasks=held, turn=turn)
            held = []
        held.append(task)
    if held:
        yield WindowRequest(tasks=held, turn=turn)


def joined(source: Source, order: Order, lead: int) -> int | None:
    """What windows may be joined to, by size, for workers that are so many errands ahead.

    Returns:
        A size; 0 where an errand must be one window, None where even then two epochs would be read ahead.
    """
    if (source.count or 0) >= (lead + 1) * order.window:
        return order.window
    windows = itertools.islice(schedule(source, order, source.count, 0), lead)
    return 0 if sum(1 for _ in windows) == lead else None


def schedule(source: Source, order: Order, count: int | None, start: int) -> Iterator[Any]:
    """The indices of the blocks of each window of an epoch, from window `start` on."""
    if isinstance(source, PlannedSource):
        return order.windows(len(source.plan), start)
    return order.pieces(count, start)


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of some blocks, in the order of an epoch.

    Attributes:
        number: Which window of the epoch.
        rows: Its rows.
        lengths: Pairs of (index of a block, documents that it had).
        last: Whether it ends its epoch, see `WindowSpec`.
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
class WindowReply:
    """What came of an errand.

    Attributes:
        windows: Those that were read, in order.
        error: Why the next one was not; None where all were.
    """

    windows: list[Window]
    error: MongotorchError | None


def put_together(source: Source, task: WindowSpec, blocks: list[Columns], *, samples: bool) -> Window:
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
        rows.marks = HashMarkers(ranks)
    elif source.by_id:
        rows.marks = IdMarkers(parts[0].ids)
    return Window(number=task.number, rows=rows, lengths=lengths, last=task.last, complete=complete)


def assembled(
    source: Source, tasks: Iterator[WindowSpec], blocks: Iterator[Columns], *, samples: bool
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


def brought(errands: Iterator[WindowReply]) -> Iterator[Window]:
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
    demand: ReadPressure | None,
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

    def __init__(
        self, access: DatabaseAccess, source: PlannedSource, most_bytes: int, demand: ReadPressure
    ) -> None:
        self._access = access
        self._plan, self._paths = source.plan, source.paths
        self._most_bytes = most_bytes
        self._demand = demand

    def __call__(self, errand: WindowRequest) -> WindowReply:
        """The windows of an errand; an error waits behind those that were read before it."""
        source, tasks = PlannedSource(self._access.reader, self._plan, self._paths), errand.tasks
        indices = self._demand.wanted((index for task in tasks for index in task.indices), errand.turn)
        blocks = source.ahead(indices, self._most_bytes, self._demand)
        windows: list[Window] = []
        try:
            windows.extend(assembled(source, iter(tasks), blocks, samples=False))
        except MongotorchError as error:
            return WindowReply(windows=windows, error=error)
        return WindowReply(windows=windows, error=None)
