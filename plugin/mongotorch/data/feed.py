"""Windows of ordered rows, from wherever the mode says: read now, read ahead, or held.

Always: the windows are the same in every mode; what was opened for them is closed by `close`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, final

from torch.utils.data import get_worker_info

from mongotorch.data.access import Access
from mongotorch.data.columns import Columns
from mongotorch.data.demand import Demand
from mongotorch.data.download import cache_name, download
from mongotorch.data.marks import IdMarks, RankMarks
from mongotorch.data.memory import Held, hold
from mongotorch.data.order import Order, worker_seed
from mongotorch.data.prefetch import Ahead, close_iterator
from mongotorch.data.report import Tally
from mongotorch.data.rows import Rows
from mongotorch.data.source import PlannedSource, Source, open_source
from mongotorch.data.spec import StreamSpec
from mongotorch.data.windows import Task, Window, WindowReader, put_together
from mongotorch.data.workers import Workers


@final
class Feed:
    """The rows of a stream in one process.

    Args:
        spec: What is streamed.
        access: The database.
    """

    def __init__(self, spec: StreamSpec, access: Access) -> None:
        self.spec = spec
        self._access = access
        self.source: Source | None = None
        self._held: Held | None = None
        self._workers: Workers | None = None
        self.tally = Tally()

    def close(self) -> None:
        """End workers, let go of memory and files; it can be used again."""
        if self._held is not None:
            self._held.close()
        if self._workers is not None:
            self._workers.close()
        self.source = self._held = self._workers = None

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
        for window, indices in enumerate(_schedule(source, order, held.count, start), start):
            keys = held.keys(indices)
            for index in indices:
                self.tally.add(int(index), len(held.keys([index])))
            permutation, ranks = order.rows(keys) if order.shuffle else (None, None)
            rows = held.rows(indices, permutation)
            if ranks is not None:
                rows.marks = RankMarks(ranks)
            elif source.by_id:
                rows.marks = IdMarks(held.ids(int(indices[0])))
            yield window, rows

    def _read(self, source: Source, order: Order, start: int) -> Iterator[tuple[int, Rows]]:
        windows = self._windows(source, order, start)
        try:
            for window in windows:
                for index, length in window.lengths:
                    self.tally.add(index, length)
                if len(window.rows):
                    yield window.number, window.rows
        finally:
            close_iterator(windows)

    def _windows(self, source: Source, order: Order, start: int) -> Iterator[Window]:
        """The windows that are read: by workers, by threads ahead, or when they are asked for."""
        spec = self.spec
        here = get_worker_info() is None
        if here and spec.workers and isinstance(source, PlannedSource) and not spec.builds_samples:
            schedule = enumerate(order.windows(len(source.plan), start), start)
            demand = Demand(crowded=self._access.reader().crowded())
            tasks = (
                Task(order=order, number=number, indices=[int(i) for i in indices], ahead=demand.high())
                for number, indices in schedule
            )
            return self._reading_workers(source).map(tasks, worker_seed(order.seed, order.epoch), demand)
        if not (here and spec.data_prefetch):
            return self._assembled(source, order, start, None)
        demand = Demand(crowded=self._access.reader().crowded())
        windows = self._assembled(source, order, start, demand)
        # A shuffled window is half of the bounds: one is trained on while the next is put together, and no more.
        most = 0 if order.shuffle else spec.prefetch_factor
        return Ahead(windows, most=most, most_bytes=spec.prefetch_bytes, weigh=_weight, demand=demand)

    def _assembled(self, source: Source, order: Order, start: int, demand: Demand | None) -> Iterator[Window]:
        """The windows put together; what they are made of is read ahead where there is a demand to go by."""
        flat = (int(i) for indices in _schedule(source, order, source.count, start) for i in indices)
        most = self.spec.prefetch_bytes // 8
        blocks = source.blocks(flat) if demand is None else source.ahead(flat, most, demand)
        try:
            for number, indices in enumerate(_schedule(source, order, source.count, start), start):
                # Nothing is named here: a name would keep the blocks, and the window, while the next one is read.
                window = [self._put_together(source, order, number, indices, blocks)]
                complete = len(window[0].lengths) == len(indices)
                yield window.pop()
                if not complete:
                    return
        finally:
            close_iterator(blocks)

    def _put_together(
        self, source: Source, order: Order, number: int, indices: Any, blocks: Iterator[Columns]
    ) -> Window:
        found = list(islice(blocks, len(indices)))
        return put_together(source, order, number, indices, found, samples=self.spec.builds_samples)

    def _reading_workers(self, source: PlannedSource) -> Workers:
        if self._workers is None:
            # A window is as large as half of the bounds: not the loader's usual two for each worker.
            ahead = 1 if self.spec.workers > 1 else 2
            options = {n: v for n, v in self.spec.loader.items() if not n.startswith("pin_memory")}
            reader = WindowReader(self._access, source, self.spec.prefetch_bytes // 8)
            self._workers = Workers(reader, {**options, "prefetch_factor": ahead})
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

    def _hold(self, source: Source) -> Held:
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


def _schedule(source: Source, order: Order, count: int | None, start: int) -> Iterator[Any]:
    if isinstance(source, PlannedSource):
        return order.windows(len(source.plan), start)
    return order.pieces(count, start)


def _weight(window: Window) -> int:
    return window.nbytes
