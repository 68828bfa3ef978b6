"""The future that `db.apply` returns, and that `db.job(uuid)` finds again from anywhere.

Always: what it says is read from the job's document when asked, so that every process that holds the same
job sees the same; a final status never changes again; `result()` either returns what the run published or
raises. A job without a run (nothing was left to do) is done from the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar, final

from mongotorch.errors import JobCancelledError, JobFailedError, JobTimeoutError

_SLICE_S = 2.0
"""So often somebody who waits looks whether the run still has somebody who runs it."""
T = TypeVar("T")


class JobRecords(Protocol):
    """What a future needs of the place where jobs are kept."""

    def get(self, job_id: str) -> Mapping[str, Any]:
        """The job's document. Raises: NotFoundError."""

    def wait(self, job_id: str, timeout_s: float | None) -> Mapping[str, Any]:
        """The job's document once it has ended. Raises: JobTimeoutError, NotFoundError."""

    def has_ended(self, job_id: str) -> bool:
        """Whether the job succeeded, failed or was cancelled. Raises: NotFoundError."""

    def cancel(self, job_id: str) -> bool:
        """Mark a job that has not ended as cancelled; False if it had ended."""


@final
class Job(Generic[T]):
    """One run of one component, from here or from anywhere.

    Args:
        uuid: The job's own uuid.
        component: Gives the component as it was stored, before the run; asked once, when somebody wants it.
        records: Where the job's document is; None for a job that had nothing to run.
        load: From the uuid of what the run published to the component.
        error: What the run raised, when this process ran it.
        resume: Has the job executed again where nobody holds it any more; asked while somebody waits. None: that
            is for others to do.
        result: What `result()` gives, where it is known already.
    """

    def __init__(
        self,
        uuid: str,
        *,
        component: Callable[[], T],
        load: Callable[[str], T],
        records: JobRecords | None = None,
        error: BaseException | None = None,
        result: T | None = None,
        resume: Callable[[], BaseException | None] | None = None,
    ) -> None:
        self._resume = resume
        self.uuid = uuid
        self._component = component
        self._known: T | None = None
        self._records = records
        self._load = load
        self._error = error
        self._result = result

    def __repr__(self) -> str:
        return f"Job({self.uuid!r}, {self.status})"

    @property
    def component(self) -> T:
        """The component as it was stored, before the run."""
        if self._known is None:
            self._known = self._component()
        return self._known

    @property
    def status(self) -> str:
        """`queued`, `running`, `succeeded`, `failed` or `cancelled`."""
        return "succeeded" if self._records is None else str(self._records.get(self.uuid)["status"])

    @property
    def progress(self) -> dict[str, Any]:
        """How far the run is: `step`, `samples`, `samples_per_s`, and what it last measured."""
        return {} if self._records is None else dict(self._records.get(self.uuid).get("progress") or {})

    @property
    def record(self) -> dict[str, Any]:
        """The whole job document: times, parameters, environment, error with its traceback."""
        return {} if self._records is None else dict(self._records.get(self.uuid))

    def done(self) -> bool:
        """Whether the run has ended, however it ended."""
        return self._records is None or self._records.has_ended(self.uuid)

    def cancel(self) -> bool:
        """Ask the run to stop at its next step; nothing is published.

        Returns:
            False if it had already ended.
        """
        return self._records is not None and self._records.cancel(self.uuid)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the run raised, None if it succeeded; waits for its end.

        Args:
            timeout: Seconds to wait; None waits for ever.

        Raises:
            JobTimeoutError: The run has not ended by then.
        """
        status = self._wait(timeout)
        if status == "succeeded":
            return None
        if self._error is not None:
            return self._error
        if status == "cancelled":
            return JobCancelledError(f"job {self.uuid} was cancelled; nothing was published")
        error = self.record.get("error") or {}
        what = f"{error.get('type')}: {error.get('message')}"
        return JobFailedError(
            f"job {self.uuid} failed: {what}\n{error.get('traceback') or ''}",
            document_id=error.get("document_id"),
            field=error.get("field"),
        )

    def result(self, timeout: float | None = None) -> T:
        """What the run published: the trained model (for a component without a run, the component).

        Args:
            timeout: Seconds to wait; None waits for ever.

        Raises:
            JobTimeoutError: The run has not ended by then.
            JobCancelledError: It was cancelled.
            JobFailedError: It failed in another process; in the process that ran it, its own error is raised.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        if self._result is None:
            self._result = self._load(self.record["result"])
        return self._result

    def _wait(self, timeout: float | None) -> str:
        """The final status; a run whose process died is gone on with here, if that is this job's to do."""
        if self._records is None:
            return "succeeded"
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE_S if deadline is None else deadline - time.monotonic()
            try:
                return str(self._records.wait(self.uuid, max(min(left, _SLICE_S), 0.0))["status"])
            except JobTimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
            if self._resume is not None:
                self._error = self._resume() or self._error
