"""Schedules on a real replica set: noticed at once, nothing missed while nobody looks, nothing counted twice."""

from __future__ import annotations

import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pymongo
import pytest
from tests.helpers import COLLECTION, fill, points, trainer

from mongotorch import Changed, Datalayer, NewDocuments, Schedule, Worker


@pytest.fixture
def db(server_uri: str, tmp_path: Path) -> Iterator[Datalayer]:
    """A datalayer over a fresh database of the real server."""
    settings: dict[str, Any] = {"valid_fraction": 0.2, "cache_dir": tmp_path / "cache", "progress": False}
    with Datalayer.connect(server_uri, **settings) as datalayer:
        yield datalayer


def test_the_nth_document_starts_a_job_within_a_second(db: Datalayer, server_uri: str) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find(), max_iterations=1), trigger=NewDocuments(3)))
    worker = Worker(db)
    thread = threading.Thread(target=worker.run)
    thread.start()
    took, ran = [], []
    try:
        _wait_for(lambda: db["mt.schedules"].raw.find_one({"_id": "#leader"}))
        with pymongo.MongoClient[dict[str, Any]](server_uri) as plain:
            documents = plain.get_database()[COLLECTION]
            for turn in range(1, 8):
                documents.insert_many([{"x": [0.0] * 4, "y": 0} for _ in range(2)])
                _wait_for(lambda: _state(db)["inserted"] == 2)
                began = time.monotonic()
                documents.insert_one({"x": [0.0] * 4, "y": 0})
                while not _started(db, turn) and time.monotonic() - began < 30:
                    time.sleep(0.005)
                took.append(time.monotonic() - began)
                _wait_for(lambda turn=turn: db.show("model", "m")[-1] == turn)
                ran.append(time.monotonic() - began - took[-1])
    finally:
        worker.stop()
        thread.join()
    print("insert of the n-th document to job started, seconds:", sorted(round(t, 3) for t in took))
    # Beside full cores all is slower, such a small run too.
    assert statistics.median(took) < max(1.0, 2 * statistics.median(ran)), (took, ran)


def test_what_happens_while_no_scheduler_runs_is_counted_once(db: Datalayer, server_uri: str) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**6)))
    with pymongo.MongoClient[dict[str, Any]](server_uri) as plain:
        documents = plain.get_database()[COLLECTION]
        for first in range(0, 10_000, 2_500):
            documents.insert_many([{"_id": -1 - n, "x": [0.0] * 4, "y": 0} for n in range(first, first + 2_500)])
    db.scheduler.step()
    db.scheduler.step()
    assert _state(db)["inserted"] == 10_000


@pytest.mark.parametrize("token", [{"_data": "zz"}, {"_data": "82" + "00" * 20}, {"_data": "no token at all"}])
def test_a_place_that_the_oplog_has_forgotten_is_counted_anew(db: Datalayer, token: dict[str, Any]) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**6)))
    db[COLLECTION].insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
    db.scheduler.step()
    db[COLLECTION].raw.insert_many([{**row, "_id": 5000 + row["_id"]} for row in points(10_000)])
    db[COLLECTION].raw.database["mt.schedules"].update_one({"_id": "s"}, {"$set": {"token": token}})
    db.scheduler.step()
    db.scheduler.step()
    assert _state(db)["inserted"] == 10_030
    db[COLLECTION].raw.insert_one({"x": [0.0] * 4, "y": 0})
    db.scheduler.step()
    assert _state(db)["inserted"] == 10_031


@pytest.mark.parametrize("ahead_s", [60, 10**6])
def test_a_place_that_another_server_gave_and_that_lies_ahead_is_counted_anew(db: Datalayer, ahead_s: int) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**6)))
    records = db[COLLECTION].raw.database["mt.schedules"]
    token = db.schedules()[0]["token"]["_data"]  # two characters, and eight of the seconds
    later = f"{token[:2]}{int(token[2:10], 16) + ahead_s:08X}{token[10:]}"
    records.update_one({"_id": "s"}, {"$set": {"token": {"_data": later}}})
    db[COLLECTION].raw.insert_many(_rows(1000, 30))
    db.scheduler.step()
    assert _state(db)["inserted"] == 30
    db[COLLECTION].raw.insert_many(_rows(2000, 5))
    db.scheduler.step()
    assert _state(db)["inserted"] == 35


def test_history_lost_in_the_middle_is_counted_anew(db: Datalayer) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**6)))
    stop = threading.Event()
    thread = threading.Thread(target=db.scheduler.run, args=(stop,))
    thread.start()
    admin = db[COLLECTION].raw.database.client.admin
    try:
        for turn in range(5):
            admin.command(
                {
                    "configureFailPoint": "failCommand",
                    "mode": {"times": 1},
                    "data": {"failCommands": ["getMore"], "errorCode": 286, "appName": "mongotorch"},
                }
            )
            rows = points(100)
            db[COLLECTION].raw.insert_many([{**row, "_id": 1000 * (turn + 1) + row["_id"]} for row in rows])
            _wait_for(lambda turn=turn: _state(db)["inserted"] == 100 * (turn + 1))
    finally:
        admin.command({"configureFailPoint": "failCommand", "mode": "off"})
        stop.set()
        thread.join()
    assert _state(db)["inserted"] == 500


def test_a_select_by_uuid_is_counted(db: Datalayer) -> None:
    tenant = uuid.UUID(int=7)
    rows = [{**row, "_id": uuid.UUID(int=row["_id"] + 1), "tenant": tenant} for row in points(60)]
    db[COLLECTION].insert_many(rows[:40])
    select = db[COLLECTION].find({"tenant": tenant})
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10**6)))
    other = {**rows[0], "_id": uuid.UUID(int=9999), "tenant": uuid.UUID(int=8)}
    db[COLLECTION].raw.insert_many([*rows[40:], other])
    db.scheduler.step()
    assert _state(db)["inserted"] == 20


def test_a_document_counts_when_an_update_brings_it_into_the_select(db: Datalayer) -> None:
    fill(db)
    select = db[COLLECTION].find({"labelled": True})
    db[COLLECTION].update_many({}, {"$set": {"labelled": True}})
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10**6)))
    raw = db[COLLECTION].raw
    raw.insert_many([{"_id": 1000 + n, "x": [0.0] * 4, "y": 0} for n in range(10)])
    raw.update_many({"_id": {"$gte": 1000}}, {"$set": {"looked_at": True}})
    db.scheduler.step()
    assert _state(db)["inserted"] == 0
    raw.update_many({"_id": {"$gte": 1004}}, {"$set": {"labelled": True}})
    db.scheduler.step()
    assert _state(db)["inserted"] == 6


def test_deletions_are_known_when_the_place_is_forgotten_later(db: Datalayer) -> None:
    fill(db)
    select = db[COLLECTION].find({"y": 1})
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(10**6)))
    raw = db[COLLECTION].raw
    raw.delete_many({"_id": {"$lt": 60}})
    db.scheduler.step()
    raw.insert_many([{"_id": 1000 + n, "x": [0.0] * 4, "y": 1} for n in range(5)])
    raw.database["mt.schedules"].update_one({"_id": "s"}, {"$set": {"token": {"_data": "zz"}}})
    db.scheduler.step()
    assert _state(db)["inserted"] == 5


def _rows(first: int, count: int, **given: Any) -> list[dict[str, Any]]:
    return [{**row, "_id": first + n, **given} for n, row in enumerate(points(count))]


def _out(database: Any) -> None:
    database["made"].insert_many(_rows(1000, 400))
    list(database["made"].aggregate([{"$out": COLLECTION}]))
    database["made"].drop()


def _rename_over(database: Any) -> None:
    database["made"].insert_many(_rows(0, 400))  # some have the `_id`s of those that were there
    database["made"].rename(COLLECTION, dropTarget=True)


def _rename_away_and_in(database: Any) -> None:
    database["made"].insert_many(_rows(1000, 400))
    database[COLLECTION].rename("before")
    database["made"].rename(COLLECTION)


def _drop_and_insert(database: Any) -> None:
    database[COLLECTION].drop()
    database[COLLECTION].insert_many(_rows(0, 400))


def _twice(database: Any) -> None:
    _out(database)
    _out(database)


@pytest.mark.parametrize("where", [{}, {"y": 1}], ids=["all", "some"])
@pytest.mark.parametrize("replace", [_out, _rename_over, _rename_away_and_in, _drop_and_insert, _twice])
def test_a_collection_that_others_replace_as_a_whole_is_counted(
    db: Datalayer, replace: Any, where: dict[str, Any]
) -> None:
    fill(db)
    raw = db[COLLECTION].raw
    before = raw.count_documents(where)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find(where)), trigger=Changed(10**6)))
    raw.insert_many(_rows(9000, 10))  # and gone again before anybody looks
    replace(raw.database)
    made = raw.count_documents(where)
    raw.insert_many(_rows(5000, 5, y=1))
    db.scheduler.step()
    assert _state(db)["inserted"] == made + 5
    assert _state(db)["changed"] == before + made + 5
    raw.insert_many(_rows(6000, 2, y=1))
    db.scheduler.step()
    assert _state(db)["inserted"] == made + 7
    raw.database["mt.schedules"].update_one({"_id": "s"}, {"$set": {"token": {"_data": "zz"}}})
    raw.insert_one({"x": [0.0] * 4, "y": 1})
    db.scheduler.step()
    assert _state(db)["inserted"] == made + 8


@pytest.mark.parametrize("code", [None, 239, 246])
def test_a_collection_is_counted_as_it_was_when_it_got_its_name(db: Datalayer, code: int | None) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**6)))
    raw = db[COLLECTION].raw
    _out(raw.database)
    raw.delete_many({"_id": {"$lt": 1100}})
    # With a code the server does not know any more how it was: what is there now counts.
    fail = {"failCommands": ["aggregate"], "errorCode": code or 0, "namespace": raw.full_name}
    admin = raw.database.client.admin
    admin.command({"configureFailPoint": "failCommand", "mode": {"times": 1} if code else "off", "data": fail})
    try:
        db.scheduler.step()
    finally:
        admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    assert _state(db)["inserted"] == (300 if code else 400)
    raw.insert_many(_rows(5000, 30))
    db.scheduler.step()
    assert _state(db)["inserted"] == (330 if code else 430)


def test_collections_that_are_renamed_elsewhere_do_not_count(db: Datalayer) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=Changed(10**6)))
    database = db[COLLECTION].raw.database
    database["made"].insert_many(_rows(0, 40))
    database["made"].rename("other")
    list(database[COLLECTION].aggregate([{"$out": "made"}]))
    database["made"].drop()
    db.scheduler.step()
    assert _state(db)["changed"] == 0


def _view(database: Any) -> str:
    database.command("create", "seen", viewOn="base", pipeline=[{"$match": {"y": {"$lt": 2}}}])
    return "base"


def _time_series(database: Any) -> str:
    database.create_collection("seen", timeseries={"timeField": "at"})
    return "seen"


def _capped(database: Any) -> str:
    database.create_collection("seen", capped=True, size=10**6)
    return "seen"


def _clustered(database: Any) -> str:
    database.create_collection("seen", clusteredIndex={"key": {"_id": 1}, "unique": True})
    return "seen"


@pytest.mark.parametrize("create", [_view, _time_series, _capped, _clustered])
def test_every_type_of_collection_is_counted(db: Datalayer, create: Any) -> None:
    database = db["seen"].raw.database
    base, at = database[create(database)], datetime(2026, 1, 1)
    base.insert_many(_rows(0, 60, at=at))
    of_all = trainer(db["seen"].find(), max_iterations=2)
    db.apply(Schedule("s", trainer=of_all, trigger=NewDocuments(50)))
    base.insert_many(_rows(1000, 90, at=at))
    _wait_for(lambda: db.scheduler.step() and db.schedules()[0]["firings"])
    Worker(db).run(until_idle=True)
    assert db.schedules()[0]["outcome"]["version"] == 1


def _state(db: Datalayer) -> dict[str, Any]:
    (document,) = db.schedules()
    state: dict[str, Any] = document["state"]
    return state


def _started(db: Datalayer, count: int) -> bool:
    found = db[COLLECTION].raw.database["mt.jobs"].count_documents({"type_id": "schedule", "attempt": {"$gte": 1}})
    return bool(found >= count)


def _wait_for(so: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not so():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def test_changes_are_inserts_updates_and_deletes_but_no_folds(db: Datalayer) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=Changed(10**6)))
    raw = db[COLLECTION].raw
    raw.insert_many([{"_id": 1000 + n, "x": [0.0] * 4, "y": 0} for n in range(3)])
    raw.update_many({"_id": {"$lt": 5}}, {"$set": {"looked_at": True}})
    raw.delete_many({"_id": {"$gte": 100, "$lt": 107}})
    db[COLLECTION].assign_folds()
    db.scheduler.step()
    assert _state(db)["changed"] == 3 + 5 + 7
    assert _state(db)["inserted"] == 3


def test_a_document_that_has_waited_long_enough_fires_alone(db: Datalayer) -> None:
    fill(db)
    of_all = trainer(db[COLLECTION].find())
    db.apply(Schedule("s", trainer=of_all, trigger=NewDocuments(10**6), max_wait=0.3))
    db.scheduler.step()
    db[COLLECTION].raw.insert_one({"x": [0.0] * 4, "y": 0})
    db.scheduler.step()
    assert db.schedules()[0]["firings"] == 0
    time.sleep(0.35)
    db.scheduler.step()
    assert db.schedules()[0]["firings"] == 1
