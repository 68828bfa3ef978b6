"""Runs that are killed at random moments, again and again, end with the bits of a run that was left alone."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
from tests import run_processes as runs
from tests.train.test_recipe import RECIPES

from mongotorch import Datalayer, TorchTrainer

pytestmark = pytest.mark.fault


def kill_until_done(uri: str, db: Datalayer, *, seed: int, workers: int = 2) -> int:
    """Start workers and kill them at random moments, until no job is left; how many were killed."""
    moments = random.Random(seed)
    killed = 0
    processes = [runs.start(runs.work, uri) for _ in range(workers)]
    while db.jobs(status="queued", limit=1) or db.jobs(status="running", limit=1):
        victim = processes.pop(0)
        victim.join(moments.uniform(0.25, 1.0))
        if victim.is_alive():
            victim.kill()
            killed += 1
        victim.join()
        processes.append(runs.start(runs.work, uri))
    for process in processes:
        process.kill()
        process.join()
    return killed


def run_killed(uri: str, count: int, seed: int) -> None:
    with Datalayer.connect(uri, **runs.SETTINGS) as db:
        runs.fill(db)
        names = [f"run-{n}" for n in range(count)]
        jobs = [db.apply(runs.trainer(db, name, in_memory=n % 2 == 0)) for n, name in enumerate(names)]
        alone = [db.apply(runs.trainer(db, f"alone-{n}", in_memory=n == 0), priority=9) for n in (0, 1)]
        runs.work_alone(uri, 2)
        expected = [runs.weights(job.result(timeout=30)) for job in alone]
        assert runs.same(*expected), "streamed or in memory is the same run"
        killed = kill_until_done(uri, db, seed=seed)
        tried = [job.record["attempt"] for job in jobs]
        # How many depends on how busy the machine is; that none was killed cannot be.
        assert killed >= count // 3, "the test kills"
        assert sum(attempt > 1 for attempt in tried) >= count // 5, tried
        for n, (name, job) in enumerate(zip(names, jobs, strict=True)):
            assert runs.same(runs.weights(job.result(timeout=30)), expected[n % 2]), name
            assert db.show("model", name) == [0, 1]
            assert db.load("model", name).uuid == job.result().uuid
        db.gc(grace_s=0)
        assert db["mt.checkpoints"].count() == 0
        assert runs.unreached(db) == []


def test_runs_killed_at_random_end_with_the_bits_of_one_that_was_left_alone(server_uri: str) -> None:
    run_killed(server_uri, count=12, seed=0)


def with_recipe(db: Datalayer, recipe: str, name: str) -> TorchTrainer:
    """A run with one of the recipes, each step of which takes a while."""
    given = copy.deepcopy(RECIPES[recipe][0])
    given["callbacks"] = [*given.get("callbacks", ()), Unhurried()]
    loader = {"batch_size": 16, "shuffle": True, "drop_last": True}  # a batch norm needs two rows
    return runs.trainer(db, name, in_memory=False).replace(loader_kwargs=loader, **given)


class Unhurried:
    """A callback that makes a run long enough to be killed, however fast the machine is."""

    def on_step(self, fit: Any, event: Any) -> None:
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_runs_of_every_recipe_killed_at_random_end_with_the_bits_of_those_that_were_left_alone(
    server_uri: str,
) -> None:
    numbers = {recipe: n for n, recipe in enumerate(RECIPES)}
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        runs.fill(db)
        jobs = {recipe: db.apply(with_recipe(db, recipe, f"run-{n}")) for recipe, n in numbers.items()}
        alone = {
            recipe: db.apply(with_recipe(db, recipe, f"alone-{n}"), priority=9) for recipe, n in numbers.items()
        }
        runs.work_alone(server_uri, len(alone))
        assert kill_until_done(server_uri, db, seed=2) >= len(jobs) // 3, "the test kills"
        assert sum(job.record["attempt"] > 1 for job in jobs.values()) >= len(jobs) // 3
        for recipe, job in jobs.items():
            found, expected = (runs.weights(one.result(timeout=30)) for one in (job, alone[recipe]))
            assert runs.same(found, expected), recipe


@pytest.mark.soak
def test_two_hundred_runs_killed_at_random(server_uri: str) -> None:
    run_killed(server_uri, count=200, seed=1)


def test_who_applies_again_after_a_kill_waits_for_the_dead_lease_and_goes_on(server_uri: str) -> None:
    settings = {**runs.SETTINGS, "compute": "local"}
    with Datalayer.connect(server_uri, **settings) as db, runs.one_thread():
        runs.fill(db, 100)
        victim = runs.start(runs.apply_and_die, server_uri, 30)
        victim.join(60)
        assert victim.exitcode == -9
        (left,) = db.jobs(status="running")
        job = db.apply(runs.trainer(db, "again", in_memory=True, steps=60))
        assert job.uuid == left.uuid
        model = job.result(timeout=60)
        alone = db.apply(runs.trainer(db, "alone", in_memory=True, steps=60)).result()
        assert runs.same(runs.weights(model), runs.weights(alone))
        assert job.record["attempt"] == 2
