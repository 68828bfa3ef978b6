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
from mongotorch.jobs import Handler, environment, worker_name
from mongotorch.mongo.error_translation import is_transient, redact
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.settings import Settings
from mongotorch.store import Jobs

_log = logging.getLogger("mongotorch.jobs")
_RECORD_AGAIN_S: Final = (0.05, 1.0)  # pauses between the tries to record the end of a job


@final
class JobRunner:
    """Runs the jobs of one database.

    Args:
        jobs: The job documents.
        settings: `lease_s`.
        train: The handler of every component that has no handler of its own.
        handlers: The others, by `type_id`.
    """

    def __init__(self, jobs: Jobs, settings: Settings, *, train: Handler, handlers: Mapping[str, Handler]) -> None:
        self._jobs, self._lease_s = jobs, settings.lease_s
        self._train, self._handlers = train, handlers

    def run(self, job_id: str) -> None:
        """Run one job if it can be claimed; otherwise another process runs it, or it has ended.

        Raises:
            JobCancelledError: It was cancelled, or taken over.
            Exception: What the handler raised.
        """
        job = self._claim(job_id)
        if job is not None:
            self._run(job, stop=None, retry=False)

    def claim(self) -> dict[str, Any] | None:
        """Claim the most urgent job; None where none waits."""
        return self._claim(None)

    def run_claimed(self, job: Mapping[str, Any], stop: threading.Event) -> bool:
        """Run a claimed job and record how it ended; an error of the job is recorded and not raised.

        Args:
            job: The claimed job document.
            stop: Set while it runs: it writes a checkpoint and is handed back.

        Returns:
            False: it was handed back.
        """
        try:
            self._run(job, stop=stop, retry=True)
        except JobReleasedError:
            return False
        except Exception:  # noqa: BLE001 - it is in the job's document, where people look
            return True
        return True

    def is_idle(self) -> bool:
        """Whether no job waits, not even for a later time."""
        return not self._jobs.is_waiting()

    def _claim(self, job_id: str | None) -> dict[str, Any] | None:
        return self._jobs.claim(
            worker=worker_name(), lease_s=self._lease_s, job_id=job_id, environment=environment()
        )

    def _run(self, job: Mapping[str, Any], *, stop: threading.Event | None, retry: bool) -> None:
        job_id, attempt = job["_id"], job["attempt"]
        handler = self._handlers.get(job["type_id"], self._train)
        heartbeat = Heartbeat(self._jobs, job_id, attempt, lease_s=self._lease_s, stop=stop)
        try:
            with heartbeat:
                result = handler(job, heartbeat)
        except JobReleasedError:
            heartbeat.beat()
            self._jobs.release(job_id, attempt)
            raise
        except JobCancelledError:
            raise
        except Exception as error:
            described = _described(error)
            transient = described["transient"]
            _log.error("%s", _failure(job, described))
            _beat(heartbeat)
            _recorded(lambda: self._jobs.fail(job_id, attempt, error=described, retry=retry and transient))
            raise
        except BaseException:  # Ctrl-C in the caller's own process: the person wants it to end
            self._jobs.cancel(job_id)
            raise
        try:
            _beat(heartbeat)
            succeeded = _recorded(lambda: self._jobs.succeed(job_id, attempt, result=result))
        except Exception as error:
            _log.error("job %s published %s, and cannot record it: %s", job_id, result, redact(str(error)))
            raise
        if not succeeded:
            raise JobCancelledError(
                f"job {job_id}: attempt {attempt} lost its lease before it could record its end"
            )


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


def _failure(job: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    """One line about a job that failed."""
    message = " ".join(str(error["message"]).split())
    return f"job {job['_id']} of {job['type_id']} {job['identifier']!r} failed: {error['type']}: {message}"


def _may_pass(error: BaseException) -> bool:
    """Whether the same job may succeed later: the database or the machine failed, not the run."""
    return isinstance(error, ServerUnavailableError | OSError | MemoryError) or is_transient(error)


def _described(error: BaseException) -> dict[str, Any]:
    """An error as a job's document keeps it."""
    own = isinstance(error, MongotorchError)
    return {
        "type": type(error).__name__,
        "message": redact(str(error)),
        "traceback": redact("".join(traceback.format_exception(error))),
        "transient": _may_pass(error),
        "document_id": getattr(error, "document_id", None) if own else None,
        "field": getattr(error, "field", None) if own else None,
    }
