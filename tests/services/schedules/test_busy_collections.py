"""Schedules beside others who insert without a pause: what is due fires, and the lease is kept."""

from __future__ import annotations

import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymongo
import pytest
from tests.helpers import COLLECTION, fill, model, points, trainer

from mongotorch import Datalayer, Every, NewDocuments, Schedule, Worker
from mongotorch.mongo.change_stream import READ_S, ChangeWatcher, position
from mongotorch.store import Schedules


@contextmanager
def inserting(raw: Any, per_s: float, *, name: str = COLLECTION) -> Iterator[list[int]]:
    """Others insert documents without folds, one at a time or, above 200 a second, in batches; how many so far."""
    stop, done = threading.Event(), [0]
    batch = max(int(per_s // 200), 1)
    row = points(1)[0]

    def insert() -> None:
        began = time.monotonic()
        while not stop.is_set():
            rows = [{"x": row["x"], "y": n % 3, "n": done[0] + n} for n in range(batch)]
            raw.database[name].insert_many(rows)
            done[0] += batch
            stop.wait(max(began + done[0] / per_s - time.monotonic(), 0))

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@contextmanager
def inserting_elsewhere(uri: str, per_s: int) -> Iterator[None]:
    """As `inserting`, from a process of its own, which the workers of this one do not slow down."""
    code = """
        import sys, time, pymongo
        uri, per_s, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        documents = pymongo.MongoClient(uri).get_database()[name]
        print("ready", flush=True)
        began, done, batch = time.monotonic(), 0, max(per_s // 200, 1)
        while True:
            documents.insert_many([{"x": [0.5] * 4, "y": n % 3, "n": n} for n in range(batch)])
            done += batch
            time.sleep(max(began + done / per_s - time.monotonic(), 0))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), uri, str(per_s), COLLECTION]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("per_s", [14, 50, 1000])
def test_reading_changes_ends_at_its_deadline_whatever_comes(server_uri: str, per_s: float) -> None:
    with pymongo.MongoClient[dict[str, Any]](server_uri) as client:
        database = client.get_database()
        database[COLLECTION].insert_one({})
        after = position(database)
        assert after is not None
        with ChangeWatcher(database, {COLLECTION}, after) as watch, inserting(database[COLLECTION], per_s) as done:
            took, seen = [], 0
            for _ in range(6):
                began = time.monotonic()
                seen += len(watch.read())
                took.append(time.monotonic() - began)
        while changes := watch_rest(database, watch.token):
            seen += changes
            break
    assert statistics.median(took) < READ_S + 0.5, took
    assert max(took) < 5.0, took
    assert seen == done[0], "nothing is lost between two reads"


def watch_rest(database: Any, after: dict[str, Any]) -> int:
    """How many changes there are after a token."""
    count = 0
    with ChangeWatcher(database, {COLLECTION}, after) as watch:
        while changes := watch.read():
            count += len(changes)
    return count


def test_one_step_counts_what_has_happened_and_not_what_goes_on_happening(db: Datalayer) -> None:
    fill(db)
    db.apply(Schedule("s", trainer=trainer(db[COLLECTION].find()), trigger=NewDocuments(10**9)))
    raw = db[COLLECTION].raw
    with inserting(raw, 200) as done:
        time.sleep(0.3)
        before, began = done[0], time.monotonic()
        db.scheduler.step()
        assert time.monotonic() - began < 10
    assert db.schedules()[0]["state"]["inserted"] >= before


@pytest.mark.parametrize("per_s", [14, 1000])
def test_what_is_due_fires_beside_inserts_and_the_lease_is_kept(
    uri: str, per_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several leases long; a second scheduler waits to lead all the time."""
    monkeypatch.setattr("mongotorch.services.schedules.register.Register._is_waiting", lambda *_: False)
    with Datalayer.connect(uri, lease_s=1.0, progress=False) as db, Datalayer.connect(uri, lease_s=1.0) as other:
        fill(db)
        of_all = trainer(db[COLLECTION].find())
        db.apply(Schedule("every", trainer=of_all, trigger=Every(seconds=0.5)))
        db.apply(Schedule("new", trainer=of_all, trigger=NewDocuments(10**9)))
        schedules = db["mt.schedules"].raw
        stop = threading.Event()
        threads = [threading.Thread(target=each.scheduler.run, args=(stop,)) for each in (db, other)]
        leaders, late = set(), []
        with inserting(db[COLLECTION].raw, per_s) as done:
            threads[0].start()
            while schedules.find_one({"_id": "#leader"}) is None:
                time.sleep(0.01)
            threads[1].start()
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                leaders.add((schedules.find_one({"_id": "#leader"}) or {}).get("who"))
                late.append(_seconds_late(db))
                time.sleep(0.05)
        deadline = time.monotonic() + 20
        while _inserted(db) < done[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join(30)
        print(f"{per_s} a second: {done[0]} documents, at most {max(late):.2f} s late")
        assert len(leaders) == 1, leaders
        assert max(late) < 3.0
        assert _inserted(db) == done[0]


def _inserted(db: Datalayer) -> int:
    count: int = next(one for one in db.schedules() if one["_id"] == "new")["state"]["inserted"]
    return count


def _seconds_late(db: Datalayer) -> float:
    """For how long a moment of the schedule `every` has been due by now."""
    document = next(one for one in db.schedules() if one["_id"] == "every")
    last = document["state"]["memory"].get("last", document["state"]["since"])
    late: float = (Schedules(db["mt.schedules"].raw.database).now() - last).total_seconds() - 0.5
    return late


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("per_s", [50, 1000])
def test_schedules_beside_foreign_inserts_with_two_workers(server_uri: str, per_s: int, seconds: float) -> None:
    """Three schedules and two workers: what is due fires within 2 s, runs end and are judged, nothing fails."""
    with Datalayer.connect(server_uri, lease_s=5.0, progress=False, valid_fraction=0.2) as db:
        fill(db)
        options: dict[str, Any] = {"max_iterations": 40, "validation_interval": 20}
        for name, trigger in {"a": Every(seconds=1.0), "b": Every(seconds=0.5), "c": NewDocuments(100)}.items():
            made = trainer(db[COLLECTION].find(), model=model(identifier=f"m{name}"), **options)
            made = made.replace(identifier=f"t{name}")
            db.apply(Schedule(name, trainer=made, trigger=trigger))
        workers = [Worker(db) for _ in range(2)]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        before = db[COLLECTION].count()
        with inserting_elsewhere(server_uri, per_s):
            for thread in threads:
                thread.start()
            late = _watched_for(db, seconds)
        done = db[COLLECTION].count() - before
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join(120)
        jobs = list(db["mt.jobs"].raw.find())
        ended = [job for job in jobs if job["status"] == "succeeded"]
        print(f"{per_s} a second for {seconds} s: {done} inserts, {len(ended)} runs, {max(late):.2f} s late")
        assert {job["status"] for job in jobs} <= {"succeeded", "queued"}, [job["error"] for job in jobs]
        assert len(ended) >= 2
        assert max(late) < (2.0 if seconds == 60 else 5.0), "the short one may run beside anything"
        assert {document["problem"] for document in db.schedules()} == {None}
        for job in ended:
            said = db.show(uuid=job["result"])
            compared = ("against the champion's", "nothing is live yet")
            assert any(words in said["verdict"]["why"] for words in compared), said["verdict"]
            assert said["verdict"]["documents"] == said["data"]["valid"]["count"] > 0


def _watched_for(db: Datalayer, seconds: float) -> list[float]:
    """For how long what was due had not been looked at, again and again, from when a scheduler leads."""
    schedules, raw = Schedules(db["mt.schedules"].raw.database), db["mt.schedules"].raw
    started = time.monotonic()
    while raw.find_one({"_id": "#leader"}) is None:
        assert time.monotonic() < started + 60
        time.sleep(0.01)
    begun, late, deadline = schedules.now(), [0.0], time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = schedules.now()
        due = [max(one["next_at"], begun) for one in db.schedules() if one["next_at"] is not None]
        late.append(max(((now - at).total_seconds() for at in due), default=0.0))
        time.sleep(0.1)
    return late
