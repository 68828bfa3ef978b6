"""Reads the windows of an epoch: ranges of documents become rows in the order of the epoch.

A query is read as numbered ranges of about equal size: ranges of `_id` where its plan has them (`PlannedWindows`),
else so many documents at a time in the query's own order (`OwnOrderWindows`). A window is a few ranges that are
shuffled together. `read` is an ordered map (see `prefetch`): it can be called here, in a thread or in a worker
process.

Guarantees: ranges are the same in every process and epoch as long as the documents are; a window is a function of
its ranges and of the order of its epoch, wherever it is read.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from bson import Regex

from mongotorch.data.decode import U64, Columns, Reply, among, decode, id_keys, pack_ids
from mongotorch.data.prefetch import ReadPressure, ThreadPrefetcher, close_iterator, map_ordered
from mongotorch.data.read import (
    MOST_SHUFFLED_RANGES,
    DatabaseAccess,
    Form,
    Plan,
    Reader,
    RunDtypes,
    decode_fitting,
    is_snapshot_lost,
    make_plan,
    regrouped,
    resume_plan,
    weights_of,
    with_weights,
)
from mongotorch.data.stream.batches import NO_ROWS, Rows, TensorRows, gathered, ordered
from mongotorch.data.stream.shuffle import Order, WindowSpec, position_keys, row_weights
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.data.training_set import only, only_once, scan_members
from mongotorch.errors import DataError, QueryError

_FOUND_BYTES = 16 * 2**20  # of `_id`s that are kept for the next epoch
_FOUND_BYTES_OF_RANGE = 2**20
_UNDER_WAY = 4  # ranges that are read but not decoded yet, at most


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of some ranges, in the order of an epoch.

    Attributes:
        spec: Which window.
        rows: Its rows.
        lengths: How many documents each of its ranges had; fewer of these than ranges where the query ends.
        skipped: How many of those are not among the rows, because they do not fit.
        why: What is wrong with the first of them.
    """

    spec: WindowSpec
    rows: Rows
    lengths: list[int]
    skipped: int = 0
    why: str = ""

    @property
    def complete(self) -> bool:
        """Whether no range is missing."""
        return len(self.lengths) == len(self.spec.ranges)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.nbytes


@final
class RepeatedRows(Rows):
    """Rows that come as often as their weights say: what was read is held once, and batches are copies of it.

    Args:
        source: The rows as they were read.
        order: Which of them comes when.
    """

    def __init__(self, source: TensorRows, order: npt.NDArray[np.int64]) -> None:
        self._source, self._order = source, torch.from_numpy(order)
        self._tensors = source.batch(0, len(source))

    def __len__(self) -> int:
        return len(self._order)

    def tensor(self, path: str, start: int, stop: int) -> torch.Tensor | None:
        """See `Rows.tensor`."""
        return self._tensors[path].index_select(0, self._order[start:stop])

    def columns(self, start: int, stop: int) -> Columns:
        """Never asked for, as of its source."""
        return self._source.columns(start, stop)

    def ids(self, start: int, stop: int) -> list[Any]:
        """See `Rows.ids`."""
        return [self._source.ids(row, row + 1)[0] for row in self._order[start:stop].tolist()]

    @property
    def nbytes(self) -> int:
        """See `Rows.nbytes`."""
        return self._source.nbytes + self._order.nbytes


def repeated(parts: list[Columns], order: npt.NDArray[np.int64]) -> Rows:
    """The rows of ranges that are used nowhere else, in an order that has some several times or not at all."""
    source = gathered(parts, None) if len(order) else NO_ROWS
    return RepeatedRows(source, order) if isinstance(source, TensorRows) else ordered(parts, order, owned=True)


class WindowReader(abc.ABC):
    """Reads the windows of a query; picklable, so that worker processes read with a copy of it.

    Args:
        access: The database.
        spec: What is streamed.

    Attributes:
        digest: Names the sequence of ranges, for a resumed run.
        rows: About how many documents a range has.
        window: How many ranges are shuffled together.
        count: How many ranges there are; None where that is not known before the end.
        paths: The fields.
        weight: The field with the weight of a document; None lets each document come once.
        members: The documents that are read, see `StreamSpec.members`.
        pending: The same where they are being scanned, see `StreamSpec.pending`.
        dtypes: Those of the run, see `RunDtypes`.
        defaults: The values of fields that a document lacks.
        samples: Whether samples are built of the rows, which needs the values and not just tensors.
        skips: Whether documents that do not fit are left out.
        forms: What fields that become tensors look like where those are left out, see `RunDtypes`.
        plan: Where ranges are those of `_id`; None where documents come in the query's own order.
    """

    digest: str
    rows: int
    window: int
    count: int | None = None
    plan: Plan | None = None

    def __init__(self, access: DatabaseAccess, spec: StreamSpec) -> None:
        self._access = access
        self._shard = spec.shard if spec.shard_by == "ranges" else (0, 1)
        # Not the spec itself: it may hold functions that cannot be pickled.
        self.paths: tuple[str, ...] = spec.key.paths
        self.weight = spec.sample_weight
        self._read_paths = spec.read_key.paths
        self.members, self.pending = spec.members, spec.pending
        self._has_own_ids = access.query.keeps_ids
        self.defaults = dict(spec.defaults or {})
        self.dtypes = dict(spec.dtypes or {})
        self.skips = spec.on_bad_document == "skip"
        self.forms: dict[str, Form] = {}
        self.samples, self._in_flight_bytes = spec.builds_samples, spec.in_flight_bytes

    @abc.abstractmethod
    def order(self, order: Order, start: int, count: int | None) -> Iterator[npt.NDArray[np.int64]]:
        """The ranges of each window of an epoch from window `start` on."""

    def windows(self, order: Order, start: int = 0, *, count: int | None = None) -> Iterator[WindowSpec]:
        """The windows of an epoch from window `start` on.

        Args:
            order: Of the epoch.
            start: The first window.
            count: How many ranges there are, where it is known by now.
        """
        return order.specs(self.order(order, start, count), start)

    def read(
        self,
        specs: Iterator[WindowSpec],
        *,
        prefetch: bool = True,
        pressure: ReadPressure | None = None,
    ) -> Iterator[Window]:
        """The windows of these specs, one after the other; the last one may be short where the query ends.

        Ranges are read ahead inside an epoch only: those of a small one may be all that is read ahead.

        Args:
            specs: Taken as far ahead as ranges are read ahead.
            prefetch: Whether the server reads the next ranges while one is decoded.
            pressure: Whether the windows are needed (else reading ends after the current range), and whether
                somebody waits for one (else one range is read after the other); always, unless given.

        Raises:
            FieldMissingError: A document lacks a field.
            ServerUnavailableError: The server cannot be read.
        """
        pressure = pressure or ReadPressure()
        for _, epoch in itertools.groupby(specs, key=lambda spec: spec.order.epoch):
            these, following = itertools.tee(epoch)
            numbers = (number for spec in following for number in spec.ranges)
            needed = itertools.takewhile(lambda _: not pressure.stopped(), numbers)
            ranges = self.ranges(needed, prefetch=prefetch, awaited=pressure.awaited)
            try:
                for spec in these:
                    # Nothing is named: a name would keep the ranges, and the window, while the next one is read.
                    window = [self.put_together(spec, list(islice(ranges, len(spec.ranges))))]
                    complete = window[0].complete
                    yield window.pop()
                    if not complete:
                        return
            finally:
                close_iterator(ranges)

    def ranges(
        self, numbers: Iterable[int], *, prefetch: bool = True, awaited: Callable[[], bool] = lambda: True
    ) -> Generator[Columns, None, None]:
        """The ranges of these numbers, decoded. Raises: see `read`."""
        replies = self.replies(numbers, prefetch=prefetch, awaited=awaited)
        try:
            yield from map(self.decode, replies)
        finally:
            close_iterator(replies)

    def all_ranges(self) -> Iterator[int]:
        """The numbers of all ranges; endless where their number is not known."""
        return iter(range(self.count)) if self.count is not None else itertools.count()

    @abc.abstractmethod
    def replies(
        self, numbers: Iterable[int], *, prefetch: bool = False, awaited: Callable[[], bool] = lambda: True
    ) -> Iterator[list[Reply]]:
        """The ranges of these numbers as BSON; they ascend without a gap where there is no plan."""

    def decode(self, replies: list[Reply]) -> Columns:
        """The columns of the members of a range."""
        if self.skips:
            return self._fitting(self.kept(replies))
        return self.members_of(self._decoded(replies)).typed(self.dtypes)

    def members_of(self, columns: Columns) -> Columns:
        """The members among the rows of a range."""
        members = self.known_members()
        if members is None or (kept := among(id_keys(columns.ids), members)).all():
            return columns
        return columns.take(np.flatnonzero(kept))

    def _decoded(self, replies: list[Reply]) -> Columns:
        """The columns of documents; the weight is a field of them, and a path only where the key has it."""
        columns = decode(replies, self._read_paths, defaults=self.defaults)
        return columns if self.weight is None else replace(columns, paths=self.paths)

    def _fitting(self, replies: list[Reply]) -> Columns:
        columns = decode_fitting(
            replies, self._read_paths, defaults=self.defaults, dtypes=self.dtypes, forms=self.forms
        )
        return columns if self.weight is None else with_weights(replace(columns, paths=self.paths), self.weight)

    def weights(self, number: int, columns: Columns) -> npt.NDArray[Any] | None:
        """How many times each row of a range is expected, (rows,) of `ROW_WEIGHT`; None: each comes once.

        Raises:
            DataError: A value that is no weight.
        """
        if self.weight is None:
            return None
        return row_weights(self.draw_keys(number, columns), weights_of(columns, self.weight))

    def draw_keys(self, number: int, columns: Columns) -> U64:
        """What decides how often each row of a range comes: its `_id`; its position where the query has none."""
        return id_keys(columns.ids) if self._has_own_ids else self.keys(number, columns)

    def kept(self, replies: list[Reply]) -> list[Reply]:
        """The members among the documents of a range."""
        members = self.known_members()
        return replies if members is None else [only(reply, members) for reply in replies]

    def known_members(self) -> U64 | None:
        """The members, where they are known and not everything: what was read before that has no others."""
        if self.pending is None or not self.pending.is_known:
            return self.members
        return self.pending.ids

    @abc.abstractmethod
    def count_rows(self) -> int | None:
        """How many documents an epoch has now, as the server counts them; None where only reading tells.

        Raises:
            ServerUnavailableError: The server cannot be read.
        """

    @abc.abstractmethod
    def keys(self, number: int, columns: Columns) -> U64:
        """What decides where each row of a range comes in a shuffled window, uint64 of shape (rows,)."""

    def put_together(self, spec: WindowSpec, ranges: list[Columns]) -> Window:
        """The window of these ranges; fewer of them than it has where the query ends."""
        lengths = [len(columns) + columns.skipped for columns in ranges]
        skipped, why = sum(one.skipped for one in ranges), next((one.why for one in ranges if one.why), "")
        numbered = [pair for pair in zip(spec.ranges, ranges, strict=False) if len(pair[1])]
        if not numbered:
            return Window(spec=spec, rows=NO_ROWS, lengths=lengths, skipped=skipped, why=why)
        parts = [columns for _, columns in numbered]
        weights = [found for pair in numbered if (found := self.weights(*pair)) is not None] or None
        keys = [self.keys(*pair) for pair in numbered] if spec.order.shuffle else []
        order, hashes = spec.order.arranged(keys, weights)
        rows = self.arranged(parts, order, is_repeated=weights is not None)
        ids = None if self.plan is None or hashes is not None else parts[0].ids
        rows.set_markers(hashes, ids if ids is None or order is None else ids.take(order, identity=True))
        return Window(spec=spec, rows=rows, lengths=lengths, skipped=skipped, why=why)

    def arranged(self, parts: list[Columns], order: npt.NDArray[np.int64] | None, *, is_repeated: bool) -> Rows:
        """The rows of ranges that are used nowhere else, in an order that may have some several times."""
        if self.samples:
            return ordered(parts, order, owned=True)
        return repeated(parts, order) if is_repeated and order is not None else gathered(parts, order)


@final
class PlannedWindows(WindowReader):
    """Windows of ranges of `_id`, which can be read in any order."""

    def __init__(self, access: DatabaseAccess, spec: StreamSpec, plan: Plan) -> None:
        super().__init__(access, spec)
        self.plan: Plan = plan
        self.digest, self.rows, self.window, self.count = plan.digest, plan.rows, plan.window, len(plan)
        # Finding few among many costs a scan, so what it found is kept: the `_id`s of a range, as BSON.
        self._found: dict[int, bytes] | None = {} if access.query.fold_is_small else None
        self._found_bytes = 0

    def order(self, order: Order, start: int, count: int | None) -> Iterator[npt.NDArray[np.int64]]:  # noqa: ARG002 - of the interface
        """See `WindowReader.order`; of a shard of ranges, its own windows."""
        rank, world = self._shard
        return itertools.islice(order.windows(len(self.plan), start * world), rank, None, world)

    def replies(
        self,
        numbers: Iterable[int],
        *,
        prefetch: bool = False,
        awaited: Callable[[], bool] = lambda: True,
        reader: Reader | None = None,
    ) -> Iterator[list[Reply]]:
        """See `WindowReader.replies`: ranges are independent, so two can be asked for at a time.

        With another reader they have what that one reads of documents.
        """
        using = reader or self._access.reader()

        def read(number: int) -> list[Reply]:
            known = None if self._found is None else self._found.get(number)
            if known is not None:
                return using.read(self.plan.bounds(number), self.plan.rows, decode([known], ()).ids.values())
            replies = self.read_range(using, number)
            self._keep(number, replies)
            return replies

        if not prefetch or len(self.plan) == 1:  # a thread for one range is only waited for
            return map(read, numbers)
        return map_ordered(
            read,
            iter(numbers),
            threads=using.threads,
            most=_UNDER_WAY,
            most_bytes=self._in_flight_bytes,
            weigh=_weigh,
            awaited=awaited,
        )

    def read_range(self, reader: Reader, number: int, ids: list[Any] | None = None) -> list[Reply]:
        """A range, or only these of its `_id`s, as it is; while the members are not known as it was then."""
        bounds, pending = self.plan.bounds(number), self.pending
        rows = self.plan.rows if ids is None else len(ids)
        if pending is None or pending.is_known:
            return reader.read(bounds, rows, ids)
        try:
            return reader.read(bounds, rows, ids, at=pending.at)
        except QueryError as error:
            if not is_snapshot_lost(error):
                raise
        pending.wait()
        return reader.read(bounds, rows, ids)

    def _keep(self, number: int, replies: list[Reply]) -> None:
        if self._found is None or self._found_bytes > _FOUND_BYTES:
            return
        ids = decode(replies, ()).ids
        packed = pack_ids(ids)
        # A regular expression would be looked for as a pattern.
        patterns = isinstance(ids.data, list) and any(isinstance(one, Regex) for one in ids.data)
        if len(packed) <= _FOUND_BYTES_OF_RANGE and not patterns:
            self._found[number] = packed
            self._found_bytes += len(packed)

    def count_rows(self) -> int | None:
        """See `WindowReader.count_rows`."""
        members = self.known_members()
        if members is not None:
            return len(members)
        at = None if self.pending is None or self.pending.is_known else self.pending.at
        return self._access.reader().count(self.plan.whole, at=at)

    def keys(self, number: int, columns: Columns) -> U64:  # noqa: ARG002 - of the interface
        """A hash of each `_id`."""
        return id_keys(columns.ids)


@final
class OwnOrderWindows(WindowReader):
    """Windows of a query with a sort, skip, limit or pipeline; a range is found again by skipping."""

    def __init__(self, access: DatabaseAccess, spec: StreamSpec, rows: int, window: int) -> None:
        super().__init__(access, spec)
        self.rows, self.window = rows, window
        self.digest = f"own:{rows}:{window}:{spec.query.digest()[:32]}"

    def order(self, order: Order, start: int, count: int | None) -> Iterator[npt.NDArray[np.int64]]:
        """See `WindowReader.order`."""
        return order.consecutive(count, start)

    def replies(
        self,
        numbers: Iterable[int],
        *,
        prefetch: bool = False,
        awaited: Callable[[], bool] = lambda: True,  # noqa: ARG002 - one cursor is asked anyway
    ) -> Iterator[list[Reply]]:
        """See `WindowReader.replies`; ends where the query ends."""
        numbers = iter(numbers)
        start = next(numbers, None)
        if start is None:
            return
        reader = self._access.reader()
        if self.members is None:
            replies = reader.own_order(start * self.rows, self.rows)
        else:
            replies = islice(regrouped(self._members(reader, self.members), self.rows), start, None)
        if prefetch:
            replies = ThreadPrefetcher(
                replies, most=_UNDER_WAY + 1, most_bytes=self._in_flight_bytes, weigh=_weigh
            )
        try:
            for _, reply in zip(itertools.chain([start], numbers), replies, strict=False):
                yield reply
        finally:
            close_iterator(replies)

    def _members(self, reader: Reader, members: U64) -> Iterator[Reply]:
        """The members in the order of the query: places in it are counted among them alone."""
        replies = reader.drain(0, self.rows)
        try:
            if reader.query.is_pipeline:  # which may give an `_id` several times
                yield from (only(reply, members) for reply in replies)
            else:
                yield from only_once(replies, members)
        finally:
            close_iterator(replies)

    def decode(self, replies: list[Reply]) -> Columns:
        """The columns of a range, which has members only."""
        if self.skips:
            return self._fitting(replies)
        return self._decoded(replies).typed(self.dtypes)

    def kept(self, replies: list[Reply]) -> list[Reply]:
        """All documents of a range."""
        return replies

    def count_rows(self) -> int | None:
        """See `WindowReader.count_rows`; what a pipeline gives is only known when it has run."""
        reader = self._access.reader()
        if reader.query.is_pipeline:
            return None
        return reader.count(None) if self.members is None else len(self.members)

    def keys(self, number: int, columns: Columns) -> U64:
        """A hash of each row's position in the query."""
        return position_keys(number * self.rows, len(columns))


def open_windows(access: DatabaseAccess, spec: StreamSpec, digest: str | None = None) -> WindowReader:
    """What reads the windows of a stream; the same ranges as a stopped stream had, where its digest is given.

    Raises:
        EmptySelectError: The select matches no document.
        DataError: The stopped stream had another query, or its plan is gone.
        ServerUnavailableError: The server cannot be read.
    """
    windows = _open(access, spec, digest)
    run = spec.run_dtypes
    windows.dtypes = {**run.of(access, windows.paths, windows.defaults), **windows.dtypes}
    if windows.skips and not windows.samples:
        windows.forms = dict(run.forms(access, windows.paths, windows.defaults))
    return windows


def _open(access: DatabaseAccess, spec: StreamSpec, digest: str | None) -> WindowReader:
    query, sizes = spec.query, spec.sizes
    if query.is_whole and (spec.shuffle or tuple(query.ordering) in ((), (("_id", 1),))):
        database, reader = access.database(), access.reader()
        if digest is None:
            return PlannedWindows(access, spec, make_plan(database, reader, sizes))
        return PlannedWindows(access, spec, resume_plan(database, reader, sizes, digest))
    rows, window = sizes.prefetch_size, max(min(MOST_SHUFFLED_RANGES, sizes.prefetch_factor // 2), 1)
    if digest is not None:
        rows, window = _sizes_of(digest)
    windows = OwnOrderWindows(access, spec, rows, window)
    if digest not in (None, windows.digest):
        raise DataError(_OTHER_QUERY)
    return windows


def count_drawn(
    access: DatabaseAccess, spec: StreamSpec, digest: str | None, orders: Sequence[Order]
) -> list[int] | None:
    """How many rows each of some epochs has by the weights of its documents; None where only reading tells.

    Only weights are read, once for all of these epochs.

    Args:
        access: The database.
        spec: What is streamed, with a weight.
        digest: See `open_windows`.
        orders: Of the epochs.

    Raises:
        DataError: A value that is no weight.
        ServerUnavailableError: The server cannot be read.
    """
    path = spec.sample_weight
    assert path is not None  # noqa: S101 - for the type checker
    if access.query.is_pipeline:
        return None
    weights = replace(
        spec,
        key=path,
        dtypes=None,
        transform=None,
        collate_fn=None,
        defaults={path: value} if (value := (spec.defaults or {}).get(path)) is not None else None,
        run_dtypes=RunDtypes(),
    )
    reader = _open(weights.open_access(access.database, access.database()), weights, digest)
    counts = np.zeros(len(orders), np.int64)
    for number, columns in enumerate(reader.ranges(reader.all_ranges())):
        found = row_weights(reader.draw_keys(number, columns), weights_of(columns, path))
        counts += [int(order.times(found).sum()) for order in orders]
    return counts.tolist()


def content_of(access: DatabaseAccess, spec: StreamSpec) -> str:
    """The digest of what a stream reads, as `Members.digest` gives it; all of it is read for that.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    found = scan_members(
        access.database(),
        access.query,
        spec.read_key,
        read_deadline_s=spec.read_deadline_s,
        most=0,
        members=spec.members,
    )
    return found.digest


_OTHER_QUERY = "the state is that of another query; load it into the stream that it was taken from"


def _sizes_of(digest: str) -> tuple[int, int]:
    parts = digest.split(":")
    if parts[0] != "own":
        raise DataError(_OTHER_QUERY)
    return int(parts[1]), int(parts[2])


def _weigh(replies: list[Reply]) -> int:
    return sum(map(len, replies))
