"""The training stream: documents of a query as batches of tensors, epoch after epoch.

Guarantees: the batches of an epoch are a function of (documents, query, seed, epoch, batch size, shard) and of how
large the ranges of the plan are (`prefetch_size`, `prefetch_factor`, `prefetch_bytes` where the run began): not of
the mode, of reading ahead, of workers, or of where the stream was stopped and with what sizes it was resumed. Each
document is yielded once an epoch, or as often as its `sample_weight` says. A position is a few numbers, and
resuming seeks to it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from typing import Any, final

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mongotorch.data.prefetch import WorkerPool, check_picklable, close_iterator
from mongotorch.data.stream.batches import (
    Built,
    LaneBatches,
    RowSlice,
    SampleBuilder,
    batch_of,
    columns_of,
    count_batches,
    cut,
    lane_of,
    rows_in,
)
from mongotorch.data.stream.epochs import EpochReader, Report, Start
from mongotorch.data.stream.position import LoaderEpochs, Position, Turn
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.errors import DataError, EmptySelectError, LengthUnknownError, TransformError
from mongotorch.resources import Owner
from mongotorch.tensors import map_tensors, pin_memory

_STATE_VERSION = 1
_TURN = "turn"  # in the state of a worker: its number, how many there are, its next turn, whether it has ended


@final
class Stream(Owner, IterableDataset[Any]):
    """An `IterableDataset` of batches; each iteration is one epoch, and `len` is the number of its batches.

    Under a `torch.utils.data.DataLoader` (with `batch_size=None`) the workers share the batches in turn. Each
    iteration of the loader is the next epoch, with persistent workers or not; `set_epoch` chooses another one.
    While workers read, only they know how far they are: take the state of torchdata's `StatefulDataLoader` then.

    **Documents that are inserted or deleted meanwhile.** The first iteration fixes the plan: bounds on `_id`
    between the first and the last document that the select has then. They hold for the life of the stream, and for
    streams that resume from its state.

    - A document with an `_id` outside of the bounds (with generated ObjectIds: any later one) belongs to the next
      stream.
    - A document inserted inside the bounds is yielded once in this epoch if its window has not been read yet, else
      from the next epoch on (with `across_epochs`, which reads the first windows early, the one after that). It is
      never yielded twice, and moves no other document.
    - Of a fold with less than half of the documents, `valid` as a rule, the first epoch finds the `_id`s for the
      later ones: a document inserted inside the bounds after that belongs to the next stream.
    - A document deleted before its window is read is not yielded, and moves no other document. `report` counts
      both.
    - A resumed stream continues right behind the last row that was yielded, even if that row or rows before it are
      gone. It finds the place by the row's hash with `shuffle`, else by its `_id` (of up to 250 bytes; behind a
      longer one it counts rows).
    - After such a change batches hold the same rows in the same order, but are cut at other places.
    - A query with a sort (without `shuffle`), a skip, a limit or a pipeline has no bounds: it runs again each
      epoch, resuming counts rows, and a change in between shifts them.
    - Each shard reads for itself: shards are disjoint as long as the documents do not change during an epoch.
    - `memory` and `download` read once; the stream does not notice later changes.

    Args:
        open_database: Opens the database, once in each process that reads; what it opens is closed by `close`.
        spec: What to stream, and how.
        database: An open database to use in this process; it is left open.

    Attributes:
        batch_rows: How many documents the batch is of that was yielded last; None before the first.
        is_epoch_over: Whether it is known that this batch was the last of its epoch; a loaded state says nothing.

    Raises:
        EmptySelectError: On iteration: the select matches no document.
        FieldMissingError: On iteration: a document lacks a field of the key.
        DtypeError: On iteration: a value does not fit the dtype that its field has for the whole run.
        ShapeError: On iteration: the values of a batch differ in shape.
        ServerUnavailableError: On iteration: reading failed for longer than `read_deadline_s`.
    """

    def __init__(self, open_database: Callable[[], Any], spec: StreamSpec, *, database: Any = None) -> None:
        self.spec = spec
        self._access = spec.open_access(open_database, database)
        spec.run_dtypes.bind(self._access)
        self._builder = SampleBuilder(
            key=spec.key,
            transform=spec.transform,
            signature=spec.signature,
            collate_fn=spec.collate_fn,
            skips=spec.on_bad_document == "skip",
        )
        self._seed = spec.seed
        self._position = Position()
        self._resume: str | None = None  # the digest of what to go on reading
        self._pending = True  # whether the position is where the next iteration starts
        self._reader = EpochReader(spec, self._access)
        self._builders: WorkerPool[Any, Any] | None = None
        self._running: Iterator[Any] | None = None
        self._loaders = LoaderEpochs()
        self._turn: Turn | None = None  # in a worker of a user's loader, once it has begun
        self._own = False  # whether the position is that of a state which was loaded in such a worker
        self._ended = False  # and whether that worker had no batch left in its epoch
        self._taken = False  # whether a batch was asked for in this iteration
        self._found = False  # whether this iteration has found a batch, be it that of another worker
        self._skipped_elsewhere = 0  # documents of this epoch that the transforms of other shards left out
        self.batch_rows: int | None = None
        self.is_epoch_over = False

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "_reader": EpochReader(self.spec, self._access),
            "_builders": None,
            "_running": None,
        }
        if get_spawning_popen() is None:  # a copy for itself, not one for a worker of a loader
            fresh["_loaders"] = LoaderEpochs()
        position = Position.from_state(self._position.state())  # without the markers of a window
        return {**self.__dict__, **fresh, "_position": position, "_resume": self._digest()}

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or the rest of the one whose state was loaded.

        Where nothing is left of that one it is the next epoch. An iteration from which no batch is taken does not
        count as one. An earlier iteration that has not ended is ended by this.
        """
        self._stop()
        info = get_worker_info()
        if info is not None:
            self._begin_in_worker(info.seed - info.id, Turn(worker=info.id, workers=info.num_workers))
        self._running, self._taken = self._epoch(), False
        return self._running

    def rest(self) -> Iterator[Any]:
        """The batches that are left of the epoch whose state was loaded: none where that epoch has ended.

        The iteration after it is the next epoch. Not for the workers of a `DataLoader`.
        """
        self._stop()
        self._running, self._taken = self._epoch(is_rest=True), False
        return self._running

    def samples(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """The documents of one epoch as samples in place of batches, for a spec whose `collate_fn` is `list`.

        Yields:
            The `_id`s of up to `batch_size` documents, exactly as they are stored, and their samples in the same
            order. The position of the stream stays where it is.
        """
        cuts = self._cuts(Position())
        try:
            for slices, _ in cuts:
                columns = columns_of(slices)
                yield columns.ids.values(), self._builder(columns).batch
        finally:
            close_iterator(cuts)

    def __repr__(self) -> str:
        spec = self.spec
        return f"Stream({spec.query!r}, fields={list(spec.key.paths)!r}, batch_size={spec.batch_size})"

    def __len__(self) -> int:
        """How many batches an epoch has for this shard, by the documents that there are now.

        The server counts them once an epoch; with `sample_weight` the weights are read for it, unless they are in
        memory or in a download. Where fewer batches are left, because a state was loaded, this is
        still the number of the whole epoch.

        Raises:
            LengthUnknownError: The query is a pipeline that is read anew each epoch: only reading tells.
            EmptySelectError: The select matches no document.
            ServerUnavailableError: The server cannot be read.
        """
        rows = self._reader.count_rows(self._seed, self._position.epoch, self._digest())
        return self._batches_of([rows])[0]

    def lengths(self, epochs: int) -> list[int]:
        """How many batches each of so many epochs has, from the present one on; they differ by `sample_weight`.

        Raises: as `len`.
        """
        if self.spec.sample_weight is None:
            return [len(self)] * epochs
        rows = self._reader.count_epochs(self._seed, self._position.epoch, epochs, self._digest())
        return self._batches_of([None] if rows is None else rows)

    def _batches_of(self, rows: Sequence[int | None]) -> list[int]:
        if None in rows:
            raise LengthUnknownError(
                f"the length is not known: the query of {self.spec.query.collection!r} is a pipeline, and only "
                "reading tells how many documents it gives; use in_memory=True or download=True"
            )
        return [self._batches_of_rows(count) for count in rows if count is not None]

    def _batches_of_rows(self, rows: int) -> int:
        spec, shard = self.spec, self.spec.shard
        if spec.lanes:
            batches = count_batches(rows, batch_size=spec.batch_size, drop_last=spec.drop_last, shard=(0, 1))
            return -(-batches // spec.accumulation)
        dealt = (0, 1) if spec.shard_by == "batches" else shard
        batches = count_batches(rows, batch_size=spec.batch_size, drop_last=spec.drop_last, shard=dealt)
        return batches if dealt == shard else len(range(shard[0], batches, shard[1]))

    def __bool__(self) -> bool:
        return True

    @property
    def report(self) -> Report:
        """How many documents this epoch has read here, and how many of the plan were gone or new.

        Under a user's loader the workers count, each for itself, and this process has no numbers.
        """
        return self._reader.report

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration, also one that has not begun, be this epoch: what a loaded state left, or all.

        Where the workers of a loader are kept, they hear of it when they begin their next epoch.
        """
        read_by_workers = get_worker_info() is None and self._loaders.latest() is not None
        if self._pending and self._position.epoch == epoch and not read_by_workers:
            return
        if self._taken:
            self._stop()
        self._reader.keep_next(epoch)
        self._position, self._pending = Position(epoch=epoch), True
        self._loaders.moved(self._state())

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, behind the last batch that it yielded; under 1 KB of JSON.

        Raises:
            DataError: The workers of a `DataLoader` read this stream, and this process does not know how far they
                are.
        """
        if get_worker_info() is None and self._loaders.latest() is not None:
            raise DataError(
                "the workers of a DataLoader read this stream, and this process does not know how far they are: "
                "use torchdata's StatefulDataLoader and its state_dict(), or num_workers=0; set_epoch() and "
                "load_state_dict() make this stream's own position count again"
            )
        if self._turn is None:
            return self._state()
        turn = [self._turn.worker, self._turn.workers, self._turn.number, self._pending]
        return {**self._state(), _TURN: turn}

    def planned_state(self) -> dict[str, Any]:
        """The state before the first batch, with ranges and dtypes decided: streams that load it read alike.

        Raises: as iterating.
        """
        self._reader.open(self._resume)
        return self._state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the seed of that stream; other settings may differ.

        Raises:
            DataError: No such state, or that of a stream with another `shuffle` or `sample_weight`, or of a worker
                of a loader that has another number of workers.
        """
        if state.get("weight") != self.spec.sample_weight:
            raise DataError(
                f"this state is that of a stream with sample_weight={state.get('weight')!r}, and this stream has "
                f"{self.spec.sample_weight!r}"
            )
        if state.get("v") != _STATE_VERSION or state.get("shuffle") != self.spec.shuffle:
            raise DataError(
                f"this state (version {state.get('v')!r}, shuffle={state.get('shuffle')!r}) does not fit a "
                f"stream of version {_STATE_VERSION} with shuffle={self.spec.shuffle}"
            )
        info, turn = get_worker_info(), state.get(_TURN)
        if turn is not None and (info is None or turn[:2] != [info.id, info.num_workers]):
            raise DataError(
                f"this is the state of worker {turn[0]} of {turn[1]} of a loader; load the loader's state into a "
                "loader of as many workers"
            )
        self._load(state)
        if info is None:
            self._loaders.moved(self._state())
            return
        self._own = True
        self._turn = None if turn is None else Turn(worker=turn[0], workers=turn[1], number=turn[2])
        self._ended = turn is not None and bool(turn[3])

    def skip_elsewhere(self, count: int) -> None:
        """Count documents that the `transform` of other shards has left out of the last step."""
        self._reader.skip(count, "it is in the log of another worker")
        self._skipped_elsewhere += count
        if not self._pending:
            self._position = replace(self._position, skipped=self._position.skipped + count)

    def close(self) -> None:
        """Stop threads and processes, release memory and files, and close the database if it was opened here."""
        self._stop()
        self._loaders.close()
        self._close_reader()
        self._access.close()

    def _stop(self) -> None:
        running, self._running = self._running, None
        close_iterator(running)

    def _close_reader(self) -> None:
        if self._builders is not None:
            self._builders.close()
        self._builders = None
        self._reader.close()

    def _state(self) -> dict[str, Any]:
        return {
            "v": _STATE_VERSION,
            "source": self._digest(),
            "seed": self._seed,
            "shuffle": self.spec.shuffle,
            "dtypes": self.spec.run_dtypes.state(self.spec.key.paths),
            **({"weight": self.spec.sample_weight} if self.spec.sample_weight is not None else {}),
            **self._position.state(),
            **({"forms": forms} if (forms := self.spec.run_dtypes.forms_state(self.spec.key.paths)) else {}),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._stop()
        dtypes, paths = self.spec.run_dtypes, self.spec.key.paths
        if state["source"] != self._digest() or state.get("dtypes") not in (None, dtypes.state(paths)):
            self._close_reader()
        dtypes.load(state.get("dtypes"), paths)
        dtypes.load_forms(state.get("forms"), paths)
        self._reader.keep_next(state["epoch"])
        self._resume = state["source"]
        self._seed = state["seed"]
        self._position, self._pending = Position.from_state(state), True
        self.is_epoch_over = False

    def _begin(self) -> None:
        """Go to where the next iteration starts."""
        if not self._pending:
            self._position = Position(epoch=self._position.epoch + 1)
        latest = self._loaders.latest()
        if latest is not None:  # workers have read since
            self._position = Position(epoch=max(self._position.epoch, latest + 1))
            following = Position(epoch=self._position.epoch + 1)
            self._loaders.moved({**self._state(), **following.state()})
        self._pending = False

    def _begin_in_worker(self, loader: int, turn: Turn) -> None:
        """Go to where the next iteration of all workers starts, and take one's turn."""
        start = self._position if self._pending else Position(epoch=self._position.epoch + 1)
        if self._own:
            # Behind the last batch of an epoch is the next one, and the loader takes the end of this one first.
            self._loaders.begin(loader, turn, start.epoch - self._ended, own=True)
            self._turn, self._own, self._pending = self._turn or turn, False, self._ended
            return
        epoch, state = self._loaders.begin(loader, turn, start.epoch, again=self._turn is not None)
        if state is not None:
            self._load(state)
            start = self._position
        self._position = start if start.epoch == epoch else Position(epoch=epoch)
        self._turn, self._pending, self._ended = turn, False, False

    def _digest(self) -> str | None:
        return self._reader.digest or self._resume

    def _epoch(self, *, is_rest: bool = False) -> Iterator[Any]:
        """The batches; `_position` is moved before each is yielded, and to the next epoch at the end."""
        if self._ended:
            self._ended = False
            return
        self._taken = True
        if self._turn is None:
            self._begin()
        start = self._position
        fresh = self._turn is None or not self._turn.number
        self._found = False
        yield from self._served(start)
        if not self._found and fresh and not is_rest:
            if start == Position(epoch=start.epoch):
                raise self._no_batch()
            # Nothing was left of the epoch that a state was loaded for.
            yield from self._served(Position(epoch=start.epoch + 1))

    def _served(self, start: Position) -> Iterator[Any]:
        batches = self._batches(start)
        try:
            for batch, position, rows in batches:
                self.batch_rows = rows
                self._position, self._pending = position, position.epoch != start.epoch
                self.is_epoch_over = self._pending
                if self._turn is not None:
                    self._turn = replace(self._turn, number=self._turn.own + 1)
                if rows:  # else all of its documents were left out
                    yield batch
        finally:
            close_iterator(batches)
        self._position, self._pending = Position(epoch=start.epoch + 1), True
        self.is_epoch_over = True

    def _no_batch(self) -> DataError:
        if self.report.skipped and not self.report.rows - self.report.skipped:
            return DataError(
                f"none of the {self.report.skipped} document(s) of {self.spec.query.collection!r} fits; the first "
                f"one: {self.report.why}"
            )
        if self.spec.sample_weight is not None and self.report.rows:
            return DataError(
                f"an epoch has no batch: {self.report.rows} document(s) were read, and by the weights in "
                f"{self.spec.sample_weight!r} too few of them come in it",
                field=self.spec.sample_weight,
            )
        rows = f"batch_size={self.spec.batch_size}, shard={self.spec.shard}, drop_last={self.spec.drop_last}"
        if not self.spec.drop_last and self.spec.shard[1] == 1:
            return EmptySelectError(f"the select matches no document in {self.spec.query.collection!r}")
        return DataError(f"an epoch has no batch: the select has too few documents for {rows}")

    def _batches(self, start: Position) -> Iterator[tuple[Any, Position, int]]:
        """Batches or steps, the positions behind them and their numbers of documents.

        Samples are built in workers where there are some.
        """
        if self.spec.lanes:
            yield from self._steps(start)
            return
        build = self.spec.builds_samples
        cuts = self._cuts(start)
        try:
            if build and self.spec.workers and get_worker_info() is None:
                yield from self._built_by_workers(cuts, start.epoch)
                return
            built = ((self._builder(columns_of(slices)), position) for slices, position in cuts) if build else ()
            yield from self._without_skipped(built)
            for slices, position in cuts:
                yield self._finished(batch_of(slices, self.spec.key)), position, rows_in(slices)
        finally:
            close_iterator(cuts)

    def _built_by_workers(
        self, cuts: Iterator[tuple[list[RowSlice], Position]], epoch: int
    ) -> Iterator[tuple[Any, Position, int]]:
        requested: deque[Position] = deque()

        def requests() -> Iterator[list[Any]]:
            for slices, position in cuts:
                requested.append(position)
                yield [(columns_of(slices), None)]

        batches = self._mapped_by_workers(requests(), epoch)
        try:
            yield from self._without_skipped((built, requested.popleft()) for built in batches)
        finally:
            close_iterator(batches)

    def _mapped_by_workers(self, requests: Iterator[list[Any]], epoch: int) -> Iterator[Built]:
        if self._builders is None:
            self._builders = WorkerPool(self._builder.build_each, self.spec.loader)
        return self._builders.map(requests, self._reader.worker_seed(self._seed, epoch))

    def _steps(self, start: Position) -> Iterator[tuple[LaneBatches, Position, int]]:
        """Steps with the batches of this shard's lanes, the positions behind and the numbers of documents."""
        spec, requested = self.spec, deque[tuple[Position, int]]()
        each = spec.lanes // spec.shard[1]
        first, cuts = spec.shard[0] * each, self._cuts(start)

        def lanes() -> Iterator[tuple[list[RowSlice], int]]:
            for number, (slices, position) in enumerate(cuts, start.step):
                rows = rows_in(slices)
                rows -= rows % spec.batch_size if spec.drop_last else 0
                if rows:
                    requested.append((position, rows))
                for lane in range(first, first + each) if rows else ():
                    seed = self._reader.lane_seed(self._seed, start.epoch, number, lane)
                    yield lane_of(slices, rows, lane, spec.lanes), seed

        built, skipped, self._skipped_elsewhere = self._built_lanes(lanes(), start.epoch), 0, 0
        try:
            for one in built:
                made = [one, *itertools.islice(built, each - 1)]
                position, planned = requested.popleft()
                left_out = sum(lane.skipped for lane in made)
                self._reader.skip(left_out, next((lane.why for lane in made if lane.why), ""))
                skipped += left_out
                step = LaneBatches(
                    batches=tuple(self._finished(lane.batch) if lane.rows else None for lane in made),
                    rows=tuple(lane.rows for lane in made),
                    planned=planned,
                    skipped=left_out,
                    position=position.digest(planned) if spec.shard[1] > 1 else 0,
                )
                skipped_by_now = position.skipped + skipped + self._skipped_elsewhere
                yield step, replace(position, skipped=skipped_by_now), planned
        finally:
            close_iterator(built)
            close_iterator(cuts)

    def _built_lanes(self, lanes: Iterator[tuple[list[RowSlice], int]], epoch: int) -> Iterator[Built]:
        """The batch of each lane, of no row for an empty one."""
        if not self.spec.builds_samples:
            for slices, _ in lanes:
                batch = batch_of(slices, self.spec.key) if slices else None
                yield Built(batch=batch, rows=rows_in(slices))
            return
        requests = ((columns_of(slices) if slices else None, seed) for slices, seed in lanes)
        if self.spec.workers and get_worker_info() is None:
            yield from self._mapped_by_workers(([request] for request in requests), epoch)
            return
        yield from self._builder.build_each(requests)

    def _without_skipped(self, many: Iterable[tuple[Built, Position]]) -> Iterator[tuple[Any, Position, int]]:
        """The batches made of samples, and in their positions what a `transform` left out before."""
        skipped = 0
        for built, position in many:
            self._reader.skip(built.skipped, built.why)
            skipped += built.skipped
            if not built.rows and self.spec.shard[1] > 1:
                raise TransformError(
                    f"transform failed for all {built.skipped} document(s) of a batch, and each shard has to take "
                    f"as many steps as the others; the first one: {built.why}",
                    field="transform",
                )
            by_now = replace(position, skipped=position.skipped + skipped) if skipped else position
            yield self._finished(built.batch), by_now, built.rows

    def _finished(self, batch: Any) -> Any:
        if get_worker_info() is not None:
            if self.spec.builds_samples:
                check_picklable(batch)
            return map_tensors(Tensor.clone, batch)  # a view would carry its whole window to the other process
        return pin_memory(batch) if self.spec.loader.get("pin_memory") else batch

    def _cuts(self, start: Position) -> Iterator[tuple[list[RowSlice], Position]]:
        """The rows of each batch of this shard, or of this worker's turns under a user's loader."""
        spec, turn, lanes = self.spec, self._turn, bool(self.spec.lanes)
        first = Start(start.epoch, start.window, start.step, start.skipped, lambda rows: start.row(rows.markers))
        windows = self._reader.windows(self._seed, first, self._resume)
        parts = ([window] for window in windows) if spec.shard_by == "ranges" else [windows]
        cuts = itertools.chain.from_iterable(
            cut(
                iter(part),
                start,
                batch_size=spec.batch_size * (spec.accumulation if lanes else 1),
                drop_last=spec.drop_last and not lanes,
                shard=spec.shard if spec.shard_by == "rows" and not lanes else (0, 1),
            )
            for part in parts
        )
        if spec.shard_by == "batches" and turn is None:
            turn = Turn(worker=spec.shard[0], workers=spec.shard[1], number=start.step)
        try:
            for number, found in enumerate(cuts, start=0 if turn is None else turn.number):
                self._found = True
                if turn is None or number in turn:
                    yield found
        finally:
            close_iterator(windows)
