"""Stores what predictions were written into documents: one record for each version, collection and field.

Guarantees: the records of a version are found without a further index, since its uuid begins their `_id`; there
are no more of them than there are fields with predictions.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, final

from mongotorch.codecs import WRITTEN
from mongotorch.errors import NotFoundError
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import Later, clock_of, records

COLLECTION: Final = "mt.predictions"
_MOST_TEXT: Final = 1_000  # characters of an error
_LONGEST_CALL: Final = timedelta(days=30)  # what a killed call has left is removed by a later one
_COUNTS: Final = ("written", "gone", "skipped")


@final
class PredictionLog:
    """The records of predictions of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents, self._clock = records(database, COLLECTION), clock_of(database)

    @repeated("recording predictions")
    def begin(self, uuid: str, collection: str, into: str, values: Mapping[str, Any]) -> str:
        """Record that a version begins to predict.

        Args:
            uuid: The version.
            collection: The collection whose documents it predicts.
            into: The field in which the predictions are stored.
            values: What else people want to know: plain BSON.

        Returns:
            The `_id` of the record.

        Raises:
            SettingError: The user may not write.
        """
        record = f"{uuid} {collection} {into}"
        given = {"uuid": uuid, "collection": collection, "into": into, **values}
        begun = {"status": "running", "started": Later(), "changed": Later(), "error": None}
        with self._clock.alone():
            update = self._clock.update({**WRITTEN, **given, **begun}, {"runs": 1, "written": 0})
            self._documents.update_one({"_id": record}, update, upsert=True)
        return record

    @repeated("recording predictions")
    def add(self, record: str, written: int) -> None:
        """Add to the number of documents that were written; those of all runs are counted together."""
        with self._clock.alone():
            update = self._clock.update({"changed": Later()}, {"written": written})
            self._documents.update_one({"_id": record}, update)

    @repeated("recording predictions")
    def share(self, record: str, call: bytes) -> str:
        """Keep what several processes need for one call, and count what they do for it.

        Args:
            record: As `begin` gave it.
            call: What they need; they get it from `shared`.

        Returns:
            The name of the call, for those of the other methods that ask for it.
        """
        name, now = uuids.uuid4().hex, self._clock.now()
        known = (self._documents.find_one({"_id": record}, {"calls": 1}) or {}).get("calls") or {}
        old = {f"calls.{n}": "" for n, one in known.items() if one["begun"] < now - _LONGEST_CALL}
        begun = {"begun": now, "call": call, "why": "", **dict.fromkeys(_COUNTS, 0)}
        update = {"$set": {f"calls.{name}": begun}, **({"$unset": old} if old else {})}
        self._documents.update_one({"_id": record}, update)
        return name

    @repeated("reading what several processes predict")
    def shared(self, record: str, name: str) -> bytes:
        """What was given to `share`. Raises: NotFoundError."""
        field = f"calls.{name}.call"
        found = self._documents.find_one({"_id": record}, {field: 1})
        if not found or name not in (found.get("calls") or {}):
            raise NotFoundError(f"no call {name} is recorded for the prediction {record!r}")
        return bytes(found["calls"][name]["call"])

    @repeated("recording predictions")
    def add_to(self, record: str, name: str, counts: Mapping[str, int], why: str) -> None:
        """Add to the counts of a call, and to what was written by all; `why` documents were left out, if any."""
        sums = {"written": counts["written"], **{f"calls.{name}.{key}": counts[key] for key in _COUNTS}}
        first = {f"calls.{name}.why": why} if why else {}
        self._documents.update_one(
            {"_id": record, f"calls.{name}": {"$exists": True}},
            self._clock.update({"changed": Later(), **first}, sums),
        )

    @repeated("recording predictions")
    def taken(self, record: str, name: str) -> dict[str, Any]:
        """What all processes have counted for a call, which has ended: `written`, `gone`, `skipped` and `why`."""
        field = f"calls.{name}"
        found = self._documents.find_one_and_update({"_id": record}, {"$unset": {field: ""}}, {field: 1})
        counted = (found or {}).get("calls", {}).get(name) or {"why": "", **dict.fromkeys(_COUNTS, 0)}
        return {key: counted[key] for key in (*_COUNTS, "why")}

    @repeated("recording predictions")
    def end(self, record: str, status: Literal["succeeded", "failed"], error: str | None = None) -> None:
        """Record how a run ended, and what its error said."""
        values = {"status": status, "changed": Later(), "error": None if error is None else error[:_MOST_TEXT]}
        with self._clock.alone():
            self._documents.update_one({"_id": record}, self._clock.update(values))


def of_versions(uuids: Sequence[str]) -> dict[str, Any]:
    """The filter for the records of some versions, which the index of `_id` answers."""
    return {"$or": [{"_id": {"$gte": f"{uuid} ", "$lt": f"{uuid}!"}} for uuid in uuids]}
