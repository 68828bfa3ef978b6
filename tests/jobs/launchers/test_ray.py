"""The launcher of Ray, on a cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
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
from tests import processes_left as left
from tests import run_processes as runs
from tests.services.training.test_ranks import drivers, trainer

from mongotorch import Datalayer
from mongotorch.errors import JobProcessError, MongotorchError, SettingError, UnsupportedError
from mongotorch.jobs.launchers import Launcher, launcher_named
from mongotorch.testing.launchers import LauncherSuite

pytestmark = pytest.mark.fault

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
second = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "remove":
        cluster.remove_node(second, allow_graceful=False)
        print("removed", flush=True)
cluster.shutdown()
"""


class TwoNodes:
    """A cluster of two nodes of two cores each, in a process of its own."""

    def __init__(self, folder: Path, uri: str | None) -> None:
        env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), env.get("PYTHONPATH", "")])
        env |= {} if uri is None else {"MONGOTORCH_URI": uri, "MONGOTORCH_CACHE_DIR": str(folder / "cache")}
        with (folder / "cluster.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CLUSTER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self.address = self.answer("address")

    def answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError(f"the cluster did not say {word!r}")

    def remove_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("remove\n")
        self.process.stdin.flush()
        self.answer("removed")

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def uri(mongod: str) -> str:
    """The database that the nodes have in their environment."""
    return f"mongodb://{mongod}/t_ray?replicaSet=rs0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Iterator[TwoNodes]:
    made = TwoNodes(tmp_path_factory.mktemp("cluster"), uri)
    yield made
    made.close()


@pytest.fixture
def nodes(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


class TestRay(LauncherSuite):
    workers = 2

    @pytest.fixture
    def launcher(self, nodes: TwoNodes) -> Launcher:
        return launcher_named("ray")

    def test_there_is_room_for_as_many_ranks_as_the_nodes_have_cores(self, launcher: Launcher) -> None:
        assert launcher.free({}, device="cpu") == 4
        assert launcher.free({"CPU": 2}, device="cpu") == 2
        assert launcher.free({"CPU": 1, "GPU": 1}, device="cuda") == 0


def test_two_and_four_ranks_on_two_nodes_give_the_bits_of_one_process(nodes: TwoNodes, uri: str) -> None:
    settings = {**runs.SETTINGS, "compute": "local"}
    with Datalayer.connect(uri, **settings) as db, runs.one_thread():
        runs.fill(db, 200)
        alone = runs.weights(db.apply(trainer(db, "alone", workers=1)).result())
    with Datalayer.connect(uri, **{**settings, "compute": "ray"}) as db:
        for workers in (2, 4):
            job = db.apply(trainer(db, f"ray-{workers}", workers=workers))
            assert runs.same(runs.weights(job.result()), alone), workers
            assert db.show("model", f"ray-{workers}") == [0, 1]


def test_an_embedded_server_is_refused(nodes: TwoNodes, tmp_path: Path) -> None:
    with Datalayer.connect(f"embedded:{tmp_path}", progress=False, compute="ray") as db:
        runs.fill(db, 40)
        error = db.apply(trainer(db, "embedded", workers=2)).exception()
        assert isinstance(error, UnsupportedError)
        assert error.setting == "uri"


def test_another_database_than_that_of_the_nodes_is_named(nodes: TwoNodes, server_uri: str) -> None:
    with Datalayer.connect(server_uri, **{**runs.SETTINGS, "compute": "ray"}) as db:
        runs.fill(db, 40)
        error = db.apply(trainer(db, "elsewhere", workers=2)).exception()
        assert isinstance(error, SettingError), error
        assert "MONGOTORCH_URI" in str(error)
        assert db.show("model", "elsewhere") == [0]


def test_more_ranks_than_there_is_room_for_are_refused(nodes: TwoNodes, uri: str) -> None:
    with Datalayer.connect(uri, **{**runs.SETTINGS, "compute": "ray"}) as db:
        made = trainer(db, "many", workers=4).replace(compute_kwargs={"workers": 8, "lanes": 8, "device": "cpu"})
        error = db.apply(made).exception()
        assert isinstance(error, UnsupportedError)
        assert "room for 4" in str(error)


def test_a_node_that_is_removed_in_mid_run_ends_the_attempt_and_the_next_one_goes_on(
    tmp_path: Path, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = TwoNodes(tmp_path, server_uri)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    settings = {**runs.SETTINGS, "compute": "local", "checkpoint_seconds": 0.0}
    try:
        with Datalayer.connect(server_uri, **settings) as db, runs.one_thread():
            runs.fill(db, 200)
            alone = runs.weights(db.apply(trainer(db, "alone", workers=1)).result())
        with Datalayer.connect(server_uri, **{**settings, "compute": "ray"}) as db:

            def remove() -> None:
                _wait_for_step(db, 10)
                nodes.remove_one()

            removing = threading.Thread(target=remove)
            removing.start()
            job = db.apply(trainer(db, "shared", workers=(2, 4), steps=60))
            removing.join()
            error = job.exception()
            if error is not None:  # else it had ended before
                assert isinstance(error, MongotorchError), error
                assert job.record["error"]["transient"], job.record["error"]
            again = db.apply(trainer(db, "shared", workers=(2, 4), steps=60))
            assert runs.same(runs.weights(again.result()), alone)
            assert db.show("model", "shared") == [0, 1]
    finally:
        nodes.close()


class Paced:
    """A callback that writes which process is a rank, and makes a run long enough to be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def on_start(self, fit: Any) -> None:
        (Path(self.folder) / f"{fit.rank}-{os.getpid()}").touch()

    def on_step(self, fit: Any, event: Any) -> None:
        if not (Path(self.folder) / "fast").exists():
            time.sleep(0.2)


def test_a_driver_that_is_killed_leaves_no_rank_and_no_port_and_the_next_attempt_goes_on(
    nodes: TwoNodes, uri: str, tmp_path: Path
) -> None:
    settings = {**runs.SETTINGS, "compute": "local", "checkpoint_seconds": 0.0, "lease_s": 30.0}
    with Datalayer.connect(uri, **settings) as db, runs.one_thread():
        db["rows"].raw.drop()
        runs.fill(db, 200)
        alone = runs.weights(db.apply(trainer(db, "before", workers=1, steps=200)).result())
    sockets: dict[int, set[str]] = {}  # on which a rank listens, by its process

    def kill() -> None:
        _wait_for_step(db, 5)
        sockets.update({pid: left.sockets(pid) for pid in pids_in(tmp_path)})
        (driver,) = drivers()
        os.kill(driver, signal.SIGKILL)

    with Datalayer.connect(uri, **{**settings, "compute": "ray"}) as db:
        made = trainer(db, "driven", workers=(1, 2), steps=200, callbacks=(Paced(tmp_path),))
        killing = threading.Thread(target=kill)
        killing.start()
        job = db.apply(made)
        killing.join()
        error = job.exception()
        assert isinstance(error, JobProcessError), error
        assert "was killed by SIGKILL" in str(error)
        assert job.record["error"]["transient"]
        assert db.show("model", "driven") == [0]
        assert db["mt.checkpoints"].count() > 0
        assert len(sockets) == 2
        held = set.union(*sockets.values())
        assert held, "ranks listen while they run"
        left.wait_for(lambda: not any(map(left.runs, sockets)), lambda: f"they still run: {list(sockets)}")
        left.wait_for(lambda: not held & left.listening().keys(), lambda: f"somebody listens on {held}")

        left.wait_for(_are_free, lambda: "the nodes are not free")

    (tmp_path / "fast").touch()
    with Datalayer.connect(uri, **{**settings, "launcher": "local"}) as db, runs.one_thread():
        again = db.apply(made)
        assert runs.same(runs.weights(again.result()), alone)
        assert again.record["attempt"] == 2
        assert db.show("model", "driven") == [0, 1]


def _are_free() -> bool:
    with contextlib.suppress(SettingError):  # a busy machine does not answer in time
        return launcher_named("ray").free({}, device="cpu") == 4
    return False


def pids_in(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("*-*")]


def _wait_for_step(db: Datalayer, step: int) -> None:
    deadline = time.monotonic() + 200
    while not any((job.progress.get("step") or 0) >= step for job in db.jobs(status="running")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
