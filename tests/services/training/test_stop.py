"""A job that is stopped publishes the best so far; one that is cancelled publishes nothing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests import run_processes as runs
from tests.helpers import fill, run_elsewhere, same, state, trainer
from torch import Tensor

from mongotorch import Always, Datalayer, Every, Schedule, TorchTrainer, Worker
from mongotorch.errors import JobCancelledError, NotFoundError
from mongotorch.store import Jobs

reached, go_on = threading.Event(), threading.Event()
GATE = {"step": 10**9, "made": 0}


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Gated(TorchTrainer):
    """Waits in one of its steps until the test lets it go on; later steps take a moment each."""

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        GATE["made"] += 1
        if GATE["made"] == GATE["step"]:
            reached.set()
            assert go_on.wait(60)
        elif GATE["made"] > GATE["step"]:
            time.sleep(0.005)
        return super().take_step(model, batch, optimizers)


@pytest.fixture
def other(uri: str, db: Datalayer) -> Iterator[Datalayer]:
    """A second datalayer over the same database, whose jobs wait for a worker."""
    with Datalayer.connect(uri, valid_fraction=0.2, progress=False, compute="queue") as other:
        yield other


@pytest.fixture
def gate() -> Iterator[Callable[[int], None]]:
    """Sets the step at which `Gated` waits."""
    reached.clear()
    go_on.clear()

    def at(step: int) -> None:
        GATE.update(step=step, made=0)

    yield at
    go_on.set()
    at(10**9)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def stopped_at(db: Datalayer, other: Datalayer, gate: Callable[[int], None], step: int, **given: Any) -> Any:
    """The job of a run of very many steps that was stopped in one of them."""
    applied = trainer(fill(db), Gated, **{"max_iterations": 10**6, "no_improve_then_stop": 10**6, **given})
    job = other.apply(applied)
    gate(step)
    worker = in_thread(Worker(db).once)
    assert reached.wait(60)
    assert job.status == "running"
    assert other.job(job.uuid).stop()
    go_on.set()
    worker.join(60)
    assert not worker.is_alive()
    return job


def test_a_stopped_run_publishes_the_best_so_far(
    db: Datalayer, other: Datalayer, gate: Callable[[int], None]
) -> None:
    job = stopped_at(db, other, gate, 9)

    model = job.result(timeout=1)
    document = db.show(uuid=model.uuid)
    values = model.trainer.metric_values["objective"]
    assert job.status == "succeeded"
    assert 9 <= document["steps"] < 1000
    assert document["stopped"] is True
    best = document["best_step"]
    assert document["metrics"]["objective"] == min(values)
    whole = db.apply(trainer(db["points"].find(), max_iterations=best)).result()
    assert same(state(model), state(whole))
    assert not job.stop()
    assert not job.cancel()
    assert db.reproduce(model.uuid).same


def test_a_stopped_run_that_never_validates_publishes_its_last_weights(
    db: Datalayer, other: Datalayer, gate: Callable[[int], None]
) -> None:
    job = stopped_at(db, other, gate, 3, validation_interval=None)

    model = job.result(timeout=1)
    steps = db.show(uuid=model.uuid)["steps"]
    whole = db.apply(trainer(db["points"].find(), max_iterations=steps, validation_interval=None)).result()
    assert same(state(model), state(whole))


def test_a_cancelled_run_publishes_nothing_even_if_it_was_stopped_before(
    db: Datalayer, other: Datalayer, gate: Callable[[int], None]
) -> None:
    job = other.apply(trainer(fill(db), Gated))
    gate(2)
    worker = in_thread(Worker(db).once)
    assert reached.wait(60)
    assert job.stop()
    assert job.cancel()
    assert not job.stop()
    go_on.set()
    worker.join(60)
    assert isinstance(job.exception(), JobCancelledError)
    assert db.show("model", "m") == [0]


def test_a_job_that_nobody_has_begun_is_cancelled(db: Datalayer, other: Datalayer) -> None:
    job = other.apply(trainer(fill(db)))
    assert job.stop()
    assert job.status == "cancelled"
    assert not job.stop()
    assert not Worker(db).once()
    assert db.show("model", "m") == [0]


def test_a_job_that_failed_before_its_first_step_is_cancelled_when_it_is_claimed(
    db: Datalayer, other: Datalayer
) -> None:
    job = other.apply(trainer(fill(db)))
    jobs = Jobs(db["x"].raw.database)
    attempt = jobs.claim(worker="w", lease_s=30)
    assert attempt is not None
    assert jobs.release(job.uuid, attempt["attempt"])
    assert job.stop()
    assert job.status == "queued"
    Worker(db).once()
    assert job.status == "cancelled"
    assert db.show("model", "m") == [0]


def test_a_job_that_waits_with_a_checkpoint_publishes_it_without_a_further_step(
    db: Datalayer, other: Datalayer, gate: Callable[[int], None]
) -> None:
    job = other.apply(trainer(fill(db), Gated, max_iterations=10**6))
    gate(7)
    worker = Worker(db)
    thread = in_thread(worker.once)
    assert reached.wait(60)
    worker.stop()
    go_on.set()
    thread.join(60)
    assert job.status == "queued"
    assert job.stop()
    GATE["made"] = 0
    Worker(db).once()
    model = job.result(timeout=1)
    assert GATE["made"] == 0
    assert db.show(uuid=model.uuid)["steps"] == 7


def test_a_job_that_was_stopped_and_is_queued_again_is_not_stopped_any_more(
    db: Datalayer, other: Datalayer
) -> None:
    applied = trainer(fill(db))
    job = other.apply(applied)
    assert job.stop()
    again = other.apply(applied)
    assert again.uuid == job.uuid
    assert again.status == "queued"
    Worker(db).once()
    assert db.show(uuid=again.result(timeout=1).uuid)["steps"] == 12


def test_a_job_that_does_not_exist_cannot_be_stopped(db: Datalayer) -> None:
    with pytest.raises(NotFoundError):
        Jobs(db["x"].raw.database).stop("nobody")


def test_a_stop_while_the_run_publishes_is_either_too_late_or_in_time(db: Datalayer, other: Datalayer) -> None:
    select = fill(db)
    for seed in range(8):
        job = other.apply(trainer(select, max_iterations=4, seed=seed))
        worker = in_thread(Worker(db).once)
        time.sleep(0.01 * seed)
        job.stop()
        worker.join(60)
        assert job.status in ("succeeded", "cancelled")
        if job.status == "succeeded":
            assert db.show(uuid=job.result().uuid)["job"] == job.uuid


def test_a_scheduled_run_is_stopped_and_judged(
    db: Datalayer, other: Datalayer, gate: Callable[[int], None]
) -> None:
    endless = trainer(fill(db), Gated, max_iterations=10**6, no_improve_then_stop=10**6)
    db.apply(Schedule("s", trainer=endless, trigger=Every(seconds=3.6e6), gate=Always()))
    gate(5)
    job = db.fire("s")
    worker = in_thread(Worker(db, schedules=False).once)
    assert reached.wait(60)
    assert other.job(job.uuid).stop()
    go_on.set()
    worker.join(60)
    model = job.result(timeout=1)
    assert db.load("model", "m").uuid == model.uuid
    assert db.schedules()[0]["outcome"]["promoted"] is True


@pytest.mark.fault
def test_a_run_of_another_process_is_stopped_from_a_third(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        runs.fill(db, 100)
        endless = runs.trainer(db, "long", in_memory=True, steps=10**6).replace(no_improve_then_stop=10**6)
        job = db.apply(endless)
        process = runs.start(runs.work, server_uri)
        while not job.progress.get("step"):
            time.sleep(0.05)
        code = """
        from mongotorch import Datalayer
        with Datalayer.connect() as db:
            ANSWER = db.job(GIVEN["job"]).stop()
        """
        assert run_elsewhere(server_uri, code, job=job.uuid) is True
        model = job.result(timeout=60)
        assert db.show(uuid=model.uuid)["stopped"] is True
        process.join(30)
