"""Stores the runtime state of schedules, one document each, and the lease of the scheduler that leads.

Guarantees: a document changes only by compare-and-set on `rev`, so that a scheduler that has lost its lease counts
and fires nothing twice; the counts, the position in the changes and the decision are one write; a firing has a
number of its own, and is kept until its job is known to exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, final

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import READABLE, WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.mongo.driver_errors import driver_errors
from mongotorch.mongo.server_features import Later, Now, clock_of, ensure_indexes, records

COLLECTION: Final = "mt.schedules"
KIND: Final = "schedule"
_LEADER: Final = "#leader"  # an `_id` that no identifier can be
_SCHEDULES: Final = {"_id": {"$ne": _LEADER}}
Document = dict[str, Any]


@final
class Schedules:
    """The runtime documents of the schedules of one database.

    Args:
        database: The driver's database.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, *, now: Now | None = None) -> None:
        self._documents = records(database, COLLECTION)
        self._clock = clock_of(database, now)

    @driver_errors("preparing the schedules")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        ensure_indexes(self._documents, IndexModel("next_at"))

    @driver_errors("adding a schedule")
    def add(self, identifier: str, values: Mapping[str, Any]) -> bool:
        """Insert a schedule's document; False if there is one already."""
        try:
            document = {"_id": identifier, **WRITTEN, "rev": 0, "firings": 0, "pending": None, **values}
            self._documents.insert_one(document)
        except DuplicateKeyError:
            return False
        return True

    @driver_errors("reading a schedule")
    def get(self, identifier: str) -> Document:
        """The document of a schedule. Raises: NotFoundError, FormatError."""
        where = {"$and": [{"_id": identifier}, _SCHEDULES]}
        found: Document | None = self._documents.find_one(where)
        if found is None:
            raise NotFoundError(f"no schedule {identifier!r} has been applied")
        check_format(found, KIND)
        return found

    @driver_errors("reading a schedule")
    def peek(self, identifier: str) -> Document | None:
        """The document of a schedule that this release can read; None where there is none."""
        found: Document | None = self._documents.find_one({"_id": identifier, **READABLE})
        return found

    @driver_errors("reading the schedules")
    def all(self) -> list[Document]:
        """All documents, by identifier. Raises: FormatError."""
        found = list(self._documents.find(_SCHEDULES).sort("_id", 1))
        for document in found:
            check_format(document, KIND)
        return found

    @driver_errors("reading the schedules")
    def readable(self) -> list[Document]:
        """The documents that this release can read, by identifier; its schedulers handle these only."""
        return list(self._documents.find({**_SCHEDULES, **READABLE}).sort("_id", 1))

    @driver_errors("reading the schedules")
    def due(self, now: datetime, *, limit: int = 1000) -> list[Document]:
        """The documents to handle now: their `next_at` has come, or a firing waits for its job.

        Those that a newer release wrote are left to its schedulers.
        """
        waiting = {"$or": [{"next_at": {"$lte": now}, "paused": False}, {"pending": {"$type": "object"}}]}
        return list(self._documents.find({**_SCHEDULES, **READABLE, **waiting}).sort("next_at", 1).limit(limit))

    @driver_errors("writing a schedule")
    def write(self, document: Mapping[str, Any], changes: Mapping[str, Any]) -> Document | None:
        """Change a document, unless it was changed since it was read.

        Args:
            document: As it was read.
            changes: The fields that change.

        Returns:
            The changed document; None where somebody else changed it first, and nothing was written.
        """
        now = {**changes, **WRITTEN, "rev": document["rev"] + 1}
        same = {"_id": document["_id"], "rev": document["rev"]}
        with self._clock.alone():
            done = self._documents.update_one(same, {"$set": now}).matched_count
        return {**document, **now} if done else None

    def change(self, identifier: str, changes: Mapping[str, Any]) -> Document:
        """Change a document in any state. Raises: NotFoundError, FormatError."""
        while True:
            changed = self.write(self.get(identifier), changes)
            if changed is not None:
                return changed

    @driver_errors("removing a schedule")
    def remove(self, identifier: str) -> None:
        """Remove a schedule's document, if there is one."""
        self._documents.delete_one({"$and": [{"_id": identifier}, _SCHEDULES]})

    @driver_errors("writing a schedule")
    def note(self, identifier: Any, problem: str, *, of: str) -> None:
        """Keep the problem of a schedule, whatever else its document holds.

        Args:
            identifier: The `_id` of its document.
            problem: What is wrong, for people.
            of: What it is a problem of: what succeeds at that clears it.
        """
        with self._clock.alone():
            self._documents.update_one({"_id": identifier}, {"$set": {"problem": problem, "problem_of": of}})

    @driver_errors("asking the time")
    def now(self) -> datetime:
        """The database's time, naive UTC."""
        return self._clock.now()

    @driver_errors("leading the schedulers")
    def lead(self, who: str, lease_s: float) -> bool:
        """Become the leader, or extend the lease if this scheduler leads already.

        Args:
            who: The unique name of this scheduler.
            lease_s: For how many seconds the lead is held without another call.

        Returns:
            False: another scheduler leads.
        """
        # Two updates: the filter of an upsert may not contain `$expr`, by which the server's clock is asked.
        free = {"_id": _LEADER, "$or": [{"who": who}, self._clock.due("until")]}
        missing = {"_id": _LEADER, "who": {"$exists": False}}
        update = self._clock.update({**WRITTEN, "who": who, "until": Later(lease_s)})
        with self._clock.alone():
            if self._documents.update_one(free, update).matched_count:
                return True
            try:
                # Where another one leads, the upsert finds nothing and fails on the `_id` that is taken.
                self._documents.update_one(missing, update, upsert=True)
            except DuplicateKeyError:
                return False
        return True

    @driver_errors("leaving the lead")
    def resign(self, who: str) -> None:
        """Give up the lead, so that another scheduler can lead at once; does nothing unless this one leads."""
        self._documents.delete_one({"_id": _LEADER, "who": who})
