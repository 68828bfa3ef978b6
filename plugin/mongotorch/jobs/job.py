"""The handle of a job that `db.apply` returns and `db.job(uuid)` finds again, and what a job's handler gets.

Guarantees: every property reads the job's document when asked, so that all processes see the same; `result()`
returns what the run published, or raises. A `Job` without a run is done from the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar, final

from mongotorch.errors import JobCancelledError, JobFailedError, JobTimeoutError
from mongotorch.jobs.run_metrics import RunMetrics
from mongotorch.notebook import html_curves, html_pairs

_RESUME_INTERVAL_S = 2.0
"""How often a waiting caller checks whether the run has to be resumed."""
_LONGEST_ERROR = 200  # characters of it in a `repr`
T = TypeVar("T")


class Lease(Protocol):
    """An attempt's hold on its job, as a handler sees it.

    Attributes:
        progress: What the next heartbeat writes into the job's document; plain BSON.
    """

    progress: dict[str, Any]

    @property
    def is_stopping(self) -> bool:
        """Whether the process has to stop."""

    @property
    def is_asked_to_end(self) -> bool:
        """Whether the run has to end after its step, and to publish the best so far."""

    def check(self) -> None:
        """Raises: JobCancelledError when the job was cancelled, or another worker has taken it over."""


Handler = Callable[[Mapping[str, Any], Lease], str]
"""Runs a claimed job: from its document and the lease to the uuid of what was published."""


class JobRecords(Protocol):
    """The store of job documents, as a `Job` needs it."""

    def get(self, job_id: str) -> Mapping[str, Any]:
        """The job's document. Raises: NotFoundError."""

    def wait(self, job_id: str, timeout_s: float | None) -> Mapping[str, Any]:
        """The job's document once it has ended. Raises: JobTimeoutError, NotFoundError."""

    def has_ended(self, job_id: str) -> bool:
        """Whether the job succeeded, failed or was cancelled. Raises: NotFoundError."""

    def cancel(self, job_id: str) -> bool:
        """Mark a job that has not ended as cancelled; False if it had ended."""

    def stop(self, job_id: str) -> bool:
        """Ask a job that has not ended to publish the best so far; False if it had ended."""


@final
class Job(Generic[T]):
    """One run of one component, in this process or in another.

    Args:
        uuid: The job's own uuid.
        component: Loads the component as it was stored, before the run; called at most once.
        load: Loads the published component of a uuid.
        records: The store of job documents; None for a job that had nothing to run.
        error: What the run raised, if this process ran it.
        result: What `result()` returns, if it is known already.
        resume: Runs the job again if no process holds it any more; called while the caller waits. None leaves
            that to workers.
        metrics: What the run of a uuid has measured by now; None for a job that had nothing to run.
    """

    def __init__(
        self,
        uuid: str,
        *,
        component: Callable[[], Any],
        load: Callable[[str], T],
        records: JobRecords | None = None,
        error: BaseException | None = None,
        result: T | None = None,
        resume: Callable[[], BaseException | None] | None = None,
        metrics: Callable[[str], RunMetrics] | None = None,
    ) -> None:
        self._resume, self._metrics = resume, metrics
        self.uuid = uuid
        self._component = component
        self._known: Any = None
        self._records = records
        self._load = load
        self._error = error
        self._result = result

    def __repr__(self) -> str:
        status, error = self.status, self.error
        if error is None:
            return f"Job({self.uuid!r}, {status})"
        text = " ".join(f"{error['type']}: {error['message']}".split())
        return f"Job({self.uuid!r}, {status}: {text[:_LONGEST_ERROR]})"

    def _repr_html_(self) -> str:
        record, progress = self.record, self.progress
        error, values = self.error or {}, progress.get("values") or {}
        pairs = [
            ("component", f"{record.get('type_id')} {record.get('identifier')}" if record else None),
            ("status", self.status),
            ("step", progress.get("step")),
            ("measured", ", ".join(f"{name} {value:.4g}" for name, value in values.items())),
            ("samples per second", progress.get("samples_per_s")),
            ("error", f"{error.get('type')}: {error.get('message')}" if error else None),
        ]
        metrics = self.metrics
        curves = {f"{kind} objective": metrics.curve("objective", kind) for kind in ("train", "valid")}
        return html_pairs(f"Job {self.uuid}", pairs) + html_curves(curves)

    def plot(self, *names: str, axes: Any = None) -> Any:
        """Draw what the run has measured by now, as `RunMetrics.plot`.

        Args:
            names: What is drawn; `objective` unless given.
            axes: Where; None makes new ones.

        Returns:
            The axes, `matplotlib.axes.Axes`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        return self.metrics.plot(*names, axes=axes)

    @property
    def component(self) -> Any:
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
        """How far the run is, a second ago at most: `step`, `samples`, `samples_per_s`, what it last measured."""
        return {} if self._records is None else dict(self._records.get(self.uuid).get("progress") or {})

    @property
    def metrics(self) -> RunMetrics:
        """What the run has measured by now, as `db.metrics` gives it."""
        return RunMetrics(job=self.uuid, rows=()) if self._metrics is None else self._metrics(self.uuid)

    @property
    def record(self) -> dict[str, Any]:
        """The whole job document: times, parameters, environment, error with its traceback."""
        return {} if self._records is None else dict(self._records.get(self.uuid))

    @property
    def error(self) -> dict[str, Any] | None:
        """Why the run failed; None unless it did.

        The keys are `type`, `message`, `traceback`, `document_id`, `field`, `setting`, and `transient`: whether
        the database or the machine failed, so that the same run, applied again, goes on from its checkpoint.
        """
        record = self.record
        return dict(record["error"]) if record.get("status") == "failed" and record.get("error") else None

    def done(self) -> bool:
        """Whether the run has ended, however it ended."""
        return self._records is None or self._records.has_ended(self.uuid)

    def cancel(self) -> bool:
        """Ask the run to stop at its next step; nothing is published.

        Returns:
            False if it had already ended.
        """
        return self._records is not None and self._records.cancel(self.uuid)

    def stop(self) -> bool:
        """Ask the run to end after its step, from any process, and to publish the best so far.

        It validates once more, and publishes the best weights of all validations; those of the last step where it
        never validates. A job of which no step was made has nothing to publish: it is cancelled.

        Returns:
            False if it had ended, or published, already.
        """
        return self._records is not None and self._records.stop(self.uuid)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the run raised, None if it succeeded; waits for its end.

        Args:
            timeout: Seconds to wait; None waits without a limit.

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
            timeout: Seconds to wait; None waits without a limit.

        Raises:
            JobTimeoutError: The run has not ended by then.
            JobCancelledError: It was cancelled.
            JobFailedError: It failed in another process. The process that ran it raises the error itself.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        if self._result is None:
            self._result = self._load(self.record["result"])
        return self._result

    def _wait(self, timeout: float | None) -> str:
        """The final status; meanwhile `resume` takes over a run whose process died."""
        if self._records is None:
            return "succeeded"
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _RESUME_INTERVAL_S if deadline is None else deadline - time.monotonic()
            try:
                return str(self._records.wait(self.uuid, max(min(left, _RESUME_INTERVAL_S), 0.0))["status"])
            except JobTimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
            if self._resume is not None:
                self._error = self._resume() or self._error
