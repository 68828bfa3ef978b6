"""Reads epoch after epoch: each window when it is asked for, ahead in a thread or in workers, or out of a cache.

Whatever reads ahead maps an endless sequence of windows, those of the epoch and, with `across_epochs`, of all
later ones. At the end of an epoch the map is kept for the next one, and closed where another epoch is asked for.

Guarantees: the windows are the same in every mode; no epoch is begun before the one before it is served; what was
opened is closed by `close`, and what reads ahead also ends with the last reference to the reader; counting
documents for a `Report` costs one number a range and asks the server nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch.utils.data import get_worker_info

from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, WorkerPool, close_iterator
from mongotorch.data.read import DatabaseAccess
from mongotorch.data.stream.batches import Rows
from mongotorch.data.stream.cache import CachedSelect, download, load
from mongotorch.data.stream.shuffle import Order, WindowSpec, lane_seed, worker_seed
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.stream.windows import Window, WindowReader, content_of, count_drawn, open_windows
from mongotorch.errors import DataError

_log = logging.getLogger("mongotorch.data")


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
        skipped: Documents of the epoch that were left out because they do not fit (`on_bad_document="skip"`),
            those before the position of a resumed stream too.
        why: What is wrong with the first one that was left out here.
    """

    epoch: int = 0
    rows: int = 0
    gone: int = 0
    late: int = 0
    skipped: int = 0
    why: str = ""


@final
class _NextEpoch:
    """Windows that are on their way from the start of an epoch on, in the process that reads them."""

    def __init__(self, order: Order, windows: Iterator[Window]) -> None:
        self.order, self.windows = order, windows
        self._home = os.getpid()

    def begins(self, order: Order, start: int) -> bool:
        """Whether they are those of this epoch from this window on; a forked process has to read for itself."""
        return start == 0 and order == self.order and self._home == os.getpid()


@final
class EpochReader:
    """Reads the rows of a stream, epoch after epoch, in one process.

    Args:
        spec: What is streamed.
        access: The database.

    Attributes:
        report: What the current epoch, or the last one, has read.
    """

    def __init__(self, spec: StreamSpec, access: DatabaseAccess) -> None:
        self._spec, self._access = spec, access
        self._reader: WindowReader | None = None
        self._cached: CachedSelect | None = None
        self._pool: WorkerPool[WindowSpec, Window] | None = None
        self._next: _NextEpoch | None = None
        self._lengths: dict[int, int] = {}  # of ranges whose length the plan does not know, when first read
        self._counted: tuple[Any, int] | None = None  # an epoch, and how many rows it had when it was counted
        self.report = Report()
        self._has_skipped = False

    @property
    def digest(self) -> str | None:
        """Names what is read, see `WindowReader.digest`; None before the first epoch."""
        return None if self._reader is None else self._reader.digest

    def close(self) -> None:
        """End threads and workers, let go of memory and files; it can be used again."""
        self.keep_next(None)
        if self._cached is not None:
            self._cached.close()
        if self._pool is not None:
            self._pool.close()
        self._reader = self._cached = self._pool = None
        self._lengths, self._counted = {}, None

    def open(self, digest: str | None) -> None:
        """Decide what is read, see `windows`, without reading it. Raises: as `windows`."""
        self._opened(digest)

    def keep_next(self, epoch: int | None) -> None:
        """Drop what is read ahead, unless it is this epoch."""
        if self._next is not None and self._next.order.epoch != epoch:
            close_iterator(self._next.windows)
            self._next = None

    def count_rows(self, seed: int, epoch: int, digest: str | None) -> int | None:
        """How many rows an epoch has, counted once in each; None where only reading tells.

        Args:
            seed: Of the order.
            epoch: The epoch.
            digest: See `windows`.
        """
        if self._counted is not None and self._counted[0] == (seed, epoch):
            return self._counted[1]
        counts = self.count_epochs(seed, epoch, 1, digest)
        self._counted = None if counts is None else ((seed, epoch), counts[0])
        return None if counts is None else counts[0]

    def count_epochs(self, seed: int, epoch: int, count: int, digest: str | None) -> list[int] | None:
        """How many rows each of so many epochs has, from one on; None where only reading tells."""
        reader = self._opened(digest)
        orders = [Order(seed=seed, epoch=epoch + n, shuffle=False, window=1) for n in range(count)]
        is_weighted = self._spec.sample_weight is not None
        if self._cached is None and is_weighted and self._spec.mode == "stream":
            return count_drawn(self._access, self._spec, reader.digest, orders)
        rows = None if self._cached is not None or is_weighted else reader.count_rows()
        if rows is None and self._spec.mode != "stream":  # it is read once anyway
            self._cached = self._cached or self._cache(reader)
            if is_weighted:
                return [self._cached.count_drawn(order) for order in orders]
            rows = self._cached.count_rows
        return None if rows is None else [rows] * count

    @staticmethod
    def worker_seed(seed: int, epoch: int) -> int:
        """What torch's workers are seeded with in an epoch."""
        return worker_seed(seed, epoch)

    @staticmethod
    def lane_seed(seed: int, epoch: int, step: int, lane: int) -> int:
        """Where generators start for the samples of one lane of a step."""
        return lane_seed(seed, epoch, step, lane)

    def _opened(self, digest: str | None) -> WindowReader:
        self._reader = self._reader or open_windows(self._access, self._spec, digest)
        return self._reader

    def windows(
        self, seed: int, epoch: int, start: int, digest: str | None, skipped: int = 0
    ) -> Iterator[tuple[int, Rows]]:
        """The windows of an epoch from window `start` on: their numbers, and their rows in order.

        Args:
            seed: Of the order.
            epoch: The epoch.
            start: The first window.
            digest: What to go on reading where nothing is open yet, see `digest`; None takes it as it is now.
            skipped: Documents of the epoch that were left out before.
        """
        reader = self._opened(digest)
        order = Order(seed=seed, epoch=epoch, shuffle=self._spec.shuffle, window=reader.window)
        self.report = Report(epoch=epoch, skipped=skipped)
        across = self._reads_across(reader, order)
        windows = self._take_next(order, start) or self._open(reader, order, start, across=across)
        try:
            for window in windows:
                if reader.plan is not None and not window.complete:
                    raise DataError(f"window {window.spec.number} came without some of its ranges; this is a bug")
                window.rows.skipped, skipped = skipped, skipped + window.skipped
                self._count(reader, window)
                if len(window.rows):
                    yield window.spec.number, window.rows
                if window.spec.last and across:
                    self._next, windows = _NextEpoch(replace(order, epoch=epoch + 1), windows), iter(())
                    return
        finally:
            close_iterator(windows)

    def _take_next(self, order: Order, start: int) -> Iterator[Window] | None:
        following, self._next = self._next, None
        if following is None or following.begins(order, start):
            return None if following is None else following.windows
        close_iterator(following.windows)
        return None

    def _open(self, reader: WindowReader, order: Order, start: int, *, across: bool) -> Iterator[Window]:
        """The windows from `start` on, read in the way that the spec asks for."""
        spec = self._spec
        if spec.mode != "stream":
            cached = self._cached = self._cached or self._cache(reader)
            return cached.read(reader.windows(order, start, count=cached.count))
        specs = windows_from(reader, order, start, across=across)
        if self._by_workers(reader):
            if self._pool is None:
                self._pool = self._worker_pool(reader)
            together = most_together(reader, order, self._lead) or 0
            return self._pool.map(requests(specs, together), self.worker_seed(order.seed, order.epoch))
        if get_worker_info() is not None or not spec.data_prefetch:
            return reader.read(specs, prefetch=False)
        specs, sizes = itertools.tee(specs)
        pressure = ReadPressure()
        return ThreadPrefetcher(
            reader.read(specs, pressure=pressure),
            # A shuffled window is half of the bounds at most: one is trained on while the next is put together.
            most=2 * order.window if order.shuffle else max(spec.prefetch_factor, 2),
            most_bytes=spec.prefetch_bytes,
            weigh=_weigh,
            sizes=(window.size for window in sizes),
            pressure=pressure,
        )

    def _reads_across(self, reader: WindowReader, order: Order) -> bool:
        """Whether the next epoch is begun before this one ends: where asked for, and something reads ahead."""
        spec = self._spec
        asked = spec.across_epochs and spec.mode == "stream" and reader.plan is not None
        if not asked or get_worker_info() is not None:
            return False
        if self._by_workers(reader):
            return most_together(reader, order, self._lead) is not None
        return spec.data_prefetch

    def _by_workers(self, reader: WindowReader) -> bool:
        """Whether worker processes read: ranges can be read in any order, and no samples are built there."""
        here, spec = get_worker_info() is None, self._spec
        return here and spec.workers > 0 and reader.plan is not None and not spec.builds_samples

    @property
    def _lead(self) -> int:
        """Requests that workers are ahead; a window is large, so not the loader's usual two for each worker."""
        return max(self._spec.workers, 2)

    def _worker_pool(self, reader: WindowReader) -> WorkerPool[WindowSpec, Window]:
        options = {n: v for n, v in self._spec.loader.items() if not n.startswith("pin_memory")}
        options["prefetch_factor"] = self._lead // self._spec.workers
        return WorkerPool(reader.read, options, niceness=self._spec.worker_niceness)

    def _cache(self, reader: WindowReader) -> CachedSelect:
        spec = self._spec
        if spec.mode == "memory":
            return load(reader)
        parts: tuple[Any, ...] = (
            reader.digest,
            reader.paths,
            spec.query.digest(),
            spec.builds_samples,
            reader.dtypes,
            reader.defaults,
            *(["skip", reader.forms] if reader.skips else []),
            *([] if reader.weight is None else ["weight", reader.weight]),
        )

        def content() -> str:
            # Only reading all of it tells whether a document has changed.
            return spec.content or content_of(self._access, spec)

        return download(reader, spec.cache_dir or Path(".mongotorch/cache"), content, *parts)

    def _count(self, reader: WindowReader, window: Window) -> None:
        """Add a window to the report."""
        gone = late = 0
        for number, length in zip(window.spec.ranges, window.lengths, strict=False):
            expected = length
            if reader.plan is not None:
                counted = reader.plan.counted(number)
                expected = self._lengths.setdefault(number, length) if counted is None else counted
            gone += max(expected - length, 0)
            late += max(length - expected, 0)
        before = self.report
        self.report = Report(
            epoch=before.epoch,
            rows=before.rows + sum(window.lengths),
            gone=before.gone + gone,
            late=before.late + late,
            skipped=before.skipped,
            why=before.why,
        )
        self.skip(window.skipped, window.why)

    def skip(self, count: int, why: str) -> None:
        """Add documents that were left out to the report, and say so of the first one."""
        if not count:
            return
        if not self._has_skipped:
            _log.warning("left out a document of %r that does not fit: %s", self._spec.query.collection, why)
        self._has_skipped = True
        self.report = replace(self.report, skipped=self.report.skipped + count, why=self.report.why or why)


def windows_from(reader: WindowReader, order: Order, start: int, *, across: bool) -> Iterator[WindowSpec]:
    """The windows of an epoch from window `start` on, and where reading goes across its end, of all later ones."""
    yield from reader.windows(order, start)
    for epoch in itertools.count(order.epoch + 1) if across else ():
        yield from reader.windows(replace(order, epoch=epoch))


def requests(specs: Iterator[WindowSpec], most: int) -> Iterator[list[WindowSpec]]:
    """The windows as what a worker is given at a time.

    The last window of an epoch and the first ones of the next are small: they go together, so that they last as
    long as reading what follows. Those of the very first epoch go alone, because the first batch waits for them.

    Args:
        specs: The windows.
        most: The size that windows have together at most; a single one may be larger.
    """
    request: list[WindowSpec] = []
    first: Order | None = None
    for spec in specs:
        first = first or spec.order
        joins = spec.order != first and sum(one.size for one in request) + spec.size <= most
        if request and not joins:
            yield request
            request = []
        request.append(spec)
    if request:
        yield request


def most_together(reader: WindowReader, order: Order, lead: int) -> int | None:
    """The size of windows that are read together, for workers that are so many requests ahead.

    Returns:
        A size; 0 where a request must be one window, None where even then two epochs would be read ahead.
    """
    if (reader.count or 0) >= (lead + 1) * order.window:
        return order.window
    windows = itertools.islice(reader.windows(order), lead)
    return 0 if sum(1 for _ in windows) == lead else None


def _weigh(window: Window) -> int:
    return window.nbytes
