"""A run over a large select trains while its documents are scanned, and its record is that of a scan before it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, ClassVar

import pytest
from pymongo.errors import OperationFailure
from tests.helpers import COLLECTION, fill, fold_ids, points, same, state, trainer
from torch import Tensor

from mongotorch import Always, Datalayer, NewDocuments, Schedule, TorchTrainer, Worker
from mongotorch.data import BackgroundScan, ScannedMembers, StoredMembers, id_key
from mongotorch.data.read import ServerReader
from mongotorch.data.training_set import members
from mongotorch.errors import FoldMissingError, QueryError
from mongotorch.mongo.server_features import is_mock
from mongotorch.services.training.recipe import TrainingRecipe
from mongotorch.store import BlobStore

COUNT = 120


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every collection is a large one."""
    monkeypatch.setattr(members, "_LARGE", 10)


@pytest.fixture
def snapshots(db: Datalayer) -> None:
    if is_mock(db[COLLECTION].raw):
        pytest.skip("mongomock has no snapshots")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Watched(TorchTrainer):
    """Notes the rows of each step, and calls something in it."""

    in_step: ClassVar[Callable[[int], None]] = staticmethod(lambda step: None)
    seen: ClassVar[list[list[float]]] = []

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        Watched.seen.append(batch[0][:, 0].tolist())
        Watched.in_step(len(Watched.seen))
        return super().take_step(model, batch, optimizers)


@pytest.fixture
def watch() -> Iterator[Callable[[Callable[[int], None]], None]]:
    def at(call: Callable[[int], None]) -> None:
        Watched.seen, Watched.in_step = [], staticmethod(call)

    at(lambda step: None)
    yield at
    at(lambda step: None)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets scans wait until it is set."""
    event, scan = threading.Event(), ScannedMembers.scan

    def waiting(*args: Any, **given: Any) -> bool:
        assert event.wait(60)
        return scan(*args, **given)

    monkeypatch.setattr(ScannedMembers, "scan", waiting)
    yield event
    event.set()


def streamed(select: Any, **given: Any) -> TorchTrainer:
    options = {"loader_kwargs": {"batch_size": 16, "shuffle": True}, "in_memory": False, "prefetch_size": 10}
    return trainer(select, Watched, **{**options, **given})


def data_of(db: Datalayer, version: int | None) -> dict[str, Any]:
    found: dict[str, Any] = db.show("model", "m", version)["data"]
    return {name: found[name] for name in ("query", "train", "valid", "members")} | {
        "certain": found.get("certain", True)
    }


@pytest.mark.parametrize("given", [{}, {"in_memory": True}, {"sample_weight": "n"}])
@pytest.mark.usefixtures("watch")
def test_the_record_and_the_weights_are_those_of_a_scan_before_the_first_step(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    select = fill(db)
    first = db.apply(streamed(select, **given)).result()
    monkeypatch.setattr(members, "_LARGE", 10**9)
    second = db.apply(streamed(select, **given).replace(identifier="again")).result()

    assert data_of(db, first.version) == data_of(db, second.version)
    assert same(state(first), state(second))
    assert not list(db.settings.cache_dir.glob(".*")) if db.settings.cache_dir else True


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_epoch_does_not_wait_and_sees_the_documents_of_its_beginning(
    db: Datalayer, watch: Any, held: threading.Event, workers: int
) -> None:
    select = fill(db)
    ids = fold_ids(db, "train")
    begun = {n: row["x"][0] for n, row in enumerate(points())}
    epoch = -(-len(ids) // 16)

    def in_step(step: int) -> None:
        if step == 1:  # others insert between, move, and delete, before anything is scanned
            db[COLLECTION].raw.insert_many(
                [{**row, "_id": row["_id"] + 0.5, "x": [99.0] * 4, "_fold": "train"} for row in points()]
            )
            db[COLLECTION].raw.delete_one({"_id": ids[-1]})
        if step == epoch + 2:
            held.set()

    watch(in_step)
    applied = streamed(
        select, max_iterations=4 * epoch, validation_interval=None, compute_kwargs={"num_workers": workers}
    )
    trained = db.apply(applied).result()

    rows = [value for step in Watched.seen for value in step]
    assert sorted(rows[: len(ids)]) == pytest.approx(sorted(begun[n] for n in ids))
    assert max(rows) < 99
    assert trained.version == 1
    record = data_of(db, 1)
    assert record["train"]["count"] == len(ids)
    assert record["certain"]
    stored = StoredMembers.read(record["members"], lambda names: [(n, db_blob(db, n)) for n in names])
    assert set(stored.members.ids.tolist()) == {id_key(n) for n in ids}


def db_blob(db: Datalayer, name: str) -> bytes:
    return BlobStore(db[COLLECTION].raw.database).get(name)


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("code", [239, 246])
def test_where_the_server_has_forgotten_that_time_the_record_says_so(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, watch: Any, code: int
) -> None:
    read, forgotten = ServerReader._range, threading.Event()

    def failing(self: Any, bounds: Any, after: Any, most: int, ids: Any, at: Any) -> Iterator[Any]:
        if at is not None and forgotten.is_set():
            raise OperationFailure("read timestamp is older than the oldest", code)
        return read(self, bounds, after, most, ids, at)

    monkeypatch.setattr(ServerReader, "_range", failing)
    select = fill(db)
    watch(lambda step: forgotten.set())
    trained = db.apply(streamed(select, max_iterations=30, validation_interval=5)).result()

    assert trained.version == 1
    assert len(Watched.seen) == 30
    record = data_of(db, 1)
    assert record["train"]["count"] == len(fold_ids(db, "train"))
    assert record["members"]
    assert not record["certain"]


OF_OTHER_TYPES: dict[str, dict[str, Any]] = {
    "view": {"viewOn": COLLECTION, "pipeline": [{"$match": {"y": {"$lt": 2}}}]},
    "time series": {"timeseries": {"timeField": "at"}},
    "capped": {"capped": True, "size": 10**6},
    "clustered": {"clusteredIndex": {"key": {"_id": 1}, "unique": True}},
    "with a collation": {"collation": {"locale": "en", "strength": 1}},
}


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("kind", OF_OTHER_TYPES)
def test_a_large_collection_of_any_type_is_trained_on(db: Datalayer, kind: str) -> None:
    fill(db)
    database = db[COLLECTION].raw.database
    database.create_collection("other", **OF_OTHER_TYPES[kind])
    if kind != "view":
        rows = database[COLLECTION].find()
        database["other"].insert_many([{**row, "at": datetime(2026, 1, 1)} for row in rows])
    begun = time.monotonic()
    db.apply(streamed(db["other"].find(), max_iterations=30)).result()
    data = data_of(db, 1)
    assert data["train"]["count"] + data["valid"]["count"] == database["other"].count_documents({})
    assert time.monotonic() - begun < 30, "nothing is waited for that does not come"


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("step", [1, 12])
def test_a_scan_that_fails_ends_the_run_and_nothing_is_published(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, watch: Any, step: int
) -> None:
    due = threading.Event()

    def failing(*_: Any, **__: Any) -> bool:
        due.wait(30)
        raise QueryError("the server refuses it")

    monkeypatch.setattr(ScannedMembers, "scan", failing)
    watch(lambda number: due.set() if number == step else time.sleep(0.01))
    begun = time.monotonic()
    job = db.apply(streamed(fill(db), validation_interval=None))
    assert (job.status, type(job.exception())) == ("failed", QueryError)
    assert db["mt.components"].count({"version": {"$gt": 0}}) == 0
    assert time.monotonic() - begun < 20
    assert not [one for one in threading.enumerate() if one.name == "mongotorch-scan"]


@pytest.mark.usefixtures("snapshots")
def test_a_document_without_a_fold_that_is_found_late_ends_the_run(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    looked = TrainingRecipe.check
    monkeypatch.setattr(
        TrainingRecipe,
        "check",
        lambda self, database, *, seconds=None: looked(self, database) if seconds is None else False,
    )
    select = fill(db)
    db[COLLECTION].raw.update_one({"_id": 7}, {"$set": {"_fold": "other"}})
    watch(lambda number: time.sleep(0.02))
    job = db.apply(streamed(select, max_iterations=500, validation_interval=None))
    error = job.exception()
    assert isinstance(error, FoldMissingError)
    assert error.document_id == 7
    assert db["mt.components"].count({"version": {"$gt": 0}}) == 0


@pytest.mark.usefixtures("watch")
def test_a_run_that_failed_goes_on_from_its_checkpoint_with_the_same_documents(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    select = fill(db)
    expected = db.apply(streamed(select).replace(identifier="other")).result()

    def in_step(step: int) -> None:
        if step == 10:
            while db["mt.checkpoints"].count() == 0:
                time.sleep(0.01)
            raise ConnectionError("the machine is gone")

    watch(in_step)
    applied = streamed(select)
    assert db.apply(applied).status == "failed"
    db[COLLECTION].raw.insert_one({**points(1)[0], "_id": 3.5, "_fold": "train"})
    watch(lambda step: None)
    trained = db.apply(applied).result()
    assert 0 < len(Watched.seen) < 12
    assert same(state(trained), state(expected))
    assert data_of(db, trained.version) == data_of(db, expected.version)


def test_a_schedule_trains_on_a_large_select_and_knows_what_is_new(db: Datalayer) -> None:
    select = fill(db)
    db.apply(
        Schedule(
            "s", trainer=trainer(select, in_memory=False), trigger=NewDocuments(30), gate=Always(), data="new"
        )
    )
    for first in (1000, 2000):
        db[COLLECTION].raw.insert_many(
            [{**row, "_id": first + row["_id"], "_fold": "train"} for row in points(30)]
        )
        Worker(db).run(until_idle=True)
    counts = [
        version.get("data", {}).get("train", {}).get("count")
        for version in (db.show("model", "m", 1), db.show("model", "m", 2))
    ]
    assert counts == [len(fold_ids(db, "train")) - 30, 30]


def test_a_stopped_scan_leaves_no_thread_and_no_folder(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    made: list[BackgroundScan] = []
    begin = BackgroundScan.__init__

    def noted(self: BackgroundScan, *args: Any, **given: Any) -> None:
        begin(self, *args, **given)
        made.append(self)

    monkeypatch.setattr(BackgroundScan, "__init__", noted)

    def in_step(step: int) -> None:
        raise ValueError("a person's own error")

    watch(in_step)
    job = db.apply(streamed(fill(db)))
    assert job.status == "failed"
    assert len(made) == (not is_mock(db[COLLECTION].raw))
    cache = db.settings.cache_dir
    assert cache is not None
    assert not list(cache.glob(".building-*"))


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("kind", ["sort", "limit", "skip", "pipeline", "download", "whole"])
def test_only_a_select_that_is_read_by_id_is_scanned_while_training(
    db: Datalayer, watch: Any, held: threading.Event, kind: str
) -> None:
    select = fill(db)
    kinds = {
        "sort": select.sort("n"),
        "limit": select.limit(50),
        "skip": select.skip(10),
        "pipeline": db[COLLECTION].aggregate([{"$match": {}}]),
    }
    held.set() if kind == "whole" else None  # else the run would wait for a scan in the background, for ever
    applied = streamed(kinds.get(kind, select), download=kind == "download")
    assert db.apply(applied).status == "succeeded"
    assert len(Watched.seen) == 12
