"""The runs: one document each, which any worker can claim, and only one at a time can hold.

Always: one job for a component and method, and for a key; a final status changes only by `requeue`; what a
document says of parameters, environment and errors is plain, for `mongosh` and for people.

The holder's side of a job: to claim it, keep it, and end it or hand it back.

A claim is one update, and its `attempt` is the fencing token: whatever a holder says later is heard only while
the document still runs under that number. A holder that goes silent loses the job when its lease ends.

Always: a job is never held by two, and who has lost it is told so by False; times are the server's, so that
workers with other clocks agree; a run that raises is tried `max_attempts` times, one that only loses its worker
as long as it makes progress in between.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping
from typing import Any, Final, final

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import READABLE, WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.mongo.change_stream import wait_until
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.redact import plain
from mongotorch.mongo.server_features import Later, Now, clock_of, ensure_index

COLLECTION: Final = "mt.jobs"
BACK_OFF_S: Final = 1.0
MOST_BACK_OFF_S: Final = 300.0
MOST_LOSSES: Final = 20
"""So many workers in a row may vanish without any progress; the next claim fails the job instead."""
QUEUED: Final = {"status": "queued", "lease_until": None, "worker": None}


class JobLeases:
    """What a worker does with the jobs of one database; see `Jobs` for the rest.

    Args:
        database: The driver's database.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, *, now: Now | None = None) -> None:
        self._documents = database[COLLECTION]
        self._clock = clock_of(database, now)

    @driver_errors("claiming a job")
    def claim(
        self,
        *,
        worker: str,
        lease_s: float,
        job_id: str | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Take the most urgent job that waits, or whose holder went silent.

        Args:
            worker: Who takes it, for people.
            lease_s: For how many seconds it is held without a heartbeat.
            job_id: Take this one or none.
            environment: Where it runs: python, torch, platform.

        Returns:
            Its document, with the `attempt` that every later call needs; None where nothing is to be done.
        """
        ready = {
            **READABLE,  # one that a newer release has queued is for newer workers
            "$or": [
                {"status": "queued", **self._clock.due("ready_at")},
                {"status": "running", **self._clock.due("lease_until")},
            ],
        }
        values = {
            **WRITTEN,
            "status": "running",
            "worker": worker,
            "started": Later(),
            "lease_until": Later(lease_s),
            "environment": plain(environment or {}),
        }
        while True:
            with self._clock.alone():
                held: dict[str, Any] | None = self._documents.find_one_and_update(
                    ready if job_id is None else {"_id": job_id, **ready},
                    self._clock.update(values, {"attempt": 1}),
                    sort=[("priority", -1), ("created", 1), ("_id", 1)],
                    return_document=ReturnDocument.AFTER,
                )
            if held is None or held["attempt"] - held["seen"] <= MOST_LOSSES:
                return held
            self.fail(held["_id"], held["attempt"], error=_deadly(held))

    @driver_errors("a heartbeat of a job")
    def heartbeat(
        self, job_id: str, attempt: int, *, lease_s: float, progress: Mapping[str, Any] | None = None
    ) -> bool:
        """Hold the job for `lease_s` seconds more, and say how far it is.

        Returns:
            False if it was taken over or cancelled: stop, nothing of this attempt counts any more.
        """
        said = {} if progress is None else {"progress": plain(progress), "seen": attempt}
        return self._say(job_id, attempt, {"lease_until": Later(lease_s), **said})

    def succeed(self, job_id: str, attempt: int, *, result: str) -> bool:
        """The run published `result`, a component's uuid. False: fenced out, and nothing was changed."""
        return self._end(job_id, attempt, "succeeded", {"result": result, "error": None})

    @driver_errors("recording a failure")
    def fail(self, job_id: str, attempt: int, *, error: Mapping[str, Any], retry: bool = False) -> bool:
        """The run raised.

        Args:
            job_id: The job.
            attempt: The token of the claim.
            error: `type`, `message`, `traceback`, `document_id`, `field`.
            retry: Queue it again, later each time, as long as it has been tried less than `max_attempts` times.

        Returns:
            False: fenced out, and nothing was changed.
        """
        job = self._documents.find_one({"_id": job_id}, {"failures": 1, "max_attempts": 1}) or {}
        failures = job.get("failures", 0) + 1  # only the holder counts it up, and the update is fenced
        said = {"error": plain(error), "failures": failures, "seen": attempt}
        if retry and failures < job.get("max_attempts", 0):
            wait_s = min(BACK_OFF_S * 2.0 ** (failures - 1), MOST_BACK_OFF_S)
            return self._say(job_id, attempt, {**said, **QUEUED, "ready_at": Later(wait_s)})
        return self._end(job_id, attempt, "failed", said)

    @driver_errors("handing a job back")
    def release(self, job_id: str, attempt: int) -> bool:
        """Hand the job back, to be claimed by anybody at once; it counts as no failure. False: fenced out."""
        return self._say(job_id, attempt, {**QUEUED, "ready_at": Later(), "seen": attempt})

    @driver_errors("looking at a job")
    def holds(self, job_id: str, attempt: int) -> bool:
        """Whether the job still runs under this attempt."""
        return self._documents.find_one(_held(job_id, attempt), {"_id": 1}) is not None

    @driver_errors("ending a job")
    def _end(self, job_id: str, attempt: int, status: str, values: Mapping[str, Any]) -> bool:
        ended = {"status": status, "finished": Later(), "lease_until": None}
        return self._say(job_id, attempt, {**values, **ended})

    @driver_errors("updating a job")
    def _say(self, job_id: str, attempt: int, values: Mapping[str, Any]) -> bool:
        with self._clock.alone():
            update = self._clock.update(values)
            return bool(self._documents.update_one(_held(job_id, attempt), update).matched_count)


def _held(job_id: str, attempt: int) -> dict[str, Any]:
    return {"_id": job_id, "attempt": attempt, "status": "running"}


def _deadly(job: Mapping[str, Any]) -> dict[str, Any]:
    message = (
        f"{MOST_LOSSES} workers in a row vanished while they ran it, without any progress (the last one: "
        f"{job['worker']}); look for a lack of memory there, then queue it again"
    )
    return {"type": "JobLostError", "message": message, "traceback": None, "document_id": None, "field": None}


__all__ = ["COLLECTION", "FINAL", "Jobs"]
KIND: Final = "job"
FINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
_EMPTY = ("started", "finished", "lease_until", "worker", "error", "result")


@final
class Jobs(JobLeases):
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
