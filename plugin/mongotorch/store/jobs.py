"""The runs: one document each, which any worker can claim, and only one at a time can hold.

Always: one job for a component and method, and for a key; a final status changes only by `requeue`; what a
document says of parameters, environment and errors is plain, for `mongosh` and for people.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping
from typing import Any, Final, final

from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import READABLE, WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.store.clock import Later
from mongotorch.store.failures import driver_errors
from mongotorch.store.indexes import ensure_index
from mongotorch.store.leases import COLLECTION, QUEUED, Leases
from mongotorch.store.plain import plain
from mongotorch.store.waiting import wait_until

__all__ = ["COLLECTION", "FINAL", "Jobs"]

KIND: Final = "job"
FINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
_EMPTY = ("started", "finished", "lease_until", "worker", "error", "result")


@final
class Jobs(Leases):
    """The job documents of one database.

    Args:
        database: The driver's database.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    @driver_errors("preparing the jobs")
    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        ensure_index(self._documents, [("component", 1), ("method", 1)], unique=True)
        given = {"key": {"$type": "string"}}
        ensure_index(self._documents, "key", unique=True, partialFilterExpression=given)
        ensure_index(self._documents, [("status", 1), ("priority", -1), ("created", 1)])
        ensure_index(self._documents, [("identifier", 1), ("created", -1)])

    @driver_errors("adding a job")
    def add(
        self,
        *,
        component: str,
        type_id: str,
        identifier: str,
        method: str = "fit",
        key: str | None = None,
        priority: int = 0,
        parameters: Mapping[str, Any] | None = None,
        max_attempts: int = 3,
    ) -> tuple[str, bool]:
        """Queue a run, unless it is known.

        Args:
            component: The uuid of what is run.
            type_id: Its kind.
            identifier: Its name.
            method: What is called of it.
            key: A second job with this key is the first one, whatever its component.
            priority: Higher is claimed first.
            parameters: What a person wants to read of it later; what BSON lacks is kept as its `repr`.
            max_attempts: How often it is tried when it raises.

        Returns:
            The job's id, and whether this call made it.
        """
        job_id = str(uuids.uuid4())
        document: dict[str, Any] = dict.fromkeys(_EMPTY) | {
            **WRITTEN,
            "component": component,
            "type_id": type_id,
            "identifier": identifier,
            "method": method,
            "status": "queued",
            "priority": priority,
            "attempt": 0,
            "seen": 0,
            "failures": 0,
            "max_attempts": max_attempts,
            "ready_at": Later(),
            "created": Later(),
            "progress": {},
            "parameters": plain(parameters or {}),
            "environment": {},
        }
        if key is not None:
            document["key"] = key
        try:
            with self._clock.alone():
                # An upsert, since an insert cannot ask the server for its time.
                self._documents.update_one({"_id": job_id}, self._clock.update(document), upsert=True)
        except DuplicateKeyError:
            known = self._known(component, method, key)
            if known is None:
                raise
            return known, False
        return job_id, True

    def _known(self, component: str, method: str, key: str | None) -> str | None:
        """The job that a second one would be."""
        same: list[dict[str, Any]] = [{"component": component, "method": method}]
        found = self._documents.find_one({"$or": same + ([] if key is None else [{"key": key}])}, {"_id": 1})
        return None if found is None else str(found["_id"])

    @driver_errors("reading a job")
    def get(self, job_id: str) -> dict[str, Any]:
        """The document of a job. Raises: NotFoundError, FormatError."""
        found: dict[str, Any] | None = self._documents.find_one({"_id": job_id})
        if found is None:
            raise NotFoundError(f"no job {job_id}")
        check_format(found, KIND)
        return found

    @driver_errors("reading jobs")
    def find(
        self,
        *,
        status: str | None = None,
        identifier: str | None = None,
        component: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """The newest jobs that match, newest first, at most `limit` of them. Raises: FormatError."""
        asked = {"status": status, "identifier": identifier, "component": component}
        wanted = {name: value for name, value in asked.items() if value is not None}
        found = list(self._documents.find(wanted).sort([("created", -1), ("_id", -1)]).limit(limit))
        for job in found:
            check_format(job, KIND)
        return found

    @driver_errors("looking for a job")
    def is_waiting(self) -> bool:
        """Whether a job is queued that this release can run."""
        return self._documents.find_one({"status": "queued", **READABLE}, {"_id": 1}) is not None

    @driver_errors("cancelling a job")
    def cancel(self, job_id: str) -> bool:
        """Cancel a job; who runs it sees that at the next heartbeat. False if it had ended.

        Raises:
            NotFoundError: There is no such job.
        """
        values = {"status": "cancelled", "finished": Later(), "lease_until": None}
        waiting = {"_id": job_id, "status": {"$in": ["queued", "running"]}}
        with self._clock.alone():
            done = bool(self._documents.update_one(waiting, self._clock.update(values)).matched_count)
        if not done:
            self.get(job_id)  # there is none: say so
        return done

    @driver_errors("queueing a job again")
    def requeue(self, job_id: str) -> bool:
        """Queue a job again that failed or was cancelled, its failures forgotten; False for any other."""
        ended = {"_id": job_id, "status": {"$in": ["failed", "cancelled"]}}
        with self._clock.alone():
            job = self._documents.find_one(ended, {"attempt": 1})
            if job is None:
                return False
            values = {**QUEUED, "ready_at": Later(), "finished": None, "failures": 0, "seen": job["attempt"]}
            same = {**ended, "attempt": job["attempt"]}
            return bool(self._documents.update_one(same, self._clock.update(values)).matched_count)

    def wait(self, job_id: str, timeout_s: float | None) -> dict[str, Any]:
        """The document of a job once it has ended.

        Args:
            job_id: The job.
            timeout_s: Seconds to wait at most; None waits for ever.

        Raises:
            NotFoundError: There is no such job.
            JobTimeoutError: It has not ended by then; it goes on.
        """
        return wait_until(
            self._documents,
            job_id,
            read=lambda: self.get(job_id),
            done=lambda job: job["status"] in FINAL,
            timeout_s=timeout_s,
        )
