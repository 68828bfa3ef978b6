"""What is read in one go, and how far ahead: never more than one epoch, and never what was dropped."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytest

from mongotorch.data.decode.decoder import Columns
from mongotorch.data.decode.ids import U64
from mongotorch.data.prefetch import ReadPressure
from mongotorch.data.read.source import Source
from mongotorch.data.stream.order import Order
from mongotorch.data.stream.windows import WindowSpec, errands, joined, orders, tasks_of

ORDER = Order(seed=1, epoch=0, shuffle=False, window=4)


class Counted(Source):
    """So many blocks, of which nothing is read; its windows are blocks of four where they are shuffled."""

    def __init__(self, count: int) -> None:
        super().__init__(())
        self.count, self.window = count, 4

    def raws(self, indices: Iterable[int]) -> Iterator[Any]:
        """Never asked for."""
        raise NotImplementedError(indices)

    def keys(self, index: int, block: Columns) -> U64:
        """Never asked for."""
        raise NotImplementedError(index, block)


def tasks(count: int, shuffle: bool) -> Iterator[WindowSpec]:
    order = Order(seed=1, epoch=0, shuffle=shuffle, window=4)
    return (task for epoch in orders(order, 0, onward=True) for task in tasks_of(Counted(count), *epoch))


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 30])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_counts_as_two_windows_at_least(count: int, shuffle: bool) -> None:
    order = Order(seed=1, epoch=0, shuffle=shuffle, window=4)
    found = list(tasks_of(Counted(count), order, 0))
    assert sum(len(task.indices) for task in found) == count
    assert [task.last for task in found] == [False] * (len(found) - 1) + [True]
    assert sum(task.size for task in found) == max(count, 8)


def test_the_end_of_an_epoch_is_read_with_the_beginning_of_the_next() -> None:
    numbers = [
        [(task.order.epoch, task.number) for task in errand.tasks]
        for errand in islice(errands(tasks(13, shuffle=True), 4, ReadPressure(crowded=False)), 7)
    ]
    # Windows of 4, 4, 4 and 1 ranges: the last one does not fill an errand.
    assert numbers == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)], [(1, 0)], [(1, 1)], [(1, 2)]]
    numbers = [
        [(task.order.epoch, task.number) for task in errand.tasks]
        for errand in islice(errands(tasks(10, shuffle=False), 4, ReadPressure(crowded=False)), 9, 13)
    ]
    assert numbers == [
        [(0, 9), (1, 0), (1, 1), (1, 2)],
        [(1, 3), (1, 4), (1, 5), (1, 6)],
        [(1, 7), (1, 8), (1, 9), (2, 0)],
        [(2, 1), (2, 2), (2, 3), (2, 4)],
    ]


@pytest.mark.parametrize(
    ("count", "lead", "expected"), [(12, 2, 4), (11, 2, 0), (2, 2, 0), (1, 2, None), (5, 6, None)]
)
def test_workers_read_no_more_than_one_epoch_ahead(count: int, lead: int, expected: int | None) -> None:
    assert joined(Counted(count), ORDER, lead) == expected


def test_items_end_where_their_turn_is_dropped() -> None:
    demand = ReadPressure(crowded=False)
    items = demand.wanted(range(9), demand.turn)
    assert [next(items), next(items)] == [0, 1]
    demand.drop()
    assert list(items) == []
    assert list(demand.wanted(range(3), demand.turn)) == [0, 1, 2]


def test_a_process_that_holds_a_copy_drops_nothing_here() -> None:
    demand = ReadPressure(crowded=True)
    demand.met()
    turn = demand.turn

    def meddle() -> None:
        demand.drop()
        demand.asked()

    process = multiprocessing.get_context("fork").Process(target=meddle)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert demand.turn == turn
    assert not demand.high()


def test_a_worker_hears_what_is_said_after_it_was_started() -> None:
    demand, context = ReadPressure(crowded=True), multiprocessing.get_context("fork")
    started, said, heard = context.Event(), context.Event(), context.Queue()

    def listen() -> None:
        before = demand.turn, demand.high()
        started.set()
        said.wait(10)
        heard.put((before, (demand.turn, demand.high())))

    process = context.Process(target=listen)
    process.start()
    assert started.wait(10)
    demand.drop()
    demand.met()
    said.set()
    assert heard.get(timeout=10) == ((0, True), (1, False))
    process.join()
