"""Processes that somebody else has started run one job together: `torchrun -m mongotorch run-job JOB`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests import run_processes as runs
from tests.services.training.test_ranks import trainer

from mongotorch import Datalayer

pytestmark = pytest.mark.fault


def start(uri: str, job: str, ranks: int) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), str(root / "plugin")])  # this tree, whatever is installed
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MONGOTORCH_URI": uri, "MONGOTORCH_LEASE_S": "2"}
    env |= {"MONGOTORCH_CHECKPOINT_SECONDS": "0", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen([*command, "-m", "mongotorch", "run-job", job], env=env, start_new_session=True)


def test_two_processes_are_killed_and_four_others_end_the_run_with_the_bits_of_one(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **{**runs.SETTINGS, "compute": "local"}) as db, runs.one_thread():
        runs.fill(db, 200)
        alone = runs.weights(db.apply(trainer(db, "alone", workers=1, steps=400)).result())
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        job = db.apply(trainer(db, "shared", workers=(1, 4), steps=400))
        first = start(server_uri, job.uuid, 2)
        deadline = time.monotonic() + 200
        while (job.progress.get("step") or 0) < 10:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        assert start(server_uri, job.uuid[:8], 4).wait(200) == 0
        assert runs.same(runs.weights(job.result()), alone)
        assert db.show("model", "shared") == [0, 1]
        assert job.record["attempt"] == 2
        assert start(server_uri, job.uuid, 2).wait(200) == 0, "it has succeeded already"
        assert job.record["attempt"] == 2


def test_processes_that_the_lanes_cannot_be_shared_by_fail_the_job_and_say_so(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        runs.fill(db, 100)
        job = db.apply(trainer(db, "three", workers=(1, 4)))
        assert start(server_uri, job.uuid, 3).wait(200) == 1
        assert job.status == "failed"
        assert job.error is not None
        assert "3 processes were started" in job.error["message"]
        assert db.show("model", "three") == [0]


class Sleeps:
    """A callback that never returns, on one rank."""

    def on_step(self, fit: Any, event: Any) -> None:
        if fit.rank == 1 and event.step == 3:
            time.sleep(10_000)


@pytest.mark.parametrize("callbacks", [(), (Sleeps(),)], ids=["slow", "stuck"])
def test_an_attempt_that_takes_too_long_fails_and_publishes_nothing(server_uri: str, callbacks: Any) -> None:
    with Datalayer.connect(server_uri, **runs.SETTINGS, max_runtime_s=6.0) as db:
        runs.fill(db, 100)
        job = db.apply(trainer(db, "long", workers=(1, 4), steps=10**9, callbacks=callbacks))
        assert start(server_uri, job.uuid, 2).wait(200) == 1
        assert job.status == "failed"
        assert job.error is not None
        assert job.error["type"] == "JobRuntimeError"
        assert job.record["attempt"] == 1
        assert db.show("model", "long") == [0]
