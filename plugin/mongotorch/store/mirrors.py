"""Stores how far programs have come that pass on what happens, where their target cannot be asked for it.

Guarantees: what is recorded as sent stays so until its time is further back than the position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, final

from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.mongo.retry import repeated
from mongotorch.mongo.server_features import Later, clock_of, records

COLLECTION: Final = "mt.mirrors"


@final
class MirrorPositions:
    """The positions of the mirrors of one database: one document each.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = records(database, COLLECTION)
        self._clock = clock_of(database)

    @repeated("reading the clock")
    def now(self) -> datetime:
        """The time, by the database's clock, naive UTC."""
        return self._clock.now()

    @repeated("reading the position of a mirror")
    def begin(self, name: str) -> tuple[datetime, set[str]]:
        """Where a mirror goes on, from now where it is new.

        Args:
            name: The name of the mirror.

        Returns:
            The time up to which everything was sent, and the ids of what was sent since.

        Raises:
            FormatError: A newer release has written it.
        """
        found = self._documents.find_one({"_id": name})
        if found is None:
            begun = self._clock.update({**WRITTEN, "since": Later(), "sent": []})
            with self._clock.alone(), contextlib.suppress(DuplicateKeyError):  # another process was faster
                self._documents.update_one({"_id": name, "since": None}, begun, upsert=True)
            found = self._documents.find_one({"_id": name})
        check_format(found, "mirror")
        return found["since"], set(found["sent"])

    @repeated("recording what a mirror has sent")
    def record(self, name: str, event: str) -> None:
        """Record that an event was sent, before the next one is."""
        self._documents.update_one({"_id": name}, {"$addToSet": {"sent": event}})

    @repeated("recording the position of a mirror")
    def advance(self, name: str, since: datetime, sent: Iterable[str]) -> None:
        """Record that everything up to a time was sent, and what was sent since."""
        self._documents.update_one({"_id": name}, {"$set": {"since": since, "sent": sorted(sent)}})
