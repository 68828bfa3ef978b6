"""Stores what predictions were written into documents: one record for each version, collection and field.

Guarantees: the records of a version are found without a further index, since its uuid begins their `_id`; there
are no more of them than there are fields with predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, final

from mongotorch.codecs import WRITTEN
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import Later, clock_of, records

COLLECTION: Final = "mt.predictions"
_MOST_TEXT: Final = 1_000  # characters of an error


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
    def end(self, record: str, status: Literal["succeeded", "failed"], error: str | None = None) -> None:
        """Record how a run ended, and what its error said."""
        values = {"status": status, "changed": Later(), "error": None if error is None else error[:_MOST_TEXT]}
        with self._clock.alone():
            self._documents.update_one({"_id": record}, self._clock.update(values))


def of_versions(uuids: Sequence[str]) -> dict[str, Any]:
    """The filter for the records of some versions, which the index of `_id` answers."""
    return {"$or": [{"_id": {"$gte": f"{uuid} ", "$lt": f"{uuid}!"}} for uuid in uuids]}
