"""Reading ahead in threads.

Always: what comes out is in the order that was asked for; an error raised while reading ahead is raised where
the item would have come out; no more than the bounds is held; closing ends the threads.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar, final

from mongotorch.data.demand import Demand

S = TypeVar("S")
T = TypeVar("T")

_THREAD = "mongotorch-prefetch"


@final
class Ahead(Generic[T]):
    """An iterator whose source is read by a thread of its own, up to a bound.

    Args:
        source: What to read; only the thread touches it until `close` has returned.
        most: What may be held at most, in the units of `sizes`: ready, being read, or taken last; one item is
            always let through.
        most_bytes: Bytes ready at most, by `weigh`; one item is always let through.
        weigh: Bytes of an item.
        demand: Told when somebody waits for an item, and when nobody wants one any more.
        sizes: What each item counts, known before it is read; one each unless given.
    """

    def __init__(
        self,
        source: Iterator[T],
        *,
        most: int,
        most_bytes: int,
        weigh: Callable[[T], int],
        demand: Demand | None = None,
        sizes: Iterator[int] | None = None,
    ) -> None:
        self._source = source
        self._sizes = itertools.repeat(1) if sizes is None else sizes
        self._demand = demand or Demand(crowded=False)
        self._most, self._most_bytes, self._weigh = most, most_bytes, weigh
        self._ready: deque[tuple[T, int, int]] = deque()
        self._bytes = self._held = self._taken = 0
        self._end: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=_THREAD, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._demand.asked()
            self._held, self._taken = self._held - self._taken, 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            self._demand.met()
            if self._ready:
                item, weight, self._taken = self._ready.popleft()
                self._bytes -= weight
                self._changed.notify_all()
                return item
            end = self._end
        if isinstance(end, StopIteration):
            raise StopIteration
        assert end is not None  # noqa: S101 - for the type checker; the wait above saw it
        raise end

    def close(self) -> None:
        """Stop the thread and wait for it; a read in progress is waited for. A second call does nothing."""
        self._demand.drop()
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._end = self._end or StopIteration()
            self._changed.notify_all()
        self._thread.join()
        close_iterator(self._source)

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for size in self._sizes:
                # The item is not named: a name would keep it here while the next one is read.
                if not self._begin(size) or not self._offer(next(self._source), size):
                    break
        except BaseException as error:  # noqa: BLE001 - it is raised again by the consumer
            end = error
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def _begin(self, size: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._held or self._held + size <= self._most)
            self._held += size
            return not self._closed

    def _offer(self, item: T, size: int) -> bool:
        weight = self._weigh(item)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._ready or self._bytes + weight <= self._most_bytes
            )
            if self._closed:
                return False
            self._ready.append((item, weight, size))
            self._bytes += weight
            self._changed.notify_all()
            return True


def in_order(
    function: Callable[[S], T],
    items: Iterator[S],
    *,
    threads: int,
    most: int,
    most_bytes: int,
    weigh: Callable[[T], int],
    eager: Callable[[], bool] = lambda: True,
) -> Iterator[T]:
    """The results of the items, in their order, some of them ahead in threads.

    Args:
        function: Done in the threads.
        items: Taken when there is room.
        threads: How many.
        most: Items under way or ready, at most.
        most_bytes: Bytes under way or ready, at most, judged by the largest result so far; one item is always
            let through.
        weigh: Bytes of a result.
        eager: Asked once an item: whether to do it ahead, in a thread, or here when all before it are out.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_THREAD)
    pending: deque[Future[T]] = deque()
    largest = 0
    try:
        for item in items:
            ahead = eager()  # once: it may change at any time, and nothing may overtake what is under way
            while pending and (not ahead or len(pending) >= most or (len(pending) + 1) * largest > most_bytes):
                result = pending.popleft().result()
                largest = max(largest, weigh(result))
                yield result
            if ahead:
                pending.append(pool.submit(function, item))
            else:
                yield function(item)
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def close_iterator(iterator: Any) -> None:
    """Close an iterator that can be closed."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
