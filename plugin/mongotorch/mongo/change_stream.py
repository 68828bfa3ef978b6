"""Reads what changes in a database, and waits for changes, by MongoDB's change streams.

- `baseline` counts a query's documents and gives the resume token of that moment; `ChangeWatcher` reads the
  changes after a token. Schedules count documents with the two.
- `open_stream`, `poller` and `wait_until` wait for one document to change. Where there are no change streams
  (mongomock, a standalone server, a user who may not watch) they look again after a pause.

Source: MongoDB manual, "Change Streams": a resume token is a position in the order of all changes; tokens compare
as their text does.

Guarantees: a change is either counted by a baseline or read after its token, never both and never neither; a
token that the server no longer knows is an error, never passed over; a stream is open before the first look, so
that no change falls between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, final

from bson import Timestamp
from pymongo import ReadPreference
from pymongo.errors import OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from mongotorch.errors import JobTimeoutError, StoreError
from mongotorch.mongo.driver_errors import HISTORY_LOST, NO_CHANGE_STREAMS, NO_SNAPSHOT, driver_errors, has_code
from mongotorch.mongo.server_features import WITHOUT_CHANGES, cluster_time, collection_type, is_mock, records
from mongotorch.query import Query
from mongotorch.resources import Owner

KINDS: Final = ("insert", "update", "replace", "delete")
AWAIT_S: Final = 0.1
"""How long the server holds back the answer to `ChangeWatcher.read` when there are no changes, in seconds."""
READ_S: Final = 0.25
"""How long `ChangeWatcher.read` goes on reading while there are changes, in seconds."""
POLL_S: Final = 0.05
_DROPS: Final = ("drop", "rename", "dropDatabase")
_MAX_CHANGES: Final = 1000
_MAX_POLL_S: Final = 1.0
_AWAIT_ONE_S: Final = 1.0
Token = dict[str, Any]
Document = dict[str, Any]
Wake = Callable[[float], None]
"""Waits until something may have changed, for so many seconds at most."""


class HistoryLostError(StoreError):
    """The changes after a token are no longer known: count again. The scheduler handles it; no user sees it."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One change of one document.

    Attributes:
        collection: The name of its collection.
        kind: `insert`, `update`, `replace` or `delete`; `drop` where the whole collection was dropped or got
            another name; `rename` where another one got its name, and replaced it if it was there, as `$out` does.
        document_id: The document's `_id`; None for a whole collection.
        fields: The paths that an update set or removed; empty for every other kind.
        token: The position right after the change.
        at: The cluster time of the change.
    """

    collection: str
    kind: str
    document_id: Any
    fields: frozenset[str]
    token: Token
    at: Timestamp


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """How many documents a query had at a moment.

    Attributes:
        count: The number of documents.
        token: The position in the order of changes at that moment; None where there are no change streams, as for
            views and time series collections.
    """

    count: int
    token: Token | None


@final
class ChangeWatcher(Owner):
    """Reads the changes of some collections after a token.

    Args:
        database: The driver's database.
        collections: The names of the collections.
        after: The token.

    Raises:
        HistoryLostError: The server no longer knows the token.
        ServerUnavailableError: The server cannot be reached.
    """

    def __init__(self, database: Any, collections: Collection[str], after: Token) -> None:
        self.collections = frozenset(collections)
        # The server watches with a majority only. A member that lags behind would tell of changes later.
        database = database.with_options(
            read_preference=ReadPreference.PRIMARY, read_concern=ReadConcern("majority")
        )
        with _translate_errors("watching for changes"):
            self._stream = database.watch(
                _pipeline(self.collections),
                resume_after=after,
                batch_size=_MAX_CHANGES,
                max_await_time_ms=int(AWAIT_S * 1000),
            )
        self._after = after

    @property
    def token(self) -> Token:
        """The position after everything that was read; it advances also while nothing happens."""
        return dict(self._stream.resume_token or self._after)

    def read(self) -> list[Change]:
        """The next changes: those of `READ_S` seconds, at most 1,000; empty after `AWAIT_S` seconds without any.

        However fast changes come, and however slowly, it returns at that time, give or take one request.

        Raises:
            HistoryLostError: The server has dropped changes that were not read yet.
            ServerUnavailableError: The server cannot be reached.
        """
        found: list[Change] = []
        deadline = time.monotonic() + READ_S
        with _translate_errors("reading changes"):
            while len(found) < _MAX_CHANGES and (event := self._stream.try_next()) is not None:
                found += _changes(event, self.collections)
                # Each single insert answers a request: without a deadline a trickle of them is read for ever.
                if time.monotonic() >= deadline:
                    break
        return found

    def close(self) -> None:
        """Close the stream; does nothing the second time."""
        with contextlib.suppress(PyMongoError):
            self._stream.close()


def baseline(database: Any, query: Query) -> Baseline:
    """Count a query's documents, and get the resume token of the same moment.

    Args:
        database: The driver's database.
        query: What is counted, by its filter; for a pipeline, the whole collection.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    with driver_errors("counting documents"):
        at = cluster_time(database)
        if at is None or collection_type(database, query.collection) in WITHOUT_CHANGES:
            return Baseline(count=counted(database, query), token=None)
        count = counted_at(database, query, at)
        try:
            return Baseline(count=count, token=_token_after(database, at))
        except OperationFailure as error:
            if not has_code(error, NO_CHANGE_STREAMS):
                raise
            return Baseline(count=count, token=None)


@driver_errors("reading changes")
def position(database: Any) -> Token | None:
    """The position in the order of changes right after what has happened by now; None without change streams."""
    at = cluster_time(database)
    return None if at is None else _token_after(database, at)


@driver_errors("counting documents")
def counted(database: Any, query: Query, ids: Collection[Any] | None = None) -> int:
    """How many documents match a query's filter now, among these `_id`s if they are given."""
    where = {} if query.is_pipeline else query.where
    if ids is not None:
        among = {"_id": {"$in": list(ids)}}
        where = {"$and": [where, among]} if where else among
    # Of a majority, as the changes are that are counted: a member that lags behind would not have them yet.
    return int(records(database, query.collection).count_documents(where))


@driver_errors("counting documents")
def counted_at(database: Any, query: Query, at: Timestamp) -> int:
    """How many documents matched a query's filter at a cluster time; how many do now, where that is not known.

    A capped collection has no snapshots, and others have those of the last minutes.

    Args:
        database: The driver's database.
        query: What is counted, by its filter; for a pipeline, the whole collection.
        at: The cluster time.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    where = {} if query.is_pipeline else query.where
    try:
        reply = database.command(
            "aggregate",
            query.collection,
            pipeline=[{"$match": where}, {"$count": "n"}],
            cursor={},
            readConcern={"level": "snapshot", "atClusterTime": at},
            codec_options=database.codec_options,  # a command does not take those of its database
        )
    except OperationFailure as error:
        if not has_code(error, NO_SNAPSHOT):
            raise
        return counted(database, query)
    first = reply["cursor"]["firstBatch"]
    return int(first[0]["n"]) if first else 0


def _token_after(database: Any, at: Timestamp) -> Token:
    """The position right after a cluster time: that of a stream that has not given anything yet."""
    stage = {"$changeStream": {"startAtOperationTime": Timestamp(at.time, at.inc + 1)}}
    reply = database.command("aggregate", 1, pipeline=[stage], cursor={"batchSize": 0})
    cursor = reply["cursor"]
    with contextlib.suppress(PyMongoError):
        database.command("killCursors", cursor["ns"].partition(".")[2], cursors=[cursor["id"]])
    return dict(cursor["postBatchResumeToken"])


def _pipeline(collections: frozenset[str]) -> list[dict[str, Any]]:
    updated = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
    among = {"$in": sorted(collections)}
    changed = {"ns.coll": among, "operationType": {"$in": [*KINDS, *_DROPS]}}
    return [
        {"$match": {"$or": [changed, {"to.coll": among, "operationType": "rename"}]}},
        # Only the names of fields leave the server: the values may be large, and nobody here needs them.
        {
            "$project": {
                "operationType": 1,
                "clusterTime": 1,
                "ns.coll": 1,
                "to.coll": 1,
                "documentKey._id": 1,
                "set": {"$map": {"input": updated, "in": "$$this.k"}},
                "unset": "$updateDescription.removedFields",
            }
        },
    ]


def _changes(event: Mapping[str, Any], collections: frozenset[str]) -> Iterator[Change]:
    """The changes of these collections that an event is: a collection that is renamed may be two of them."""
    kind = event["operationType"]
    change = Change(
        collection=event.get("ns", {}).get("coll", ""),
        kind="drop" if kind in _DROPS else kind,
        document_id=event.get("documentKey", {}).get("_id"),
        fields=frozenset([*(event.get("set") or ()), *(event.get("unset") or ())]),
        token=dict(event["_id"]),
        at=event["clusterTime"],
    )
    if change.collection in collections:
        yield change
    if kind == "rename" and event["to"]["coll"] in collections:
        yield dataclasses.replace(change, collection=event["to"]["coll"], kind="rename")


@contextlib.contextmanager
def _translate_errors(doing: str) -> Iterator[None]:
    """Translate driver errors as `driver_errors` does, but lost history into `HistoryLostError`."""
    with driver_errors(doing):
        try:
            yield
        except OperationFailure as error:
            if has_code(error, HISTORY_LOST) or error.has_error_label("NonResumableChangeStreamError"):
                raise HistoryLostError(f"{doing}: the resume token is no longer known ({error.code})") from error
            raise


def wait_until(
    collection: Any,
    key: str,
    read: Callable[[], Document],
    done: Callable[[Document], bool],
    timeout_s: float | None,
) -> Document:
    """Wait until a job's document fulfils a condition, and return it.

    Args:
        collection: The driver's collection that contains it.
        key: Its `_id`.
        read: Reads it.
        done: The condition.
        timeout_s: The longest wait in seconds; None: no limit.

    Raises:
        JobTimeoutError: It does not fulfil the condition in that time.
        ServerUnavailableError: The server cannot be reached.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _waker(collection, key) as wake:
        while not done(document := read()):
            left = _AWAIT_ONE_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise JobTimeoutError(f"job {key} is still {document['status']} after {timeout_s} s; it goes on")
            wake(left)
    return document


@contextlib.contextmanager
def _waker(collection: Any, key: str) -> Iterator[Wake]:
    stream = open_stream(collection, {"documentKey._id": key}, doing="waiting for a job")
    poll = poller()
    if stream is None:
        yield poll
        return

    def wake(left: float) -> None:
        try:
            if stream.alive and stream.try_next() is not None:
                return
        except PyMongoError:
            # The stream cannot be resumed (history lost, rights revoked): polling does as well.
            stream.close()
        if not stream.alive:
            poll(left)

    with stream:
        yield wake


def open_stream(collection: Any, match: Document, *, doing: str) -> Any:
    """A change stream whose `try_next` waits for up to a second; None where there are no change streams.

    Args:
        collection: The driver's collection.
        match: Which changes.
        doing: What it is for, for the message of an error.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    if is_mock(collection):
        return None
    with driver_errors(doing):
        try:
            return collection.watch([{"$match": match}], max_await_time_ms=int(_AWAIT_ONE_S * 1000))
        except OperationFailure:  # a standalone server, or a user who may not watch
            return None


def poller() -> Wake:
    """A wait by sleeping: 50 ms at first and half as long again each time, up to a second."""
    pause_s = POLL_S

    def poll(left: float) -> None:
        nonlocal pause_s
        time.sleep(min(pause_s, left))
        pause_s = min(pause_s * 1.5, _MAX_POLL_S)

    return poll
