"""Ordered maps in threads and in worker processes: in order, within bounds, and ended when nobody wants them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, WorkerPool, map_ordered
from mongotorch.errors import DataError, EmptySelectError


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mongotorch-prefetch")]


def ahead(source: Iterator[int], **given: Any) -> ThreadPrefetcher[int]:
    return ThreadPrefetcher(source, **{"most": 2, "most_bytes": 99, "weigh": lambda _: 1, **given})


def eventually(condition: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 10
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.001)
    return condition()


def squares(items: Iterator[int], *, pressure: ReadPressure) -> Iterator[int]:
    for item in items:
        if item < 0:
            raise DataError(f"no square of {item}")
        if not pressure.stopped():
            yield item * item


def test_a_thread_reads_within_its_bound_and_hands_out_in_order() -> None:
    begun: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for item in range(9):
            begun.append(item)
            if item == 2:
                third.set()
            yield item

    read = ahead(items())
    assert next(read) == 0
    assert not third.is_set()  # one is taken and one is read or ready: two may be held
    assert next(read) == 1
    assert third.wait(10)
    assert list(read) == list(range(2, 9))
    read.close()


def test_an_item_that_is_larger_than_the_bound_is_let_through() -> None:
    read = ahead(iter(range(3)), sizes=iter([1, 5, 5]))
    assert list(read) == [0, 1, 2]
    read.close()


def test_an_error_of_the_source_is_raised_behind_what_was_read_before_it() -> None:
    read = ahead(squares(iter([1, 2, -1, 3]), pressure=ReadPressure()))
    assert [next(read), next(read)] == [1, 4]
    with pytest.raises(DataError):
        next(read)
    read.close()


def test_closing_stops_the_source_and_ends_the_thread() -> None:
    pressure, reading = ReadPressure(), threading.Event()

    def items() -> Iterator[int]:
        reading.set()
        assert eventually(pressure.stopped)
        yield 0

    read = ahead(items(), pressure=pressure)
    assert reading.wait(10)
    read.close()
    read.close()
    assert not readers()
    assert list(read) == []


def test_a_prefetcher_that_nobody_refers_to_ends_its_thread() -> None:
    read = ahead(iter(range(100)))
    assert next(read) == 0
    assert readers()
    del read
    gc.collect()
    assert not readers()


def test_a_forked_process_leaves_the_thread_of_its_parent_alone() -> None:
    read = ahead(iter(range(5)))
    assert next(read) == 0
    process = multiprocessing.get_context("fork").Process(target=read.close)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    assert list(read) == [1, 2, 3, 4]
    read.close()


def test_results_come_in_order_from_several_threads_and_never_too_many() -> None:
    under_way: list[int] = []
    barrier = threading.Barrier(2, timeout=30)

    def work(n: int) -> int:
        if n < 2:
            barrier.wait()  # the first two have to be under way together
        return n

    def items() -> Iterator[int]:
        for n in range(50):
            under_way.append(n)
            yield n

    seen = []
    for n in map_ordered(work, items(), threads=2, most=4, most_bytes=10**9, weigh=lambda _: 1):
        seen.append(n)
        assert len(under_way) - len(seen) <= 4
    assert seen == list(range(50))
    heavy = map_ordered(work, iter(range(4, 9)), threads=2, most=4, most_bytes=10, weigh=lambda _: 10)
    assert list(heavy) == [4, 5, 6, 7, 8]


def test_results_ahead_stay_within_their_bytes_once_one_is_known() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(20):
            taken.append(n)
            yield n

    results = map_ordered(lambda n: n, items(), threads=2, most=4, most_bytes=30, weigh=lambda _: 10)
    assert next(results) == 0
    for n in results:
        assert len(taken) - (n + 1) <= 3


def test_while_nobody_waits_one_item_is_worked_on_after_the_other() -> None:
    working = threading.Semaphore(1)

    def work(n: int) -> int:
        assert working.acquire(blocking=False)
        time.sleep(0.002)
        working.release()
        return n

    results = map_ordered(
        work, iter(range(20)), threads=2, most=4, most_bytes=99, weigh=lambda _: 1, awaited=lambda: False
    )
    assert list(results) == list(range(20))


def test_results_stay_in_order_where_somebody_waits_now_and_then() -> None:
    chance = random.Random(0)

    def work(n: int) -> int:
        time.sleep(chance.random() / 1000)
        return n

    for _ in range(5):
        results = map_ordered(
            work,
            iter(range(100)),
            threads=2,
            most=4,
            most_bytes=99,
            weigh=lambda _: 1,
            awaited=lambda: chance.random() < 0.5,
        )
        assert list(results) == list(range(100))


def test_a_source_knows_whether_somebody_waits() -> None:
    pressure = ReadPressure()
    seen: list[bool] = []
    assert pressure.awaited()

    def items() -> Iterator[int]:
        for item in range(3):
            seen.append(eventually(pressure.awaited if item < 2 else lambda: not pressure.awaited()))
            yield item

    read = ahead(items(), pressure=pressure, most=9)
    assert next(read) == 0
    assert next(read) == 1
    assert eventually(lambda: len(seen) == 3)
    assert seen == [True, True, True]
    read.close()


def test_workers_know_whether_somebody_waits_for_them() -> None:
    def waits(items: Iterator[int], *, pressure: ReadPressure) -> Iterator[bool]:
        for item in items:
            yield eventually(pressure.awaited if item == 0 else lambda: not pressure.awaited())

    pool = WorkerPool(waits, {"num_workers": 1, "multiprocessing_context": "fork"})
    results = pool.map(iter([[0], [1]]), 0)
    assert next(results)
    time.sleep(0.5)  # the worker is at the second request now
    assert next(results)
    results.close()  # type: ignore[attr-defined]


def test_an_error_in_a_thread_comes_out_in_its_place() -> None:
    def work(n: int) -> int:
        if n == 3:
            raise EmptySelectError("three")
        return n

    results = map_ordered(work, iter(range(9)), threads=2, most=4, most_bytes=10, weigh=lambda _: 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(EmptySelectError):
        next(results)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_workers_give_the_results_of_all_requests_in_order(options: dict[str, Any]) -> None:
    pool = WorkerPool(squares, options)
    for _ in range(2):
        requests = iter([[1, 2], [3], [], [4, 5, 6]])
        assert list(pool.map(requests, 0)) == [1, 4, 9, 16, 25, 36]
    pool.close()


def test_an_error_in_a_worker_comes_out_behind_the_results_before_it() -> None:
    pool = WorkerPool(squares, {"num_workers": 1})
    results = pool.map(iter([[1], [2, 3, -4, 5], [6]]), 0)
    assert [next(results), next(results), next(results)] == [1, 4, 9]
    with pytest.raises(DataError, match="no square of -4"):
        next(results)
    pool.close()


def test_a_worker_stops_early_when_its_map_is_closed() -> None:
    """The second request would go on for ever if it did not see that nobody wants it."""
    begun = multiprocessing.get_context("fork").Event()

    def endless(items: Iterator[int], *, pressure: ReadPressure) -> Iterator[int]:
        for item in items:
            while item and not pressure.stopped():
                begun.set()
            yield item

    pool = WorkerPool(endless, {"num_workers": 1, "persistent_workers": True})
    results = pool.map(iter([[0], [1]]), 0)
    assert next(results) == 0
    assert begun.wait(10)
    results.close()  # type: ignore[attr-defined]
    assert list(pool.map(iter([[0]]), 0)) == [0]
    pool.close()


def test_a_forked_process_does_not_stop_the_workers_of_its_parent() -> None:
    pool = WorkerPool(squares, {"num_workers": 1, "persistent_workers": True})
    results = pool.map(iter([[n] for n in range(6)]), 0)
    assert next(results) == 0
    process = multiprocessing.get_context("fork").Process(target=pool.stop)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    assert list(results) == [1, 4, 9, 16, 25]
    pool.close()


def test_a_users_own_beginning_of_a_worker_is_kept() -> None:
    def begin(worker: int) -> None:
        os.environ["BEGUN"] = str(worker)

    def begun(items: Iterator[int], *, pressure: ReadPressure) -> Iterator[str | None]:
        return (os.environ.get("BEGUN") for _ in items)

    pool = WorkerPool(begun, {"num_workers": 1, "worker_init_fn": begin})
    assert list(pool.map(iter([[0]]), 0)) == ["0"]
    pool.close()
    assert "BEGUN" not in os.environ


def nicenesses(items: Iterator[int], *, pressure: ReadPressure) -> Iterator[int]:
    """The niceness of the process that works, for each item."""
    for _ in items:
        yield os.nice(0)


@pytest.mark.parametrize("niceness", [0, 7])
def test_workers_have_the_niceness_that_was_set(niceness: int) -> None:
    pool = WorkerPool(nicenesses, {"num_workers": 1}, niceness=niceness)
    assert list(pool.map(iter([[1, 2]]), 0)) == [os.nice(0) + niceness] * 2
