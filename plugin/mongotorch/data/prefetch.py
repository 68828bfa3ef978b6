"""Reading ahead in threads.

Always: what comes out is in the order that was asked for; an error raised while reading ahead is raised where
the item would have come out; no more than the bounds is held; closing ends the threads.

How hard to read ahead, by who waits and by what the machine has.

Two questions under way beside a decoder fill a wait for batches soonest. On two cores that also hold the server
they take, while nobody waits, the core of the training again and again: each step becomes longer by more than is
won.

Always: it changes when something is read, and whether what nobody takes any more is read to its end; never what
is read or in which order.

Torch's worker processes, for one function on items.

Always: results come out in the order of the items; an error raised in a worker is raised where its result would
have come out; closing ends the processes, and so does the death of the process that started them.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.sharedctypes import RawValue
from typing import Any, Generic, TypeVar, final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mongotorch.errors import MongotorchError

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_WAITING_S = 0.001  # what was ready is taken sooner


@final
class ReadPressure:
    """Told by who takes windows, asked by who reads them. A new one is that of somebody who waits.

    It may be handed to worker processes when they are started: they see what this process says later. What another
    process says is not heard, since a fork may hold a copy of a reader that is none of its business.

    Args:
        crowded: Whether there are too few cores for the server, the reader and the training at once; kept as an
            attribute.
    """

    def __init__(self, *, crowded: bool) -> None:
        self.crowded, self._home = crowded, os.getpid()
        # Aligned words: each is read and written whole, without a lock.
        self._asked_s, self._turn = RawValue("d", 0.0), RawValue("q", 0)

    def asked(self) -> None:
        """A window is asked for."""
        self._say(time.monotonic())

    def met(self) -> None:
        """It was given."""
        self._say(math.inf)

    def high(self) -> bool:
        """Whether to have several questions under way, rather than to do one thing after the other."""
        return not self.crowded or time.monotonic() - self._asked_s.value > _WAITING_S

    @property
    def turn(self) -> int:
        """Names what is read now, until it is dropped."""
        return int(self._turn.value)

    def drop(self) -> None:
        """What is read now is not wanted any more."""
        if os.getpid() == self._home:
            self._turn.value += 1

    def wanted(self, items: Iterable[T], turn: int) -> Iterator[T]:
        """The items, up to where their turn is dropped."""
        return itertools.takewhile(lambda _: self.turn == turn, items)

    def _say(self, asked_s: float) -> None:
        if os.getpid() == self._home:
            self._asked_s.value = asked_s


def crowded(client: Any) -> bool:
    """Whether the server that a client is connected to shares two cores or fewer with this process."""
    hosts = [host for host, _ in client.nodes]
    here = all(host in _HERE or host == socket.gethostname() or host.startswith("/") for host in hosts)
    return cores() <= 2 and bool(hosts) and here


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


S = TypeVar("S")
T = TypeVar("T")
_THREAD = "mongotorch-prefetch"


@final
class ThreadPrefetcher(Generic[T]):
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
        demand: ReadPressure | None = None,
        sizes: Iterator[int] | None = None,
    ) -> None:
        self._source = source
        self._sizes = itertools.repeat(1) if sizes is None else sizes
        self._demand = demand or ReadPressure(crowded=False)
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


def map_ordered(
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


_NICE = 10  # added to the niceness, of -20 to 19


@final
class _Failure:
    """An error on its way out of a worker: torch would rebuild it from its message alone."""

    def __init__(self, error: MongotorchError) -> None:
        self.error = error


@final
class _Work(Dataset[Any]):
    """What a worker does with one item."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._function(item)
        except MongotorchError as error:
            return _Failure(error)


@final
class _Begin:
    """What a worker does first: where it is crowded, it gives way, to the one who takes its results above all."""

    def __init__(self, also: Callable[[int], Any] | None, *, crowded: bool) -> None:
        self._also, self._crowded = also, crowded

    def __call__(self, worker: int) -> None:
        if self._crowded and hasattr(os, "nice"):
            os.nice(_NICE)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self._also is not None:
            self._also(worker)


def _end_with_parent() -> None:
    """Torch's workers notice as well that their parent is gone, and then wait for ever for it to take a result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@final
class _Feed(Sampler[Any]):
    """Hands the items of this epoch to the workers."""

    def __init__(self) -> None:
        self.items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.items


@final
class Workers:
    """Worker processes that do one function on items, in order.

    Args:
        function: Done in the workers; gets one item, returns one result.
        options: Options of `torch.utils.data.DataLoader`.
        demand: Told when somebody waits for a result, and when nobody wants one any more; kept as an attribute.
    """

    def __init__(
        self, function: Callable[[Any], Any], options: Mapping[str, Any], demand: ReadPressure | None = None
    ) -> None:
        self.demand = demand or ReadPressure(crowded=False)
        self._feed = _Feed()
        self._options = dict(options)
        self._generator = self._options.pop("generator", None)
        self._own = torch.Generator()
        also = self._options.pop("worker_init_fn", None)
        self._loader: DataLoader[Any] = DataLoader(
            _Work(function),
            sampler=self._feed,
            batch_size=None,
            collate_fn=_same,
            generator=self._generator or self._own,
            worker_init_fn=_Begin(also, crowded=self.demand.crowded),
            **self._options,
        )

    def map(self, items: Iterator[Any], seed: int) -> Iterator[Any]:
        """The results of the items; workers are seeded by `seed`, not by the global generator.

        Args:
            items: Taken when a worker has room.
            seed: Of the workers' generators.
        """
        self._feed.items = items
        self.demand.asked()
        if self._generator is None:
            self._own.manual_seed(seed)
        results = iter(self._loader)
        try:
            for result in results:
                self.demand.met()
                if isinstance(result, _Failure):
                    raise result.error
                yield result
                self.demand.asked()
        finally:
            self.demand.drop()
            del results
            if not self._options.get("persistent_workers"):
                self.close()

    def close(self) -> None:
        """End the processes that are kept for the next epoch."""
        iterator = self._loader._iterator
        self._loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _same(item: Any) -> Any:
    return item
