"""Stores the jobs: one document a run, which any worker can claim and one at a time holds under a lease.

A claim is one update that also counts `attempt` up, and that number is the fencing token: whatever a worker writes
later takes effect only while the job still runs under it. A worker that stops sending heartbeats loses the job
when its lease ends.

Guarantees: one job for a component and method, and one for a key; two workers never hold a job at once, by the
database's clock; a final status changes only by `requeue`; a run that raises, or loses its workers, is tried a
number of times, counted anew when it gets further than before; parameters, environment and errors are stored as
plain BSON.
"""

from __future__ import annotations

import contextlib
import re
import uuid as uuids
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, final

from bson import ObjectId
from pymongo import IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import READABLE, WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.mongo.change_stream import wait_until
from mongotorch.mongo.driver_errors import redact, repeated
from mongotorch.mongo.server_features import Later, LocalClock, Now, clock_of, ensure_indexes, records

COLLECTION: Final = "mt.jobs"
KIND: Final = "job"
FINAL_STATUSES: Final = frozenset({"succeeded", "failed", "cancelled"})
BACK_OFF_S: Final = 1.0
MAX_BACK_OFF_S: Final = 300.0
MAX_LOSSES: Final = 20
"""How many workers in a row may vanish without a further step; the next claim fails the job instead."""
MAX_LOSSES_IN_ALL: Final = 100
"""How many workers may vanish in all, with progress or without."""
LEAST_PREFIX: Final = 4
"""Characters of a job's uuid that name it, at the least."""
HAND_BACK: Final = "hand_back"
"""The field with the attempt whose ranks were asked to end, with a checkpoint."""
MAX_FAILURES: Final = 20
"""How often a run is tried without a further step where the database could not be reached."""
_INT64: Final = range(-(2**63), 2**63)
_MAX_TEXT: Final = 100_000  # characters
_MAX_DEPTH: Final = 50
_QUEUED: Final = {"status": "queued", "lease_until": None, "worker": None}
_NEEDED: Final = ("component", "type_id", "identifier")
_EMPTY: Final = ("started", "finished", "lease_until", "worker", "error", "result")


def running(job_id: str, attempt: int) -> dict[str, Any]:
    """The filter for a job while it runs under an attempt."""
    return {"_id": job_id, "attempt": attempt, "status": "running"}


@final
class Jobs:
    """The job documents of one database.

    Args:
        database: The driver's database.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, *, now: Now | None = None) -> None:
        self._documents = records(database, COLLECTION)
        self._clock = clock_of(database, now)

    @repeated("preparing the jobs")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        with_key = {"key": {"$type": "string"}}
        ensure_indexes(
            self._documents,
            IndexModel([("component", 1), ("method", 1)], unique=True),
            IndexModel("key", unique=True, partialFilterExpression=with_key),
            # In the order of a claim, to its last field: the server takes the first that is ready, unsorted.
            IndexModel([("status", 1), ("priority", -1), ("created", 1), ("_id", 1)]),
            IndexModel([("identifier", 1), ("created", -1)]),
            IndexModel([("created", -1), ("_id", -1)]),
            IndexModel("finished"),  # what has ended since a time, and what ended too long ago to be kept
        )

    # Anybody: add, look, wait, cancel, queue again.

    @repeated("adding a job")
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
        max_runtime_s: float | None = None,
    ) -> tuple[str, bool]:
        """Queue a run, unless there is a job for it.

        Args:
            component: The uuid of what runs.
            type_id: Its kind.
            identifier: Its name.
            method: The method that is called.
            key: Names the run: a second job with this key is the first one, whatever its component.
            priority: Higher is claimed first.
            parameters: Shown to people; what BSON cannot hold is kept as its `repr`.
            max_attempts: How often the run is tried when it raises, or its process ends, without progress.
            max_runtime_s: The longest time that one attempt may take, in seconds; None: no limit.

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
            "reached": 0,
            "losses": 0,
            "failures": 0,
            "max_attempts": max_attempts,
            "max_runtime_s": max_runtime_s,
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
            same: list[dict[str, Any]] = [{"component": component, "method": method}]
            found = self._documents.find_one({"$or": same + ([] if key is None else [{"key": key}])}, {"_id": 1})
            if found is None:
                raise
            return str(found["_id"]), found["_id"] == job_id  # its own, where the first answer was lost
        return job_id, True

    @repeated("storing the job of an imported version")
    def put_back(self, job_id: str, record: Mapping[str, Any], *, result: str) -> None:
        """Store the job of a version that another database has published, unless it is here.

        Args:
            job_id: The job's id.
            record: Its document there; what is for people to read is taken from it.
            result: The uuid of the version.
        """
        text = {name: str(record.get(name)) for name in _NEEDED}
        times = {name: record.get(name) for name in ("created", "started", "finished")}
        shown = {name: plain(record.get(name) or {}) for name in ("progress", "parameters", "environment")}
        counts = dict.fromkeys(("priority", "losses", "failures"), 0)
        end = {"status": "succeeded", "result": result, "published": result}
        numbers = {name: int(number(record, name)) for name in ("attempt", "seen", "reached", "max_attempts")}
        document: dict[str, Any] = {
            **dict.fromkeys(_EMPTY),
            **WRITTEN,
            **text,
            **shown,
            **numbers,
            **counts,
            **end,
        }
        document |= {name: time for name, time in times.items() if isinstance(time, datetime)}
        document |= {"method": f"imported-{job_id}", "max_runtime_s": None, "ready_at": document.get("created")}
        with contextlib.suppress(DuplicateKeyError), self._clock.alone():
            self._documents.insert_one({"_id": job_id, **document})

    @repeated("reading a job")
    def complete(self, prefix: str) -> str:
        """The id of the one job whose id begins so; a whole id that is known is itself.

        Raises:
            NotFoundError: None does, or several do; the message says which.
        """
        if len(prefix) < LEAST_PREFIX:
            raise NotFoundError(f"no job {prefix!r}; give its uuid, or at least {LEAST_PREFIX} characters of it")
        begins = {"_id": {"$regex": f"^{re.escape(prefix)}"}}
        found = [job["_id"] for job in self._documents.find(begins, {"_id": 1}).sort("_id", 1).limit(4)]
        if prefix in found or len(found) == 1:
            return prefix if prefix in found else str(found[0])
        if not found:
            raise NotFoundError(f"no job {prefix}")
        raise NotFoundError(f"several jobs begin with {prefix!r}: {', '.join(found)}; give more of it")

    @repeated("reading a job")
    def get(self, job_id: str) -> dict[str, Any]:
        """The document of a job. Raises: NotFoundError, FormatError."""
        found: dict[str, Any] | None = self._documents.find_one({"_id": job_id})
        if found is None:
            raise NotFoundError(f"no job {job_id}")
        check_format(found, KIND)
        return found

    @repeated("reading jobs")
    def find(
        self,
        *,
        status: str | None = None,
        identifier: str | None = None,
        component: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """The documents of the newest jobs that match, newest first, at most `limit` (0 is all of them).

        Raises:
            FormatError: A newer release has written one of them.
        """
        asked = {"status": status, "identifier": identifier, "component": component}
        where = {name: value for name, value in asked.items() if value is not None}
        found = list(self._documents.find(where).sort([("created", -1), ("_id", -1)]).limit(limit))
        for job in found:
            check_format(job, KIND)
        return found

    @repeated("reading jobs")
    def ended(self, since: datetime) -> list[dict[str, Any]]:
        """The documents of the jobs that have ended since a time, in that order. Raises: FormatError."""
        where = {"status": {"$in": sorted(FINAL_STATUSES)}, "finished": {"$gte": since}}
        found = list(self._documents.find(where).sort([("finished", 1), ("_id", 1)]))
        for job in found:
            check_format(job, KIND)
        return found

    @repeated("looking for a job")
    def count(self, *, component: str) -> int:
        """How many jobs a component has had."""
        return int(self._documents.count_documents({"component": component}))

    @repeated("looking for a job")
    def is_waiting(self) -> bool:
        """Whether a job is queued that this release can run."""
        return self._documents.find_one({"status": "queued", **READABLE}, {"_id": 1}) is not None

    def has_ended(self, job_id: str) -> bool:
        """Whether a job succeeded, failed or was cancelled. Raises: NotFoundError, FormatError."""
        return self.get(job_id)["status"] in FINAL_STATUSES

    def wait(self, job_id: str, timeout_s: float | None) -> dict[str, Any]:
        """Wait until a job has ended, and return its document.

        Args:
            job_id: The job.
            timeout_s: The longest wait in seconds; None: no limit.

        Raises:
            NotFoundError: There is no such job.
            JobTimeoutError: It has not ended in that time; it goes on.
        """
        job = self.get(job_id)
        if job["status"] in FINAL_STATUSES:
            return job  # no change stream is opened for a job that has ended
        return wait_until(
            self._documents,
            job_id,
            read=lambda: self.get(job_id),
            done=lambda job: job["status"] in FINAL_STATUSES,
            timeout_s=timeout_s,
        )

    @repeated("cancelling a job")
    def cancel(self, job_id: str) -> bool:
        """Cancel a job; its worker notices at the next heartbeat. False if it had ended, or published, already.

        Raises:
            NotFoundError: There is no such job.
        """
        values = {"status": "cancelled", "finished": Later(), "lease_until": None}
        open_job = {"_id": job_id, "status": {"$in": ["queued", "running"]}, "published": None}
        with self._clock.alone():
            done = bool(self._documents.update_one(open_job, self._clock.update(values)).matched_count)
        if not done:
            self.get(job_id)  # raises if there is none
        return done

    @repeated("stopping a job")
    def stop(self, job_id: str) -> bool:
        """Ask a job to end and to publish the best so far; one that nobody has begun is cancelled.

        Returns:
            False if it had ended, or published, already.

        Raises:
            NotFoundError: There is no such job.
        """
        unpublished = {"_id": job_id, "published": None}
        never_begun = {**unpublished, "status": "queued", "attempt": 0}
        cancelled = {"status": "cancelled", "finished": Later(), "lease_until": None}
        # A job that is claimed between the two is stopped by the second.
        for where, values in (
            (never_begun, cancelled),
            ({**unpublished, "status": {"$in": ["queued", "running"]}}, {"stop": Later()}),
        ):
            with self._clock.alone():
                if self._documents.update_one(where, self._clock.update(values)).matched_count:
                    return True
        self.get(job_id)  # raises if there is none
        return False

    @repeated("looking at a job")
    def is_asked_to_stop(self, job_id: str) -> bool:
        """Whether a job was asked to end and to publish the best so far."""
        return self._found({"_id": job_id, "stop": {"$ne": None}})

    @repeated("queueing a job again")
    def requeue(self, job_id: str) -> bool:
        """Queue a failed or cancelled job again, without its failures; False for any other job."""
        ended = {"_id": job_id, "status": {"$in": ["failed", "cancelled"]}}
        with self._clock.alone():
            job = self._documents.find_one(ended, {"attempt": 1})
            if job is None:
                return False
            fresh = {"failures": 0, "losses": 0, "seen": job["attempt"], "published": None, "stop": None}
            values = {**_QUEUED, **fresh, "ready_at": Later(), "finished": None}
            same = {**ended, "attempt": job["attempt"]}
            return bool(self._documents.update_one(same, self._clock.update(values)).matched_count)

    # A worker: claim, keep the lease, end or release.

    @repeated("claiming a job")
    def claim(
        self,
        *,
        worker: str,
        lease_s: float,
        job_id: str | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Claim the first job by priority and age that is queued, or whose lease has ended.

        Args:
            worker: Names the worker, for people.
            lease_s: How long the job is held without a heartbeat, in seconds.
            job_id: Claim only this job.
            environment: Where it runs: python, torch, platform.

        Returns:
            The job's document, with the `attempt` that every later call needs; None where there is no such job.
        """
        ready = {
            **READABLE,  # a job that a newer release has queued is for newer workers
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
        where = ready if job_id is None else {"_id": job_id, **ready}
        while True:
            claimed = self._claimed(where, values)
            if claimed is None:
                return None
            attempt = claimed["attempt"]
            if attempt - number(claimed, "seen") > MAX_LOSSES or number(claimed, "losses") > MAX_LOSSES_IN_ALL:
                self.fail(claimed["_id"], attempt, error=_lost(claimed))
            elif (broken := _broken(claimed)) is not None:
                self.fail(claimed["_id"], attempt, error=broken)
            else:
                return claimed

    def _claimed(self, where: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
        order, after = [("priority", -1), ("created", 1), ("_id", 1)], ReturnDocument.AFTER
        claimed: dict[str, Any] | None
        with self._clock.alone():
            if isinstance(self._clock, LocalClock):  # whose updates have no conditions
                found = self._documents.find_one(where, sort=order)
                if found is None:
                    return None
                lost = number(found, "losses") + (found["status"] == "running")
                counts = {"attempt": int(number(found, "attempt")) + 1, "losses": int(lost)}
                update = self._clock.update({**values, **counts})
                claimed = self._documents.find_one_and_update({"_id": found["_id"]}, update, return_document=after)
                return claimed
            # A job that runs is claimed because its lease has ended: its worker was lost.
            is_lost = {"$cond": [{"$eq": ["$status", "running"]}, 1, 0]}
            update = self._clock.update(values, {"attempt": 1, "losses": is_lost})
            claimed = self._documents.find_one_and_update(where, update, sort=order, return_document=after)
        return claimed

    @repeated("a heartbeat of a job")
    def heartbeat(
        self,
        job_id: str,
        attempt: int,
        *,
        lease_s: float | None,
        progress: Mapping[str, Any] | None = None,
        reached: int | None = None,
    ) -> bool:
        """Extend the lease to `lease_s` seconds from now, and record progress.

        Args:
            job_id: The job.
            attempt: The fencing token of the claim.
            lease_s: The length of the lease; None leaves it as it is, to the process that has claimed the job.
            progress: What people read; None keeps what there is.
            reached: The step that the run has reached, if no attempt was there before: only that is progress, by
                which the count of vanished workers starts anew.

        Returns:
            False: the job was taken over or cancelled; stop, nothing of this attempt takes effect any more.
        """
        made: dict[str, Any] = {} if progress is None else {"progress": plain(progress)}
        if reached is not None:
            made |= {"reached": reached, "seen": attempt}
        renewed = {} if lease_s is None else {"lease_until": Later(lease_s)}
        return (
            self._update(job_id, attempt, {**renewed, **made}) if renewed or made else self.holds(job_id, attempt)
        )

    @repeated("asking a run to hand its job back")
    def ask_to_hand_back(self, job_id: str, attempt: int) -> bool:
        """Ask the ranks of an attempt to write a checkpoint and to end, as the job's worker has to stop.

        Returns:
            False: fenced out, nothing was changed.
        """
        return self._update(job_id, attempt, {HAND_BACK: attempt})

    def succeed(
        self, job_id: str, attempt: int, *, result: str, progress: Mapping[str, Any] | None = None
    ) -> bool:
        """End a job that published `result`, a component's uuid. False: fenced out, nothing was changed.

        It may be repeated: an end that this attempt has recorded already is one. `progress` as in `heartbeat`.
        """
        made = {} if progress is None else {"progress": plain(progress)}
        if self._end(job_id, attempt, "succeeded", {"result": result, "error": None, **made}):
            return True
        same = {"_id": job_id, "attempt": attempt, "status": "succeeded", "result": result}
        return self._found(same)

    @repeated("recording a failure")
    def fail(
        self, job_id: str, attempt: int, *, error: Mapping[str, Any], retry: bool = False, most: int | None = None
    ) -> bool:
        """Record that the run raised, or that its process ended.

        Args:
            job_id: The job.
            attempt: The fencing token of the claim.
            error: `type`, `message`, `traceback`, `document_id`, `field`.
            retry: Queue the job again, each time after a longer pause, until it has failed too often without a
                further step.
            most: How often that is; None: `max_attempts` of the job.

        Returns:
            False: fenced out, nothing was changed.
        """
        job = self._documents.find_one({"_id": job_id}) or {}
        reached = number(job, "reached")
        # Only the holder counts, and the update is fenced.
        failures = 1 if reached > number(job, "failed_at") else number(job, "failures") + 1
        values = {"error": plain(error), "failures": failures, "failed_at": reached, "seen": attempt}
        if retry and failures < (number(job, "max_attempts") if most is None else most):
            wait_s = min(BACK_OFF_S * 2.0 ** (failures - 1), MAX_BACK_OFF_S)
            return self._update(job_id, attempt, {**values, **_QUEUED, "ready_at": Later(wait_s)})
        return self._end(job_id, attempt, "failed", values)

    @repeated("handing a job back")
    def release(self, job_id: str, attempt: int, *, killed: bool = False) -> bool:
        """Hand the job back for anybody to claim at once; not a failure. False: fenced out.

        Args:
            job_id: The job.
            attempt: The fencing token of the claim.
            killed: The run did not stop by itself: without a further step it counts as a worker that vanished.
        """
        seen = {} if killed else {"seen": attempt}
        return self._update(job_id, attempt, {**_QUEUED, **seen, "ready_at": Later()})

    @repeated("looking at a job")
    def holds(self, job_id: str, attempt: int) -> bool:
        """Whether the job still runs under this attempt."""
        return self._found(running(job_id, attempt))

    @repeated("looking at a job")
    def _found(self, where: Mapping[str, Any]) -> bool:
        return self._documents.find_one(where, {"_id": 1}) is not None

    @repeated("ending a job")
    def _end(self, job_id: str, attempt: int, status: str, values: Mapping[str, Any]) -> bool:
        ended = {"status": status, "finished": Later(), "lease_until": None}
        return self._update(job_id, attempt, {**values, **ended})

    @repeated("updating a job")
    def _update(self, job_id: str, attempt: int, values: Mapping[str, Any]) -> bool:
        with self._clock.alone():
            update = self._clock.update(values)
            return bool(self._documents.update_one(running(job_id, attempt), update).matched_count)


def _lost(job: Mapping[str, Any]) -> dict[str, Any]:
    message = (
        f"{MAX_LOSSES} workers in a row vanished while they ran it, without a further step, or "
        f"{MAX_LOSSES_IN_ALL} in all (the last one: {job.get('worker')}); look for a lack of memory there, then "
        "queue it again"
    )
    return {"type": "JobLostError", "message": message, "traceback": None, "document_id": None, "field": None}


def number(job: Mapping[str, Any], name: str) -> float:
    """A number in a job's document; 0 where there is none."""
    value = job.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _broken(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The error of a job's document that no worker can run, since a field is missing or of another type."""
    for name in _NEEDED:
        if not isinstance(job.get(name), str):
            message = (
                f"the job's document has no text in the field {name!r}; queue the component again by `db.apply`"
            )
            return {
                "type": "FormatError",
                "message": message,
                "traceback": None,
                "document_id": None,
                "field": name,
            }
    return None


def plain(value: Any, _depth: int = 0) -> Any:
    """The value in plain BSON, for people to read; any value can be converted.

    Args:
        value: Any object. Integers beyond 64 bits, objects that BSON does not have, and containers below the 50th
            level become their `repr`.

    Returns:
        The converted value, its texts redacted and cut at 100,000 characters.
    """
    if value is None or type(value) in (bool, float, bytes, datetime, ObjectId):
        return value
    if type(value) is int and value in _INT64:
        return value
    if isinstance(value, str):
        return redact(value.encode(errors="replace").decode())[:_MAX_TEXT]
    if _depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {plain_key(key): plain(part, _depth + 1) for key, part in value.items()}
    if _depth < _MAX_DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part, _depth + 1) for part in value]
    return plain(repr(value), _depth)


def plain_key(key: Any) -> str:
    """A field name that every server and mongomock accept: `.` and `$` become `_`."""
    return str(key).encode(errors="replace").decode().replace("\0", "?").replace(".", "_").replace("$", "_")
