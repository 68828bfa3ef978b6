"""Windows of ordered rows, from wherever the mode says: read now, read ahead, or held.

Always: the windows are the same in every mode; what was opened for them is closed by `close`.

The next epoch's windows, on their way while the last ones of this epoch are served.

Always: they are taken by the epoch that they are of, or closed; one that nobody closes is closed with its owner;
a process that was forked meanwhile leaves them alone, because their thread is not in it.

How many documents of the plan were there, and how many were gone.

Always: counting costs one number a range and no question to the server. What a range should hold is known from
the plan where it was walked, else from the first time that this stream read the range.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, final

from torch.utils.data import get_worker_info

from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, Workers, close_iterator
from mongotorch.data.read.plan import Plan
from mongotorch.data.read.reader import DatabaseAccess
from mongotorch.data.read.source import PlannedSource, Source, open_source
from mongotorch.data.stream.cache import CachedSelect, cache_name, download, hold
from mongotorch.data.stream.order import Order, worker_seed
from mongotorch.data.stream.position import HashMarkers, IdMarkers
from mongotorch.data.stream.rows import Rows
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.stream.windows import (
    Window,
    WindowReader,
    brought,
    errands,
    joined,
    orders,
    read_epochs,
    schedule,
    tasks_of,
)
from mongotorch.errors import DataError


@final
class NextEpoch:
    """Windows from the first one of an epoch on.

    Args:
        owner: With whom they end at the latest; they must not refer to it.
        order: Of the epoch.
        windows: The windows of that epoch and of all later ones.
    """

    def __init__(self, owner: Any, order: Order, windows: Iterator[Window]) -> None:
        self._order, self._windows, self._home = order, windows, os.getpid()
        self._closing = weakref.finalize(owner, _close, windows, self._home)
        # At exit the thread ends anyway, and a server that is away would be waited for.
        self._closing.atexit = False

    def take(self, order: Order, start: int) -> Iterator[Window] | None:
        """The windows, where they are those of this epoch from this window on; else they are closed."""
        wanted = start == 0 and order == self._order and self._home == os.getpid()
        if wanted and self._closing.detach() is not None:
            return self._windows
        self._closing()
        return None

    def close(self, *, but: int | None = None) -> bool:
        """Stop reading, unless it is this epoch that is read; whether it is stopped."""
        if but != self._order.epoch:
            self._closing()
        return not self._closing.alive


def _close(windows: Iterator[Window], home: int) -> None:
    if os.getpid() == home:
        close_iterator(windows)


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What the current epoch of a stream (or the last one) has read so far, in this process.

    `gone` and `late` are net numbers of each range: a document that came and one that went in the same range
    cancel out.

    Attributes:
        epoch: The epoch.
        rows: Documents read.
        gone: Documents that the plan, or an earlier epoch, had in the ranges read, and that are not there now.
        late: Documents in them that are new since: inserted, or changed so that they match, with an `_id`
            inside the plan's bounds.
    """

    epoch: int = 0
    rows: int = 0
    gone: int = 0
    late: int = 0


@final
class Tally:
    """Counts for a `Report`.

    Args:
        plan: Whose ranges are read; None where documents come in an order of their own, and only rows count.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan
        self._seen: dict[int, int] = {}
        self.report = Report()

    def begin(self, epoch: int) -> None:
        """An epoch starts, or goes on after a resume."""
        self.report = Report(epoch=epoch)

    def add(self, index: int, rows: int) -> None:
        """A range was read, and had so many rows."""
        expected = rows
        if self._plan is not None:
            counted = self._plan.counted(index)
            expected = self._seen.setdefault(index, rows) if counted is None else counted
        before = self.report
        self.report = Report(
            epoch=before.epoch,
            rows=before.rows + rows,
            gone=before.gone + max(expected - rows, 0),
            late=before.late + max(rows - expected, 0),
        )


@final
class EpochReader:
    """The rows of a stream in one process.

    Args:
        spec: What is streamed.
        access: The database.
    """

    def __init__(self, spec: StreamSpec, access: DatabaseAccess) -> None:
        self.spec = spec
        self._access = access
        self.source: Source | None = None
        self._held: CachedSelect | None = None
        self._workers: Workers | None = None
        self._onward: NextEpoch | None = None
        self.tally = Tally()

    def close(self) -> None:
        """End workers, let go of memory and files; it can be used again."""
        self.expect(None)
        if self._held is not None:
            self._held.close()
        if self._workers is not None:
            self._workers.close()
        self.source = self._held = self._workers = None

    def expect(self, epoch: int | None) -> None:
        """Let go of what is read ahead for another epoch than this one."""
        if self._onward is not None and self._onward.close(but=epoch):
            self._onward = None

    def windows(self, seed: int, epoch: int, start: int, digest: str | None) -> Iterator[tuple[int, Rows]]:
        """The windows of an epoch from window `start` on, their rows in order.

        Args:
            seed: Of the order.
            epoch: The epoch.
            start: The first window.
            digest: The source to go on in; None, or the one that is open, takes that.
        """
        source = self._open_source(digest)
        order = Order(seed=seed, epoch=epoch, shuffle=self.spec.shuffle, window=source.window)
        self.tally.begin(epoch)
        if self.spec.mode == "stream":
            yield from self._read(source, order, start)
            return
        held = self._held = self._held or self._hold(source)
        for window, indices in enumerate(schedule(source, order, held.count, start), start):
            keys = held.keys(indices)
            for index in indices:
                self.tally.add(int(index), len(held.keys([index])))
            permutation, ranks = order.rows(keys) if order.shuffle else (None, None)
            rows = held.rows(indices, permutation)
            if ranks is not None:
                rows.marks = HashMarkers(ranks)
            elif source.by_id:
                rows.marks = IdMarkers(held.ids(int(indices[0])))
            yield window, rows

    def _read(self, source: Source, order: Order, start: int) -> Iterator[tuple[int, Rows]]:
        onward = self._reads_onward(source, order)
        windows = self._taken_up(order, start) or self._windows(source, order, start, onward=onward)
        try:
            for window in windows:
                if not window.complete and source.count is not None:
                    raise DataError(f"window {window.number} came without some of its blocks; this is a bug")
                for index, length in window.lengths:
                    self.tally.add(index, length)
                if len(window.rows):
                    yield window.number, window.rows
                if window.last and onward:
                    self._onward = NextEpoch(self, replace(order, epoch=order.epoch + 1), windows)
                    windows = iter(())
                    return
        finally:
            close_iterator(windows)

    def _reads_onward(self, source: Source, order: Order) -> bool:
        """Whether the next epoch is begun before this one ends: where it is wanted and something reads ahead."""
        if not self.spec.across_epochs or source.count is None or get_worker_info() is not None:
            return False
        if self._by_workers(source):
            return joined(source, order, self._lead) is not None
        return self.spec.data_prefetch

    def _taken_up(self, order: Order, start: int) -> Iterator[Window] | None:
        onward, self._onward = self._onward, None
        return None if onward is None else onward.take(order, start)

    def _by_workers(self, source: Source) -> TypeGuard[PlannedSource]:
        here, spec = get_worker_info() is None, self.spec
        return here and spec.workers > 0 and isinstance(source, PlannedSource) and not spec.builds_samples

    def _windows(self, source: Source, order: Order, start: int, *, onward: bool) -> Iterator[Window]:
        """The windows that are read: by workers, by threads ahead, or when they are asked for."""
        spec = self.spec
        epochs = partial(orders, order, start, onward=onward)
        if self._by_workers(source):
            workers = self._reading_workers(source)
            tasks = (task for epoch in epochs() for task in tasks_of(source, *epoch))
            sent = errands(tasks, joined(source, order, self._lead) or 0, workers.demand)
            return brought(workers.map(sent, worker_seed(order.seed, order.epoch)))
        read = partial(
            read_epochs, source, epochs(), most_bytes=spec.prefetch_bytes // 8, samples=spec.builds_samples
        )
        if get_worker_info() is not None or not spec.data_prefetch:
            return read(None)
        demand = ReadPressure(crowded=self._access.reader().crowded())
        # A shuffled window is half of the bounds at most: one is trained on while the next is put together.
        most = 2 * order.window if order.shuffle else max(spec.prefetch_factor, 2)
        return ThreadPrefetcher(
            read(demand),
            most=most,
            most_bytes=spec.prefetch_bytes,
            weigh=_weight,
            demand=demand,
            sizes=(task.size for epoch in epochs() for task in tasks_of(source, *epoch)),
        )

    @property
    def _lead(self) -> int:
        """Errands that workers are ahead; a window is large, so not the loader's usual two for each worker."""
        return max(self.spec.workers, 2)

    def _reading_workers(self, source: PlannedSource) -> Workers:
        if self._workers is None:
            options = {n: v for n, v in self.spec.loader.items() if not n.startswith("pin_memory")}
            demand = ReadPressure(crowded=self._access.reader().crowded())
            reader = WindowReader(self._access, source, self.spec.prefetch_bytes // 8, demand)
            options["prefetch_factor"] = self._lead // self.spec.workers
            self._workers = Workers(reader, options, demand)
        return self._workers

    def _open_source(self, digest: str | None) -> Source:
        if self.source is None:
            self.source = open_source(
                self._access.reader,
                self._access.database,
                self.spec.query,
                self.spec.key.paths,
                self.spec.sizes,
                shuffle=self.spec.shuffle,
                digest=digest,
            )
            self.tally = Tally(self.source.plan if isinstance(self.source, PlannedSource) else None)
        return self.source

    def _hold(self, source: Source) -> CachedSelect:
        if self.spec.mode == "memory":
            return hold(source, samples=self.spec.builds_samples, most_bytes=self.spec.prefetch_bytes // 8)
        membership = self._access.reader().membership()
        name = cache_name(
            source.digest, membership, self.spec.key.paths, self.spec.query.digest(), self.spec.builds_samples
        )
        folder = self.spec.cache_dir or Path(".mongotorch/cache")
        return download(
            source, folder, name, samples=self.spec.builds_samples, most_bytes=self.spec.prefetch_bytes // 8
        )


def _weight(window: Window) -> int:
    return window.nbytes
