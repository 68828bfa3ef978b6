"""The holder's side of a job: to claim it, keep it, and end it or hand it back.

A claim is one update, and its `attempt` is the fencing token: whatever a holder says later is heard only while
the document still runs under that number. A holder that goes silent loses the job when its lease ends.

Always: a job is never held by two, and who has lost it is told so by False; times are the server's, so that
workers with other clocks agree; a run that raises is tried `max_attempts` times, one that only loses its worker
as long as it makes progress in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pymongo import ReturnDocument

from mongotorch.codecs import READABLE, WRITTEN
from mongotorch.store.clock import Later, Now, clock_of
from mongotorch.store.failures import driver_errors
from mongotorch.store.plain import plain

COLLECTION: Final = "mt.jobs"
BACK_OFF_S: Final = 1.0
MOST_BACK_OFF_S: Final = 300.0
MOST_LOSSES: Final = 20
"""So many workers in a row may vanish without any progress; the next claim fails the job instead."""
QUEUED: Final = {"status": "queued", "lease_until": None, "worker": None}


class Leases:
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
