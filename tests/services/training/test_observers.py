"""Observers are called in their order, at each event, and closed however the run ends."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import pytest
from tests.helpers import SELECT, fit, trainer

from mongotorch.errors import JobCancelledError, JobReleasedError
from mongotorch.services.training import observers
from mongotorch.services.training.checkpoints import CheckpointWriter
from mongotorch.services.training.observers import JobProgress, Observer, ProgressBar, observe
from mongotorch.train import Fit, Stepped, Validated


class Recorded(Observer):
    """Writes what it is called with into a list that several share."""

    def __init__(self, name: str, calls: list[str], fails_at: int = -1) -> None:
        self.name, self.calls, self.fails_at = name, calls, fails_at

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls.append(f"{self.name} closed")

    def on_start(self, fit: Fit) -> None:
        self.calls.append(f"{self.name} start {fit.step}")

    def on_step(self, event: Stepped) -> None:
        self.calls.append(f"{self.name} step {event.step}")
        if event.step == self.fails_at:
            raise RuntimeError(self.name)

    def on_validation(self, event: Validated) -> None:
        self.calls.append(f"{self.name} validation {event.step}")

    def on_end(self) -> None:
        self.calls.append(f"{self.name} end")


class FakeLease:
    """A lease that is lost, or stops its holder, when the test says so."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.is_stopping, self.is_lost, self.is_asked_to_end = False, False, False

    def check(self) -> None:
        if self.is_lost:
            raise JobCancelledError("lost")


def test_observers_see_every_event_in_their_order() -> None:
    calls: list[str] = []
    observe(
        fit(trainer(SELECT, max_iterations=2, validation_interval=2)), [Recorded("a", calls), Recorded("b", calls)]
    )
    events = ["start 0", "step 1", "step 2", "validation 2", "end"]
    assert calls == [f"{name} {event}" for event in events for name in "ab"] + ["b closed", "a closed"]


def test_an_error_of_an_observer_ends_the_run_and_closes_all() -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError, match="a"):
        observe(fit(trainer(SELECT, max_iterations=9)), [Recorded("a", calls, fails_at=2), Recorded("b", calls)])
    assert calls[-4:] == ["b step 1", "a step 2", "b closed", "a closed"]


def test_a_lost_lease_ends_the_run_before_anything_is_written() -> None:
    calls: list[str] = []
    written: list[Any] = []
    lease = FakeLease()
    lease.is_lost = True
    observers = [JobProgress(lease, limit=9), Recorded("b", calls), CheckpointWriter(written.append, interval_s=0)]
    with pytest.raises(JobCancelledError):
        observe(fit(trainer(SELECT, max_iterations=9)), observers)
    assert (calls, written, lease.progress) == (
        ["b start 0", "b closed"],
        [],
        {"step": 0, "samples": 0, "max_steps": 9},
    )


def test_progress_of_fast_steps_changes_now_and_then_and_is_complete_at_the_end() -> None:
    lease, seen, now_s = FakeLease(), list[int](), iter(range(100))
    progress = JobProgress(lease, limit=60, clock=lambda: next(now_s) / 45)

    class Watching(Observer):
        def on_step(self, event: Stepped) -> None:
            seen.append(event.step - lease.progress["step"])

    observe(fit(trainer(SELECT, max_iterations=57, validation_interval=None)), [progress, Watching()])
    assert (seen[0], max(seen)) == (0, 4)
    assert (lease.progress["step"], lease.progress["left_s"], lease.progress["samples_per_s"] > 0) == (
        57,
        0.1,
        True,
    )


def test_a_stop_writes_a_checkpoint_of_the_step_and_releases_the_job() -> None:
    written: list[Any] = []
    lease = FakeLease()
    lease.is_stopping = True
    writer = CheckpointWriter(written.append, interval_s=1000, lease=lease)
    with pytest.raises(JobReleasedError):
        observe(fit(trainer(SELECT, max_iterations=9)), [JobProgress(lease, limit=9), writer])
    assert [state["step"] for state in written] == [1]
    assert lease.progress["step"] == 1


@pytest.mark.parametrize(
    ("show", "notebook", "drawn"), [(None, True, True), (False, True, False), (True, False, True)]
)
def test_a_progress_bar_is_drawn_in_a_notebook_and_where_it_is_asked_for(
    show: bool | None,
    notebook: bool,
    drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(observers, "is_notebook", lambda: notebook)
    with ProgressBar("a trainer", limit=3, show=show):
        pass
    assert ("a trainer" in capsys.readouterr().err) is drawn
