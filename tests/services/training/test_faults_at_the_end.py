"""An error in any call between the last step and the end of the publication: published, or said; never silence.

The calls are enumerated, not sampled: every function of the package, and every call of a collection of the driver,
that is entered from the last step on. Each raises once.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import mongomock.collection
import pymongo.synchronous.collection
import pytest
from pymongo.errors import AutoReconnect
from tests.helpers import fill, model, same, state, trainer

import mongotorch
from mongotorch import Datalayer, TorchTrainer
from mongotorch.services.training.job_runner import JobRunner

pytestmark = [
    pytest.mark.fault,
    # A call that raises may be the first one of a thread, such as one that uploads.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STEPS = 4
SAMPLE = 8  # calls of each kind of error that are not left to the long runs
PACKAGE = str(Path(mongotorch.__file__).parent)
DRIVERS = (mongomock.collection.__file__, pymongo.synchronous.collection.__file__)
ERRORS: dict[str, type[Exception]] = {
    "transient": AutoReconnect,
    "unexpected": RuntimeError,
    "memory": MemoryError,
    "disk": OSError,
}
Call = tuple[str, int]
"""A function, as its file and name, and which call of it since the last step, from 0."""


class Watched:
    """Sees each call from the last step of a run to the end of its job, in all threads, and lets one raise.

    Args:
        raising: The call that raises; None only counts.
        error: What it raises.

    Attributes:
        calls: How often each function was called.
        raised: Whether it has raised.
        steps: How many steps were made.
    """

    def __init__(self, raising: Call | None = None, error: type[Exception] = RuntimeError) -> None:
        self.calls: Counter[str] = Counter()
        self.raised, self.steps = False, 0
        self._raising, self._error = raising, error
        self._lock = threading.Lock()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Watched:
        step, run = TorchTrainer.take_step, JobRunner._run

        def stepping(*args: Any, **given: Any) -> Any:
            made = step(*args, **given)
            self.steps += 1
            if self.steps == STEPS:
                self._watch(self._profile)
            return made

        def running(*args: Any, **given: Any) -> None:
            try:
                run(*args, **given)
            finally:
                self._watch(None)

        self._patch.setattr(TorchTrainer, "take_step", stepping)
        self._patch.setattr(JobRunner, "_run", running)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch(None)
        self._patch.undo()

    def _watch(self, profile: Any) -> None:
        threading.setprofile(profile)
        sys.setprofile(profile)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._called(frame.f_code)

    def _called(self, code: Any) -> None:
        if code.co_name == "<genexpr>":
            return
        if code.co_filename in DRIVERS:
            name = f"driver {code.co_name}"
            if code.co_name.startswith("_"):
                return
        elif code.co_filename.startswith(PACKAGE):
            name = f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}"
        else:
            return
        with self._lock:
            number = self.calls[name]
            self.calls[name] += 1
        if (name, number) == self._raising and not self.raised:
            self.raised = True
            raise self._error(f"injected at {name}")


def applied(db: Datalayer, name: str) -> TorchTrainer:
    made: TorchTrainer = trainer(
        db["points"].find(), max_iterations=STEPS, validation_interval=2, model=model(identifier=name)
    )
    return made.replace(identifier=name)


def points_of(watched: Watched) -> list[Call]:
    """Each function's first and last call, and each call of the driver."""
    found: list[Call] = []
    for name, count in sorted(watched.calls.items()):
        numbers = range(count) if name.startswith("driver") else sorted({0, count - 1})
        found += [(name, number) for number in numbers]
    return found


def trained_versions(db: Datalayer, name: str) -> list[int]:
    """The trained versions of a model; each loads, with the trainer that made it."""
    found = [version for version in db.show("model", name) if db.show("model", name, version)["trained"]]
    for version in found:
        loaded: Any = db.load("model", name, version)
        assert loaded.trainer.model.uuid == loaded.uuid
    return found


class Outcomes:
    """What faults led to: the calls that broke a rule, and how often each outcome was seen."""

    def __init__(self, db: Datalayer, caplog: pytest.LogCaptureFixture) -> None:
        self.db, self._caplog = db, caplog
        self.broken: list[str] = []
        self.seen: Counter[str] = Counter()
        fill(db)
        db.apply(applied(db, "warm")).result()
        with Watched() as watched:
            self._expected = state(db.apply(applied(db, "plain")).result())
        self.calls = points_of(watched)

    def check(self, call: Call, error: type[Exception]) -> None:
        """Let one call raise, look, and apply again."""
        db, name = self.db, f"m{self.seen.total()}"
        self._caplog.clear()
        with self._caplog.at_level(logging.WARNING), Watched(call, error) as watched:
            job = db.apply(applied(db, name))
        where = f"{error.__name__} at {call}"
        lines = [record for record in self._caplog.records if record.levelno >= logging.ERROR]
        status, visible = job.status, trained_versions(db, name)
        if status == "failed":
            self._expect(len(lines) == 1, f"{where}: failed with {len(lines)} lines")
            # The driver may fail at the error in turn: an attribute of it that raises is nothing it expects.
            self._expect(job.error is not None and "injected" in job.error["traceback"], f"{where}: {job.error}")
        elif status == "running":  # it is visible; the next worker, or the next `apply`, records the end
            self._expect(visible == [1] and len(lines) == 1, f"{where}: {visible} with {len(lines)} lines")
        else:
            self._expect(status == "succeeded" and visible == [1], f"{where}: {status} with {visible}")
        with Watched() as again:
            ended = db.apply(applied(db, name)).exception(timeout=20)
        self._expect(ended is None, f"{where}: the next attempt ended with {ended!r}")
        self._expect(trained_versions(db, name) == [1], f"{where}: {trained_versions(db, name)} in the end")
        self._expect(same(state(db.load("model", name)), self._expected), f"{where}: other weights")
        self.seen[f"raised: {watched.raised}, {status} with {visible}, then {again.steps} steps"] += 1

    def _expect(self, holds: bool, why: str) -> None:
        if not holds:
            self.broken.append(why)


def at_each(outcomes: Outcomes, calls: list[Call], error: type[Exception]) -> None:
    for call in calls:
        outcomes.check(call, error)
    print(len(calls), dict(outcomes.seen))
    assert outcomes.broken == []
    assert outcomes.db.verify().problems == ()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("error", ERRORS)
def test_every_call_that_fails_is_heard(db: Datalayer, caplog: pytest.LogCaptureFixture, error: str) -> None:
    outcomes = Outcomes(db, caplog)
    assert len(outcomes.calls) > 200
    at_each(outcomes, outcomes.calls, ERRORS[error])


@pytest.mark.parametrize(("error", "first"), [("transient", 1), ("unexpected", 2)])
def test_some_calls_that_fail_are_heard(
    db: Datalayer, caplog: pytest.LogCaptureFixture, error: str, first: int
) -> None:
    """A sample of the long test above, without one."""
    outcomes = Outcomes(db, caplog)
    assert len(outcomes.calls) > 200
    at_each(outcomes, outcomes.calls[first :: len(outcomes.calls) // SAMPLE], ERRORS[error])
