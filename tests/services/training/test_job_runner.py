"""The job of a run: what it says while it runs and afterwards, joined and cancelled from elsewhere."""

from __future__ import annotations

import datetime
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.helpers import fill, model, net, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel
from mongotorch.errors import JobCancelledError, JobFailedError, JobTimeoutError, MongotorchError, NotFoundError

entered, opened = threading.Event(), threading.Event()


def gated(output: Tensor, target: Tensor) -> Tensor:
    """An objective that waits until the test opens the gate."""
    entered.set()
    assert opened.wait(60)
    return nn.functional.cross_entropy(output, target)


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("mongodb://me:secret@host is not for your eyes")


@pytest.fixture
def other(uri: str, db: Datalayer) -> Iterator[Datalayer]:
    """A second datalayer over the same database."""
    with Datalayer.connect(uri, valid_fraction=0.2, progress=False) as other:
        yield other


@pytest.fixture
def running(db: Datalayer) -> Iterator[Future[Any]]:
    """A run that has begun in a thread and waits at the gate; its job."""
    entered.clear()
    opened.clear()
    applied = trainer(fill(db), objective=gated, seed=4)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(db.apply, applied)
        try:
            assert entered.wait(60)
            yield job
        finally:
            opened.set()


def test_the_job_says_how_the_run_went(db: Datalayer, other: Datalayer) -> None:
    job = db.apply(trainer(fill(db), max_iterations=8, loader_kwargs={"batch_size": 10}))
    trained = job.result()

    record = other.job(job.uuid).record
    assert (record["status"], job.done(), job.exception()) == ("succeeded", True, None)
    assert record["created"] <= record["started"] <= record["finished"]
    assert isinstance(record["finished"], datetime.datetime)
    progress = record["progress"]
    assert (progress["step"], progress["max_steps"], progress["validated_step"]) == (8, 8, 8)
    assert progress["samples_per_s"] > 0
    assert progress["values"]["objective"] == pytest.approx(trained.trainer.metric_values["objective"][-1])
    assert record["parameters"]["optimizer_cls"] == "Adam"
    assert record["parameters"]["max_iterations"] == 8
    assert record["parameters"]["objective"] == "torch.nn.functional.cross_entropy"
    assert record["environment"]["python"] == platform.python_version()
    assert record["environment"]["torch"] == torch.__version__
    assert (record["error"], record["result"]) == (None, trained.uuid)
    found = other.job(job.uuid).result()
    assert isinstance(found, TorchModel)
    assert same(state(found), state(trained))
    points = list(db["mt.metrics"].raw.find({"job": job.uuid, "kind": "valid"}).sort("step", 1))
    assert [point["step"] for point in points] == [4, 8]
    assert [p["values"]["objective"] for p in points] == trained.trainer.metric_values["objective"]


def test_a_failure_is_raised_here_and_told_elsewhere(db: Datalayer, other: Datalayer) -> None:
    job = db.apply(trainer(fill(db), objective=broken))

    with pytest.raises(RuntimeError, match="not for your eyes"):
        job.result()
    assert isinstance(job.exception(), RuntimeError)
    assert job.done()
    found = other.job(job.uuid)
    assert found.status == "failed"
    with pytest.raises(JobFailedError, match="RuntimeError"):
        found.result()
    error = found.record["error"]
    assert error["type"] == "RuntimeError"
    assert "in broken" in error["traceback"]
    assert "secret" not in str(found.record)
    assert "secret" not in str(found.exception())
    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0], [0])


def test_jobs_are_found_again_by_status_and_name(db: Datalayer, other: Datalayer) -> None:
    select = fill(db)
    good = db.apply(trainer(select, max_iterations=1))
    bad = db.apply(model(identifier="bad", trainer=trainer(select, model=None, objective=broken)))

    assert [job.uuid for job in other.jobs()] == [bad.uuid, good.uuid]
    assert [job.uuid for job in other.jobs(status="failed")] == [bad.uuid]
    assert [job.uuid for job in other.jobs(identifier="t")] == [good.uuid]
    assert [job.uuid for job in other.jobs(limit=1)] == [bad.uuid]
    assert other.jobs(status="cancelled") == []
    with pytest.raises(NotFoundError):
        other.job("no-such-job")


def test_a_failed_run_can_be_applied_again_and_then_succeeds(db: Datalayer) -> None:
    select = fill(db)
    db["points"].raw.update_one({"_id": 3}, {"$unset": {"x": ""}})
    applied = trainer(select)
    failed = db.apply(applied)
    assert failed.exception() is not None
    db["points"].raw.update_one({"_id": 3}, {"$set": {"x": [0.0] * 4}})

    job = db.apply(applied)

    assert job.result().version == 1
    assert job.record["error"] is None


def test_whoever_applies_what_is_running_joins_it(running: Future[Any], db: Datalayer, other: Datalayer) -> None:
    joined = other.apply(trainer(db["points"].find(), objective=gated, seed=4))

    assert (joined.status, joined.done()) == ("running", False)
    with pytest.raises(JobTimeoutError):
        joined.result(timeout=0)
    opened.set()
    mine, theirs = running.result(60).result(), joined.result(60)
    assert mine.uuid == theirs.uuid
    assert running.result().uuid == joined.uuid
    assert db.show("model", "m") == [0, 1]
    assert len(db.jobs()) == 1


def test_a_run_that_is_cancelled_from_elsewhere_publishes_nothing(
    running: Future[Any], db: Datalayer, other: Datalayer
) -> None:
    (found,) = other.jobs(status="running")

    assert found.cancel()
    opened.set()

    job = running.result(60)
    with pytest.raises(JobCancelledError):
        job.result()
    with pytest.raises(JobCancelledError):
        found.result()
    assert (job.status, found.cancel()) == ("cancelled", False)
    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0], [0])
    assert same(state(db.load("model", "m")), state(net()))


def test_a_cancelled_run_can_be_applied_again(running: Future[Any], db: Datalayer) -> None:
    db.jobs(status="running")[0].cancel()
    opened.set()
    cancelled = running.result(60)
    assert cancelled.status == "cancelled"

    job = db.apply(cancelled.component)

    assert job.result().version == 1
    expected = db.apply(trainer(db["points"].find(), objective=nn.functional.cross_entropy, seed=4)).result()
    assert same(state(job.result()), state(expected))


def stopped(output: Tensor, target: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_an_interrupt_stops_the_caller_and_cancels_the_job(db: Datalayer) -> None:
    with pytest.raises(KeyboardInterrupt):
        db.apply(trainer(fill(db), objective=stopped))

    (job,) = db.jobs()
    assert job.status == "cancelled"
    assert db.show("model", "m") == [0]


def test_an_own_error_keeps_its_document_and_field(db: Datalayer, other: Datalayer) -> None:
    select = fill(db)
    db["points"].raw.update_one({"_id": 3}, {"$unset": {"x": ""}})

    job = db.apply(trainer(select))

    assert isinstance(job.exception(), MongotorchError)
    told = other.job(job.uuid).exception()
    assert isinstance(told, JobFailedError)
    assert (told.document_id, told.field) == (3, "x")


def test_a_database_with_several_runs_can_be_opened_again(db: Datalayer, uri: str) -> None:
    select = fill(db)
    for seed in range(3):
        db.apply(trainer(select, seed=seed, max_iterations=1))

    with Datalayer.connect(uri) as again:
        assert len(again.jobs()) == 3
        assert again.show("model", "m") == [0, 1, 2, 3]
