"""What is read in one go, and how far ahead: never more than one epoch, and never what nobody wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy.typing as npt
import pytest

from mongotorch.data import StreamSpec
from mongotorch.data.decode.columns import Columns
from mongotorch.data.decode.ids import U64
from mongotorch.data.prefetch import ReadPressure
from mongotorch.data.stream.epochs import most_together, windows_from
from mongotorch.data.stream.shuffle import Order, WindowSpec, requests
from mongotorch.data.stream.windows import WindowReader
from mongotorch.query import Query


def order_of(shuffle: bool) -> Order:
    return Order(seed=1, epoch=0, shuffle=shuffle, window=4)


class Counted(WindowReader):
    """So many empty ranges, of which four are shuffled together; remembers which were read."""

    def __init__(self, count: int) -> None:
        spec = StreamSpec(query=Query.find("none"), key="x")
        super().__init__(spec.open_access(lambda: None), spec)
        self.count, self.window = count, 4
        self.numbers: list[int] = []
        self.pressure, self.stop_after = ReadPressure(), -1

    def order(self, order: Order, start: int, count: int | None) -> Iterator[npt.NDArray[Any]]:
        """One after the other."""
        return order.consecutive(self.count, start)

    def replies(
        self, numbers: Iterable[int], *, prefetch: bool = False, awaited: Callable[[], bool] = lambda: True
    ) -> Iterator[Any]:
        """Nothing for each range."""
        for number in numbers:
            self.numbers.append(number)
            if len(self.numbers) == self.stop_after:
                self.pressure.stop()
            yield [b""]

    def count_rows(self) -> int | None:
        """Never asked for."""
        raise NotImplementedError

    def keys(self, number: int, columns: Columns) -> U64:
        """Never asked for."""
        raise NotImplementedError(number, columns)


def endless(count: int, shuffle: bool) -> Iterator[WindowSpec]:
    return windows_from(Counted(count), order_of(shuffle), 0, across=True)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 30])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_counts_as_two_windows_at_least(count: int, shuffle: bool) -> None:
    found = list(Counted(count).windows(order_of(shuffle)))
    assert sum(len(spec.ranges) for spec in found) == count
    assert [spec.last for spec in found] == [False] * (len(found) - 1) + [True]
    assert sum(spec.size for spec in found) == max(count, 8)


def test_the_end_of_an_epoch_is_read_with_the_beginning_of_the_next() -> None:
    def numbers(count: int, shuffle: bool, first: int, last: int) -> list[list[tuple[int, int]]]:
        asked = islice(requests(endless(count, shuffle), 4), first, last)
        return [[(spec.order.epoch, spec.number) for spec in request] for request in asked]

    # Windows of 4, 4, 4 and 1 ranges: the last one does not fill a request.
    assert numbers(13, True, 0, 7) == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)], [(1, 0)], [(1, 1)], [(1, 2)]]
    assert numbers(10, False, 9, 13) == [
        [(0, 9), (1, 0), (1, 1), (1, 2)],
        [(1, 3), (1, 4), (1, 5), (1, 6)],
        [(1, 7), (1, 8), (1, 9), (2, 0)],
        [(2, 1), (2, 2), (2, 3), (2, 4)],
    ]


@pytest.mark.parametrize(
    ("count", "lead", "expected"), [(12, 2, 4), (11, 2, 0), (2, 2, 0), (1, 2, None), (5, 6, None)]
)
def test_workers_read_no_more_than_one_epoch_ahead(count: int, lead: int, expected: int | None) -> None:
    assert most_together(Counted(count), order_of(shuffle=False), lead) == expected


def test_the_windows_of_an_endless_sequence_are_those_of_its_epochs() -> None:
    reader = Counted(10)
    found = list(islice(reader.read(endless(10, shuffle=True)), 12))
    seen = [(window.spec.order.epoch, window.spec.number, window.spec.last) for window in found[:4]]
    assert seen == [(0, 0, False), (0, 1, False), (0, 2, True), (1, 0, False)]
    assert all(window.complete and window.lengths == [0] * len(window.spec.ranges) for window in found)
    assert reader.numbers[:12] == [*range(10), 0, 1]


def test_reading_ends_behind_the_range_at_which_it_is_stopped() -> None:
    reader = Counted(10)
    reader.stop_after = 2
    windows = reader.read(
        iter([WindowSpec(order=order_of(False), number=0, ranges=[0, 1, 2, 3], last=True, size=4)]),
        pressure=reader.pressure,
    )
    found = list(windows)
    assert [window.complete for window in found] == [False]
    assert reader.numbers == [0, 1]
