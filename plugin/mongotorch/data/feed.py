"""Windows of ordered rows, from wherever the mode says: read now, read ahead, or held.

Always: the windows are the same in every mode; what was opened for them is closed by `close`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
from torch.utils.data import get_worker_info

from mongotorch.data.access import Access, RangeReader
from mongotorch.data.columns import Columns
from mongotorch.data.memory import Held, cache_name, download, hold, ordered
from mongotorch.data.order import Order, worker_seed
from mongotorch.data.prefetch import Ahead, Workers, close_iterator, nbytes
from mongotorch.data.rows import Rows
from mongotorch.data.source import PlannedSource, Source, open_source
from mongotorch.data.spec import StreamSpec


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
        if self.spec.mode == "stream":
            yield from self._read(source, order, start)
            return
        if self._held is None:
            self._held = self._hold(source)
        held = self._held
        for window, indices in enumerate(_schedule(source, order, held.count, start), start):
            keys = held.keys(indices) if self.spec.shuffle else None
            yield window, held.rows(indices, None if keys is None else order.rows(keys))

    def _read(self, source: Source, order: Order, start: int) -> Iterator[tuple[int, Rows]]:
        flat = (int(i) for indices in _schedule(source, order, source.count, start) for i in indices)
        blocks = self._fetch(source, flat, order)
        try:
            for window, indices in enumerate(_schedule(source, order, source.count, start), start):
                found = list(islice(blocks, len(indices)))
                pairs = [(int(i), b) for i, b in zip(indices, found, strict=False) if len(b)]
                if pairs:
                    parts = [block for _, block in pairs]
                    keys = np.concatenate([source.keys(*p) for p in pairs]) if order.shuffle else None
                    yield window, ordered(parts, None if keys is None else order.rows(keys), owned=True)
                if len(found) < len(indices):
                    return
        finally:
            close_iterator(blocks)

    def _fetch(self, source: Source, indices: Iterator[int], order: Order) -> Iterator[Columns]:
        """Blocks in order: from workers, from a thread ahead, or read when they are asked for."""
        spec = self.spec
        if get_worker_info() is None:
            if spec.workers and isinstance(source, PlannedSource) and not spec.builds_samples:
                if self._workers is None:
                    self._workers = Workers(RangeReader(self._access, source), _without_pinning(spec.loader))
                return self._workers.map(indices, worker_seed(order.seed, order.epoch))
            if spec.data_prefetch:
                blocks = source.blocks(indices)
                return Ahead(blocks, most=spec.prefetch_factor, most_bytes=spec.prefetch_bytes, weigh=nbytes)
        return source.blocks(indices)

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
        return self.source

    def _hold(self, source: Source) -> Held:
        if self.spec.mode == "memory":
            return hold(source, samples=self.spec.builds_samples)
        membership = self._access.reader().membership()
        name = cache_name(
            source.digest, membership, self.spec.key.paths, self.spec.query.digest(), self.spec.builds_samples
        )
        folder = self.spec.cache_dir or Path(".mongotorch/cache")
        return download(source, folder, name, samples=self.spec.builds_samples)


def _schedule(source: Source, order: Order, count: int | None, start: int) -> Iterator[Any]:
    if isinstance(source, PlannedSource):
        return order.windows(len(source.plan), start)
    return order.pieces(count, start)


def _without_pinning(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("pin_memory")}
