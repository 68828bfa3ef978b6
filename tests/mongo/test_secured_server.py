"""A server with authentication and TLS: clear errors for those it refuses, and nothing written. The roles too."""

from __future__ import annotations

import dataclasses
import importlib.util
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
import torch
from pymongo.errors import PyMongoError
from tests.helpers import COLLECTION, fill, points, trainer

from mongotorch import Datalayer, NewDocuments, Schedule, TorchModel, Worker
from mongotorch.component import Component
from mongotorch.errors import IntegrityError, MongotorchError, ServerUnavailableError, SettingError
from mongotorch.mongo.connection import Connection, open_address
from mongotorch.services.versions.catalog import Catalog
from mongotorch.settings import read_settings
from mongotorch.store import (
    BlobStore,
    Checkpoints,
    GarbageCollector,
    Jobs,
    MetricLog,
    follow_alias,
)
from mongotorch.store.access_roles import ROLES, role_document

PASSWORD = "s3cret-of-the-test"
BLOBS = ("mt.artifacts.files", "mt.artifacts.chunks")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Thing(Component):
    type_id = "thing"

    value: Any = None


class Certificates:
    """A CA with a certificate of the server, and another CA that has nothing to do with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for ca in ("ca", "other"):
            self._openssl(
                *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={ca}"),
                *("-keyout", f"{ca}.key", "-out", f"{ca}.pem"),
            )
        self._openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
            *("-keyout", "server.key", "-out", "server.csr"),
        )
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl(
            *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "names", "-out", "server.crt"),
        )
        both = (folder / "server.key").read_text() + (folder / "server.crt").read_text()
        (folder / "server.pem").write_text(both)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@dataclasses.dataclass
class Secured:
    port: int
    folder: Path

    def uri(self, user: str = "", *, ca: str = "ca", tls: bool = True, password: str = PASSWORD) -> str:
        who = f"{user}:{password}@" if user else ""
        options = "replicaSet=rs0&authSource=admin" if user else "replicaSet=rs0"
        trust = f"&tls=true&tlsCAFile={self.folder / ca}.pem" if tls else ""
        return f"mongodb://{who}localhost:{self.port}/shop?{options}{trust}"

    def open(self, user: str = "", **more: Any) -> Connection:
        return open_address(self.uri(user, **more), read_settings(server_timeout_s=3))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    found = importlib.util.find_spec("fiftyone")
    assert found is not None
    assert found.submodule_search_locations
    binary = Path(next(iter(found.submodule_search_locations))) / "db" / "bin" / "mongod"
    folder = tmp_path_factory.mktemp("secured")
    Certificates(folder)
    (folder / "keyfile").write_text("k" * 64)
    (folder / "keyfile").chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "data").mkdir()
    command = [str(binary), "--dbpath", str(folder / "data"), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--replSet", "rs0", "--wiredTigerCacheSizeGB", "0.25", "--auth", "--nounixsocket"]
    command += ["--keyFile", str(folder / "keyfile"), "--tlsMode", "requireTLS"]
    command += ["--tlsCertificateKeyFile", str(folder / "server.pem"), "--tlsCAFile", str(folder / "ca.pem")]
    command += ["--tlsAllowConnectionsWithoutCertificates"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log) as process:
        secured = Secured(port, folder)
        try:
            _set_up(secured)
            yield secured
        finally:
            process.terminate()


def _set_up(secured: Secured) -> None:
    tls: dict[str, Any] = {"tls": True, "tlsCAFile": str(secured.folder / "ca.pem")}
    with pymongo.MongoClient[dict[str, Any]]("localhost", secured.port, directConnection=True, **tls) as client:
        members = [{"_id": 0, "host": f"localhost:{secured.port}"}]
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})
    with pymongo.MongoClient[dict[str, Any]](secured.uri()) as client:  # from this host, until there is a user
        client.admin.command("createUser", "root", pwd=PASSWORD, roles=["root"])
    with pymongo.MongoClient[dict[str, Any]](secured.uri("root")) as client:
        for role in ROLES:
            client.admin.command(role_document(role, "shop"))
            client.admin.command("createUser", role, pwd=PASSWORD, roles=[f"mongotorch-{role}-shop"])
        client.admin.command("createUser", "onlooker", pwd=PASSWORD, roles=[{"role": "read", "db": "shop"}])


class House:
    def __init__(self, connection: Connection) -> None:
        database = self.database = connection.database
        self.catalog = Catalog(database)
        self.blobs, self.components, self.aliases = (
            self.catalog.blobs,
            self.catalog.components,
            self.catalog.aliases,
        )
        self.jobs, self.metric_log, self.checkpoints = Jobs(database), MetricLog(database), Checkpoints(database)
        self.promoter = self.catalog.promoter

    def ensure_indexes(self) -> None:
        for store in (self.catalog, self.jobs, self.metric_log, self.checkpoints):
            store.ensure_indexes()


@pytest.fixture
def everything(secured: Secured) -> Iterator[dict[str, int]]:
    """How many documents each collection has; what a test refuses must leave it as it was."""

    def count() -> dict[str, int]:
        with secured.open("root") as root:
            names = root.database.list_collection_names()
            return {name: root.database[name].count_documents({}) for name in names}

    before = count()
    yield before
    assert count() == before


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"user": "root", "password": "wrong"}, SettingError, "user name or password"),
        ({"user": "nobody"}, SettingError, "user name or password"),
        ({"user": "root", "ca": "other"}, ServerUnavailableError, "certificate verify failed"),
        ({"user": "root", "tls": False}, ServerUnavailableError, "cannot be reached"),
    ],
)
def test_a_refused_user_learns_why(
    secured: Secured, options: dict[str, Any], kind: type[MongotorchError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        secured.open(**options)

    assert PASSWORD not in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert isinstance(caught.value.__cause__, PyMongoError)


@pytest.mark.usefixtures("everything")
def test_who_says_no_name_is_refused_at_the_first_read_and_write(secured: Secured) -> None:
    with secured.open() as connection:
        house = House(connection)
        for act in (
            house.ensure_indexes,
            lambda: house.catalog.store(Thing("a", value=torch.ones(3))),
            lambda: house.blobs.put(b"abc"),
            lambda: house.jobs.add(component="c", type_id="t", identifier="i"),
            lambda: house.jobs.claim(worker="w", lease_s=1),
            lambda: house.components.find("thing", "a"),
            lambda: GarbageCollector(house.database).collect(),
        ):
            with pytest.raises(SettingError, match="does not allow it"):
                act()


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("user", ["onlooker", "reader"])
def test_who_may_only_read_writes_nothing(secured: Secured, user: str) -> None:
    with secured.open(user) as connection:
        house = House(connection)
        for act in (
            lambda: house.catalog.store(Thing("a", value=torch.ones(3))),
            lambda: house.blobs.put(b"abc"),
            lambda: house.blobs.remove("abc"),
            lambda: house.components.remove("abc"),
            lambda: house.jobs.add(component="c", type_id="t", identifier="i"),
            lambda: house.jobs.claim(worker="w", lease_s=1),
            lambda: house.aliases.move("thing", "a", to=None, expected=None, who="w", why=""),
            lambda: house.metric_log.add(job="j", component="c", step=1, kind="valid", values={}),
            lambda: GarbageCollector(house.database).collect(),
        ):
            with pytest.raises(SettingError, match="does not allow it"):
                act()


def test_a_trainer_publishes_and_a_reader_loads(secured: Secured) -> None:
    with secured.open("trainer") as connection:
        house = House(connection)
        house.ensure_indexes()
        connection.database["digits"].insert_one({"x": 1})
        uuid = house.catalog.store(Thing("a", value=torch.arange(3.0)))
        house.catalog.store(Thing("a", value=torch.ones(3)))
        house.promoter.promote("thing", "a", 0)
        job, _ = house.jobs.add(component=uuid, type_id="thing", identifier="a")
        claimed = house.jobs.claim(worker="w", lease_s=60, job_id=job)
        assert claimed is not None
        house.metric_log.add(job=job, component=uuid, step=1, kind="valid", values={"objective": 1.0})
        assert house.checkpoints.put(job, claimed["attempt"], 1, {}, [])
        assert house.jobs.succeed(job, claimed["attempt"], result=uuid)
        assert house.jobs.wait(job, 10)["status"] == "succeeded"

    with secured.open("reader") as connection:
        House(connection).ensure_indexes()  # they are there: nothing to be refused
        with secured.open("root") as root:  # a database of an earlier release lacks the newer ones
            root.database["mt.jobs"].drop_index("finished_1")
        House(connection).ensure_indexes()
        loaded = (catalog := House(connection).catalog).load(catalog.find("thing", "a"))
        assert isinstance(loaded, Thing)
        assert torch.equal(loaded.value, torch.arange(3.0))
        assert [move.to_uuid for move in House(connection).aliases.history("thing", "a")] == [uuid]
        with follow_alias(connection.database, "thing", "a", "live") as wake:
            wake(1.0)
        assert House(connection).jobs.wait(job, 10)["result"] == uuid
        assert connection.database["digits"].find_one({}) is not None
        with secured.open("root") as root:
            root.database["mt.jobs"].drop_index("component_1_method_1")
        with pytest.raises(SettingError, match="does not allow it"):  # without a unique one nothing is right
            House(connection).ensure_indexes()


def test_a_worker_runs_jobs_and_changes_no_data_and_no_published_version(secured: Secured) -> None:
    with secured.open("trainer") as connection:
        owner = House(connection)
        owner.ensure_indexes()
        connection.database["letters"].insert_one({"x": 1})
        uuid = owner.catalog.store(Thing("w", value=[1]))
        job, _ = owner.jobs.add(component=uuid, type_id="thing", identifier="w")

    with secured.open("worker") as connection:
        house = House(connection)
        house.ensure_indexes()
        claimed = house.jobs.claim(worker="w", lease_s=60, job_id=job)
        assert claimed is not None
        assert connection.database["letters"].find_one({}) is not None
        assert house.checkpoints.put(job, claimed["attempt"], 1, {}, [house.blobs.put(b"state")])
        result = house.catalog.store(Thing("w", value=[2]))
        house.checkpoints.drop(job)
        assert house.promoter.promote("thing", "w", uuid=result, job=job).to_uuid == result
        assert house.jobs.succeed(job, claimed["attempt"], result=result)
        with pytest.raises(SettingError, match="does not allow it"):
            house.components.remove(uuid)
        for raw in ("letters", "mt.components", "mt.aliases", *BLOBS, "mt.artifacts.uses"):
            with pytest.raises(PyMongoError, match="not authorized"):
                connection.database[raw].update_many({}, {"$set": {"x": 2}})
        for raw in ("letters", "mt.components", "mt.aliases", *BLOBS, "mt.artifacts.uses", "mt.jobs"):
            with pytest.raises(PyMongoError, match="not authorized"):
                connection.database[raw].delete_many({})


def test_a_worker_stores_what_is_stored_already_and_cannot_mend_what_is_damaged(secured: Secured) -> None:
    with secured.open("trainer") as connection:
        owner = House(connection)
        owner.ensure_indexes()
        name = owner.blobs.put(b"shared")
        damaged = owner.blobs.put(b"damaged")
        connection.database["mt.artifacts.files"].update_one({"filename": damaged}, {"$set": {"length": 1}})

    with secured.open("worker") as connection:
        blobs = House(connection).blobs
        assert blobs.put_all([b"shared", b"new"])[0] == name
        with pytest.raises(IntegrityError, match="verify --repair"):
            blobs.put(b"damaged")
        # Others who store the same at once: what the second has uploaded is left to the collector.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(BlobStore, "touch", lambda self, names: list(names))
            assert blobs.put(b"shared") == name
        assert blobs.get(name) == b"shared"

    with secured.open("trainer") as connection:
        assert House(connection).blobs.put(b"damaged") == damaged
        GarbageCollector(connection.database, grace_s=0).collect()
        GarbageCollector(connection.database, grace_s=0).collect()


def test_a_worker_trains_on_documents_that_it_may_only_read_and_nobody_gave_a_fold(secured: Secured) -> None:
    given: dict[str, Any] = {"progress": False, "valid_fraction": 0.2, "server_timeout_s": 3}
    with Datalayer.connect(secured.uri("trainer"), **given) as owner:
        select = fill(owner)
        owner.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10)))
        owner[COLLECTION].insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(10)])
        with Datalayer.connect(secured.uri("worker"), **given) as db:
            Worker(db).run(until_idle=True)
            assert db.schedules()[0]["outcome"]["promoted"]
            assert db.load("model", "m").version == 1
            owner[COLLECTION].raw.insert_many([{**row, "_id": 2000 + row["_id"]} for row in points(10)])
            before = list(owner[COLLECTION].raw.find())
            Worker(db).run(until_idle=True)
            assert db.job(db.schedules()[0]["last"]["job"]).status == "succeeded"
        assert owner.show("model", "m")[-1] == 2
        counted = owner.show("model", "m", 2)["data"]
        assert counted["train"]["count"] + counted["valid"]["count"] == len(before)
        assert list(owner[COLLECTION].raw.find()) == before


def test_who_may_not_write_documents_cannot_write_predictions(secured: Secured) -> None:
    given: dict[str, Any] = {"progress": False, "server_timeout_s": 3}
    with Datalayer.connect(secured.uri("trainer"), **given) as owner:
        owner["inbox"].raw.insert_many([{"_id": n, "x": [float(n)] * 4} for n in range(20)])
        owner.apply(TorchModel("guesses", object=torch.nn.Linear(4, 1)))
        before = list(owner["inbox"].raw.find())
        for user in ("reader", "worker", "onlooker"):
            with (
                Datalayer.connect(secured.uri(user), **given) as db,
                pytest.raises(SettingError, match="does not allow it"),
            ):
                db.predict("model", "guesses", 0, select=db["inbox"].find(), into="p", key="x")
        assert list(owner["inbox"].raw.find()) == before
        assert owner.predict("model", "guesses", 0, select=owner["inbox"].find(), into="p", key="x").written == 20


def test_who_may_only_read_streams_the_folds_of_documents_without_one(secured: Secured) -> None:
    given: dict[str, Any] = {"progress": False, "server_timeout_s": 3}
    with Datalayer.connect(secured.uri("trainer"), **given) as owner:
        owner["foreign"].raw.insert_many([{"_id": n, "x": float(n)} for n in range(300)])
    with Datalayer.connect(secured.uri("reader"), **given) as db:
        found: list[int] = []
        for fold in ("train", "valid"):
            with db.stream(db["foreign"].find(), key="x", batch_size=16, fold=fold, shuffle=True) as stream:
                found += [int(n) for batch in stream for n in batch.tolist()]
        assert sorted(found) == list(range(300))


def test_a_trainer_sees_no_other_database(secured: Secured) -> None:
    with secured.open("trainer") as connection, pytest.raises(PyMongoError, match="not authorized"):
        connection.client["other"]["notes"].find_one({})
