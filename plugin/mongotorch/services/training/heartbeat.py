"""The heartbeat of an attempt: a thread that renews the lease of its job, whatever the run does.

Guarantees: the lease is renewed three times in its length, however long a step takes. A lost lease or a cancelled
job is noticed at the next `check`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from types import TracebackType
from typing import Any, Self, final

from mongotorch.errors import JobCancelledError, JobRuntimeError
from mongotorch.store import Jobs

_log = logging.getLogger("mongotorch.jobs")
PROGRESS_S = 0.5
"""How long progress waits before it is written, at the most."""


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


def too_long(job_id: str, max_runtime_s: float) -> JobRuntimeError:
    """The error of an attempt that has taken longer than it may."""
    return JobRuntimeError(
        f"job {job_id} ran for longer than max_runtime_s={max_runtime_s:g} allows; give it more, or less to do",
        setting="max_runtime_s",
    )
