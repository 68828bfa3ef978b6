"""What the containers of docker/compose.yaml run, run here, against a mongod as the image of MongoDB starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pymongo
import pytest
import torch
from pymongo.errors import OperationFailure
from ruamel.yaml import YAML

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.mongo.server_binary import find_mongod

DOCKER = Path(__file__).parents[1] / "docker"


@pytest.fixture(scope="module")
def compose() -> Any:
    return YAML(typ="safe").load(DOCKER / "compose.yaml")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _secrets(folder: Path, port: int) -> dict[str, str]:
    script = ["sh", str(DOCKER / "make-secrets.sh"), str(folder), f"127.0.0.1:{port}", "shop"]
    ran = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return {path.name: path.read_text() for path in folder.iterdir()}


def _initialise(compose: Any, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    service = compose["services"]["initialise"]
    here = {
        "mongo:27017": f"127.0.0.1:{port}",
        "${MONGO_DATABASE:-mongotorch}": "shop",
        "/run/secrets": str(folder),
    }
    environment = {name: here[value] for name, value in service["environment"].items()}
    program = Path(service["entrypoint"][1]).name
    command = [sys.executable, str(DOCKER / program)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """The secrets and the port of a mongod as the compose file starts it: with a root user, not yet initiated."""
    folder, port = tmp_path_factory.mktemp("compose"), _free_port()
    password = _secrets(folder / "secrets", port)["root_password"]
    (folder / "data").mkdir()
    (folder / "keyfile").write_text("k" * 64)
    (folder / "keyfile").chmod(0o600)
    mongod = [str(find_mongod().path), "--dbpath", str(folder / "data"), "--port", str(port)]
    mongod += ["--bind_ip", "127.0.0.1", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]
    with (folder / "log").open("w") as log:
        # As the image does the first time: a server that nobody else reaches, for the root user.
        with subprocess.Popen(mongod, stdout=log) as first:
            with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", port) as client:
                client.admin.command("createUser", "root", pwd=password, roles=["root"])
            first.terminate()
        secured = [*mongod, "--replSet", "rs0", "--keyFile", str(folder / "keyfile")]
        with subprocess.Popen(secured, stdout=log) as process:
            yield folder / "secrets", port
            process.terminate()


@pytest.fixture(scope="module")
def initialised(compose: Any, server: tuple[Path, int]) -> Path:
    ran = _initialise(compose, *server)
    assert (ran.returncode, ran.stdout) == (0, "initialised\n"), ran.stderr
    return server[0]


def test_secrets_are_made_once_and_are_for_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    first = _secrets(folder, 1)
    assert folder.stat().st_mode & 0o777 == 0o700
    passwords = [value for name, value in first.items() if name.endswith("_password")]
    assert len(set(passwords)) == 4
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in passwords)
    assert _secrets(folder, 1) == first
    (folder / "worker_password").unlink()
    again = _secrets(folder, 1)
    assert again["worker_password"] != first["worker_password"]
    assert again["worker_password"] in again["worker_uri"]
    assert again["trainer_uri"] == first["trainer_uri"]


def test_the_initialiser_can_run_again_and_renews_a_password(
    compose: Any, server: tuple[Path, int], initialised: Path
) -> None:
    folder, port = server
    (folder / "reader_password").unlink()
    address = _secrets(folder, port)["reader_uri"].strip()

    assert _initialise(compose, folder, port).returncode == 0

    with Datalayer.connect(address, server_timeout_s=10) as db:
        assert db.show() == []


def test_each_user_may_do_what_its_role_says(initialised: Path) -> None:
    for name, may_write in (("reader", False), ("worker", False), ("trainer", True)):
        with pymongo.MongoClient[dict[str, Any]]((initialised / f"{name}_uri").read_text().strip()) as client:
            assert client.shop.command("ping")["ok"]
            if may_write:
                client.shop.letters.insert_one({})
            else:
                with pytest.raises(OperationFailure, match="not authorized"):
                    client.shop.letters.insert_one({})
            with pytest.raises(OperationFailure, match="not authorized"):
                client.elsewhere.letters.insert_one({})


def test_a_wrong_root_password_ends_the_initialiser_in_one_line_without_it(
    compose: Any, server: tuple[Path, int], initialised: Path, tmp_path: Path
) -> None:
    secrets = _secrets(tmp_path, server[1])
    ran = _initialise(compose, tmp_path, server[1])
    assert ran.returncode == 1
    assert ran.stderr.startswith("initialise: ")
    assert "Authentication failed" in ran.stderr
    assert secrets["root_password"] not in ran.stderr


def test_a_worker_with_the_environment_of_the_compose_file_trains_what_is_queued(
    compose: Any, initialised: Path, tmp_path: Path
) -> None:
    service = compose["services"]["worker"]
    places = {"/run/secrets": str(initialised), "/cache": str(tmp_path / "cache")}
    environment = dict(os.environ)
    for name, value in service["environment"].items():
        for place, here in places.items():
            value = value.replace(place, here)
        environment[name] = value
    command = [str(Path(sys.executable).with_name("mongotorch")), *service["command"]]
    command = [part.replace("${WORKER_CONCURRENCY:-1}", "1") for part in command]

    address = (initialised / "trainer_uri").read_text().strip()
    with Datalayer.connect(address, compute="queue", progress=False) as db:
        db["points"].insert_many({"_id": n, "x": [n / 100, 1.0], "y": [3 * n / 100]} for n in range(100))
        trainer = TorchTrainer(
            "line-trainer",
            key=("x", "y"),
            select=db["points"].find(),
            objective=torch.nn.functional.mse_loss,
            loader_kwargs={"batch_size": 10},
            max_iterations=20,
            model=TorchModel("line", object=torch.nn.Linear(2, 1)),
        )
        job = db.apply(trainer)
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as worker:
            try:
                model = job.result(timeout=90)
            finally:
                worker.send_signal(signal.SIGTERM)
                log = worker.communicate(timeout=60)[1]
        assert worker.returncode == 0, log
        assert model.version == 1
        assert "claimed" in log or "succeeded" in log, log
        for secret in ("worker_password", "trainer_password"):
            assert (initialised / secret).read_text() not in log


def test_the_dashboard_with_the_environment_of_the_compose_file_reads_alone_and_asks_for_the_token(
    compose: Any, initialised: Path
) -> None:
    service, port = compose["services"]["dashboard"], _free_port()
    given = {
        name: value.replace("/run/secrets", str(initialised)) for name, value in service["environment"].items()
    }
    here = {"0.0.0.0": "127.0.0.1", "8265": str(port)}
    command = [str(Path(sys.executable).with_name("mongotorch"))]
    command += [here.get(part, part) for part in service["command"]]
    token = (initialised / "dashboard_token").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", token)
    with Datalayer.connect((initialised / "trainer_uri").read_text().strip(), progress=False) as db:
        db.apply(TorchModel("shown", object=torch.nn.Linear(2, 1)))
    with subprocess.Popen(command, env={**os.environ, **given}, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            said = served.stdout.readline()
            assert said.startswith("dashboard of mongodb://reader:***@"), said
            address = f"http://127.0.0.1:{port}/models?format=json"
            assert httpx2.get(address).status_code == 401
            found = httpx2.get(address, headers={"Authorization": f"Bearer {token}"})
            assert "shown" in [model["identifier"] for model in found.json()["models"]]
        finally:
            served.send_signal(signal.SIGTERM)
            assert token not in served.communicate(timeout=60)[0]
