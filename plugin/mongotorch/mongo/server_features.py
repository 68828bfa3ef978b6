"""Whose clock counts: the server's, so that machines whose clocks differ agree; this machine's on mongomock.

Always: an update that says `Later(seconds)` stores the time of one clock plus the seconds, and a filter that
asks what is due compares with the same clock; no value of a caller is ever read as an expression; on mongomock,
whose updates are not atomic between threads, an update runs alone in its process.

Makes the indexes that the promises rest on, or sees that they are there for a user who may not make any.

Always: who may write without making indexes finds them made; a reader of an empty database is not refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from pymongo.errors import OperationFailure

Now = Callable[[], datetime]
# One lock for all: mongomock serves tests and demos of one process.
_memory = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Later:
    """A time of the store's clock, in seconds from now; negative is past."""

    seconds: float = 0.0


class Clock(Protocol):
    """How times are written and compared."""

    def due(self, field: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """The filter for documents whose field is a time before now minus so many seconds."""

    def update(self, values: Mapping[str, Any], add: Mapping[str, int] | None = None) -> Any:
        """The update that sets fields (`Later` stands for a time) and adds to counters."""

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, a read and a write are one step as far as the store does not see to that itself."""

    def now(self) -> datetime:
        """The time, naive UTC in whole milliseconds, for what has to be known before it is written."""


class ServerClock:
    """The clock of the server: `$$NOW`, which every statement reads once.

    Args:
        database: The driver's database, which is asked for `now`.
    """

    def __init__(self, database: Any) -> None:
        self._database = database

    def due(self, field: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """See `Clock.due`."""
        return {"$expr": {"$lte": [f"${field}", _now_plus(-seconds)]}}

    def update(self, values: Mapping[str, Any], add: Mapping[str, int] | None = None) -> Any:
        """See `Clock.update`."""
        times = {name: _now_plus(value.seconds) for name, value in values.items() if isinstance(value, Later)}
        plain = {name: {"$literal": value} for name, value in values.items() if name not in times}
        sums = {name: {"$add": [{"$ifNull": [f"${name}", 0]}, number]} for name, number in (add or {}).items()}
        return [{"$set": {**plain, **times, **sums}}]

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """See `Clock.alone`; the server does it."""
        return contextlib.nullcontext()

    def now(self) -> datetime:
        """See `Clock.now`; one round trip to the primary."""
        told: datetime = self._database.command("hello")["localTime"]
        return told


class LocalClock:
    """The clock of this machine, for mongomock and for tests.

    Args:
        now: Gives the time, as naive UTC, in whole milliseconds.
    """

    def __init__(self, now: Now | None = None) -> None:
        self._now = now or utc_now

    def due(self, field: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """See `Clock.due`."""
        return {field: {"$lte": self._now() - timedelta(seconds=seconds)}}

    def update(self, values: Mapping[str, Any], add: Mapping[str, int] | None = None) -> Any:
        """See `Clock.update`."""
        now = self._now()
        said = {
            name: now + timedelta(seconds=value.seconds) if isinstance(value, Later) else value
            for name, value in values.items()
        }
        return {"$set": said} | ({"$inc": dict(add)} if add else {})

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """See `Clock.alone`."""
        return _memory

    def now(self) -> datetime:
        """See `Clock.now`."""
        return self._now()


def is_mock(database: Any) -> bool:
    """Whether a database, collection or client is mongomock's."""
    return type(database).__module__.partition(".")[0] == "mongomock"


def clock_of(database: Any, now: Now | None = None) -> Clock:
    """The clock that counts for a database: the server's, unless there is none or another is given."""
    return LocalClock(now) if now is not None or is_mock(database) else ServerClock(database)


def utc_now() -> datetime:
    """Naive UTC in whole milliseconds, as the driver gives times back."""
    now = datetime.now(UTC).replace(tzinfo=None)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def _now_plus(seconds: float) -> Any:
    return {"$add": ["$$NOW", round(seconds * 1000)]} if seconds else "$$NOW"


_UNAUTHORIZED: Final = 13
Keys = str | Sequence[tuple[str, int]]


def ensure_index(collection: Any, keys: Keys, **options: Any) -> None:
    """Make an index, if it is not there.

    Args:
        collection: The driver's collection.
        keys: A field, or fields with directions.
        options: `unique`, `partialFilterExpression`.

    Raises:
        OperationFailure: The user may not make it, and it is not there.
    """
    wanted = [(keys, 1)] if isinstance(keys, str) else list(keys)
    if is_mock(collection) and _is_there(collection, wanted):
        return  # mongomock would hold all documents against it again, those outside a partial index too
    try:
        collection.create_index(wanted, **options)
    except OperationFailure as error:
        if error.code != _UNAUTHORIZED:
            raise
        if not _is_there(collection, wanted) and collection.find_one({}, {"_id": 1}) is not None:
            raise


def _is_there(collection: Any, keys: list[tuple[str, int]]) -> bool:
    return any(list(index["key"]) == keys for index in collection.index_information().values())
