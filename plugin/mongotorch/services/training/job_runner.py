"""Performs a job here: claims it, keeps it alive, runs it, and records how it ended.

Always: a job is claimed before anything is done for it, and what is recorded is fenced by the attempt; an error
is recorded with its traceback and then raised as it was; a secret is in neither.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import socket
import threading
import traceback
from collections.abc import Mapping
from typing import Any, Protocol, final

from mongotorch._version import __version__
from mongotorch.errors import JobCancelledError, JobReleasedError, MongotorchError, ServerUnavailableError
from mongotorch.mongo.redact import redact
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.settings import Settings
from mongotorch.store import Jobs


class JobHandler(Protocol):
    """What is done for a claimed job."""

    def run(self, job: Mapping[str, Any], heart: Heartbeat) -> str:
        """Do it; the uuid of what was published."""


@final
class JobRunner:
    """Performs jobs in this process.

    Args:
        jobs: The job documents.
        work: What is done for one.
        settings: `lease_s`.
    """

    def __init__(self, jobs: Jobs, work: JobHandler, settings: Settings) -> None:
        self._jobs, self._work, self._settings = jobs, work, settings

    def perform(self, job_id: str) -> None:
        """Perform one job, if it can be claimed; else somebody else performs it, or it has ended.

        Raises:
            JobCancelledError: It was cancelled, or taken over.
            Exception: What the run raised.
        """
        job = self._claim(job_id)
        if job is not None:
            self._run(job, stop=None, retry=False)

    def claim(self) -> dict[str, Any] | None:
        """Take the most urgent job; see `Shift.claim`."""
        return self._claim(None)

    def take(self, job: Mapping[str, Any], stop: threading.Event) -> bool:
        """Perform a claimed job; what it raises is recorded and no more. False: it was handed back."""
        try:
            self._run(job, stop=stop, retry=True)
        except JobReleasedError:
            return False
        except Exception:  # noqa: BLE001 - it is in the job's document, where people look
            return True
        return True

    def is_idle(self) -> bool:
        """Whether no job waits; see `Shift.is_idle`."""
        return not self._jobs.is_waiting()

    def _claim(self, job_id: str | None) -> dict[str, Any] | None:
        return self._jobs.claim(
            worker=worker_name(), lease_s=self._settings.lease_s, job_id=job_id, environment=environment()
        )

    def _run(self, job: Mapping[str, Any], *, stop: threading.Event | None, retry: bool) -> None:
        job_id, attempt = job["_id"], job["attempt"]
        with Heartbeat(self._jobs, job_id, attempt, lease_s=self._settings.lease_s, stop=stop) as heart:
            try:
                result = self._work.run(job, heart)
            except JobReleasedError:
                heart.beat()
                self._jobs.release(job_id, attempt)
                raise
            except JobCancelledError:
                raise
            except Exception as error:
                self._jobs.fail(job_id, attempt, error=described(error), retry=retry and is_passing(error))
                raise
            except BaseException:  # Ctrl-C in the caller's own process: the person wants it to end
                self._jobs.cancel(job_id)
                raise
            heart.beat()
        if not self._jobs.succeed(job_id, attempt, result=result):
            raise JobCancelledError(f"job {job_id}: attempt {attempt} had lost its lease before it could say so")


def is_passing(error: Exception) -> bool:
    """Whether the same run can succeed later: the database or the machine failed, not the run."""
    return isinstance(error, ServerUnavailableError | OSError | MemoryError)


def described(error: BaseException) -> dict[str, Any]:
    """An error as a job's document keeps it."""
    known = isinstance(error, MongotorchError)
    document_id = getattr(error, "document_id", None) if known else None
    return {
        "type": type(error).__name__,
        "message": redact(str(error)),
        "traceback": redact("".join(traceback.format_exception(error))),
        "document_id": document_id,
        "field": getattr(error, "field", None) if known else None,
    }


def worker_name() -> str:
    """Who runs: the host and the process."""
    return f"{socket.gethostname()}:{os.getpid()}"


@functools.cache
def environment() -> dict[str, str]:
    """What a run depends on besides its parameters: versions and platform."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pymongo")}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "mongotorch": __version__,
        **packages,
    }
