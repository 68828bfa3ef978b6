"""Reads ahead, in threads or in worker processes, and hands out the results in the order that was asked for.

What is read ahead is an ordered map: a function from an iterator of items to an iterator of results. The function
can be called as it is, its results can be read by a thread (`ThreadPrefetcher`), or it can run in worker processes
(`WorkerPool`); what comes out is the same. `map_ordered` has several items of one such map under way at a time.

Guarantees: results come in the order of their items; an error is raised where its result would have come out; no
more is held than the bounds allow; closing ends the threads and stops the work that workers still have, and so
does losing the last reference; a forked process leaves the threads and workers of its parent alone; worker
processes end with the process that started them.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import multiprocessing
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mongotorch.errors import DataProcessError, MongotorchError

S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
S_contra = TypeVar("S_contra", contravariant=True)
_THREAD = "mongotorch-prefetch"
_HANDED_OVER_S = 0.001


class OrderedMap(Protocol[S_contra, T_co]):
    """Turns items into results, one after the other, when they are asked for."""

    def __call__(self, items: Iterator[S_contra], /, *, pressure: ReadPressure) -> Iterator[T_co]:
        """The results of the items.

        Args:
            items: Taken one by one.
            pressure: Whether the results are needed, and whether somebody waits for one.
        """
        ...


@final
class ReadPressure:
    """Whether somebody waits for a result, and whether results are needed at all; entered while somebody waits.

    It may be handed to worker processes when they are started: they see what the process that made it says later.
    What another process says is not heard, since a fork may hold a copy of a reader that is none of its business.
    A new one is that of somebody who waits.
    """

    def __init__(self) -> None:
        self._home = os.getpid()
        # Aligned words: each is read and written whole, without a lock.
        self._since_s, self._current = RawValue("d", 0.0), RawValue("q", 0)
        self._number = 0

    def __enter__(self) -> None:
        self._wait_since(time.monotonic())

    def __exit__(self, *_: object) -> None:
        self._wait_since(math.inf)

    def awaited(self) -> bool:
        """Whether somebody waits, and has done so for longer than it takes to hand over what is ready."""
        return bool(time.monotonic() - self._since_s.value > _HANDED_OVER_S)

    def stop(self) -> None:
        """The results that are read now are not needed any more; those of the next map are."""
        if os.getpid() == self._home:
            self._current.value += 1

    def stopped(self) -> bool:
        """Whether the results are not needed any more."""
        return bool(self._current.value != self._number)

    @property
    def current(self) -> int:
        """The number of the map whose results are needed."""
        return int(self._current.value)

    def of(self, number: int) -> ReadPressure:
        """The same for the results of a map of this number."""
        pressure = copy.copy(self)
        pressure._number = number
        return pressure

    def _wait_since(self, since_s: float) -> None:
        if os.getpid() == self._home:
            self._since_s.value = since_s


def map_ordered(
    function: Callable[[S], T],
    items: Iterator[S],
    *,
    threads: int,
    most: int,
    most_bytes: int,
    weigh: Callable[[T], int],
    awaited: Callable[[], bool] = lambda: True,
) -> Iterator[T]:
    """The results of the items, in their order, several of them under way in threads while somebody waits for one.

    What is read ahead of what anybody needs is read one after the other: several requests at a time fill a wait
    soonest, but where nobody waits they only take the cores from whoever computes.

    Args:
        function: Called in the threads, or by whoever takes the results while nobody waits.
        items: Taken when there is room.
        threads: How many.
        most: Items under way or ready, at most.
        most_bytes: Bytes under way or ready, at most, judged by the largest result so far; one item is always
            let through.
        weigh: Bytes of a result.
        awaited: Whether somebody waits for a result; asked once for each item.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_THREAD)
    pending: deque[Future[T]] = deque()
    largest = 0
    try:
        for item in items:
            while pending and (len(pending) >= most or (len(pending) + 1) * largest > most_bytes):
                result = pending.popleft().result()
                largest = max(largest, weigh(result))
                yield result
            if awaited():
                pending.append(pool.submit(function, item))
                continue
            while pending:  # what was asked for before comes first
                yield pending.popleft().result()
            yield function(item)
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@final
class ThreadPrefetcher(Generic[T]):
    """An iterator whose source is read ahead by a thread of its own, up to a bound.

    Args:
        source: What to read; only the thread uses it until the prefetcher is closed, which closes the source too.
            It must not refer to the prefetcher or its owner, so that the thread ends where those are dropped.
        most: What may be held at most, in the units of `sizes`: ready, being read, or taken last; one item is
            always let through.
        most_bytes: Bytes ready at most, by `weigh`; one item is always let through.
        weigh: Bytes of an item.
        sizes: What each item counts, known before it is read; one each unless given. The thread takes one of
            these before the item that it belongs to.
        pressure: Entered while somebody waits, and stopped when the prefetcher is closed, for a source that asks.
    """

    def __init__(
        self,
        source: Iterator[T],
        *,
        most: int,
        most_bytes: int,
        weigh: Callable[[T], int],
        sizes: Iterator[int] | None = None,
        pressure: ReadPressure | None = None,
    ) -> None:
        self._buffer = _Buffer(most, most_bytes, weigh, pressure or ReadPressure())
        sizes = itertools.repeat(1) if sizes is None else sizes
        thread = threading.Thread(target=_fill, args=(self._buffer, source, sizes), name=_THREAD, daemon=True)
        self._closing = weakref.finalize(self, _end, self._buffer, thread, source, os.getpid())
        # At exit the thread ends anyway, and a server that is away would be waited for.
        self._closing.atexit = False
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._buffer.take()

    def close(self) -> None:
        """Stop the thread and wait for it; a read in progress is waited for. A second call does nothing."""
        self._closing()


@final
class _Buffer(Generic[T]):
    """What the thread of a prefetcher has read and what has not been taken yet."""

    def __init__(self, most: int, most_bytes: int, weigh: Callable[[T], int], pressure: ReadPressure) -> None:
        self._most, self._most_bytes, self._weigh, self._pressure = most, most_bytes, weigh, pressure
        self._ready: deque[tuple[T, int, int]] = deque()
        self._bytes = self._counted = self._taken = 0
        self._end: BaseException | None = None
        self._changed = threading.Condition()

    def begin(self, size: int) -> bool:
        """Wait until there is room for an item of this size; whether it is still wanted."""
        with self._changed:
            self._wait(lambda: not self._counted or self._counted + size <= self._most)
            self._counted += size
            return not self._pressure.stopped()

    def put(self, item: T, size: int) -> bool:
        """Wait until there is room for the bytes of an item, and add it; whether it is still wanted."""
        weight = self._weigh(item)
        with self._changed:
            self._wait(lambda: not self._ready or self._bytes + weight <= self._most_bytes)
            if self._pressure.stopped():
                return False
            self._ready.append((item, size, weight))
            self._bytes += weight
            self._changed.notify_all()
            return True

    def take(self) -> T:
        """Wait for the next item. Raises what ended the source once all items are taken."""
        with self._changed:
            self._counted, self._taken = self._counted - self._taken, 0
            self._changed.notify_all()
            with self._pressure:
                self._changed.wait_for(lambda: self._ready or self._end is not None)
            if self._ready:
                item, self._taken, weight = self._ready.popleft()
                self._bytes -= weight
                self._changed.notify_all()
                return item
            end = self._end
        assert end is not None  # noqa: S101 - for the type checker; the wait above saw it
        raise end

    def end(self, error: BaseException) -> None:
        """Nothing comes after what is ready."""
        with self._changed:
            self._end = self._end or error
            self._changed.notify_all()

    def stop(self) -> None:
        """Let go of what is ready, and let nothing more in."""
        with self._changed:
            self._pressure.stop()
            self._ready.clear()
        self.end(StopIteration())

    def _wait(self, room: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._pressure.stopped() or room())


def _fill(buffer: _Buffer[T], source: Iterator[T], sizes: Iterator[int]) -> None:
    """Read the source into the buffer: the work of a prefetcher's thread."""
    end: BaseException = StopIteration()
    try:
        for size in sizes:
            if not buffer.begin(size):
                break
            # The item is not named: a name would keep it here while the next one is read.
            if not buffer.put(next(source), size):
                break
    except BaseException as error:  # noqa: BLE001 - it is raised again by the consumer
        end = error
    buffer.end(end)


def _end(buffer: _Buffer[Any], thread: threading.Thread, source: Iterator[Any], home: int) -> None:
    if os.getpid() != home:  # a fork: the thread is not in this process
        return
    buffer.stop()
    if thread is not threading.current_thread():  # else the garbage collector happens to run in it
        thread.join()
        close_iterator(source)


@final
class WorkerPool(Generic[S, T]):
    """Worker processes, those of torch's `DataLoader`, that run an ordered map.

    Args:
        function: Gets the items of one request; pickled where processes are spawned.
        options: Options of `torch.utils.data.DataLoader`.
        niceness: What is added to the niceness of each process, where the system has one.
    """

    def __init__(self, function: OrderedMap[S, T], options: Mapping[str, Any], *, niceness: int = 0) -> None:
        self._home = os.getpid()
        self._pressure = ReadPressure()
        self._requests: _Requests[S] = _Requests()
        self._options = dict(options)
        self._generator = self._options.pop("generator", None)
        self._own = torch.Generator()
        begin = self._options.pop("worker_init_fn", None)
        self._loader: DataLoader[Any] = DataLoader(
            _RequestSet(function, self._pressure),
            sampler=self._requests,
            batch_size=None,
            collate_fn=_same,
            generator=self._generator or self._own,
            worker_init_fn=_Begin(begin, niceness),
            **self._options,
        )

    def map(self, requests: Iterator[list[S]], seed: int) -> Iterator[T]:
        """The results of the items of all requests; an earlier map that was not read to its end must be closed.

        Args:
            requests: The items that a worker is given at a time, taken when a worker has room.
            seed: Of the workers' generators, in place of the global one.
        """
        number = self._pressure.current
        self._requests.source = ((number, items) for items in requests)
        if self._generator is None:
            self._own.manual_seed(seed)
        replies = self._start()
        try:
            while True:
                with self._pressure:
                    reply = self._next(replies)
                if reply is None:
                    return
                results, error = reply
                del reply  # each result is held by whoever takes it alone
                while results:
                    yield results.pop(0)
                if error is not None:
                    raise error
        finally:
            self.stop()
            if os.getpid() == self._home:
                del replies
                if not self._options.get("persistent_workers"):
                    self.close()

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self._loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise DataProcessError(
                f"worker processes cannot be started, because what they are given cannot be pickled ({error}): "
                "use functions that can be imported, or multiprocessing_context='fork'"
            ) from error

    def _next(self, replies: Iterator[Any]) -> Any:
        """The next reply, or None. Raises: DataProcessError where torch says that a worker is gone."""
        try:
            return next(replies, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise
            # Now, not with the last reference, which the error has: torch goes on to look after the process.
            replies._shutdown_workers()  # type: ignore[attr-defined]
            self.close()
            raise DataProcessError(
                f"a worker process of the stream is gone: {error}; the system may have ended it for its "
                "memory, or what it called did; num_workers=0 shows more"
            ) from error

    def stop(self) -> None:
        """Let workers end early what they do for the current map; in a forked process it does nothing."""
        self._pressure.stop()

    def close(self) -> None:
        """End the processes that are kept for the next map."""
        iterator = self._loader._iterator
        self._loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


@final
class _Requests(Sampler[Any], Generic[S]):
    """Hands the requests of the current map to the workers."""

    def __init__(self) -> None:
        self.source: Iterator[tuple[int, list[S]]] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.source


@final
class _RequestSet(Dataset[Any]):
    """What a worker does with one request: as many results as it can, and the error that ended them."""

    def __init__(self, function: OrderedMap[Any, Any], pressure: ReadPressure) -> None:
        self._function, self._pressure = function, pressure

    def __getitem__(self, request: tuple[int, list[Any]]) -> tuple[list[Any], MongotorchError | None]:
        number, items = request
        results: list[Any] = []
        try:
            results.extend(self._function(iter(items), pressure=self._pressure.of(number)))
        except MongotorchError as error:  # torch would rebuild it from its message alone
            return results, error
        return results, None


@final
class _Begin:
    """What a worker does first."""

    def __init__(self, users: Callable[[int], Any] | None, niceness: int) -> None:
        self._users, self._niceness = users, niceness

    def __call__(self, worker: int) -> None:
        if self._niceness and hasattr(os, "nice"):
            os.nice(self._niceness)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self._users is not None:
            self._users(worker)


def _end_with_parent() -> None:
    """Torch's workers notice as well that their parent is gone, and then wait for ever for it to take a result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _same(item: Any) -> Any:
    return item


@final
class _Trial(ForkingPickler):
    """Pickles nothing but what might fail: tensors pass in shared memory, and doing that twice would leak it."""

    def persistent_id(self, item: Any) -> str | None:
        """A name instead of each tensor."""
        return "" if isinstance(item, torch.Tensor) else None


def check_picklable(made: Any) -> None:
    """Look whether a result can be handed to another process; the queue would drop it, and be waited for for ever.

    Raises:
        DataProcessError: It cannot be pickled.
    """
    try:
        _Trial(io.BytesIO()).dump(made)
    except Exception as error:
        raise DataProcessError(
            f"a worker process cannot hand over the batch that it made: {type(error).__name__}: {error}; let "
            "transform and collate_fn return tensors and plain values, or use num_workers=0"
        ) from error


def close_iterator(iterator: Any) -> None:
    """Close an iterator that can be closed."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
