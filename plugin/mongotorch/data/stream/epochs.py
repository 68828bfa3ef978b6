"""Reads epoch after epoch: each window when it is asked for, ahead in a thread or in workers, or out of a cache.

Whatever reads ahead maps an endless sequence of windows, those of the epoch and, with `across_epochs`, of all
later ones. At the end of an epoch the map is kept for the next one, and closed where another epoch is asked for.
One of several shards reads only the documents of its own rows, where they are large: the `_id`s of a window first,
which tell the order of its rows, and then what is the shard's.

Guarantees: the windows are the same in every mode; no epoch is begun before the one before it is served; what was
opened is closed by `close`, and what reads ahead also ends with the last reference to the reader; counting
documents for a `Report` costs one number a range and asks the server nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from mongotorch.data.decode import U64, Column, Columns, Reply, decode, id_keys, pack_ids
from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, WorkerPool, close_iterator, map_ordered
from mongotorch.data.read import DatabaseAccess
from mongotorch.data.stream.batches import NO_ROWS, Rows, lane_start
from mongotorch.data.stream.cache import CachedSelect, download, load
from mongotorch.data.stream.shuffle import Order, Share, WindowSpec, lane_seed, requests, worker_seed
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.stream.windows import (
    PlannedWindows,
    Window,
    WindowReader,
    content_of,
    count_drawn,
    open_windows,
)
from mongotorch.errors import DataError

_log = logging.getLogger("mongotorch.data")
_SAVED_BYTES: Final = 1024  # of each document, from where on asking for its `_id` first costs less
_IDS_BYTES: Final = 2**22  # of `_id`s that one request asks for; a server takes four times that
_UNDER_WAY: Final = 4  # ranges that are read but not decoded yet, at most


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


class Start(NamedTuple):
    """Where reading starts in an epoch.

    Attributes:
        epoch: The epoch.
        window: The window.
        step: Batches that lie before.
        skipped: Documents of the epoch that were left out before.
        row: From the rows of the window to the first that is left.
    """

    epoch: int
    window: int
    step: int
    skipped: int
    row: Callable[[Rows], int]


@final
class _NextEpoch:
    """Windows that are on their way from the start of an epoch on, in the process that reads them."""

    def __init__(self, order: Order, windows: Iterator[Window]) -> None:
        self.order, self.windows = order, windows
        self._home = os.getpid()

    def begins(self, order: Order, start: Start) -> bool:
        """Whether they are those of this epoch from here on; a forked process has to read for itself."""
        is_first = not (start.window or start.step)
        return is_first and order == self.order and self._home == os.getpid()


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

    def windows(self, seed: int, start: Start, digest: str | None) -> Iterator[tuple[int, Rows]]:
        """The windows of an epoch from that of a position on: their numbers, and their rows in order.

        Args:
            seed: Of the order.
            start: The position.
            digest: What to go on reading where nothing is open yet, see `digest`; None takes it as it is now.
        """
        epoch, skipped = start.epoch, start.skipped
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

    def _take_next(self, order: Order, start: Start) -> Iterator[Window] | None:
        following, self._next = self._next, None
        if following is None or following.begins(order, start):
            return None if following is None else following.windows
        close_iterator(following.windows)
        return None

    def _open(self, reader: WindowReader, order: Order, start: Start, *, across: bool) -> Iterator[Window]:
        """The windows from `start` on, read in the way that the spec asks for."""
        spec = self._spec
        if spec.mode != "stream":
            cached = self._cached = self._cached or self._cache(reader)
            return cached.read(reader.windows(order, start.window, count=cached.count))
        specs = windows_from(reader, order, start.window, across=across)
        if self._by_workers(reader):
            if self._pool is None:
                self._pool = self._worker_pool(reader)
            together = most_together(reader, order, self._lead) or 0
            return self._pool.map(requests(specs, together), self.worker_seed(order.seed, order.epoch))
        if get_worker_info() is not None or not spec.data_prefetch:
            return self._read(reader, specs, start)
        specs, sizes = itertools.tee(specs)
        pressure = ReadPressure()
        return ThreadPrefetcher(
            self._read(reader, specs, start, pressure),
            # A shuffled window is half of the bounds at most: one is trained on while the next is put together.
            most=2 * order.window if order.shuffle else max(spec.prefetch_factor, 2),
            most_bytes=spec.prefetch_bytes,
            weigh=_weigh,
            sizes=(window.size for window in sizes),
            pressure=pressure,
        )

    def _read(
        self,
        reader: WindowReader,
        specs: Iterator[WindowSpec],
        start: Start,
        pressure: ReadPressure | None = None,
    ) -> Iterator[Window]:
        """The windows of these specs, of one of several shards without what it does not need."""
        spec = self._spec
        if isinstance(reader, PlannedWindows) and can_share(spec, self._access):
            return SharedWindows(reader, self._access, spec, start).read(specs, pressure)
        return reader.read(specs, prefetch=pressure is not None, pressure=pressure)

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


def share_of(spec: StreamSpec) -> Share:
    """The rows of an epoch that the shard of a stream has."""
    rank, world = spec.shard
    if spec.lanes:
        rows, each = spec.batch_size * spec.accumulation, spec.lanes // world
        first, stop = (lane_start(rows, lane, spec.lanes) for lane in (rank * each, (rank + 1) * each))
        return Share(period=rows, first=first, stop=stop, is_cut_anew=True)
    size, is_by_rows = spec.batch_size, spec.shard_by == "rows"
    return Share(period=size * world, first=rank * size, stop=(rank + 1) * size, is_cut_anew=is_by_rows)


def can_share(spec: StreamSpec, access: DatabaseAccess) -> bool:
    """Whether a shard can do without the documents of the others.

    Only who reads a document knows whether it fits, so documents that do not are left out by all shards.
    """
    is_read_alike = spec.on_bad_document == "raise" and spec.query.projection_document is None
    is_dealt_out = spec.shard[1] > 1 and spec.shard_by != "ranges"
    return is_dealt_out and is_read_alike and get_worker_info() is None and access.reader().finds_ids


@final
class PartRows(Rows):
    """The rows of a window, of which some are there.

    Args:
        own: Those that are there.
        numbers: Which rows of the window they are, ascending.
        count: How many rows the window has.
    """

    def __init__(self, own: Rows, numbers: npt.NDArray[np.int64], count: int) -> None:
        self._own, self._numbers, self._count = own, numbers, count

    def __len__(self) -> int:
        return self._count

    def tensor(self, path: str, start: int, stop: int) -> torch.Tensor | None:
        """See `Rows.tensor`."""
        return self._own.tensor(path, *self._at(start, stop))

    def columns(self, start: int, stop: int) -> Columns:
        """See `Rows.columns`."""
        return self._own.columns(*self._at(start, stop))

    def ids(self, start: int, stop: int) -> list[Any]:
        """See `Rows.ids`."""
        return self._own.ids(*self._at(start, stop))

    @property
    def nbytes(self) -> int:
        """See `Rows.nbytes`."""
        return self._own.nbytes + self._numbers.nbytes

    def _at(self, start: int, stop: int) -> tuple[int, int]:
        first, last = (int(found) for found in np.searchsorted(self._numbers, (start, stop)))
        if last - first != stop - start:
            raise AssertionError(f"rows {start} to {stop} of a window belong to another shard; this is a bug")
        return first, last


@final
class SharedWindows:
    """Reads the windows of a stream for one shard, one after the other; see `WindowReader.read`.

    Args:
        windows: What reads them as a whole.
        access: The database.
        spec: What is streamed.
        start: Where it starts; each further epoch starts at its beginning.
    """

    def __init__(self, windows: PlannedWindows, access: DatabaseAccess, spec: StreamSpec, start: Start) -> None:
        self._windows, self._access, self._share = windows, access, share_of(spec)
        self._first_row: Callable[[Rows], int] | None = start.row
        # A shard has whole batches by their numbers in the epoch, of which the first may be behind a position.
        self._before = 0 if self._share.is_cut_anew else start.step * spec.batch_size
        self._heads_of = {"_id": 1} if windows.weight is None else {"_id": 1, windows.weight: 1}
        self._paths = () if windows.weight is None else (windows.weight,)
        self._in_flight_bytes = spec.in_flight_bytes
        self._row_bytes, self._prefetch = 0.0, False

    def read(self, specs: Iterator[WindowSpec], pressure: ReadPressure | None) -> Iterator[Window]:
        """The windows of these specs; the first one tells how large documents are.

        Args:
            specs: The windows.
            pressure: See `WindowReader.read`; None where nothing reads ahead.

        Raises: see `WindowReader.read`.
        """
        self._prefetch, pressure = pressure is not None, pressure or ReadPressure()
        first = next(specs, None)
        if first is None:
            return
        window = [self._whole(first, pressure)]
        self._pass(window[0].rows)
        yield window.pop()
        if self._row_bytes * self._share.saved(self._windows.rows * self._windows.window) < _SAVED_BYTES:
            yield from self._windows.read(specs, prefetch=self._prefetch, pressure=pressure)
            return
        for spec in itertools.takewhile(lambda _: not pressure.stopped(), specs):
            if spec.order.epoch != first.order.epoch and not spec.number:
                self._before, first = 0, spec
            window.append(self._part(spec, pressure) or self._whole(spec, pressure))
            self._pass(window[0].rows)
            yield window.pop()

    def _pass(self, rows: Rows) -> None:
        """Count the rows of a window that is read, from where the stream starts."""
        first_row, self._first_row = self._first_row, None
        self._before += len(rows) - (0 if first_row is None else first_row(rows))

    def _whole(self, spec: WindowSpec, pressure: ReadPressure) -> Window:
        """A window with all of its documents."""
        size, found = 0, list[Columns]()
        needed = itertools.takewhile(lambda _: not pressure.stopped(), spec.ranges)
        replies = self._windows.replies(needed, prefetch=self._prefetch, awaited=pressure.awaited)
        try:
            for reply in replies:
                size += sum(map(len, reply))
                found.append(self._windows.decode(reply))
        finally:
            close_iterator(replies)
        self._row_bytes = size / max(sum(map(len, found)), 1)
        return self._windows.put_together(spec, found)

    def _part(self, spec: WindowSpec, pressure: ReadPressure) -> Window | None:
        """A window with the documents of the shard; None where some of them are gone by now, or were not found."""
        heads = list(self._heads(spec, pressure))
        lengths = [len(columns) for columns in heads]
        numbered = [pair for pair in zip(spec.ranges, heads, strict=False) if len(pair[1])]
        if not numbered or len(heads) < len(spec.ranges):
            return Window(spec=spec, rows=NO_ROWS, lengths=lengths)
        keys = [id_keys(columns.ids) for _, columns in numbered]
        weights = [found for pair in numbered if (found := self._windows.weights(*pair)) is not None] or None
        order, hashes = spec.order.arranged(keys if spec.order.shuffle else [], weights)
        count = sum(lengths) if order is None else len(order)
        mine = np.flatnonzero(self._share.rows(self._before, count))
        documents, inverse = np.unique(mine if order is None else order[mine], return_inverse=True)
        chosen = list(_chosen(numbered, keys, documents))
        parts = list(self._documents(chosen, pressure))
        if pressure.stopped():
            return Window(spec=spec, rows=NO_ROWS, lengths=lengths)
        if not all(np.array_equal(id_keys(part.ids), one.keys) for part, one in zip(parts, chosen, strict=True)):
            return None
        own = self._windows.arranged(parts, inverse, is_repeated=weights is not None) if parts else NO_ROWS
        rows, ids = PartRows(own, mine, count), None if hashes is not None else numbered[0][1].ids
        rows.set_markers(hashes, ids if ids is None or order is None else ids.take(order, identity=True))
        return Window(spec=spec, rows=rows, lengths=lengths)

    def _heads(self, spec: WindowSpec, pressure: ReadPressure) -> Iterator[Columns]:
        """The `_id`s of the ranges of a window, with the weights where rows have some."""
        windows, reader = self._windows, self._access.reader(projection=self._heads_of)
        needed = itertools.takewhile(lambda _: not pressure.stopped(), spec.ranges)
        replies = windows.replies(needed, prefetch=self._prefetch, awaited=pressure.awaited, reader=reader)
        try:
            for reply in replies:
                yield windows.members_of(decode(reply, self._paths, defaults=windows.defaults))
        finally:
            close_iterator(replies)

    def _documents(self, chosen: Sequence[_Chosen], pressure: ReadPressure) -> Iterator[Columns]:
        """The documents of these `_id`s, of each range those that are there."""
        reader = self._access.reader()

        def read(one: _Chosen) -> list[Reply]:
            each = max(len(one.ids) * _IDS_BYTES // max(len(pack_ids(one.ids)), 1), 1)
            found: list[Reply] = []
            for first in range(0, len(one.ids), each):
                some = one.ids.slice(first, first + each, identity=True).values()
                found += self._windows.read_range(reader, one.number, some)
            return found

        replies = map_ordered(
            read,
            itertools.takewhile(lambda _: not pressure.stopped(), iter(chosen)),
            threads=reader.threads,
            most=_UNDER_WAY,
            most_bytes=self._in_flight_bytes,
            weigh=lambda reply: sum(map(len, reply)),
            awaited=lambda: self._prefetch and pressure.awaited(),
        )
        try:
            yield from map(self._windows.decode, replies)
        finally:
            close_iterator(replies)


class _Chosen(NamedTuple):
    """The documents of one range that a shard needs.

    Attributes:
        number: The range.
        ids: Their `_id`s.
        keys: The keys of those.
    """

    number: int
    ids: Column
    keys: U64


def _chosen(
    numbered: list[tuple[int, Columns]], keys: list[U64], documents: npt.NDArray[np.int64]
) -> Iterator[_Chosen]:
    """What of each range is among these documents of a window, which ascend."""
    first = 0
    for (number, columns), own in zip(numbered, keys, strict=True):
        low, high = np.searchsorted(documents, (first, first + len(own)))
        rows = documents[low:high] - first
        first += len(own)
        if len(rows):
            yield _Chosen(number, columns.ids.take(rows, identity=True), own[rows])
