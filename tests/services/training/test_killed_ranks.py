"""Ranks that are killed, stopped, cancelled and handed back, and a million documents that four of them share."""

from __future__ import annotations

import collections
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import processes_left as left
from tests import run_processes as runs
from tests.services.training.test_ranks import kill_when, ranks_of, trainer

from mongotorch import Datalayer, Worker
from mongotorch.errors import JobCancelledError, MongotorchError
from mongotorch.jobs.launchers.torchrun import TorchrunLauncher

pytestmark = pytest.mark.fault
SETTINGS = {**runs.SETTINGS, "compute": "local", "checkpoint_seconds": 0.0, "lease_s": 30.0}


class Unhurried:
    """A callback that makes a run long enough to be killed, however fast the machine is."""

    def on_step(self, fit: Any, event: Any) -> None:
        time.sleep(0.02)


def when_at(db: Datalayer, step: int, do: Callable[[Any], object], ended: threading.Event) -> threading.Thread:
    """Do something with the running job when it is at a step."""

    def watch() -> None:
        while not ended.wait(0.05):
            for job in db.jobs(status="running"):
                if (job.progress.get("step") or 0) >= step:
                    do(job)
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def step_of(db: Datalayer) -> int:
    """The step of the newest checkpoint of any run."""
    newest = db["mt.checkpoints"].raw.find_one(sort=[("step", -1)])
    return newest["step"] if newest else 0


@pytest.mark.timeout(1800)
def test_a_rank_killed_at_twenty_random_moments_with_another_number_each_time(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(5)
    room = [1]
    monkeypatch.setattr(TorchrunLauncher, "free", lambda *_, **__: room[0])
    mark, ports = left.marked(monkeypatch), left.ports()
    listened: set[int] = set()

    def is_at(step: int) -> bool:
        listened.update(*map(left.ports, left.of_mark(mark)))
        return step_of(db) >= step

    with Datalayer.connect(server_uri, **SETTINGS) as db, runs.one_thread():
        runs.fill(db, 400)
        alone = runs.weights(db.apply(trainer(db, "alone", workers=1, steps=1000)).result())
        made = trainer(db, "shared", workers=(2, 4), steps=1000, callbacks=[Unhurried()])
        killed = tried = 0
        while killed < 20 and tried < 60:
            room[0], tried = choose.choice([2, 4]), tried + 1
            ended, moment = threading.Event(), step_of(db) + choose.randint(-20, 20)  # also while ranks begin
            watching = kill_when(lambda moment=moment: is_at(moment), ended)  # type: ignore[misc]
            job = db.apply(made)
            ended.set()
            watching.join()
            if job.status == "succeeded":
                break
            killed += 1
            assert job.error is not None
            assert job.error["transient"], job.error
            left.expect_none(mark, ports)
        room[0] = 4
        job = db.apply(made)
        assert runs.same(runs.weights(job.result()), alone)
        assert killed >= 10, "the test kills"
        assert listened, "ranks listen while they run"
        left.expect_none(mark, ports)
        assert db.show("model", "shared") == [0, 1]
        assert db["mt.checkpoints"].count() == 0


def test_a_rank_that_raises_fails_the_job_with_its_error_and_where(server_uri: str) -> None:
    def fail_on_the_other(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if os.environ.get("RANK") == "1":
            raise LookupError("no such sample")
        return x, y

    with Datalayer.connect(server_uri, **{**runs.SETTINGS, "compute": "local"}) as db:
        runs.fill(db, 100)
        begun = time.monotonic()
        job = db.apply(trainer(db, "raising", workers=2, transform=fail_on_the_other))
        error = job.exception()
        assert isinstance(error, MongotorchError)
        assert "no such sample" in str(error)
        assert "rank 1 of 2" in job.record["error"]["traceback"]
        assert time.monotonic() - begun < 120
        assert db.show("model", "raising") == [0]
        assert ranks_of() == []


def test_a_stopped_run_publishes_the_best_so_far_and_a_cancelled_one_nothing(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **SETTINGS) as db:
        runs.fill(db, 200)
        ended = threading.Event()
        stopping = when_at(db, 5, lambda job: job.stop(), ended)
        job = db.apply(trainer(db, "stopped", workers=2, steps=100_000))
        ended.set()
        stopping.join()
        model = job.result()
        found = db.show(uuid=model.uuid)
        assert found["stopped"]
        assert 5 <= found["steps"] < 100_000
        begun, ended = time.monotonic(), threading.Event()
        cancelling = when_at(db, 5, lambda job: job.cancel(), ended)
        job = db.apply(trainer(db, "cancelled", workers=2, steps=100_000))
        ended.set()
        cancelling.join()
        assert isinstance(job.exception(), JobCancelledError)
        assert db.show("model", "cancelled") == [0]
        assert ranks_of() == []
        assert time.monotonic() - begun < 120


def test_a_worker_that_has_to_stop_hands_its_job_back_with_a_checkpoint(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **{**SETTINGS, "compute": "queue", "checkpoint_seconds": 3600}) as db:
        runs.fill(db, 200)
        job = db.apply(trainer(db, "handed", workers=2, steps=3000, validation_interval=None))
        worker, ended = Worker(db), threading.Event()
        stopping = when_at(db, 5, lambda _: worker.stop(), ended)
        worker.run()
        ended.set()
        stopping.join()
        assert job.status == "queued"
        (kept,) = db["mt.checkpoints"].raw.find({"step": {"$gt": 0}})
        assert kept["step"] >= 5
        assert ranks_of() == []
        assert job.stop()
        Worker(db).run(until_idle=True)
        assert db.show(uuid=job.result().uuid)["steps"] > kept["step"]


def test_four_ranks_read_each_of_a_million_documents_once(server_uri: str) -> None:
    count, batch = 1_000_000, 10_000
    seen: collections.Counter[int] = collections.Counter()
    with Datalayer.connect(server_uri, progress=False) as db:
        for first in range(0, count, 50_000):
            many = ({"_id": n, "x": float(n)} for n in range(first, first + 50_000))
            db["many"].raw.insert_many(many, ordered=False)
        steps = []
        for rank in range(4):
            options: dict[str, Any] = {
                "key": ("x",),
                "batch_size": batch // 4,
                "shuffle": True,
                "seed": 3,
                "prefetch_size": 10_000,
            }
            with db.stream(db["many"].find(), shard=(rank, 4), **options) as stream:
                rows = [torch.as_tensor(part[0] if isinstance(part, (tuple, list)) else part) for part in stream]
            steps.append(len(rows))
            seen.update(torch.cat(rows).to(torch.int64).flatten().tolist())
    assert set(steps) == {100}
    assert len(seen) == count
    assert set(seen.values()) == {1}
