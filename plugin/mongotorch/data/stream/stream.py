"""The training stream: documents of a query as batches of tensors, epoch after epoch.

Always: the batches of an epoch are a function of (documents, query, seed, epoch, batch size, shard) and of how
large the ranges of the plan are (`prefetch_size`, `prefetch_factor`, `prefetch_bytes` where the run began): not of
the mode, of reading ahead, of workers, or of where the stream was stopped and with what sizes it was resumed.
Each document is yielded once an epoch. A position is a few numbers and resuming seeks to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mongotorch.data.decode.decoder import Columns
from mongotorch.data.prefetch import Workers, close_iterator
from mongotorch.data.stream.batches import RowSlice, SampleBuilder, batch_of, columns_of, cut
from mongotorch.data.stream.epochs import EpochReader, Report
from mongotorch.data.stream.order import worker_seed
from mongotorch.data.stream.position import EpochOffset, Position
from mongotorch.data.stream.spec import StreamSpec
from mongotorch.errors import DataError, EmptySelectError
from mongotorch.resources import Owner
from mongotorch.tensors import map_tensors, pin_memory

_STATE_VERSION = 1


@final
class Stream(Owner, IterableDataset[Any]):
    """An `IterableDataset` of batches, one epoch an iteration.

    Under a `torch.utils.data.DataLoader` (with `batch_size=None`) its workers take turns in the same batches;
    a loader copies the stream to its workers, so call `set_epoch` before each of its epochs.

    **Documents that come and go.** The first iteration fixes the plan: bounds on `_id` between the first and the
    last one that the select had then. They hold for the life of the stream and for those that resume from its
    state.

    - A document with an `_id` outside of the bounds (with generated ObjectIds: any later one) belongs to the next
      stream.
    - One that comes with an `_id` inside of them is yielded once in this epoch where its window was not yet read,
      else from the next epoch on (with `across_epochs`, whose first windows are read early, the one after that);
      never twice, and nobody else moves.
    - One that is deleted before its window is read is not yielded, and nobody else moves; `report` counts both.
    - A resumed stream goes on behind the very row that was yielded last, also where rows before it, or it
      itself, are gone. That is by the row's hash with `shuffle`, else by its `_id` (of up to 250 bytes; behind a
      longer one rows are counted).
    - Batches after a change hold the same rows in the same order, cut at other places.
    - A query with a sort (without `shuffle`), a skip, a limit or a pipeline has no bounds: it is asked anew each
      epoch, a resume counts rows, and a change in between shifts them.
    - Shards read for themselves: they are disjoint as long as the documents do not change during an epoch.
    - `memory` and `download` read once; what changes later is not noticed by the stream.

    Args:
        open_database: Opens the database, once in each process that reads; what it opens is closed by `close`.
        spec: What to stream, and how.
        database: An open database to use in this process; it is left open.

    Raises:
        EmptySelectError: On iteration: the select matches no document.
        FieldMissingError: On iteration: a document lacks a field of the key.
        ShapeError: On iteration: the values of a batch differ in shape.
        ServerUnavailableError: On iteration: reading failed for longer than `read_deadline_s`.
    """

    def __init__(self, open_database: Callable[[], Any], spec: StreamSpec, *, database: Any = None) -> None:
        self.spec = spec
        self._access = spec.open_access(open_database, database)
        self._builder = SampleBuilder(
            key=spec.key, transform=spec.transform, signature=spec.signature, collate_fn=spec.collate_fn
        )
        self._seed = spec.seed
        self._position = Position()
        self._resume: str | None = None  # the digest of the source to go on in
        self._pending = True  # whether the position is where the next iteration starts
        self._feed = EpochReader(spec, self._access)
        self._workers: Workers | None = None
        self._running: Iterator[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        place = EpochOffset(**self._position.place.state())
        position = Position(epoch=self._position.epoch, place=place)  # without the marks of a window
        feed = EpochReader(self.spec, self._access)
        fresh = {"_feed": feed, "_workers": None, "_running": None, "_position": position}
        return {**self.__dict__, **fresh, "_resume": self._digest()}

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or the rest of the one whose state was loaded.

        An iteration that goes on elsewhere is ended by this.
        """
        self._stop()
        if not self._pending:
            self._position = Position(epoch=self._position.epoch + 1)
        self._pending = False
        self._running = self._epoch(self._position)
        return self._running

    @property
    def report(self) -> Report:
        """How many documents this epoch has read here, and how many of the plan were gone or new.

        Under a user's loader the workers count, each for itself, and this process has no numbers.
        """
        return self._feed.tally.report

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, from its start."""
        self._stop()
        self._feed.expect(epoch)
        self._position, self._pending = Position(epoch=epoch), True

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, behind the last batch that it yielded; under 1 KB of JSON."""
        return {
            "v": _STATE_VERSION,
            "source": self._digest(),
            "seed": self._seed,
            "shuffle": self.spec.shuffle,
            "epoch": self._position.epoch,
            **self._position.place.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; its seed counts, other settings may differ.

        Raises:
            DataError: No such state, or that of a stream with another `shuffle`.
        """
        if state.get("v") != _STATE_VERSION or state.get("shuffle") != self.spec.shuffle:
            raise DataError(
                f"this state (version {state.get('v')!r}, shuffle={state.get('shuffle')!r}) does not fit a "
                f"stream of version {_STATE_VERSION} with shuffle={self.spec.shuffle}"
            )
        self._stop()
        if state["source"] != self._digest():
            self._drop_source()
        self._feed.expect(state["epoch"])
        self._resume = state["source"]
        self._seed = state["seed"]
        place = EpochOffset(**{name: state[name] for name in ("window", "offset", "step", "after")})
        self._position, self._pending = Position(epoch=state["epoch"], place=place), True

    def close(self) -> None:
        """End threads and processes, let go of memory and files, close the database if it was opened here."""
        self._stop()
        self._drop_source()
        self._access.close()

    def _stop(self) -> None:
        running, self._running = self._running, None
        close_iterator(running)

    def _drop_source(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._workers = None
        self._feed.close()

    def _digest(self) -> str | None:
        return self._resume if self._feed.source is None else self._feed.source.digest

    def _epoch(self, position: Position) -> Iterator[Any]:
        """The batches; `_position` is moved before each is yielded, and to the next epoch at the end."""
        batches = self._placed(position)
        any_batch = position.place != EpochOffset()
        try:
            for batch, place in batches:
                any_batch = True
                last = place.window < 0
                self._position = Position(epoch=position.epoch + 1) if last else replace(position, place=place)
                self._pending = last
                yield batch
        finally:
            close_iterator(batches)
        if not any_batch and get_worker_info() is None:
            raise self._nothing()
        self._position, self._pending = Position(epoch=position.epoch + 1), True

    def _nothing(self) -> DataError:
        rows = f"batch_size={self.spec.batch_size}, shard={self.spec.shard}, drop_last={self.spec.drop_last}"
        if not self.spec.drop_last and self.spec.shard[1] == 1:
            return EmptySelectError(f"the select matches no document in {self.spec.query.collection!r}")
        return DataError(f"an epoch has no batch: the select has too few documents for {rows}")

    def _placed(self, position: Position) -> Iterator[tuple[Any, EpochOffset]]:
        """Batches with the places behind them; samples are built in workers where there are some."""
        cuts = self._cuts(position)
        try:
            if self.spec.builds_samples and self.spec.workers and get_worker_info() is None:
                yield from self._built(cuts, position.epoch)
                return
            for pieces, place in cuts:
                build = self.spec.builds_samples
                batch = self._builder(columns_of(pieces)) if build else batch_of(pieces, self.spec.key)
                yield self._finished(batch), place
        finally:
            close_iterator(cuts)

    def _built(
        self, cuts: Iterator[tuple[list[RowSlice], EpochOffset]], epoch: int
    ) -> Iterator[tuple[Any, EpochOffset]]:
        places: deque[EpochOffset] = deque()

        def feed() -> Iterator[Columns]:
            for pieces, place in cuts:
                places.append(place)
                yield columns_of(pieces)

        if self._workers is None:
            self._workers = Workers(self._builder, self.spec.loader)
        results = self._workers.map(feed(), worker_seed(self._seed, epoch))
        try:
            for batch in results:
                yield batch, places.popleft()
        finally:
            close_iterator(results)

    def _finished(self, batch: Any) -> Any:
        if get_worker_info() is not None:  # a view would carry its whole window to the other process
            return map_tensors(Tensor.clone, batch)
        return pin_memory(batch) if self.spec.loader.get("pin_memory") else batch

    def _cuts(self, position: Position) -> Iterator[tuple[list[RowSlice], EpochOffset]]:
        """The pieces of each batch of this shard, and of this worker's turns under a user's loader."""
        spec, info = self.spec, get_worker_info()
        place = position.place
        windows = self._feed.windows(self._seed, position.epoch, place.window, self._resume)
        try:
            for pieces, behind in cut(
                windows,
                place,
                batch_size=spec.batch_size,
                drop_last=spec.drop_last,
                shard=spec.shard,
            ):
                if info is None or (behind.step - 1 - place.step) % info.num_workers == info.id:
                    yield pieces, behind
        finally:
            close_iterator(windows)
