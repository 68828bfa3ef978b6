"""What changes in a database: one change stream over the collections that schedules look at.

Source: MongoDB manual, "Change Streams": a resume token names a place in the order of all changes, and tokens
compare as their text does.

Always: reading goes on behind a token, whoever held it before; a place that the server no longer knows is said
so (`HistoryLostError`), never passed over; a baseline's count and its token are of one moment, so that no change
is in both and none in neither.

Waiting for a document to reach a state: woken by the server where it can, by looking again where it cannot.

Always: the change stream is open before the first look, so that no change falls between the two; a wait ends
in the document or in an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, final

from bson import Timestamp
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.errors import JobTimeoutError, StoreError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import is_mock
from mongotorch.query import Query
from mongotorch.resources import Owner

KINDS: Final = ("insert", "update", "replace", "delete")
_DROPS: Final = ("drop", "rename", "dropDatabase")
# ChangeStreamFatalError, ChangeStreamHistoryLost, InvalidResumeToken, and tokens that are not even text of one.
_LOST: Final = frozenset({260, 280, 286, 9, 14, 40647, 40649, 50811})
_NO_STREAMS: Final = frozenset({40573, 13})  # no replica set; a user who may not watch
_MOST: Final = 1000
AWAIT_S: Final = 0.1
"""For so long the server holds a question for changes back when there are none."""
Token = dict[str, Any]


class HistoryLostError(StoreError):
    """The changes behind a token are no longer known; count anew. It never leaves the scheduler."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One change of one document.

    Attributes:
        collection: Where.
        kind: `insert`, `update`, `replace` or `delete`; `drop` where a whole collection went.
        document_id: The document's `_id`; None for a drop.
        fields: The paths that an update set or removed; empty for every other kind.
        token: The place right behind it.
    """

    collection: str
    kind: str
    document_id: Any
    fields: frozenset[str]
    token: Token


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """How many documents a query has at a moment.

    Attributes:
        count: The documents.
        token: The place in the order of changes at that moment; None where nothing can be watched.
    """

    count: int
    token: Token | None


@final
class ChangeWatcher(Owner):
    """The changes of some collections, behind a token.

    Args:
        database: The driver's database.
        collections: The names.
        after: The token.

    Raises:
        HistoryLostError: The server no longer knows the token.
        ServerUnavailableError: The server cannot be reached.
    """

    def __init__(self, database: Any, collections: Collection[str], after: Token) -> None:
        self.collections = frozenset(collections)
        with _translate_errors("watching for changes"):
            self._stream = database.watch(
                _pipeline(self.collections),
                resume_after=after,
                batch_size=_MOST,
                max_await_time_ms=int(AWAIT_S * 1000),
            )
        self._after = after

    @property
    def token(self) -> Token:
        """The place behind everything that was read, moved on by the server also where nothing happens."""
        return dict(self._stream.resume_token or self._after)

    def read(self) -> list[Change]:
        """The changes that have come, at most 1,000; after `AWAIT_S` seconds without any, none.

        Raises:
            HistoryLostError: The server has dropped changes that were not read yet.
            ServerUnavailableError: The server cannot be reached.
        """
        found: list[Change] = []
        with _translate_errors("reading changes"):
            while len(found) < _MOST and (event := self._stream.try_next()) is not None:
                found.append(_change(event))
        return found

    def close(self) -> None:
        """End the stream. Again: nothing."""
        with contextlib.suppress(PyMongoError):
            self._stream.close()


def baseline(database: Any, query: Query) -> Baseline:
    """Count a query's documents and mark the place in the order of changes, at one moment.

    Args:
        database: The driver's database.
        query: What to count, by its filter; a pipeline's collection is counted whole.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    with driver_errors("counting documents"):
        if is_mock(database) or (at := _operation_time(database)) is None:
            return Baseline(count=counted(database, query), token=None)
        count = _count_at(database, query, at)
        try:
            return Baseline(count=count, token=_token_behind(database, at))
        except OperationFailure as error:
            if error.code not in _NO_STREAMS:
                raise
            return Baseline(count=count, token=None)


@driver_errors("counting documents")
def counted(database: Any, query: Query, ids: Collection[Any] | None = None) -> int:
    """How many documents match a query's filter now, of these `_id`s where they are given."""
    where = {} if query.is_pipeline else query.where
    if ids is not None:
        among = {"_id": {"$in": list(ids)}}
        where = {"$and": [where, among]} if where else among
    return int(database[query.collection].count_documents(where))


def _operation_time(database: Any) -> Timestamp | None:
    said: Timestamp | None = database.command("hello").get("operationTime")
    return said


def _count_at(database: Any, query: Query, at: Timestamp) -> int:
    where = {} if query.is_pipeline else query.where
    reply = database.command(
        "aggregate",
        query.collection,
        pipeline=[{"$match": where}, {"$count": "n"}],
        cursor={},
        readConcern={"level": "snapshot", "atClusterTime": at},
    )
    first = reply["cursor"]["firstBatch"]
    return int(first[0]["n"]) if first else 0


def _token_behind(database: Any, at: Timestamp) -> Token:
    """The place right behind a cluster time: that of a stream that has not given anything yet."""
    stage = {"$changeStream": {"startAtOperationTime": Timestamp(at.time, at.inc + 1)}}
    reply = database.command("aggregate", 1, pipeline=[stage], cursor={"batchSize": 0})
    cursor = reply["cursor"]
    with contextlib.suppress(PyMongoError):
        database.command("killCursors", cursor["ns"].partition(".")[2], cursors=[cursor["id"]])
    return dict(cursor["postBatchResumeToken"])


def _pipeline(collections: frozenset[str]) -> list[dict[str, Any]]:
    set_ones = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
    fields = {"$map": {"input": set_ones, "in": "$$this.k"}}
    return [
        {"$match": {"ns.coll": {"$in": sorted(collections)}, "operationType": {"$in": [*KINDS, *_DROPS]}}},
        # Only names leave the server: what was written may be large, and is nobody's business here.
        {
            "$project": {
                "operationType": 1,
                "ns.coll": 1,
                "documentKey._id": 1,
                "set": fields,
                "unset": "$updateDescription.removedFields",
            }
        },
    ]


def _change(event: Mapping[str, Any]) -> Change:
    kind = event["operationType"]
    return Change(
        collection=event.get("ns", {}).get("coll", ""),
        kind="drop" if kind in _DROPS else kind,
        document_id=event.get("documentKey", {}).get("_id"),
        fields=frozenset([*(event.get("set") or ()), *(event.get("unset") or ())]),
        token=dict(event["_id"]),
    )


@contextlib.contextmanager
def _translate_errors(doing: str) -> Iterator[None]:
    """Errors of the tree, and lost history told apart from the rest."""
    with driver_errors(doing):
        try:
            yield
        except OperationFailure as error:
            if error.code in _LOST or error.has_error_label("NonResumableChangeStreamError"):
                raise HistoryLostError(f"{doing}: the place is no longer known ({error.code})") from error
            raise


POLL_S: Final = 0.05
_MOST_POLL_S: Final = 1.0
_AWAIT_S: Final = 1.0
Document = dict[str, Any]
Wake = Callable[[float], None]


def wait_until(
    collection: Any,
    key: str,
    read: Callable[[], Document],
    done: Callable[[Document], bool],
    timeout_s: float | None,
) -> Document:
    """Wait for a document.

    Args:
        collection: Where it is.
        key: Its `_id`.
        read: Reads it.
        done: Whether it is as wanted.
        timeout_s: Seconds to wait at most; None waits for ever.

    Raises:
        JobTimeoutError: It is not, by then.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _waker(collection, key) as wake:
        while not done(document := read()):
            left = _AWAIT_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise JobTimeoutError(f"job {key} is still {document['status']} after {timeout_s} s; it goes on")
            wake(left)
    return document


@contextlib.contextmanager
def _waker(collection: Any, key: str) -> Iterator[Wake]:
    stream = open_stream(collection, {"documentKey._id": key}, doing="waiting for a job")
    if stream is None:
        yield poller()
        return
    with stream:
        poll = poller()

        def wake(left: float) -> None:
            try:
                if stream.alive and stream.try_next() is not None:
                    return
            except PyMongoError:
                # The stream broke for good (history lost, rights taken): looking again is as good.
                stream.close()
            if not stream.alive:
                poll(left)

        yield wake


def open_stream(collection: Any, match: Document, *, doing: str) -> Any:
    """A change stream whose `try_next` waits for a second at most; None where there is none.

    Args:
        collection: What is watched.
        match: Which changes.
        doing: What it is for, for the message of an error.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    if is_mock(collection):
        return None
    with driver_errors(doing):
        try:
            return collection.watch([{"$match": match}], max_await_time_ms=int(_AWAIT_S * 1000))
        except OperationFailure:  # no replica set, or a user who may not watch: look again instead
            return None


def poller() -> Wake:
    """A wait that is short at first and longer each time, up to a second."""
    pause = POLL_S

    def poll(left: float) -> None:
        nonlocal pause
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _MOST_POLL_S)

    return poll
