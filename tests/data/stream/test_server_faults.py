"""The stream on a server that breaks: lost connections, lost cursors, a primary that steps down or is killed.

Each document comes exactly once, in the order of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pymongo import MongoClient
from pymongo.errors import AutoReconnect

from mongotorch.data import Stream, StreamSpec
from mongotorch.errors import ServerUnavailableError
from mongotorch.query import Query

pytestmark = pytest.mark.fault

COUNT = 3000
APP = "stream-under-test"
SELECT = Query.find("documents")
QUERIES = {
    "by id": SELECT,
    "own order": SELECT.sort("y", -1),
    "pipeline": Query.aggregate("documents", [{"$match": {"y": {"$gte": 0}}}, {"$sort": {"y": 1}}]),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefetch": {"data_prefetch": True},
    "workers": {"loader": {"num_workers": 2}},
}


class Opener:
    """Opens the database in any process, under a name that failpoints can aim at."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name = address, name

    def __call__(self) -> Any:
        return MongoClient(self.address, appname=APP)[self.name]


def fill(database: Any) -> None:
    documents = [{"x": [float(n), n / 2], "y": n} for n in range(COUNT)]
    random.Random(3).shuffle(documents)
    database["documents"].insert_many(documents)


def stream(opener: Opener, **given: Any) -> Stream:
    small = {"batch_size": 64, "prefetch_size": 40, "prefetch_factor": 4, "seed": 5, "shuffle": True}
    return Stream(opener, StreamSpec(**{"query": SELECT, "key": ("x", "y"), **small, **given}))


def labels(batches: Any) -> list[int]:
    found = []
    for x, y in batches:
        assert torch.equal(x, torch.stack([y.float(), y.float() / 2], dim=1))
        found += y.tolist()
    return found


@pytest.fixture
def one_node(mongod: str) -> Iterator[Opener]:
    """A fresh database on the server of the session."""
    opener = Opener(f"mongodb://{mongod}/?replicaSet=rs0", "faults" + uuid.uuid4().hex[:12])
    with MongoClient[dict[str, Any]](opener.address) as client:
        fill(client[opener.name])
        yield opener
        client.drop_database(opener.name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", QUERIES)
def test_random_failures_of_find_and_getmore_lose_and_repeat_nothing(
    one_node: Opener, name: str, way: str
) -> None:
    draw = random.Random(f"{name} {way}")
    with stream(one_node, query=QUERIES[name]) as undisturbed:
        expected = labels(undisturbed)
    assert sorted(expected) == list(range(COUNT))
    hits = 0
    with (
        MongoClient[dict[str, Any]](one_node.address) as admin,
        stream(one_node, query=QUERIES[name], **WAYS[way]) as broken,
    ):
        point = contextlib.closing(Failpoint(admin))
        with point as failing:
            failing.next_time(draw)
            found = []
            for batch in broken:
                found += labels([batch])
                if draw.random() < 0.5:
                    failing.next_time(draw)
        hits = failing.hits
    assert found == expected
    assert hits > 0


class Failpoint:
    """`failCommand` of the server, aimed at the stream's own connections."""

    def __init__(self, admin: MongoClient[dict[str, Any]]) -> None:
        self._admin = admin
        self.hits = self._before = 0
        self.set("off", {})
        self._before, self.hits = self.hits, 0

    def next_time(self, draw: random.Random) -> None:
        """Let the next one to three reads fail, one way or the other."""
        how: dict[str, Any] = draw.choice([{"closeConnection": True}, {"errorCode": 43}])
        commands = draw.choice([["find"], ["getMore"], ["find", "getMore", "aggregate"]])
        self.set({"times": draw.randint(1, 3)}, {"failCommands": commands, "appName": APP, **how})

    def close(self) -> None:
        self.set("off", {})

    def set(self, mode: Any, data: dict[str, Any]) -> None:
        set_to = {"configureFailPoint": "failCommand", "mode": mode, "data": data}
        self.hits = int(self._admin.admin.command(set_to)["count"]) - self._before


def test_a_server_that_never_answers_again_is_given_up_at_the_deadline(one_node: Opener) -> None:
    with MongoClient[dict[str, Any]](one_node.address) as admin, stream(one_node, read_deadline_s=0.2) as broken:
        batches = iter(broken)
        next(batches)
        with contextlib.closing(Failpoint(admin)) as failing:
            failing.set("alwaysOn", {"failCommands": ["find"], "appName": APP, "closeConnection": True})
            with pytest.raises(ServerUnavailableError) as caught:
                list(batches)
    assert caught.value.setting == "read_deadline_s"
    assert isinstance(caught.value.__cause__, AutoReconnect)


class Nodes:
    """A replica set of three, whose elections take a second."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._binary, self._folder = binary, folder
        ports = [free_port() for _ in range(3)]
        try:
            self._initiate(ports)
        except BaseException:
            self.close()
            raise
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.address = f"mongodb://{hosts}/?replicaSet=three&w=majority"

    def _initiate(self, ports: list[int]) -> None:
        for port in ports:
            self.start(port)
        for port in ports:  # all of them have to answer before one is told of the others
            with MongoClient[dict[str, Any]]("127.0.0.1", port, directConnection=True) as client:
                client.admin.command("hello")
        members = [{"_id": n, "host": f"127.0.0.1:{port}"} for n, port in enumerate(ports)]
        settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 300}
        with MongoClient[dict[str, Any]]("127.0.0.1", ports[0], directConnection=True) as client:
            client.admin.command("replSetInitiate", {"_id": "three", "members": members, "settings": settings})

    def start(self, port: int) -> None:
        path = self._folder / str(port)
        path.mkdir(exist_ok=True)
        command = [str(self._binary), "--dbpath", str(path), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--replSet", "three", "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"]
        with (path / "log").open("ab") as log:
            self._running[port] = subprocess.Popen(command, stdout=log)

    def kill_primary(self, admin: MongoClient[dict[str, Any]]) -> None:
        """As the machine dies: no farewell."""
        assert admin.primary is not None
        process = self._running.pop(admin.primary[1])
        process.send_signal(signal.SIGKILL)
        process.wait()

    def step_down(self, admin: MongoClient[dict[str, Any]]) -> None:
        """Another one has to be elected; this one does not stand for two seconds."""
        command = {"replSetStepDown": 2, "secondaryCatchUpPeriodSecs": 1, "force": True}
        with contextlib.suppress(AutoReconnect):
            admin.admin.command(command)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    found = importlib.util.find_spec("fiftyone")
    assert found is not None
    assert found.submodule_search_locations is not None
    binary = Path(next(iter(found.submodule_search_locations))) / "db" / "bin" / "mongod"
    with contextlib.closing(Nodes(binary, tmp_path)) as three:
        yield three


Fault = Callable[[Nodes, MongoClient[dict[str, Any]]], None]


def test_an_epoch_outlives_its_primaries(nodes: Nodes) -> None:
    """In each way a step down in mid-epoch; at the end the primary is killed, and two of three are left."""
    opener = Opener(nodes.address, "failover")
    faults: list[tuple[str, str, Fault]] = [
        ("by id", "plain", Nodes.step_down),
        ("by id", "prefetch", Nodes.step_down),
        ("own order", "prefetch", Nodes.step_down),
        ("by id", "workers", Nodes.kill_primary),
    ]
    with MongoClient[dict[str, Any]](nodes.address) as admin:
        fill(admin[opener.name])
        for name, way, fault in faults:
            with stream(opener, query=QUERIES[name]) as undisturbed:
                expected = labels(undisturbed)
            assert sorted(expected) == list(range(COUNT))
            with stream(opener, query=QUERIES[name], **WAYS[way]) as broken:
                batches = iter(broken)
                found = labels(next(batches) for _ in range(10))
                fault(nodes, admin)
                found += labels(batches)
            assert found == expected, (name, way)
            admin.admin.command("ping")
