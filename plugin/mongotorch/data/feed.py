"""Windows of ordered rows, from wherever the mode says: read now, read ahead, or held.

Always: the windows are the same in every mode; what was opened for them is closed by `close`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast, final

import numpy as np
from torch.utils.data import get_worker_info

from mongotorch.data.access import Access, RangeReader
from mongotorch.data.columns import Columns
from mongotorch.data.download import cache_name, download
from mongotorch.data.marks import IdMarks, RankMarks
from mongotorch.data.memory import Held, gathered, hold, ordered
from mongotorch.data.order import Order, worker_seed
from mongotorch.data.prefetch import Ahead, Workers, close_iterator
from mongotorch.data.report import Tally
from mongotorch.data.rows import NO_ROWS, Rows
from mongotorch.data.source import PlannedSource, Source, open_source
from mongotorch.data.spec import StreamSpec

_Window = tuple[int, Rows, list[tuple[int, int]]]


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
        if self._ahead:
            # A shuffled window is half of what may be ready: one is, and the next is put together.
            most = 1 if order.shuffle else self.spec.prefetch_factor
            windows = Ahead(windows, most=most, most_bytes=self.spec.prefetch_bytes, weigh=_weight)
        try:
            for window, rows, lengths in windows:
                for index, length in lengths:
                    self.tally.add(index, length)
                if len(rows):
                    yield window, rows
        finally:
            close_iterator(windows)

    def _windows(self, source: Source, order: Order, start: int) -> Iterator[_Window]:
        """The windows that are read, each with the rows of its ranges; in the thread that reads ahead."""
        flat = (int(i) for indices in _schedule(source, order, source.count, start) for i in indices)
        blocks = self._fetch(source, flat, order)
        try:
            for window, indices in enumerate(_schedule(source, order, source.count, start), start):
                found = list(islice(blocks, len(indices)))
                pairs = [(int(i), block) for i, block in zip(indices, found, strict=False)]
                lengths = [(index, len(block)) for index, block in pairs]
                yield window, self._ordered(source, order, [pair for pair in pairs if len(pair[1])]), lengths
                if len(found) < len(indices):
                    return
        finally:
            close_iterator(blocks)

    def _ordered(self, source: Source, order: Order, pairs: list[tuple[int, Columns]]) -> Rows:
        """The rows of some blocks in the order of the epoch."""
        parts = [block for _, block in pairs]
        if not parts:
            return NO_ROWS
        permutation, marks = None, None
        if order.shuffle:
            permutation, ranks = order.rows(np.concatenate([source.keys(*pair) for pair in pairs]))
            marks = RankMarks(ranks)
        samples = self.spec.builds_samples
        rows = ordered(parts, permutation, owned=True) if samples else gathered(parts, permutation)
        rows.marks = marks or (IdMarks(parts[0].ids) if source.by_id else None)
        return rows

    @property
    def _ahead(self) -> bool:
        return self.spec.data_prefetch and get_worker_info() is None

    def _fetch(self, source: Source, indices: Iterator[int], order: Order) -> Iterator[Columns]:
        """Blocks in order: from workers, from a thread ahead, or read when they are asked for."""
        spec = self.spec
        if get_worker_info() is None and spec.workers and source.by_id and not spec.builds_samples:
            if self._workers is None:
                reader = RangeReader(self._access, cast("PlannedSource", source))
                self._workers = Workers(reader, _without_pinning(spec.loader))
            return self._workers.map(indices, worker_seed(order.seed, order.epoch))
        if not self._ahead:
            return source.blocks(indices)
        return source.ahead(indices, spec.prefetch_bytes // 8)

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


def _weight(window: _Window) -> int:
    return window[1].nbytes


def _without_pinning(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("pin_memory")}
