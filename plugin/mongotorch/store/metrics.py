"""What a run measured: one document a point, so that a long history never meets the size limit of a document.

Always: one point for a job, step and kind; saying it again, as a resumed run does, replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.redact import plain_key
from mongotorch.mongo.server_features import Later, clock_of, ensure_index

COLLECTION = "mt.metrics"


@final
class MetricLog:
    """The measured points of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = database[COLLECTION]
        self._clock = clock_of(database)

    @driver_errors("preparing the metrics")
    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        ensure_index(self._documents, [("job", 1), ("step", 1), ("kind", 1)], unique=True)
        ensure_index(self._documents, [("component", 1), ("step", 1)])

    @driver_errors("writing a metric")
    def add(self, *, job: str, component: str, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write a point; the same job, step and kind again replaces it.

        Args:
            job: The job's id.
            component: The uuid of what is trained.
            step: After how many optimizer steps.
            kind: What was measured: `train`, `valid`.
            values: By name.
        """
        point = {"job": job, "step": int(step), "kind": kind}
        said = {
            **point,
            **WRITTEN,
            "component": component,
            "values": {plain_key(name): float(value) for name, value in values.items()},
            "at": Later(),
        }
        with self._clock.alone():
            # The _id is the point itself: two writers at once then meet in one document.
            self._documents.update_one({"_id": f"{job}:{step}:{kind}"}, self._clock.update(said), upsert=True)

    @driver_errors("reading metrics")
    def of(self, job: str) -> list[dict[str, Any]]:
        """The points of a job, by step and kind. Raises: FormatError."""
        found = list(self._documents.find({"job": job}).sort([("step", 1), ("kind", 1)]))
        for point in found:
            check_format(point, "metric")
        return found

    @driver_errors("removing metrics")
    def remove(self, job: str) -> int:
        """Remove the points of a job; how many there were."""
        return int(self._documents.delete_many({"job": job}).deleted_count)
