"""Each schedule is on its own: one that cannot be used says why, is tried again, and stops no other."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar

import pytest
import torch
from tests.helpers import COLLECTION, fill, points, trainer

from mongotorch import (
    AnyOf,
    Datalayer,
    Decision,
    Every,
    MetricAbove,
    MetricBelow,
    NewDocuments,
    Schedule,
    State,
    Trigger,
    Worker,
)
from mongotorch.mongo.change_stream import Change, ChangeWatcher


@dataclasses.dataclass(frozen=True)
class Broken(Trigger):
    """A trigger that raises as long as it is broken, and fires once it is not."""

    is_broken: ClassVar[bool] = True
    asked: ClassVar[int] = 0

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Raises, or fires once."""
        type(self).asked += 1
        if self.is_broken:
            raise ZeroDivisionError("no such day")
        return Decision(not state.memory, "it is mended"), state.consumed({"fired": True})


@dataclasses.dataclass(frozen=True)
class Stumbling(Trigger):
    """Never fires, watches what is inserted, and raises as long as it is broken."""

    is_broken: ClassVar[bool] = True

    @property
    def watches(self) -> frozenset[str]:
        """Documents that are inserted."""
        return frozenset({"inserted"})

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Raises, or says no."""
        if self.is_broken:
            raise ZeroDivisionError("no such day")
        return Decision(False, "never"), state


def objective_that_raises(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As `cross_entropy` in training, without an answer for a live model."""
    if not output.requires_grad:
        raise LookupError("no loss for this")
    return torch.nn.functional.cross_entropy(output, target)


GO = threading.Event()


def objective_that_waits(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As `cross_entropy`, as soon as it may go on."""
    GO.wait(60)
    return torch.nn.functional.cross_entropy(output, target)


@pytest.fixture(autouse=True)
def _broken() -> None:
    Broken.is_broken, Broken.asked = True, 0


def apply(db: Datalayer, name: str, trigger: Trigger, **given: Any) -> None:
    made = trainer(db[COLLECTION].find(), **{"max_iterations": 1, "validation_interval": None, **given})
    db.apply(Schedule(name, trigger=trigger, trainer=made))


def documents(db: Datalayer) -> dict[str, dict[str, Any]]:
    return {document["_id"]: document for document in db.schedules()}


def insert(db: Datalayer, first: int, count: int = 1) -> None:
    db[COLLECTION].raw.insert_many([{**row, "_id": first + row["_id"]} for row in points(count)])


@contextmanager
def scheduling(db: Datalayer) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=db.scheduler.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


def wait_for(so: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not so():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def test_a_trigger_that_raises_stops_no_other_and_is_asked_again(
    db: Datalayer, caplog: pytest.LogCaptureFixture
) -> None:
    fill(db)
    apply(db, "broken", Broken())
    apply(db, "sound", NewDocuments(1))
    with scheduling(db):
        insert(db, 1000)
        wait_for(lambda: documents(db)["sound"]["firings"] == 1)
        wait_for(lambda: documents(db)["broken"]["problem"])
        assert documents(db)["broken"]["problem"] == "its trigger failed: ZeroDivisionError: no such day"
        time.sleep(0.7)
        assert Broken.asked < 4, "it is left alone longer each time"
        lines = [record for record in caplog.records if "no such day" in record.getMessage()]
        assert [(line.levelno, "'broken'" in line.getMessage()) for line in lines] == [(logging.WARNING, True)]
        Broken.is_broken = False
        wait_for(lambda: documents(db)["broken"]["firings"] == 1)
    assert documents(db)["broken"]["problem"] is None
    assert documents(db)["sound"]["problem"] is None


def test_an_objective_that_raises_on_the_live_model_stops_no_other(db: Datalayer) -> None:
    fill(db)
    apply(db, "a", MetricBelow("objective", 0.0), objective=objective_that_raises)
    mixed = AnyOf(MetricBelow("objective", 0.0, every_s=3600.0), NewDocuments(1))
    apply(db, "b", mixed, objective=objective_that_raises)
    apply(db, "c", NewDocuments(1))
    insert(db, 1000)
    db.scheduler.step()
    found = documents(db)
    assert {name: document["firings"] for name, document in found.items()} == {"a": 0, "b": 1, "c": 1}
    for name in ("a", "b"):
        assert found[name]["problem"] == "the live model could not be measured: LookupError: no loss for this"
    insert(db, 2000)
    db.scheduler.step()
    assert documents(db)["b"]["problem"], "what asks the trigger without measuring does not hide it"


@pytest.mark.parametrize(
    "damage",
    [
        {"$set": {"state": "none"}},
        {"$set": {"state": {}}},
        {"$set": {"state.since": "yesterday"}},
        {"$set": {"token": 5}},
        {"$set": {"token": {"_data": None}}},
        {"$set": {"select": {"collection": 7}}},
        {"$set": {"watches": None}},
        {"$set": {"next_at": "soon"}},
        {"$set": {"pending": {"firing": 1}}},
        {"$set": {"last": "never"}},
        {"$unset": {"component": 1}},
        {"$unset": {"rev": 1}},
        {"$unset": {"paused": 1}},
    ],
    ids=str,
)
def test_a_document_that_cannot_be_used_stops_no_other(db: Datalayer, damage: dict[str, Any]) -> None:
    fill(db)
    apply(db, "damaged", NewDocuments(1))
    apply(db, "sound", NewDocuments(1))
    raw = db["mt.schedules"].raw
    whole = raw.find_one({"_id": "damaged"})
    raw.update_one({"_id": "damaged"}, damage)
    insert(db, 1000)
    db.scheduler.step()
    found = documents(db)
    assert found["sound"]["firings"] == 1
    assert "its document in mt.schedules cannot be used" in found["damaged"]["problem"]
    assert whole is not None
    raw.replace_one({"_id": "damaged"}, whole)
    db.scheduler.step()
    assert documents(db)["damaged"]["firings"] == 1, "what happened meanwhile is not lost"
    assert documents(db)["damaged"]["problem"] is None


def test_a_select_that_the_server_refuses_stops_no_other_and_misses_nothing(db: Datalayer) -> None:
    fill(db)
    apply(db, "refused", NewDocuments(10**6))
    apply(db, "sound", NewDocuments(1))
    raw = db["mt.schedules"].raw
    whole = raw.find_one({"_id": "refused"})
    assert whole is not None
    raw.update_one({"_id": "refused"}, {"$set": {"select.filter": '{"x": {"$nonsense": 1}}'}})
    with scheduling(db):
        wait_for(lambda: db["mt.schedules"].raw.find_one({"_id": "#leader"}))
        insert(db, 1000, 3)
        wait_for(lambda: documents(db)["sound"]["firings"] == 1)
        wait_for(lambda: "nonsense" in (documents(db)["refused"]["problem"] or ""))
        insert(db, 2000, 4)
        raw.update_one({"_id": "refused"}, {"$set": {"select": whole["select"]}})
        wait_for(lambda: documents(db)["refused"]["state"]["inserted"] == 7)


def inserted(db: Datalayer, name: str) -> int:
    return int(documents(db)[name]["state"]["inserted"])


def test_a_schedule_whose_trigger_raised_for_a_while_misses_nothing(db: Datalayer) -> None:
    fill(db)
    apply(db, "sound", NewDocuments(10**6))
    apply(db, "stumbling", Stumbling())
    Stumbling.is_broken = True
    with scheduling(db):
        wait_for(lambda: documents(db)["stumbling"]["problem"])
        insert(db, 1000, 3)
        wait_for(lambda: inserted(db, "sound") == 3)
        Stumbling.is_broken = False
        wait_for(lambda: documents(db)["stumbling"]["problem"] is None)
        insert(db, 2000)
        wait_for(lambda: inserted(db, "sound") == 4)
        wait_for(lambda: inserted(db, "stumbling") == 4)


def test_a_schedule_of_a_collection_that_is_watched_already_misses_nothing(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(db)
    apply(db, "old", NewDocuments(10**6))
    due, read = threading.Event(), ChangeWatcher.read

    def read_after_it_was_applied(watch: ChangeWatcher) -> list[Change]:
        if due.is_set():
            due.clear()
            apply(db, "new", NewDocuments(10**6))
            insert(db, 2000, 3)
        return read(watch)

    monkeypatch.setattr(ChangeWatcher, "read", read_after_it_was_applied)
    with scheduling(db):
        insert(db, 1000)
        wait_for(lambda: inserted(db, "old") == 1)
        due.set()
        if db.uri.startswith("mongomock"):  # where nothing is watched
            apply(db, "new", NewDocuments(10**6))
            insert(db, 2000, 3)
        wait_for(lambda: inserted(db, "old") == 4)
        insert(db, 3000)
        wait_for(lambda: inserted(db, "old") == 5)
        wait_for(lambda: inserted(db, "new") == 4)


def test_a_position_advances_also_where_others_never_pause(db: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the changes since its last one are read again by each scheduler that begins, or are forgotten."""
    monkeypatch.setattr("mongotorch.services.schedules.scheduler._ADVANCE_S", 0.1)
    if db.uri.startswith("mongomock"):
        pytest.skip("mongomock has no change streams")
    fill(db)
    db["quiet"].raw.insert_one({"x": [0.0] * 4, "y": 0})
    apply(db, "busy", NewDocuments(10**6))
    of_quiet = trainer(db["quiet"].find()).replace(identifier="tq")
    db.apply(Schedule("quiet", trainer=of_quiet, trigger=NewDocuments(10**6)))
    begun = documents(db)["quiet"]["token"]
    stop = threading.Event()

    def never_pause() -> None:
        while not stop.wait(0.01):
            db[COLLECTION].raw.insert_one({"x": [0.0] * 4, "y": 0})

    thread = threading.Thread(target=never_pause)
    thread.start()
    try:
        with scheduling(db):
            wait_for(lambda: documents(db)["quiet"]["token"] != begun)
    finally:
        stop.set()
        thread.join()
    assert inserted(db, "quiet") == 0


def test_nothing_waits_for_a_measurement(db: Datalayer) -> None:
    fill(db)
    GO.clear()
    apply(db, "slow", MetricAbove("objective", 0.0), objective=objective_that_waits)
    apply(db, "quick", Every(seconds=0.2))
    try:
        with scheduling(db):
            wait_for(lambda: documents(db)["quick"]["firings"] == 1)
            leader = db["mt.schedules"].raw.find_one({"_id": "#leader"})
            assert leader is not None
            assert documents(db)["slow"]["firings"] == 0
            GO.set()
            wait_for(lambda: documents(db)["slow"]["firings"] == 1)
            assert documents(db)["slow"]["state"]["scores"]["objective"] > 0
    finally:
        GO.set()


def test_a_run_that_fails_says_so_and_the_next_that_ends_clears_it(db: Datalayer) -> None:
    fill(db)
    apply(db, "s", NewDocuments(10**6), max_iterations=12)
    db[COLLECTION].raw.insert_one({"_id": 7777, "x": "no vector", "y": 0, "_fold": "train"})
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    found = documents(db)["s"]
    assert found["outcome"]["job"] == job.uuid
    assert not found["outcome"]["promoted"]
    assert found["outcome"]["why"].startswith("failed: ")
    assert "7777" in found["problem"]
    assert job.uuid in found["problem"]
    insert(db, 3000)
    db.scheduler.step()
    assert documents(db)["s"]["problem"], "that its trigger can be asked does not hide it"
    db[COLLECTION].raw.delete_one({"_id": 7777})
    db.fire("s")
    Worker(db).run(until_idle=True)
    found = documents(db)["s"]
    assert found["problem"] is None
    assert found["outcome"]["version"] == 1


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_run_whose_worker_cannot_say_so_has_an_outcome_too(db: Datalayer, status: str) -> None:
    fill(db)
    apply(db, "s", NewDocuments(10**6))
    job = db.fire("s")
    error = {"type": "LostError", "message": "20 workers vanished"}
    db["mt.jobs"].raw.update_one({"_id": job.uuid}, {"$set": {"status": status, "error": error}})
    db.scheduler.step()
    found = documents(db)["s"]
    assert found["outcome"]["job"] == job.uuid
    expected = "failed: LostError: 20 workers vanished" if status == "failed" else "it was cancelled"
    assert found["outcome"]["why"] == expected
    assert bool(found["problem"]) == (status == "failed")


def test_at_most_one_firing_of_a_schedule_waits_for_a_worker(db: Datalayer) -> None:
    fill(db)
    apply(db, "s", AnyOf(Every(seconds=0.05), NewDocuments(1)))
    jobs = db["mt.jobs"].raw
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        insert(db, int(time.monotonic() * 10**6))
        db.scheduler.step()
    assert jobs.count_documents({"status": "queued"}) == 1
    assert documents(db)["s"]["firings"] == 1
    waiting = documents(db)["s"]["state"]["inserted"]
    assert waiting >= 1, "what came meanwhile is counted"
    jobs.update_one({"status": "queued"}, {"$set": {"status": "running"}})
    db["mt.schedules"].raw.update_one({"_id": "s"}, {"$set": {"next_at": datetime(2020, 1, 1)}})
    db.scheduler.step()
    assert documents(db)["s"]["firings"] == 2
    assert documents(db)["s"]["state"]["inserted"] == 0, "one run is for all of it"
