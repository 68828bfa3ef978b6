"""A run that fails is heard: one line in the log, the error on the job, and how far it was."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from tests.helpers import fill, trainer
from torch import Tensor, nn

from mongotorch import Datalayer

calls = iter(range(10**6))


def breaking(output: Tensor, target: Tensor) -> Tensor:
    if next(calls) == 4:
        raise RuntimeError("the fifth batch is bad")
    return nn.functional.cross_entropy(output, target)


@pytest.fixture
def failing(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(globals(), "calls", iter(range(10**6)))
    return trainer(fill(db), objective=breaking, validation_interval=None)


def test_it_is_one_line_of_the_log(db: Datalayer, failing: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        job = db.apply(failing)

    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    text = errors[0].getMessage()
    assert errors[0].name.startswith("mongotorch")
    assert "\n" not in text
    for part in (job.uuid, "RuntimeError", "the fifth batch is bad", "'t'"):
        assert part in text


def test_the_job_names_the_error(db: Datalayer, failing: Any) -> None:
    job = db.apply(failing)

    for one in (job, db.job(job.uuid)):
        assert "the fifth batch is bad" in repr(one)
        assert "\n" not in repr(one)
        error = one.error or {}
        assert (error["type"], error["message"]) == ("RuntimeError", "the fifth batch is bad")


def test_a_job_that_did_not_fail_has_no_error(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db)))
    assert job.error is None
    assert repr(job) == f"Job({job.uuid!r}, succeeded)"


def test_how_far_it_was_is_kept(db: Datalayer, failing: Any) -> None:
    job = db.apply(failing)

    assert job.status == "failed"
    assert job.progress["step"] == 4


def test_how_far_it_is_can_be_read_while_it_runs(db: Datalayer, uri: str) -> None:
    opened = threading.Event()
    slow.opened = opened  # type: ignore[attr-defined]
    applied = trainer(fill(db), objective=slow, max_iterations=10**6, validation_interval=None)
    jobs: list[Any] = []

    def run() -> None:
        with Datalayer.connect(uri, progress=False) as own:
            jobs.append(own.apply(applied).status == "failed")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 30
        while len(set(seen)) < 3 and time.monotonic() < deadline:
            found = db.jobs(status="running")
            if found and found[0].progress:
                seen.append(found[0].progress["step"])
        assert len(set(seen)) >= 3
        assert seen == sorted(seen)
    finally:
        opened.set()
        thread.join(60)
    assert jobs == [True]
    assert db.jobs()[0].progress["step"] >= max(seen)


def slow(output: Tensor, target: Tensor) -> Tensor:
    """An objective that ends the run when the test says so."""
    if slow.opened.is_set():  # type: ignore[attr-defined]
        raise RuntimeError("enough")
    return nn.functional.cross_entropy(output, target)
