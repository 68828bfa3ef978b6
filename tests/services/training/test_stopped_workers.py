"""Workers that are killed, or stopped past their lease and woken again: each job has its effect exactly once."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
from tests import run_processes as runs

from mongotorch import Datalayer

pytestmark = pytest.mark.fault

JOBS, WORKERS = 40, 4
LEASE_S = 1.0


def test_four_workers_killed_and_stopped_past_their_lease_do_each_of_forty_jobs_once(server_uri: str) -> None:
    uri = server_uri
    with Datalayer.connect(uri, **runs.SETTINGS) as db:
        runs.fill(db, 100)
        jobs = [db.apply(runs.trainer(db, f"job-{n}", in_memory=True, steps=40)) for n in range(JOBS)]
        stopped = torment(uri, db)
        assert stopped >= 3, "some were zombies"
        results = [job.result(timeout=60) for job in jobs]
        expected = runs.weights(results[0])
        for n, model in enumerate(results):
            assert db.show("model", f"job-{n}") == [0, 1]
            assert runs.same(runs.weights(model), expected)
        # One document a job and no more, whatever zombies tried.
        published = db["mt.components"].raw.aggregate(
            [{"$match": {"job": {"$ne": None}, "type_id": "model"}}, {"$sortByCount": "$job"}]
        )
        assert {row["count"] for row in published} == {1}
        # A zombie may write a checkpoint after the end; nobody reads it, and it is garbage.
        db.gc(grace_s=0)
        assert db["mt.checkpoints"].count() == 0
        assert runs.unreached(db) == []


def torment(uri: str, db: Datalayer) -> int:
    """Kill workers, or stop them for longer than a lease and wake them, until no job is left; how many slept."""
    choose = random.Random(2)
    pause = threading.Event()
    workers = [runs.start(runs.work, uri) for _ in range(WORKERS)]
    asleep: list[int] = []
    slept = 0
    while db.jobs(status="queued", limit=1) or db.jobs(status="running", limit=1):
        pause.wait(choose.uniform(0.3, 0.6))
        for process in [process for process in workers if not process.is_alive()]:
            workers.remove(process)
            workers.append(runs.start(runs.work, uri))
        victim = choose.choice(workers)
        if victim.pid is None or victim.pid in asleep or not victim.is_alive():
            continue
        if choose.random() < 0.5:
            victim.kill()
            continue
        os.kill(victim.pid, signal.SIGSTOP)
        slept += 1
        asleep.append(victim.pid)
        waker = threading.Timer(LEASE_S * 1.7, wake, (victim.pid, asleep))
        waker.daemon = True
        waker.start()
    for process in workers:
        process.kill()
        process.join()
    return slept


def wake(pid: int, asleep: list[int]) -> None:
    asleep.remove(pid)
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return
