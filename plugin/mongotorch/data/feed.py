"""Windows of ordered rows, from wherever the mode says: read now, read ahead, or held.

Always: the windows are the same in every mode; what was opened for them is closed by `close`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeGuard, final

from torch.utils.data import get_worker_info

from mongotorch.data.access import Access
from mongotorch.data.demand import Demand
from mongotorch.data.download import cache_name, download
from mongotorch.data.marks import IdMarks, RankMarks
from mongotorch.data.memory import Held, hold
from mongotorch.data.onward import Onward
from mongotorch.data.order import Order, worker_seed
from mongotorch.data.prefetch import Ahead, close_iterator
from mongotorch.data.report import Tally
from mongotorch.data.rows import Rows
from mongotorch.data.source import PlannedSource, Source, open_source
from mongotorch.data.spec import StreamSpec
from mongotorch.data.tasks import errands, joined, orders, schedule, tasks_of
from mongotorch.data.windows import Window, WindowReader, brought, read_epochs
from mongotorch.data.workers import Workers
from mongotorch.errors import DataError


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
        self._onward: Onward | None = None
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
                rows.marks = RankMarks(ranks)
            elif source.by_id:
                rows.marks = IdMarks(held.ids(int(indices[0])))
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
                    self._onward = Onward(self, replace(order, epoch=order.epoch + 1), windows)
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
        demand = Demand(crowded=self._access.reader().crowded())
        # A shuffled window is half of the bounds at most: one is trained on while the next is put together.
        most = 2 * order.window if order.shuffle else max(spec.prefetch_factor, 2)
        return Ahead(
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
            demand = Demand(crowded=self._access.reader().crowded())
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


def _weight(window: Window) -> int:
    return window.nbytes
