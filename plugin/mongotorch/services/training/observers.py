"""Observers of a run: each reacts to the events of a `Fit`; `observe` trains and calls them in their order.

To watch runs in a further way, write an `Observer` and add it to the list in `TrainingRun.train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self, final

from tqdm.auto import tqdm

from mongotorch.data import BackgroundScan
from mongotorch.jobs import Lease, log_job
from mongotorch.mongo.driver_errors import redact
from mongotorch.notebook import is_notebook
from mongotorch.store import MetricEntry, MetricLog
from mongotorch.tensors import device_memory_bytes, to_floats
from mongotorch.train import Fit, Stepped, Validated

_log = logging.getLogger("mongotorch.jobs")
_SHOWN_MOST: Final = 10**9  # steps; a larger limit is no total that a bar could show
MOST_ENTRIES: Final = 2048
"""How many `train` entries a run may keep; the steps between them grow by powers of two."""
_NORM: Final = "gradient_norm"
_MOST_PENDING: Final = 64  # steps whose values stay where they are, before they are added up
_WRITE_S: Final = 1.0  # between two writes of what is measured
_PAUSE_S: Final = 0.1  # between two writes at the least, however often a run validates
_SHOW_S: Final = 0.1  # between two changes of a job's progress, which a heartbeat writes less often


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
        on_steps = [one.on_step for one in observers if type(one).on_step is not Observer.on_step]
        for event in events:
            if isinstance(event, Stepped):
                for on_step in on_steps:
                    on_step(event)
            else:
                for observer in observers:
                    observer.on_validation(event)
        for observer in observers:
            observer.on_end()


@final
class JobProgress(Observer):
    """Ends the run when its lease is lost or it is asked to end, and hands the heartbeat its `progress`.

    The rate and the remaining time are in it from the second step of this attempt on. Where steps are fast it
    changes ten times a second, and at the end.

    Args:
        lease: The attempt's hold on its job.
        limit: The most steps of the run; None: unlimited.
        clock: A monotonic clock, in seconds.

    Attributes:
        progress: Plain BSON.
        has_stopped: Whether the run was ended before its last step.
    """

    def __init__(self, lease: Lease, *, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock, self._limit = lease, clock, limit
        self._begun_s: float | None = None
        self._now_s, self._due_s = 0.0, 0.0
        self._first_step, self._samples = 0, 0
        self._last: Stepped | None = None  # that is not in the progress yet
        self._fit: Fit | None = None
        self.has_stopped = False
        self.progress: dict[str, Any] = {"step": 0, "samples": 0, "max_steps": limit}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()

    def on_start(self, fit: Fit) -> None:
        """Say that the run has begun."""
        self._fit = fit
        self._lease.progress = self.progress

    def on_step(self, event: Stepped) -> None:
        """Count the step and its samples. Raises: JobCancelledError when the lease is lost."""
        self._lease.check()
        if self._lease.is_asked_to_end and self._fit is not None:
            self.stop(self._fit)
        self._last, self._now_s = event, self._clock()
        self._samples += event.rows
        if self._begun_s is None:
            self._begun_s, self._first_step = self._now_s, event.step
            self._show()
        elif self._now_s >= self._due_s:
            self._show()

    def _show(self) -> None:
        """Bring the progress up to the last step."""
        event, self._last = self._last, None
        if event is None or self._begun_s is None:
            return
        self._due_s = self._now_s + _SHOW_S
        progress = {**self.progress, "step": event.step, "samples": self._samples}
        if event.skipped:
            progress["skipped"] = event.skipped
        elapsed_s, steps = self._now_s - self._begun_s, event.step - self._first_step
        if elapsed_s > 0 and steps > 0:
            progress["samples_per_s"] = round(self._samples / elapsed_s, 1)
            if self._limit is not None:
                progress["left_s"] = round(elapsed_s / steps * (self._limit - event.step), 1)
        self._lease.progress = self.progress = progress

    def on_validation(self, event: Validated) -> None:
        """Keep what was measured. Raises: JobCancelledError when the lease is lost."""
        self._lease.check()
        self._show()
        self.progress = {**self.progress, "values": event.values, "validated_step": event.step}
        self._lease.progress = self.progress

    def stop(self, fit: Fit) -> None:
        """End the run after the step that was made, unless that is the last one anyway."""
        if not fit.is_over:
            fit.stop()
            self.has_stopped = True


@final
class ProgressBar(Observer):
    """Draws one tqdm bar over the steps of the run.

    Args:
        title: What is trained.
        limit: The most steps; None where only early stopping ends the run.
        show: True draws, False does not, None draws on a terminal and in a notebook only.
    """

    def __init__(self, title: str, *, limit: int | None, show: bool | None) -> None:
        # tqdm draws when `disable` is False, never when True, and on a terminal only when None.
        is_shown = True if show is None and is_notebook() else show
        disable = None if is_shown is None else not is_shown
        self._bar: tqdm[Any] = tqdm(total=limit, desc=title, unit="step", disable=disable)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_step(self, event: Stepped) -> None:
        """Move the bar; a resumed run starts where the earlier one ended."""
        if not self._bar.disable:
            self._bar.update(event.step - self._bar.n)

    def on_validation(self, event: Validated) -> None:
        """Show the measured values beside the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in event.values.items()})


@final
class MetricRecorder(Observer):
    """Writes what a run measures into `mt.metrics`: each validation, and a `train` entry every so many steps.

    The values of a `train` entry are means over the rows since the entry before: `objective`, `gradient_norm` and
    what the trainer logged. Besides, it has `learning_rate` (`learning_rate/0`, `learning_rate/1`, … where there
    are several), `samples_per_s`, `waited_share` (of the time, for data), and `device_memory_bytes` on a GPU.

    A thread of its own writes once a second, and after validations. What it cannot write is logged and tried
    again, and never ends the run. However long a run is, it keeps few entries: when there are `MOST_ENTRIES`,
    every second one is removed, and the interval is twice as long from then on.

    Args:
        metric_log: The metrics of the database.
        job: The claimed job document.
        interval: Steps between two `train` entries, at first; None writes none.
        begun: The step that the run goes on from, 0 for a new one: later entries are those of a killed attempt.
        state: What `state_dict` gave when that step was captured.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        metric_log: MetricLog,
        *,
        job: Mapping[str, Any],
        interval: int | None,
        begun: int = 0,
        state: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metric_log, self._job, self._begun, self._clock = metric_log, job, begun, clock
        self._interval = interval or 0
        while self._interval and begun >= MOST_ENTRIES * self._interval:
            self._interval *= 2
        self._due = self._next(begun)
        self._means = _Means(state or {})
        self._elapsed_s = 0.0
        self._last_s: float | None = None  # when the last step or validation ended
        self._device: Any = None
        self._waiting: list[tuple[float, MetricEntry]] = []
        self._thin_to: int | None = None
        self._one, self._writing = threading.Lock(), threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._is_lost, self._has_failed = False, False
        self._thread = threading.Thread(target=self._run, name="mongotorch-metrics", daemon=True)

    def __enter__(self) -> Self:
        if self._begun or self._job["attempt"] > 1:
            self._try(lambda: self._metric_log.remove(self._job["_id"], after=self._begun))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:  # there was nothing to write but the end
            self.flush()

    def on_start(self, fit: Fit) -> None:
        """Begin to measure the time."""
        self._device = fit.device
        self._last_s = self._clock()

    def on_step(self, event: Stepped) -> None:
        """Add the step to the means, and have them written if the interval is over."""
        if not self._interval:
            return
        now = self._clock()
        self._elapsed_s += now - (self._last_s or now)
        self._last_s = now
        self._means.add(event)
        if event.step >= self._due:
            self._measure(now)
            self._begin()

    def on_validation(self, event: Validated) -> None:
        """Have the values written."""
        self._last_s = self._clock()  # the time of a validation is not that of a step
        self._put(self._last_s, MetricEntry(step=event.step, kind="valid", values=event.values))
        self._begin()
        self._wake.set()

    def on_end(self) -> None:
        """Have the means of the last steps written."""
        if self._means.steps:
            self._measure(self._clock())

    def state_dict(self) -> dict[str, Any]:
        """The means of the steps since the last entry, for a run that goes on here; plain values."""
        return self._means.state_dict()

    def flush(self) -> None:
        """Write what waits, in the calling thread."""
        with self._writing:
            with self._one:
                batch, self._waiting = self._waiting, []
                thin_to, self._thin_to = self._thin_to, None
            now = self._clock()
            measured = [dataclasses.replace(one, age_s=now - made) for made, one in batch]
            names = {"job": self._job["_id"], "component": self._job["component"]}
            attempt = self._job["attempt"]
            write = functools.partial(self._metric_log.write, measured, attempt=attempt, **names)
            if measured and not self._is_lost and not self._try(write):
                with self._one:
                    self._waiting = [*batch, *self._waiting][-MOST_ENTRIES:]
            if thin_to is not None and not self._is_lost:
                self._try(lambda: self._metric_log.thin(self._job["_id"], thin_to))

    def _measure(self, now: float) -> None:
        waited_s, last = self._means.waited_s, self._means.last
        means, rows, steps = self._means.take()
        step, rates = (self._begun, ()) if last is None else (last.step, last.learning_rates)
        names = ("learning_rate",) if len(rates) == 1 else [f"learning_rate/{n}" for n in range(len(rates))]
        # An optimizer without a learning rate has NaN.
        values = {**means, **{name: rate for name, rate in zip(names, rates, strict=True) if rate == rate}}
        if self._elapsed_s > 0:
            values["samples_per_s"] = rows / self._elapsed_s
            values["waited_share"] = min(waited_s / self._elapsed_s, 1.0)
        memory = None if self._device is None else device_memory_bytes(self._device)
        if memory is not None:
            values["device_memory_bytes"] = memory
        self._elapsed_s = 0.0
        self._put(now, MetricEntry(step=step, kind="train", values=values, steps=steps))
        if step >= MOST_ENTRIES * self._interval:
            self._interval *= 2
            self._thin_to = self._interval
        self._due = self._next(step)

    def _begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _next(self, step: int) -> int:
        return (step // self._interval + 1) * self._interval if self._interval else 0

    def _put(self, now: float, measured: MetricEntry) -> None:
        with self._one:
            self._waiting.append((now, measured))

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(_WRITE_S)
            self._wake.clear()
            self.flush()
            self._closed.wait(_PAUSE_S)
        self.flush()

    def _try(self, write: Callable[[], object]) -> bool:
        """Write; False where the database did not take it. A job that is another attempt's gets nothing more."""
        try:
            self._is_lost = self._is_lost or write() is False
        except Exception as error:  # noqa: BLE001 - the run is worth more than its history
            if not self._has_failed:
                _log.warning("job %s: metrics could not be written: %s", self._job["_id"], redact(str(error)))
            self._has_failed = True
            return False
        return True


@final
class ValidationLog(Observer):
    """Logs the validations of a job's run."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job

    def on_validation(self, event: Validated) -> None:
        """Log what was measured."""
        shown = ", ".join(f"{name} {value:.6g}" for name, value in event.values.items())
        detail = f"at step {event.step}: {shown}"
        log_job(self._job, "validated", detail, step=event.step, values=dict(event.values))


@final
class ScanObserver(Observer):
    """Begins the scan of a run's documents at its first step, raises what fails in it, and ends it with a run."""

    def __init__(self, scan: BackgroundScan) -> None:
        self._scan = scan

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._scan.end()

    def on_step(self, event: Stepped) -> None:
        """Begin the scan, if it has not begun."""
        self._scan.begin()


def shown_limit(steps: int | None) -> int | None:
    """The most steps of a run, where a bar can show them as a total."""
    return None if steps is None or steps > _SHOWN_MOST else steps


class _Means:
    """Means over rows of what steps gave; the sums are made of many steps at a time, since that is cheaper.

    Args:
        state: What `state_dict` gave.

    Attributes:
        last: The last step, since this was made.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._rows = int(state.get("rows", 0))
        self._steps, self._waited_s = int(state.get("steps", 0)), 0.0
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in state.get("sums", {}).items()}
        self._pending: list[Stepped] = []
        self.last: Stepped | None = None

    def add(self, event: Stepped) -> None:
        """Add a step."""
        self.last = event
        pending = self._pending
        pending.append(event)
        if len(pending) >= _MOST_PENDING:
            self._sum_up()

    @property
    def steps(self) -> int:
        """How many steps they are of."""
        return self._steps + len(self._pending)

    @property
    def waited_s(self) -> float:
        """Seconds that these steps waited for data."""
        self._sum_up()
        return self._waited_s

    def take(self) -> tuple[dict[str, float], int, int]:
        """The means by name, the rows and the steps that they are of; all begins anew."""
        self._sum_up()
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        rows, steps = self._rows, self._steps
        self._sums, self._rows, self._steps, self._waited_s = {}, 0, 0, 0.0
        return means, rows, steps

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        self._sum_up()
        sums = {name: list(pair) for name, pair in self._sums.items()}
        return {"rows": self._rows, "steps": self._steps, "sums": sums}

    def _sum_up(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        rows = [event.rows for event in pending]
        self._rows += sum(rows)
        self._steps += len(pending)
        self._waited_s += sum(event.waited_s for event in pending)
        self._add("objective", [event.loss for event in pending], rows)
        given: dict[str, tuple[list[Any], list[int]]] = {}
        for event in pending:
            further = (
                {**event.values} if event.gradient_norm is None else {**event.values, _NORM: event.gradient_norm}
            )
            for name, value in further.items():
                values, weights = given.setdefault(name, ([], []))
                values.append(value)
                weights.append(event.rows)
        for name, (values, weights) in given.items():
            self._add(name, values, weights)

    def _add(self, name: str, values: Sequence[Any], weights: Sequence[int]) -> None:
        total, weight = self._sums.get(name, (0.0, 0.0))
        for value, rows in zip(to_floats(values), weights, strict=True):
            # One after the other: the sum does not depend on when it is made.
            total += value * rows
            weight += rows
        self._sums[name] = [total, weight]
