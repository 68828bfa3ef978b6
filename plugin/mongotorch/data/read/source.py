"""Where blocks of rows come from: ranges of `_id`, or pieces of a query's own order.

Always: a source is a sequence of blocks that is the same in every process and epoch as long as the
documents are; a block is about `rows` documents; `window` blocks are shuffled together. Which blocks are read
when is not decided here.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import numpy as np

from mongotorch.data.decode.decoder import Columns, decode
from mongotorch.data.decode.ids import U64, mix
from mongotorch.data.decode.replies import Reply, offsets
from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, close_iterator, map_ordered
from mongotorch.data.read.plan import WINDOW, Plan, Sizes, make_plan, resume_plan
from mongotorch.data.read.reader import Reader
from mongotorch.errors import DataError
from mongotorch.query import Query

_UNDER_WAY = 4  # blocks that are read but not decoded yet, at most


class Source(abc.ABC):
    """A sequence of blocks.

    Attributes:
        digest: Names the sequence, for a resumed run.
        window: Blocks that are shuffled together.
        count: Blocks there are; None is not known before the end.
        by_id: Whether rows come in the order of their `_id`s.
    """

    digest: str
    window: int
    count: int | None
    by_id: bool

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths

    @abc.abstractmethod
    def raws(self, indices: Iterable[int]) -> Iterator[list[Reply]]:
        """The blocks of these indices as BSON; ascending ones without a gap where `count` is None."""

    def blocks(self, indices: Iterable[int]) -> Iterator[Columns]:
        """The blocks of these indices, decoded.

        Raises:
            FieldMissingError: A document lacks a field.
            ServerUnavailableError: The server cannot be read.
        """
        return (self.decode(raw) for raw in self.raws(indices))

    def ahead(
        self,
        indices: Iterable[int],
        most_bytes: int,
        demand: ReadPressure | None = None,  # noqa: ARG002 - for those that can choose
    ) -> Iterator[Columns]:
        """Like `blocks`, but the server reads the next ones while one is decoded.

        Args:
            indices: Which blocks.
            most_bytes: Bytes that may be under way.
            demand: How hard to read ahead, where that can be chosen; None is as hard as possible.
        """
        raws = ThreadPrefetcher(self.raws(indices), most=_UNDER_WAY + 1, most_bytes=most_bytes, weigh=_weight)
        return self._decoded(raws)

    def _decoded(self, raws: Iterator[list[Reply]]) -> Iterator[Columns]:
        try:
            yield from map(self.decode, raws)
        finally:
            close_iterator(raws)

    def decode(self, raws: list[Reply]) -> Columns:
        """The columns of a block."""
        return decode(raws, self.paths)

    @abc.abstractmethod
    def keys(self, index: int, block: Columns) -> U64:
        """What decides the place of each row in a shuffled window, uint64 of shape (rows,)."""


@final
class PlannedSource(Source):
    """Ranges of `_id`, in any order."""

    by_id = True

    def __init__(self, open_reader: Callable[[], Reader], plan: Plan, paths: tuple[str, ...]) -> None:
        super().__init__(paths)
        self._open_reader = open_reader
        self.plan = plan
        self.digest, self.window, self.count = plan.digest, plan.window, len(plan)

    def raws(self, indices: Iterable[int]) -> Iterator[list[Reply]]:
        """See `Source.raws`."""
        reader = self._open_reader()
        return (reader.read(self.plan.span(int(index)), self.plan.rows) for index in indices)

    def ahead(
        self, indices: Iterable[int], most_bytes: int, demand: ReadPressure | None = None
    ) -> Iterator[Columns]:
        """See `Source.ahead`: ranges are independent, so two can be asked for at a time, or none ahead."""
        reader = self._open_reader()
        raws = map_ordered(
            lambda index: reader.read(self.plan.span(int(index)), self.plan.rows),
            iter(indices),
            threads=reader.threads,
            most=_UNDER_WAY,
            most_bytes=most_bytes,
            weigh=_weight,
            eager=demand.high if demand else lambda: True,
        )
        return self._decoded(raws)

    def keys(self, index: int, block: Columns) -> U64:  # noqa: ARG002 - of the interface
        """A hash of each `_id`."""
        return block.id_keys()


@final
class OwnOrderSource(Source):
    """Pieces of a query with a sort, skip, limit or pipeline; found again by skipping."""

    by_id = False

    def __init__(
        self, open_reader: Callable[[], Reader], query: Query, rows: int, window: int, paths: tuple[str, ...]
    ) -> None:
        super().__init__(paths)
        self._open_reader = open_reader
        self.rows, self.window, self.count = rows, window, None
        self.digest = f"own:{rows}:{window}:{query.digest()[:32]}"

    def raws(self, indices: Iterable[int]) -> Iterator[list[Reply]]:
        """See `Source.raws`; ends where the query ends."""
        indices = iter(indices)
        start = next(indices, None)
        if start is None:
            return
        reader = self._open_reader()
        chunks = reader.drain(start * self.rows, self.rows)
        try:
            pieces = _pieces(chunks, self.rows)
            for _, piece in zip(itertools.chain([start], indices), pieces, strict=False):
                yield piece
        finally:
            chunks.close()  # type: ignore[attr-defined]

    def keys(self, index: int, block: Columns) -> U64:
        """A hash of each row's place in the query's order."""
        first = index * self.rows
        return mix(np.arange(first, first + len(block), dtype=np.uint64))


def open_source(
    open_reader: Callable[[], Reader],
    database: Callable[[], Any],
    query: Query,
    paths: tuple[str, ...],
    sizes: Sizes,
    *,
    shuffle: bool,
    digest: str | None = None,
) -> Source:
    """The source of a query; the very one that a stopped stream had, where its digest is given.

    Raises:
        EmptySelectError: The select matches no document.
        DataError: The stopped stream had another query, or its plan is gone.
        ServerUnavailableError: The server cannot be read.
    """
    sorted_only = not query.is_pipeline and query.limited is None and not query.skipped
    if sorted_only and (shuffle or tuple(query.ordering) in ((), (("_id", 1),))):
        reader = open_reader()
        plan = (
            make_plan(database(), reader, sizes)
            if digest is None
            else resume_plan(database(), reader, sizes, digest)
        )
        return PlannedSource(open_reader, plan, paths)
    rows, window = sizes.prefetch_size, max(min(WINDOW, sizes.prefetch_factor // 2), 1)
    if digest is not None:
        rows, window = _sizes_of(digest)
    source = OwnOrderSource(open_reader, query, rows, window, paths)
    if digest not in (None, source.digest):
        raise DataError("the state is that of another query; load it into the stream that it was taken from")
    return source


def _sizes_of(digest: str) -> tuple[int, int]:
    parts = digest.split(":")
    if parts[0] != "own":
        raise DataError("the state is that of another query; load it into the stream that it was taken from")
    return int(parts[1]), int(parts[2])


def _pieces(chunks: Iterator[Reply], rows: int) -> Iterator[list[Reply]]:
    """The same BSON in pieces of exactly so many documents, the last one shorter."""
    piece: list[Reply] = []
    room = rows
    for chunk in chunks:
        first = 0
        for _, end in offsets(chunk):
            room -= 1
            if room == 0:
                yield [*piece, chunk[first:end]]
                piece, first, room = [], end, rows
        if first < len(chunk):
            piece.append(chunk[first:])
    if piece:
        yield piece


def _weight(raws: list[Reply]) -> int:
    return sum(map(len, raws))
