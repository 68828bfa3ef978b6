"""Records are written to a majority and read from it whatever the URI says, and errors of a passing kind pass."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from pymongo.errors import PyMongoError
from tests.helpers import COLLECTION, fill, model, points, same, state, trainer

from mongotorch import Datalayer, NewDocuments, Schedule
from mongotorch.errors import JobCancelledError, NotFoundError, QueryError, ServerUnavailableError, SettingError
from mongotorch.store import BlobStore
from mongotorch.store.components import Components
from mongotorch.worker import Worker

WEAK = "w=1&journal=false&readConcernLevel=local&readPreference=secondaryPreferred&retryWrites=false&tz_aware=true"
QUICK = "heartbeatFrequencyMS=500"  # a server that says it shuts down is looked at again then
WRITES = ("insert", "update", "delete", "findAndModify")
READS = ("find", "aggregate", "count", "distinct")
# Of a single server any mode finds the primary; the driver says so to it.
ALLOWED = ("primary", "primaryPreferred")


@pytest.fixture
def client(server_uri: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    with pymongo.MongoClient[dict[str, Any]](server_uri) as client:
        yield client


@pytest.fixture
def failing(client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Any]:
    """Let the server fail commands of our datalayers."""

    def fail(commands: list[str], code: int, times: int, **more: Any) -> None:
        data = {"failCommands": commands, "errorCode": code, "appName": "mongotorch", **more}
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"times": times}, "data": data})

    yield fail
    client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


class Commands(monitoring.CommandListener):
    """What is sent: of records what has other concerns than a majority's, and how documents are read."""

    def __init__(self) -> None:
        self.weak: list[Any] = []
        self.records: set[str] = set()
        self.documents: set[str] = set()
        self.concerns: list[dict[str, Any]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        command, kind = event.command, event.command_name
        if kind not in (*WRITES, *READS) or "autocommit" in command:  # a transaction has its concerns once
            return
        name = str(command[kind])
        preference = command.get("$readPreference", {}).get("mode", "primary")
        if not name.startswith("mt."):
            self.documents.add(f"{kind} {preference} {command.get('writeConcern', {}).get('w')}")
            if kind in READS:
                self.concerns.append(dict(command.get("readConcern", {})))
            return
        self.records.add(name)
        concern = command.get("writeConcern" if kind in WRITES else "readConcern", {})
        if "majority" not in (concern.get("w"), concern.get("level")) or preference not in ALLOWED:
            self.weak.append(command)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def test_every_record_is_written_to_and_read_from_a_majority(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    client = functools.partial(pymongo.MongoClient, event_listeners=[commands])
    monkeypatch.setattr("mongotorch.mongo.connection.MongoClient", client)
    with Datalayer.connect(f"{server_uri}&{WEAK}", compute="queue", progress=False) as db:
        job = db.apply(trainer(fill(db), loader_kwargs={"batch_size": 16, "shuffle": True}))
        Worker(db).run(until_idle=True)
        version = job.result(timeout=60).version
        db.promote("model", "m", version)
        db.load("model", "m")
        db.verify()
        db.remove("model", "m", version, force=True)
        db.gc(grace_s=0.0)

    assert commands.weak == []
    named = ("components", "jobs", "aliases", "metrics", "checkpoints", "plans", "removed", "schedules", "garbage")
    assert {f"mt.{name}" for name in (*named, "artifacts.files", "artifacts.chunks")} <= commands.records
    assert "find secondaryPreferred None" in commands.documents
    assert "insert primary 1" in commands.documents


@pytest.mark.parametrize(
    ("options", "level", "waits"),
    [
        ("readPreference=secondaryPreferred", "local", True),
        ("readPreference=nearest&readConcernLevel=majority", "majority", True),
        ("readPreference=secondaryPreferred&readConcernLevel=available", "available", False),
        ("readPreference=primary", None, False),
    ],
)
def test_a_run_that_reads_secondaries_reads_all_that_was_written_before(
    server_uri: str, monkeypatch: pytest.MonkeyPatch, options: str, level: str | None, *, waits: bool
) -> None:
    commands = Commands()
    client = functools.partial(pymongo.MongoClient, event_listeners=[commands])
    monkeypatch.setattr("mongotorch.mongo.connection.MongoClient", client)
    with Datalayer.connect(f"{server_uri}&{options}", progress=False) as db:
        select = fill(db)
        written = db[COLLECTION].raw.database.command("hello")["operationTime"]
        commands.concerns.clear()
        db.apply(trainer(select, in_memory=False)).result()
    assert len(commands.concerns) > 5
    for concern in commands.concerns:
        assert concern.get("level") == level
        assert ("afterClusterTime" in concern) is waits
        assert not waits or concern["afterClusterTime"] >= written


def test_an_address_without_acknowledged_writes_is_refused(server_uri: str) -> None:
    with pytest.raises(SettingError, match="w=0") as caught:
        Datalayer.connect(f"{server_uri}&w=0")
    assert caught.value.setting == "uri"


def test_an_address_with_a_single_connection_is_refused(server_uri: str) -> None:
    with pytest.raises(SettingError, match="maxPoolSize=1") as caught:
        Datalayer.connect(f"{server_uri}&maxPoolSize=1")
    assert caught.value.setting == "uri"
    Datalayer.connect(f"{server_uri}&maxPoolSize=2").close()


@pytest.mark.parametrize(
    "options", ["readConcernLevel=linearizable", "readConcernLevel=available", "readPreference=nearest"]
)
def test_a_schedule_fires_however_the_address_says_that_documents_are_read(server_uri: str, options: str) -> None:
    with Datalayer.connect(f"{server_uri}&{options}", compute="queue", progress=False) as db:
        of_all = trainer(fill(db), max_iterations=2)
        db.apply(Schedule("s", trigger=NewDocuments(3), trainer=of_all))
        db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(3)])
        db.scheduler.step()
        assert db.schedules()[0]["firings"] == 1


def test_connecting_says_what_of_the_address_does_not_hold(
    server_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mongotorch.connection"):
        Datalayer.connect(f"{server_uri}&{WEAK}").close()
        (record,) = caplog.records
        for option in WEAK.split("&"):
            assert option in record.getMessage()
        caplog.clear()
        Datalayer.connect(f"{server_uri}&w=majority&retryWrites=true&readPreference=primary").close()
        assert caplog.records == []


@pytest.mark.parametrize("code", [11602, 11601, 365, 189, 112, 64])
def test_an_answer_that_passes_is_asked_for_again_and_else_is_an_error_that_passes(
    server_uri: str, failing: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Datalayer.connect(f"{server_uri}&{QUICK}") as db:
        failing(["find"], code, times=4)
        with pytest.raises(NotFoundError):
            db.load("model", "m")
        monkeypatch.setattr("mongotorch.mongo.driver_errors.REPEAT_S", -1.0)
        failing(["find"], code, times=4)
        with pytest.raises(ServerUnavailableError):
            db.load("model", "m")


@pytest.mark.parametrize("code", [11602, 11601, 64])
@pytest.mark.parametrize("command", ["update", "insert", "findAndModify", "delete", "find", "commitTransaction"])
def test_a_job_outlives_an_election_at_any_write(server_uri: str, failing: Any, command: str, code: int) -> None:
    settings = {"compute": "queue", "progress": False, "lease_s": 1.0}
    with Datalayer.connect(f"{server_uri}&{QUICK}", **settings) as db:
        select = fill(db)
        jobs = [db.apply(trainer(select, seed=seed, max_iterations=4)) for seed in range(3)]
        worker = Worker(db)
        again = True
        while not all(job.done() for job in jobs):
            if again:
                failing([command], code, times=3)
            try:
                again = worker.run(until_idle=True) > 0
            except ServerUnavailableError:
                again = False  # between two jobs

        for job in jobs:
            assert job.status == "succeeded", job
        assert sorted(db.show("model", "m")) == [0, 1, 2, 3]


@pytest.mark.parametrize(("code", "kind"), [(2, QueryError), (189, ServerUnavailableError)])
@pytest.mark.parametrize("read", ["find", "pipeline", "preview"])
def test_documents_that_cannot_be_read_are_a_typed_error(
    server_uri: str, failing: Any, read: str, code: int, kind: type[Exception]
) -> None:
    with Datalayer.connect(f"{server_uri}&{QUICK}", progress=False) as db:
        select = fill(db)
        asked: dict[str, Callable[[], object]] = {
            "find": lambda: list(db.execute(select)),
            "pipeline": lambda: list(db.execute(db[COLLECTION].aggregate([{"$match": {"y": 1}}]))),
            "preview": lambda: db.preview(
                Schedule("s", trigger=NewDocuments(3), trainer=trainer(select)), since=datetime(2026, 1, 1)
            ),
        }
        failing(["find", "aggregate"], code, times=20)
        with pytest.raises(kind) as caught:
            asked[read]()
        assert isinstance(caught.value.__cause__, PyMongoError)


def _kill_operations(admin: Any) -> None:
    of_ours = {"appName": "mongotorch", "command.hello": None, "opid": {"$exists": True}}
    for operation in admin.aggregate([{"$currentOp": {"allUsers": True}}, {"$match": of_ours}]):
        admin.command("killOp", op=operation["opid"])


def _kill_sessions(admin: Any) -> None:
    admin.command("killAllSessions", [])


@pytest.mark.parametrize("kill", [_kill_operations, _kill_sessions])
def test_runs_outlive_operations_and_sessions_that_others_kill(
    server_uri: str, client: pymongo.MongoClient[dict[str, Any]], kill: Callable[[Any], None]
) -> None:
    ended = threading.Event()

    def torment() -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(PyMongoError):  # it may kill its own
                kill(client.admin)

    settings: dict[str, Any] = {"compute": "queue", "progress": False, "lease_s": 2.0}
    with Datalayer.connect(server_uri, **settings) as db:
        read: dict[str, Any] = {"in_memory": False, "prefetch_size": 10, "prefetch_factor": 2}
        jobs = [db.apply(trainer(fill(db), seed=0, max_iterations=60, **read))]
        jobs += [db.apply(trainer(db[COLLECTION].find(), seed=n, max_iterations=60, **read)) for n in range(1, 6)]
        thread = threading.Thread(target=torment)
        thread.start()
        try:
            deadline = time.monotonic() + 120
            while not all(job.done() for job in jobs) and time.monotonic() < deadline:
                with contextlib.suppress(ServerUnavailableError):  # between two jobs
                    Worker(db).run(until_idle=True)
        finally:
            ended.set()
            thread.join()
        assert [job.status for job in jobs] == ["succeeded"] * 6


def test_an_answer_that_is_lost_after_a_publication_does_not_fail_the_job(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, lost = Components._insert_all, list[str]()

    def insert_and_lose(self: Components, documents: Any, attempt: int | None) -> None:
        insert(self, documents, attempt)
        if documents[-1].get("job") and not lost:
            lost.extend(document["_id"] for document in documents)
            raise pymongo.errors.AutoReconnect("connection closed")

    monkeypatch.setattr(Components, "_insert_all", insert_and_lose)

    job = db.apply(trainer(fill(db)))

    assert job.exception() is None
    assert len(lost) == 2
    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0, 1], [0, 1])


def test_a_job_that_is_cancelled_while_it_uploads_publishes_nothing(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(model())
    job = None
    publish = Components.publish

    def cancel_and_publish(self: Components, document: Any, **more: Any) -> int:
        nonlocal job
        if document.get("job") and document.get("anchor") is None:
            job = db.job(document["job"])
            assert job.cancel()
        return publish(self, document, **more)

    monkeypatch.setattr(Components, "publish", cancel_and_publish)
    applied = db.apply(trainer(fill(db)))

    assert isinstance(applied.exception(), JobCancelledError)
    assert (db.show("model", "m"), db.show("trainer", "t")) == ([0], [0])
    assert db["mt.components"].count() == 2  # nor is there a document that nobody sees
    assert same(state(db.load("model", "m")), before)


def test_a_job_that_has_published_cannot_be_cancelled_any_more(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, answers = Components.publish, []

    def publish_and_cancel(self: Components, document: Any, **more: Any) -> int:
        version = publish(self, document, **more)
        if document.get("job") and document.get("anchor") is None:
            answers.append(db.job(document["job"]).cancel())
        return version

    monkeypatch.setattr(Components, "publish", publish_and_cancel)

    job = db.apply(trainer(fill(db)))

    assert answers == [False]
    assert job.result().version == 1


def test_a_blob_that_another_version_damaged_is_whole_in_the_next(db: Datalayer) -> None:
    db.apply(model(identifier="a"))
    db["mt.artifacts.chunks"].raw.delete_many({})

    db.apply(model(identifier="b"))

    assert same(state(db.load("model", "b")), state(model()))
    assert isinstance(BlobStore(db["mt.artifacts.files"].raw.database), BlobStore)
