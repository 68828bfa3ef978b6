"""What a schedule remembers between two looks, and who looks: one document a schedule, one lease for all.

Always: a document changes only by compare-and-set on `rev`, so that a scheduler which has lost its lease cannot
count or fire anything a second time; what was counted, up to which change, and what was decided by it are in one
write; a firing has a number of its own, and is kept until its job is known to exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, final

from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import READABLE, WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import Later, Now, clock_of, ensure_index

COLLECTION: Final = "mt.schedules"
KIND: Final = "schedule"
_LEADER: Final = "#leader"  # no identifier has this character
_SCHEDULES: Final = {"component": {"$type": "string"}}
Document = dict[str, Any]


@final
class Schedules:
    """The runtime documents of the schedules of one database.

    Args:
        database: The driver's database.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, *, now: Now | None = None) -> None:
        self._documents = database[COLLECTION]
        self._clock = clock_of(database, now)

    @driver_errors("preparing the schedules")
    def ensure_indexes(self) -> None:
        """Make the indexes that looking rests on; does nothing where they are there."""
        ensure_index(self._documents, "next_at")

    @driver_errors("adding a schedule")
    def add(self, identifier: str, values: Mapping[str, Any]) -> bool:
        """Begin a schedule's document; False where there is one already."""
        try:
            begun = {"_id": identifier, **WRITTEN, "rev": 0, "firings": 0, "pending": None, **values}
            self._documents.insert_one(begun)
        except DuplicateKeyError:
            return False
        return True

    @driver_errors("reading a schedule")
    def get(self, identifier: str) -> Document:
        """The document of a schedule. Raises: NotFoundError, FormatError."""
        found: Document | None = self._documents.find_one({"_id": identifier, **_SCHEDULES})
        if found is None:
            raise NotFoundError(f"no schedule {identifier!r} has been applied")
        check_format(found, KIND)
        return found

    @driver_errors("reading the schedules")
    def all(self) -> list[Document]:
        """Every schedule's document, by name. Raises: FormatError."""
        found = list(self._documents.find(_SCHEDULES).sort("_id", 1))
        for document in found:
            check_format(document, KIND)
        return found

    @driver_errors("reading the schedules")
    def readable(self) -> list[Document]:
        """The documents that no newer release has written, by name: those that a scheduler here looks after."""
        return list(self._documents.find({**_SCHEDULES, **READABLE}).sort("_id", 1))

    @driver_errors("reading the schedules")
    def due(self, now: datetime, *, limit: int = 1000) -> list[Document]:
        """Those that have to be looked at: their time has come, or a firing of theirs waits for its job.

        What a newer release has written is left to its schedulers.
        """
        waiting = {"$or": [{"next_at": {"$lte": now}, "paused": False}, {"pending": {"$type": "object"}}]}
        return list(self._documents.find({**_SCHEDULES, **READABLE, **waiting}).sort("next_at", 1).limit(limit))

    @driver_errors("writing a schedule")
    def write(self, document: Mapping[str, Any], changes: Mapping[str, Any]) -> Document | None:
        """Change a document, if it still is as it was read.

        Args:
            document: As it was read.
            changes: The fields that change.

        Returns:
            The document as it is now; None where somebody was faster, and nothing was changed.
        """
        now = {**changes, **WRITTEN, "rev": document["rev"] + 1}
        same = {"_id": document["_id"], "rev": document["rev"]}
        with self._clock.alone():
            done = self._documents.update_one(same, {"$set": now}).matched_count
        return {**document, **now} if done else None

    def change(self, identifier: str, changes: Mapping[str, Any]) -> Document:
        """Change a document whatever it says. Raises: NotFoundError."""
        while True:
            changed = self.write(self.get(identifier), changes)
            if changed is not None:
                return changed

    @driver_errors("removing a schedule")
    def remove(self, identifier: str) -> None:
        """Forget a schedule. Again: nothing."""
        self._documents.delete_one({"_id": identifier, **_SCHEDULES})

    @driver_errors("asking the time")
    def now(self) -> datetime:
        """The time of the clock that counts, naive UTC."""
        return self._clock.now()

    @driver_errors("leading the schedulers")
    def lead(self, who: str, lease_s: float) -> bool:
        """Become, or stay, the one scheduler that looks.

        Args:
            who: Names this scheduler; no other may have the name.
            lease_s: For how many seconds others wait when it goes silent.

        Returns:
            False: another one leads.
        """
        free = {"_id": _LEADER, "$or": [{"who": who}, self._clock.due("until")]}
        missing = {"_id": _LEADER, "who": {"$exists": False}}
        update = self._clock.update({**WRITTEN, "who": who, "until": Later(lease_s)})
        with self._clock.alone():
            if self._documents.update_one(free, update).matched_count:
                return True
            try:
                # An upsert that finds a leader tries to insert a second one.
                self._documents.update_one(missing, update, upsert=True)
            except DuplicateKeyError:
                return False
        return True

    @driver_errors("leaving the lead")
    def resign(self, who: str) -> None:
        """Let another scheduler lead at once. Not the leader: nothing."""
        self._documents.delete_one({"_id": _LEADER, "who": who})
