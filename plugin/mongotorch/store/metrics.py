"""Stores what runs measure: one document for each job, step and kind, so that no document grows with the run.

Guarantees: writing the same job, step and kind again, as a resumed run does, replaces the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.mongo.retry import repeated
from mongotorch.mongo.server_features import Later, clock_of, ensure_index, records
from mongotorch.store.jobs import plain_key

COLLECTION: Final = "mt.metrics"


@final
class MetricLog:
    """The metric entries of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = records(database, COLLECTION)
        self._clock = clock_of(database)

    @repeated("preparing the metrics")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        ensure_index(self._documents, [("job", 1), ("step", 1), ("kind", 1)], unique=True)
        ensure_index(self._documents, [("component", 1), ("step", 1)])

    @repeated("writing a metric")
    def add(self, *, job: str, component: str, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write an entry, over the one of the same job, step and kind.

        Args:
            job: The job's id.
            component: The uuid of what is trained.
            step: The number of optimizer steps taken.
            kind: What was measured: `train` or `valid`.
            values: The measured values by name.
        """
        entry = {
            "job": job,
            "step": int(step),
            "kind": kind,
            **WRITTEN,
            "component": component,
            "values": {plain_key(name): float(value) for name, value in values.items()},
            "at": Later(),
        }
        with self._clock.alone():
            # The _id follows from the entry, so that two writers at once meet in one document.
            self._documents.update_one({"_id": f"{job}:{step}:{kind}"}, self._clock.update(entry), upsert=True)

    @repeated("reading metrics")
    def of(self, job: str) -> list[dict[str, Any]]:
        """The entries of a job, by step and kind. Raises: FormatError."""
        found = list(self._documents.find({"job": job}).sort([("step", 1), ("kind", 1)]))
        for entry in found:
            check_format(entry, "metric")
        return found

    @repeated("removing metrics")
    def remove(self, job: str) -> int:
        """Remove the entries of a job, and return how many."""
        return int(self._documents.delete_many({"job": job}).deleted_count)
