"""What a real server does and mongomock does not, in one place: the clock, atomic updates, concerns, indexes.

mongomock has no `$$NOW` in updates, no atomicity between threads, no change streams and no transactions, and it
checks a unique index against documents outside of its partial filter. `is_mock` is the one test for it.

Guarantees: on a server, times are written and compared by the server's clock, so that machines whose clocks differ
agree; no value of a caller is ever evaluated as an expression.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bson import Timestamp
from pymongo import IndexModel, ReadPreference, WriteConcern
from pymongo.errors import OperationFailure
from pymongo.read_concern import ReadConcern

from mongotorch.mongo.driver_errors import UNAUTHORIZED, RetryPolicy, has_code

Now = Callable[[], datetime]
"""A clock: naive UTC in whole milliseconds."""
MAJORITY_DEADLINE_S: Final = 60.0
"""How long a write of a record waits for a majority of the replica set, before it fails for now."""
WITHOUT_CHANGES: Final = ("view", "timeseries")
"""The types of collections whose changes no change stream gives."""
_ANSWER_S: Final = 10.0
"""How long an answer of the server's clock is used, by a machine whose own clock may be wrong by less."""
# One lock for all of mongomock: it serves tests and demos of one process.
_mock_lock = threading.RLock()


def is_mock(source: Any) -> bool:
    """Whether a client, database, collection or cursor is mongomock's."""
    return type(source).__module__.partition(".")[0] == "mongomock"


@dataclasses.dataclass(frozen=True)
class Later:
    """Stands in an update for the clock's time plus some seconds; negative is past."""

    seconds: float = 0.0


class ServerClock:
    """The clock of the server: `$$NOW`, which a statement reads once.

    Args:
        database: The driver's database, which is asked for `now`.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        self._answer = (0.0, datetime.min)

    def due(self, field: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """The filter for documents whose field is at least so many seconds past."""
        return {"$expr": {"$lte": [f"${field}", _now_plus(-seconds)]}}

    def update(self, values: Mapping[str, Any], add: Mapping[str, Any] | None = None) -> Any:
        """The update that sets fields, `Later` to a time, and adds numbers or expressions to counters."""
        times = {name: _now_plus(value.seconds) for name, value in values.items() if isinstance(value, Later)}
        # `$literal`: a caller's text that begins with `$` is not a field.
        plain = {name: {"$literal": value} for name, value in values.items() if name not in times}
        # A field that is missing, or no number, counts as 0: one broken document must not stop the others.
        sums = {
            name: {"$add": [{"$cond": [{"$isNumber": f"${name}"}, f"${name}", 0]}, number]}
            for name, number in (add or {}).items()
        }
        return [{"$set": {**plain, **times, **sums}}]

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Excludes other updates of this process inside; does nothing, since the server's updates are atomic."""
        return contextlib.nullcontext()

    def now(self) -> datetime:
        """The time, naive UTC in whole milliseconds, where it has to be known before a write; one round trip."""
        found: datetime = self._database.command("hello")["localTime"]
        return found

    def recent(self) -> datetime:
        """About the time: an answer of `now` that is not old, and what has passed since on this machine."""
        asked, answer = self._answer
        passed = time.time() - asked
        if not 0 <= passed < _ANSWER_S:
            asked, answer = self._answer = time.time(), self.now()
            passed = 0.0
        return answer + timedelta(milliseconds=round(passed * 1000))


class LocalClock:
    """The clock of this machine, for mongomock and for tests.

    Args:
        now: The time, naive UTC in whole milliseconds.
    """

    def __init__(self, now: Now | None = None) -> None:
        self._now = now or utc_now

    def due(self, field: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """See `ServerClock.due`."""
        return {field: {"$lte": self._now() - timedelta(seconds=seconds)}}

    def update(self, values: Mapping[str, Any], add: Mapping[str, int] | None = None) -> Any:
        """See `ServerClock.update`."""
        now = self._now()
        fields = {
            name: now + timedelta(seconds=value.seconds) if isinstance(value, Later) else value
            for name, value in values.items()
        }
        return {"$set": fields} | ({"$inc": dict(add)} if add else {})

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """See `ServerClock.alone`; one lock for the process."""
        return _mock_lock

    def now(self) -> datetime:
        """See `ServerClock.now`."""
        return self._now()

    def recent(self) -> datetime:
        """See `ServerClock.recent`."""
        return self._now()


Clock = ServerClock | LocalClock


def clock_of(database: Any, now: Now | None = None) -> Clock:
    """The clock of a database: the server's, except on mongomock or where `now` is given."""
    return LocalClock(now) if now is not None or is_mock(database) else ServerClock(database)


def cluster_time(database: Any) -> Timestamp | None:
    """The time that orders all writes of a replica set; None on a standalone server and on mongomock."""
    time: Timestamp | None = None if is_mock(database) else database.command("hello").get("operationTime")
    return time


def collection_type(database: Any, name: str) -> str:
    """Whether a name is that of a `collection`, a `view` or a `timeseries`; `collection` where that is not known.

    It is not where there is none of that name, and where the user may not list collections.

    Raises:
        PyMongoError: The server cannot be reached.
    """
    if is_mock(database):
        return "collection"
    try:
        found = list(database.list_collections(filter={"name": name}, nameOnly=True, authorizedCollections=True))
    except OperationFailure as error:
        if not has_code(error, UNAUTHORIZED):
            raise
        return "collection"
    return str(found[0]["type"]) if found else "collection"


def watermark(database: Any, *, read_deadline_s: float = 60.0) -> Timestamp | datetime:
    """The cluster time; the server's time, naive UTC, on a standalone server, and this machine's on mongomock.

    Args:
        database: A pymongo (or mongomock) database.
        read_deadline_s: How long a server that does not answer is asked again, in seconds.

    Raises:
        ServerUnavailableError: It did not answer.
    """
    policy = RetryPolicy(deadline_s=read_deadline_s)
    return policy.run(lambda: cluster_time(database) or clock_of(database).now(), "asking for the time")


def utc_now() -> datetime:
    """This machine's time: naive UTC in whole milliseconds, as BSON keeps it."""
    now = datetime.now(UTC).replace(tzinfo=None)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def _now_plus(seconds: float) -> Any:
    return {"$add": ["$$NOW", round(seconds * 1000)]} if seconds else "$$NOW"


def records(database: Any, name: str) -> Any:
    """A collection of mongotorch's own records, whatever concerns and read preference the address has.

    Its writes are acknowledged by a majority of the replica set, and its reads see on the primary what a majority
    has: what was acknowledged is never rolled back, and what may still be rolled back is never seen.

    Args:
        database: The driver's database.
        name: The collection's name.

    Returns:
        The driver's collection; mongomock's as it is.
    """
    if is_mock(database):
        return database[name]
    return database.get_collection(
        name,
        read_preference=ReadPreference.PRIMARY,
        read_concern=ReadConcern("majority"),
        write_concern=WriteConcern("majority", wtimeout=round(MAJORITY_DEADLINE_S * 1000)),
    )


class _After(ReadConcern):
    """A read concern by which a member of the set answers when it has what was written up to a cluster time."""

    def __init__(self, level: str | None, at: Timestamp) -> None:
        super().__init__(level or "local")
        self._at = at

    @property
    def document(self) -> dict[str, Any]:
        return {**super().document, "afterClusterTime": self._at}


def documents(database: Any, name: str) -> Any:
    """A collection of documents; what is read of it has all that was written up to now, whichever member answers.

    Where the address lets secondaries be read, one that lags behind would else give other documents than the one
    that was asked before it: a run would be trained on others than its record names. Such a member answers later.

    Args:
        database: The driver's database, with the read preference of the address.
        name: The collection's name.

    Raises:
        PyMongoError: The primary does not tell the time.
    """
    collection = database[name]
    if is_mock(database) or collection.read_preference == ReadPreference.PRIMARY:
        return collection
    level, at = collection.read_concern.level, cluster_time(database)
    if at is None or level == "available":  # which asks for whatever a member has
        return collection
    return collection.with_options(read_concern=_After(level, at))


def in_transaction(database: Any, write: Callable[[Any], None]) -> None:
    """Write in one transaction, again as a whole after an error that passes; without one where there are none.

    Args:
        database: The driver's database.
        write: Writes with the session it is given: None on a standalone server and on mongomock. May be called
            several times.
    """
    if is_mock(database) or not _has_transactions(database):
        write(None)
        return
    with database.client.start_session() as session:
        session.with_transaction(
            write,
            read_concern=ReadConcern("majority"),
            write_concern=WriteConcern("majority", wtimeout=round(MAJORITY_DEADLINE_S * 1000)),
            read_preference=ReadPreference.PRIMARY,
        )


def _has_transactions(database: Any) -> bool:
    # What the client knows already costs no round trip.
    servers = database.client.topology_description.server_descriptions().values()
    if {server.server_type_name for server in servers} & {"RSPrimary", "Mongos"}:
        return True
    hello = database.command("hello")
    return "setName" in hello or hello.get("msg") == "isdbgrid"


def ensure_indexes(collection: Any, *indexes: IndexModel) -> None:
    """Create those indexes of a collection that do not exist, in one command.

    A user who may not create indexes is let through if the unique ones exist (without another one a query takes
    longer), or if the collection is empty (whoever writes first creates them).

    Args:
        collection: The driver's collection.
        indexes: With `unique`, `partialFilterExpression` and `expireAfterSeconds` as options.

    Raises:
        OperationFailure: An index cannot be created, or the user may not create one that is missing.
    """
    # First a look: creating waits for a majority, which a reader may do without. And mongomock would check
    # every document again, those outside of a partial filter too.
    missing = _missing(collection, indexes)
    if not missing:
        return
    if is_mock(collection):  # its `create_indexes` leaves the options out
        for index in missing:
            options = {name: value for name, value in index.document.items() if name not in ("key", "name")}
            collection.create_index(list(index.document["key"].items()), **options)
        return
    try:
        collection.create_indexes(missing)
    except OperationFailure as error:
        if not has_code(error, UNAUTHORIZED):
            raise
        lacking = [index for index in _missing(collection, indexes) if index.document.get("unique")]
        if lacking and collection.find_one({}, {"_id": 1}) is not None:
            raise


def _missing(collection: Any, indexes: Sequence[IndexModel]) -> list[IndexModel]:
    there = list(collection.index_information().values())
    return [index for index in indexes if not any(_is_like(index.document, one, collection) for one in there)]


def _is_like(index: Mapping[str, Any], there: Mapping[str, Any], collection: Any) -> bool:
    if list(index["key"].items()) != list(there["key"]):
        return False
    return is_mock(collection) or (
        bool(there.get("unique")) == bool(index.get("unique"))
        and there.get("partialFilterExpression") == index.get("partialFilterExpression")
    )
