"""Jobs under step-downs and kills of primaries of three nodes, and one apply from many processes at once."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.errors import PyMongoError
from tests import run_processes as runs

from mongotorch import Datalayer
from mongotorch.errors import MongotorchError

pytestmark = pytest.mark.fault


class ReplicaSet:
    """Three members of one set, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        found = importlib.util.find_spec("fiftyone")
        assert found is not None
        assert found.submodule_search_locations
        self.binary = Path(next(iter(found.submodule_search_locations))) / "db" / "bin" / "mongod"
        self.folder, self.members = folder, {}
        for _ in range(3):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.members[free.getsockname()[1]] = None
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.members)
        self.uri = f"mongodb://{hosts}/elections?replicaSet=rs3&w=1&heartbeatFrequencyMS=500"

    def initiate(self) -> None:
        for port in self.members:
            self.start(port)
        members = [{"_id": n, "host": f"127.0.0.1:{port}"} for n, port in enumerate(self.members)]
        config = {"_id": "rs3", "members": members, "settings": {"electionTimeoutMillis": 2000}}
        for port in self.members:
            with self.client(port, wait_ms=60_000) as client:
                client.admin.command("ping")
        with self.client(next(iter(self.members))) as client:
            client.admin.command("replSetInitiate", config)

    members: dict[int, subprocess.Popen[bytes] | None]

    def client(self, port: int, wait_ms: int = 3000) -> pymongo.MongoClient[dict[str, Any]]:
        return pymongo.MongoClient("127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=wait_ms)

    def start(self, port: int) -> None:
        data = self.folder / str(port)
        data.mkdir(exist_ok=True)
        command = [str(self.binary), "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--replSet", "rs3", "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64", "--nounixsocket"]
        with (data / "log").open("ab") as log:
            self.members[port] = subprocess.Popen(command, stdout=log)

    def primary(self) -> int | None:
        for port in self.members:
            with contextlib.suppress(PyMongoError), self.client(port) as client:
                if client.admin.command("hello").get("isWritablePrimary"):
                    return port
        return None

    def step_down(self) -> bool:
        port = self.primary()
        if port is None:
            return False
        with contextlib.suppress(PyMongoError), self.client(port) as client:
            client.admin.command({"replSetStepDown": 2, "secondaryCatchUpPeriodSecs": 1, "force": True})
            return True
        return False

    def kill_primary(self) -> bool:
        port = self.primary()
        process = None if port is None else self.members[port]
        if port is None or process is None:
            return False
        process.kill()
        process.wait()
        time.sleep(1)
        self.start(port)
        return True

    def close(self) -> None:
        for process in self.members.values():
            if process is not None:
                process.kill()
                process.wait()


def retried(ask: Any) -> Any:
    """The test itself meets elections, too."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except MongotorchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def run_under_elections(replica_set: ReplicaSet, *, count: int, step_downs: int, kills: int) -> None:
    choose = random.Random(3)
    faults = ["step down"] * step_downs + ["kill"] * kills
    choose.shuffle(faults)
    done = {"step down": 0, "kill": 0}
    over = threading.Event()

    def torment() -> None:
        for fault in faults:
            if over.wait(choose.uniform(1.0, 3.0)):
                return
            act = replica_set.step_down if fault == "step down" else replica_set.kill_primary
            done[fault] += act()

    settings = {**runs.SETTINGS, "lease_s": 5.0}
    with Datalayer.connect(replica_set.uri, **settings) as db:
        runs.fill(db, 100)
        jobs = [db.apply(runs.trainer(db, f"job-{n}", in_memory=True, steps=30)) for n in range(count)]
        promoted: dict[str, int] = {}
        thread = threading.Thread(target=torment)
        workers = [runs.start(runs.work_under_elections, replica_set.uri) for _ in range(2)]
        thread.start()
        try:
            deadline = time.monotonic() + 20 * 60
            while thread.is_alive() or not all(retried(job.done) for job in jobs):
                assert time.monotonic() < deadline
                for n, job in enumerate(jobs):
                    if f"job-{n}" not in promoted and retried(lambda job=job: job.status) == "succeeded":
                        with contextlib.suppress(MongotorchError):
                            move = db.promote("model", f"job-{n}")
                            promoted[f"job-{n}"] = move.to_version or 0
                time.sleep(0.5)
        finally:
            over.set()
            thread.join()
            for worker in workers:
                worker.kill()
                worker.join()
        assert min(done.values()) >= 1, done
        expected = None
        for n, job in enumerate(jobs):
            assert retried(lambda job=job: job.status) == "succeeded", retried(lambda job=job: job.record)
            model = retried(lambda job=job: job.result(timeout=60))
            expected = expected or runs.weights(model)
            assert runs.same(runs.weights(model), expected)
            assert retried(lambda n=n: db.show("model", f"job-{n}")) == [0, 1]
            if f"job-{n}" in promoted:
                moves = retried(lambda n=n: db.history("model", f"job-{n}"))
                assert [move.to_version for move in moves] == [promoted[f"job-{n}"]]
        assert promoted


def test_jobs_have_their_effect_once_under_step_downs_and_kills(replica_set: ReplicaSet) -> None:
    run_under_elections(replica_set, count=12, step_downs=6, kills=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_hundred_jobs_under_a_hundred_step_downs_and_twenty_kills(replica_set: ReplicaSet) -> None:
    run_under_elections(replica_set, count=300, step_downs=100, kills=20)


@pytest.mark.parametrize("compute", ["local", "queue"])
def test_sixty_four_identical_applies_from_eight_processes_are_one_training(server_uri: str, compute: str) -> None:
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        runs.fill(db, 60)
        processes = [runs.start(runs.apply_eight_times, server_uri, compute) for _ in range(8)]
        if compute == "queue":
            deadline = time.monotonic() + 60
            while not db.jobs():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            processes.append(runs.start(runs.work, server_uri))
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        assert len(db.jobs()) == 1
        assert db.jobs()[0].record["attempt"] == 1
        assert (db.show("model", "same"), db.show("trainer", "same-trainer")) == ([0, 1], [0, 1])
