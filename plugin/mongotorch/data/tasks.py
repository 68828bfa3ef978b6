"""Which windows are read, in which order, and which of them in one go.

Always: the windows of an epoch are those of its `Order`, wherever reading starts; reading on into the next epoch
changes when they are read, never what they are; no epoch is begun before the one before it is served.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

from mongotorch.data.demand import Demand
from mongotorch.data.order import Order
from mongotorch.data.source import PlannedSource, Source


@final
@dataclass(frozen=True, kw_only=True)
class Task:
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
class Errand:
    """What a worker is sent for in one go.

    Attributes:
        tasks: The windows.
        turn: See `Demand.turn`.
    """

    tasks: list[Task]
    turn: int


def orders(order: Order, start: int, *, onward: bool) -> Iterator[tuple[Order, int]]:
    """An epoch with the window where it starts, and with `onward` all later ones."""
    yield order, start
    for epoch in itertools.count(order.epoch + 1) if onward else ():
        yield replace(order, epoch=epoch), 0


def tasks_of(source: Source, order: Order, start: int) -> Iterator[Task]:
    """The windows of an epoch from window `start` on."""
    numbered = enumerate(schedule(source, order, source.count, start), start)
    blocks = 0
    following = next(numbered, None)
    while following is not None:
        (number, indices), following = following, next(numbered, None)
        last = following is None
        size = max(len(indices), 2 * order.window - blocks) if last else len(indices)
        blocks += len(indices)
        yield Task(order=order, number=number, indices=[int(i) for i in indices], last=last, size=size)


def errands(tasks: Iterator[Task], most: int, demand: Demand) -> Iterator[Errand]:
    """The windows as what a worker is sent for.

    The last window of an epoch and the first ones of the next are small: they go together, so that they last as
    long as reading what follows. Those of the very first epoch go alone, because somebody waits for them.

    Args:
        tasks: The windows.
        most: The size that windows have together at most.
        demand: For them.
    """
    held: list[Task] = []
    first: Order | None = None
    turn = demand.turn
    for task in tasks:
        first = first or task.order
        joins = task.order != first and sum(t.size for t in held) + task.size <= most
        if held and not joins:
            yield Errand(tasks=held, turn=turn)
            held = []
        held.append(task)
    if held:
        yield Errand(tasks=held, turn=turn)


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
