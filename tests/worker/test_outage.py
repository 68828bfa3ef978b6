"""An idle worker outlives an outage of its database, however the database goes away, and then goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, points, trainer
from tests.worker.test_elections import ReplicaSet

from mongotorch import Always, Datalayer, NewDocuments, Schedule

pytestmark = pytest.mark.fault

OUTAGE_S = 6.0
SERVER_TIMEOUT_S = 0.4  # the outage is fifteen times as long; with the default of 10 s it would be 150 s


class Server(ReplicaSet):
    """One member, which can be away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = next(iter(self.members))
        self.members = {self.port: None}
        self.uri = f"mongodb://127.0.0.1:{self.port}/outage?replicaSet=rs3&connectTimeoutMS=1000"
        self.initiate()

    @contextlib.contextmanager
    def away(self, how: str) -> Iterator[None]:
        process = self.members[self.port]
        assert process is not None
        if how == "killed":
            process.kill()
            process.wait()
        else:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if how == "killed":
                self.start(self.port)
            else:
                process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        process = self.members[self.port]
        assert process is not None
        process.kill()
        process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.end()


@contextlib.contextmanager
def worker(uri: str) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """`mongotorch worker` without an end, and the lines of its log so far."""
    environment = {**os.environ, "MONGOTORCH_URI": uri, "MONGOTORCH_SERVER_TIMEOUT_S": str(SERVER_TIMEOUT_S)}
    environment |= {"MONGOTORCH_LEASE_S": "2", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "mongotorch", "worker", "--log-format", "json"]
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        stream = process.stderr
        reader = threading.Thread(target=lambda: lines.extend(map(json.loads, stream)))
        reader.start()
        try:
            yield process, lines
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            reader.join()
    assert process.returncode == 0


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_idle_worker_survives_an_outage_and_runs_what_comes_afterwards(server: Server, how: str) -> None:
    given: dict[str, Any] = {"compute": "queue", "progress": False, "valid_fraction": 0.2, "lineage": False}
    given["server_timeout_s"] = 60
    with Datalayer.connect(server.uri, **given) as db:
        select = fill(db)
        db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10), gate=Always()))
        with worker(server.uri) as (process, lines):
            db.apply(trainer(select, max_iterations=4)).result(timeout=60)  # it is up, and idle now
            with server.away(how):
                time.sleep(OUTAGE_S)
                assert process.poll() is None
            db.apply(trainer(select, max_iterations=5)).result(timeout=60)
            db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(10)])
            deadline = time.monotonic() + 60
            while not (db.schedules()[0].get("outcome") or {}).get("promoted") and time.monotonic() < deadline:
                time.sleep(0.2)
            assert db.schedules()[0]["outcome"]["promoted"], db.schedules()
            assert process.poll() is None
    if how == "killed":
        assert any("waits for the database" in line["message"] for line in lines), lines
    assert [line for line in lines if line.get("event") == "failed"] == []
