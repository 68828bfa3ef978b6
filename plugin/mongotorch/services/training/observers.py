"""Observers of a run: each reacts to the events of a `Fit`; `observe` trains and calls them in their order.

To watch runs in a further way, write an `Observer` and add it to the list in `TrainingRun.train`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, final

from tqdm import tqdm

from mongotorch.jobs import Lease
from mongotorch.store import MetricLog
from mongotorch.train import Fit, Stepped, Validated


class Observer(Protocol):
    """Reacts to the events of one run; a context manager that is open while the run trains.

    An error in a method ends the run. Subclasses override what they need; the defaults do nothing.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    # ruff: noqa: ARG002 - the defaults ignore what they are given
    def on_start(self, fit: Fit) -> None:
        """The run is about to make its first step."""
        return  # a body, else it is abstract

    def on_step(self, event: Stepped) -> None:
        """An optimizer step was made."""
        return

    def on_validation(self, event: Validated) -> None:
        """The model was validated."""
        return

    def on_end(self) -> None:
        """The run has made its last step; not called after an error."""
        return


def observe(fit: Fit, observers: Sequence[Observer]) -> None:
    """Train, and call every observer at each event, in the order of the list.

    Args:
        fit: The run.
        observers: Entered in their order, left in the reverse order.

    Raises:
        MongotorchError: What the run or an observer raised.
    """
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        events = stack.enter_context(contextlib.closing(fit.run()))
        for observer in observers:
            observer.on_start(fit)
        for event in events:
            for observer in observers:
                if isinstance(event, Stepped):
                    observer.on_step(event)
                else:
                    observer.on_validation(event)
        for observer in observers:
            observer.on_end()


@final
class JobProgress(Observer):
    """Ends the run when its lease is lost, and hands the heartbeat what the job's document says as `progress`.

    The rate and the remaining time are in it from the second step of this attempt on.

    Args:
        lease: The attempt's hold on its job.
        limit: The most steps of the run; None: unlimited.
        clock: A monotonic clock, in seconds.

    Attributes:
        progress: Plain BSON.
    """

    def __init__(self, lease: Lease, *, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock, self._limit = lease, clock, limit
        self._begun: float | None = None
        self._first_step = 0
        self.progress: dict[str, Any] = {"step": 0, "samples": 0, "max_steps": limit}

    def on_start(self, fit: Fit) -> None:
        """Say that the run has begun."""
        self._lease.progress = self.progress

    def on_step(self, event: Stepped) -> None:
        """Count the step and its samples. Raises: JobCancelledError when the lease is lost."""
        self._lease.check()
        now = self._clock()
        if self._begun is None:
            self._begun, self._first_step = now, event.step
        samples = self.progress["samples"] + event.rows
        self.progress = {**self.progress, "step": event.step, "samples": samples}
        elapsed, steps = now - self._begun, event.step - self._first_step
        if elapsed > 0 and steps > 0:
            self.progress["samples_per_s"] = round(samples / elapsed, 1)
            if self._limit is not None:
                self.progress["left_s"] = round(elapsed / steps * (self._limit - event.step), 1)
        self._lease.progress = self.progress

    def on_validation(self, event: Validated) -> None:
        """Keep what was measured. Raises: JobCancelledError when the lease is lost."""
        self._lease.check()
        self.progress = {**self.progress, "values": event.values, "validated_step": event.step}
        self._lease.progress = self.progress


@final
class ProgressBar(Observer):
    """Draws one tqdm bar over the steps of the run.

    Args:
        title: What is trained.
        limit: The most steps; None where only early stopping ends the run.
        show: True draws, False does not, None draws on a terminal only.
    """

    def __init__(self, title: str, *, limit: int | None, show: bool | None) -> None:
        # tqdm draws when `disable` is False, never when True, and on a terminal only when None.
        self._bar: tqdm[Any] = tqdm(
            total=limit, desc=title, unit="step", disable=None if show is None else not show
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_step(self, event: Stepped) -> None:
        """Move the bar; a resumed run starts where the earlier one ended."""
        self._bar.update(event.step - self._bar.n)

    def on_validation(self, event: Validated) -> None:
        """Show the measured values beside the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in event.values.items()})


@final
class MetricRecorder(Observer):
    """Writes what each validation measured into `mt.metrics`.

    Args:
        metric_log: The metrics of the database.
        job: The job's id.
        component: The uuid of what is trained.
    """

    def __init__(self, metric_log: MetricLog, *, job: str, component: str) -> None:
        self._metric_log, self._job, self._component = metric_log, job, component

    def on_validation(self, event: Validated) -> None:
        """Write the values."""
        self._metric_log.add(
            job=self._job, component=self._component, step=event.step, kind="valid", values=event.values
        )
