"""Runs jobs in this process: claims one, keeps its lease, calls its handler, and records how it ended.

Guarantees: a job is claimed before anything is done for it, and every record is fenced by the attempt. An error is
recorded with its traceback, without secrets, and raised unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, final

from mongotorch.errors import JobCancelledError, JobReleasedError, MongotorchError, ServerUnavailableError
from mongotorch.jobs import Handler, environment, log_job, worker_name
from mongotorch.mongo.error_translation import is_transient, redact
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.settings import Settings
from mongotorch.store import Jobs
from mongotorch.store.jobs import MAX_FAILURES, number

_log = logging.getLogger("mongotorch.jobs")
_RECORD_AGAIN_S: Final = (0.05, 1.0)  # pauses between the tries to record the end of a job


@final
class JobRunner:
    """Runs the jobs of one database.

    Args:
        jobs: The job documents.
        settings: `lease_s`, and `max_runtime_s` for jobs that do not say it.
        train: The handler of every component that has no handler of its own.
        handlers: The others, by `type_id`.
    """

    def __init__(self, jobs: Jobs, settings: Settings, *, train: Handler, handlers: Mapping[str, Handler]) -> None:
        self._jobs, self._lease_s, self._max_runtime_s = jobs, settings.lease_s, settings.max_runtime_s
        self._train, self._handlers = train, handlers

    def run(self, job_id: str) -> None:
        """Run one job if it can be claimed; otherwise another process runs it, or it has ended.

        Raises:
            JobCancelledError: It was cancelled, or taken over.
            Exception: What the handler raised.
        """
        job = self._claim(job_id)
        if job is not None:
            self._run(job, stop=None)

    def claim(self) -> dict[str, Any] | None:
        """Claim the most urgent job; None where none waits."""
        return self._claim(None)

    def run_claimed(self, job: Mapping[str, Any], stop: threading.Event) -> str:
        """Run a claimed job and record how it ended; an error of the job is recorded and not raised.

        Args:
            job: The claimed job document.
            stop: Set while it runs: it writes a checkpoint and is handed back.

        Returns:
            `succeeded`, `failed` (it may be tried again), `cancelled`, or `released` where it was handed back.
        """
        try:
            self._run(job, stop=stop)
        except JobReleasedError:
            return "released"
        except JobCancelledError:
            return "cancelled"
        except BaseException:  # noqa: BLE001 - it is in the job's document, where people look
            return "failed"
        return "succeeded"

    def is_idle(self) -> bool:
        """Whether no job waits, not even for a later time."""
        return not self._jobs.is_waiting()

    def holds(self, job_id: str, attempt: int) -> bool:
        """Whether a job still runs under an attempt: it was neither cancelled nor taken over."""
        return self._jobs.holds(job_id, attempt)

    def release_killed(self, job_id: str, attempt: int) -> None:
        """Hand back the job of a process that was killed, since it did not stop."""
        self._jobs.release(job_id, attempt, killed=True)

    def fail_killed(self, job_id: str, attempt: int, error: MongotorchError, *, retry: bool) -> None:
        """Record that the process of a job ended, or was killed, without an end of the job.

        Args:
            job_id: The job.
            attempt: The attempt of that process.
            error: What became of the process.
            retry: Whether the job is tried again, unless it has failed too often.
        """
        why = f"{type(error).__name__}: {error.message}"
        found = self._jobs.get(job_id)
        log_job(found, "failed", why, level=logging.ERROR, why=why, step=int(number(found, "reached")))
        described = _described(error) | {"traceback": None}
        _recorded(lambda: self._jobs.fail(job_id, attempt, error=described, retry=retry))

    def _claim(self, job_id: str | None) -> dict[str, Any] | None:
        return self._jobs.claim(
            worker=worker_name(), lease_s=self._lease_s, job_id=job_id, environment=environment()
        )

    def _run(self, job: Mapping[str, Any], *, stop: threading.Event | None) -> None:
        """Run a claimed job; without `stop` in the process of the caller, who tries nothing again."""
        job_id, attempt = job["_id"], job["attempt"]
        handler = self._handlers.get(job["type_id"], self._train)
        log_job(job, "claimed", step=int(number(job, "reached")))
        heartbeat = Heartbeat(
            self._jobs,
            job_id,
            attempt,
            lease_s=self._lease_s,
            stop=stop,
            reached=number(job, "reached"),
            max_runtime_s=number(job, "max_runtime_s") or self._max_runtime_s,
            component=f"{job['type_id']} {job['identifier']}",
        )
        try:
            with heartbeat:
                result = handler(job, heartbeat)
        except JobReleasedError:
            _beat(heartbeat)
            _recorded(lambda: self._jobs.release(job_id, attempt))
            log_job(job, "handed back", f"after step {_step(job, heartbeat)}", step=_step(job, heartbeat))
            raise
        except JobCancelledError:
            log_job(job, "cancelled", step=_step(job, heartbeat))
            raise
        except KeyboardInterrupt as error:
            if stop is None:  # Ctrl-C in the caller's own process: the person wants it to end
                self._jobs.cancel(job_id)
            else:  # a worker takes the signal itself: the run has raised it
                self._fail(job, error, heartbeat, retry=False)
            raise
        except BaseException as error:
            self._fail(job, error, heartbeat, retry=stop is not None)
            raise
        try:
            progress = heartbeat.progress or None
            succeeded = _recorded(lambda: self._jobs.succeed(job_id, attempt, result=result, progress=progress))
        except Exception as error:
            _log.error("job %s published %s, and cannot record it: %s", job_id, result, redact(str(error)))
            raise
        if not succeeded:
            raise JobCancelledError(
                f"job {job_id}: attempt {attempt} lost its lease before it could record its end"
            )
        log_job(job, "succeeded", step=_step(job, heartbeat))

    def _fail(self, job: Mapping[str, Any], error: BaseException, heartbeat: Heartbeat, *, retry: bool) -> None:
        """Record why a job failed; what the database failed is tried more often than what the machine did."""
        described = _described(error)
        most = MAX_FAILURES if isinstance(error, ServerUnavailableError) or is_transient(error) else None
        why = f"{described['type']}: {' '.join(str(described['message']).split())}"
        log_job(job, "failed", why, level=logging.ERROR, why=why, step=_step(job, heartbeat))
        _beat(heartbeat)
        retry = retry and described["transient"]
        job_id, attempt = job["_id"], job["attempt"]
        _recorded(lambda: self._jobs.fail(job_id, attempt, error=described, retry=retry, most=most))


def _step(job: Mapping[str, Any], heartbeat: Heartbeat) -> int:
    """How many steps the run of a job has made."""
    return int(heartbeat.progress.get("step", number(job, "reached")))


def _beat(heartbeat: Heartbeat) -> None:
    """Keep how far the run came; the end is recorded also where that fails."""
    with contextlib.suppress(Exception):
        heartbeat.beat()


def _recorded(record: Callable[[], bool]) -> bool:
    """Record the end of a job, again after an error: a job without an end looks as if it still ran."""
    for wait_s in _RECORD_AGAIN_S:
        try:
            return record()
        except Exception:  # noqa: BLE001 - the last try raises it
            time.sleep(wait_s)
    return record()


def _may_pass(error: BaseException) -> bool:
    """Whether the same job may succeed later: the database or the machine failed, not the run."""
    return isinstance(error, ServerUnavailableError | OSError | MemoryError) or is_transient(error)


def _text(error: BaseException) -> str:
    """What an error says, without passwords; some cannot even say that."""
    if isinstance(error, SystemExit):
        return f"the run called sys.exit({error.code!r})"
    try:
        return redact(str(error))
    except Exception as second:  # noqa: BLE001 - any code may be in there
        return f"the error has no text: its `__str__` raised {type(second).__name__}"


def _described(error: BaseException) -> dict[str, Any]:
    """An error as a job's document keeps it."""
    own = isinstance(error, MongotorchError)
    return {
        "type": type(error).__name__,
        "message": _text(error),
        "traceback": redact("".join(traceback.format_exception(error))),
        "transient": _may_pass(error),
        "document_id": getattr(error, "document_id", None) if own else None,
        "field": getattr(error, "field", None) if own else None,
    }
