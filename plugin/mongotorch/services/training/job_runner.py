"""Runs jobs in this process: claims one, keeps its lease, calls its handler, and records how it ended.

`JobRunner` does that; a `Heartbeat` is the thread that renews the lease meanwhile, whatever the run does.

Guarantees: a job is claimed before anything is done for it, and every record is fenced by the attempt. An error is
recorded with its traceback, without secrets, and raised unchanged. The lease is renewed three times in its length,
however long a step takes; a lost lease or a cancelled job is noticed at the next `check`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self, final

from mongotorch.errors import (
    JobCancelledError,
    JobReleasedError,
    MongotorchError,
    ServerUnavailableError,
)
from mongotorch.jobs import Handler, environment, log_job, worker_name
from mongotorch.jobs.failures import described, too_long
from mongotorch.mongo.driver_errors import is_transient, redact
from mongotorch.settings import Settings
from mongotorch.store import Jobs
from mongotorch.store.jobs import MAX_FAILURES, number
from mongotorch.train import Group

_log = logging.getLogger("mongotorch.jobs")
PROGRESS_S: Final = 0.5
"""How long progress waits before it is written, at the most."""
_RECORD_AGAIN_S: Final = (0.05, 1.0)  # pauses between the tries to record the end of a job


@final
class JobRunner:
    """Runs the jobs of one database.

    Args:
        jobs: The job documents.
        settings: `lease_s`, and `max_runtime_s` for jobs that do not say it.
        train: The handler of every component that has no handler of its own.
        handlers: The others, by `type_id`.
        train_rank: Runs one rank of the run of a claimed job.
    """

    def __init__(
        self,
        jobs: Jobs,
        settings: Settings,
        *,
        train: Handler,
        handlers: Mapping[str, Handler],
        train_rank: Callable[[Mapping[str, Any], Group], None],
    ) -> None:
        self._train_rank = train_rank
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

    def claim(self, job_id: str | None = None) -> dict[str, Any] | None:
        """Claim one job, or the most urgent of all; None where it, or any, does not wait."""
        return self._claim(job_id)

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

    def run_rank(self, job_id: str, attempt: int, group: Group) -> None:
        """Run one rank of a job that another process has claimed: as many processes call it as there are ranks.

        Args:
            job_id: The job.
            attempt: The attempt that was claimed.
            group: All ranks.

        Raises:
            NotFoundError: There is no such job in this database.
            JobCancelledError: It was cancelled, or taken over.
            MongotorchError: The run failed, here or on another rank.
        """
        job = self._jobs.get(job_id)
        if (job["status"], job["attempt"]) != ("running", attempt):
            raise JobCancelledError(f"job {job_id} does not run under attempt {attempt} any more")
        self._train_rank(job, group)

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
        description = described(error) | {"traceback": None}
        _recorded(lambda: self._jobs.fail(job_id, attempt, error=description, retry=retry))

    def fail_rank(self, job_id: str, error: BaseException) -> None:
        """Record what a rank has raised of which nobody else hears; nothing if the job has ended already."""
        job, description = self._jobs.get(job_id), described(error)
        retry = bool(description["transient"])
        _recorded(lambda: self._jobs.fail(job_id, job["attempt"], error=description, retry=retry))

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
        description = described(error)
        most = MAX_FAILURES if isinstance(error, ServerUnavailableError) or is_transient(error) else None
        why = f"{description['type']}: {' '.join(str(description['message']).split())}"
        log_job(job, "failed", why, level=logging.ERROR, why=why, step=_step(job, heartbeat))
        _beat(heartbeat)
        retry = retry and description["transient"]
        job_id, attempt = job["_id"], job["attempt"]
        _recorded(lambda: self._jobs.fail(job_id, attempt, error=description, retry=retry, most=most))


@final
class Heartbeat:
    """Holds one attempt's lease; a context manager that stops the thread. It is the `Lease` of handlers.

    Args:
        jobs: The job documents.
        job_id: The job.
        attempt: The attempt that was claimed.
        lease_s: The length of the lease, in seconds.
        stop: Set when the process has to stop.
        reached: The furthest step of the attempts before.
        max_runtime_s: The longest time of this attempt, in seconds; None: no limit.
        component: What the job runs, for the log: its kind and name.

    Attributes:
        progress: What the next beat writes into the job's document.
    """

    def __init__(
        self,
        jobs: Jobs,
        job_id: str,
        attempt: int,
        *,
        lease_s: float,
        stop: threading.Event | None = None,
        reached: float = 0,
        max_runtime_s: float | None = None,
        component: str = "",
    ) -> None:
        self._jobs, self._job_id, self._attempt, self._component = jobs, job_id, attempt, component
        self._lease_s, self._reached, self._max_runtime_s = lease_s, reached, max_runtime_s
        self._begun_s = time.monotonic()
        self._lost = threading.Event()
        self._ended, self._stopping = threading.Event(), stop or threading.Event()
        self._is_asked_to_end = False
        self._one = threading.Lock()
        self._written: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="mongotorch-heartbeat", daemon=True)
        self.progress: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def is_stopping(self) -> bool:
        """Whether the process has to stop: the run writes a checkpoint and hands the job back."""
        return self._stopping.is_set()

    @property
    def is_asked_to_end(self) -> bool:
        """Whether somebody has asked the run to end, and to publish the best so far."""
        return self._is_asked_to_end

    def look(self) -> None:
        """See whether somebody has asked the run to end."""
        self._is_asked_to_end = self._is_asked_to_end or self._jobs.is_asked_to_stop(self._job_id)

    def check(self) -> None:
        """Return if the run may go on.

        Raises:
            JobCancelledError: The job was cancelled, or another worker has taken it over.
            JobRuntimeError: The attempt has taken longer than it may.
        """
        if self._max_runtime_s is not None and time.monotonic() - self._begun_s > self._max_runtime_s:
            raise too_long(self._job_id, self._max_runtime_s)
        if self._lost.is_set():
            raise JobCancelledError(
                f"job {self._job_id}: attempt {self._attempt} was cancelled, or its lease ran out and another "
                "worker has it; this attempt publishes nothing"
            )

    def beat(self) -> None:
        """Renew the lease and write the progress now."""
        with self._one:
            self._written, step = self.progress, self.progress.get("step", 0)
            alive = self._jobs.heartbeat(
                self._job_id,
                self._attempt,
                lease_s=self._lease_s,
                progress=self.progress or None,
                reached=step if step > self._reached else None,
            )
            self._reached = max(step, self._reached)
        if not alive and not self._lost.is_set():
            self._lost.set()
            about = {"job": self._job_id, "attempt": self._attempt, "component": self._component, "step": step}
            _log.warning(
                "job %s: attempt %s was cancelled, or has lost its lease, at step %s",
                *(self._job_id, self._attempt, step),
                extra={**about, "event": "lease lost"},
            )

    def _run(self) -> None:
        renewal_s = self._lease_s / 3
        renewed_s = time.monotonic()
        while not self._lost.is_set() and not self._ended.wait(min(renewal_s, PROGRESS_S)):
            # Whatever a beat raises, mostly that the database is away: a thread that ends would lose the lease of
            # a run that goes on. The lease decides, and publishing checks it again.
            with contextlib.suppress(Exception):
                if self.progress is not self._written or time.monotonic() - renewed_s >= renewal_s:
                    self.beat()
                    renewed_s = time.monotonic()
                self.look()


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
