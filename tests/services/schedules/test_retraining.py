"""Schedules on both backends: counted, fired, run, judged, promoted, and never a worse model live."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from tests.helpers import COLLECTION, fill, fold_ids, model, points, same, state, trainer

from mongotorch import Always, Better, Cron, Datalayer, Every, MetricAbove, Never, NewDocuments, Schedule, Worker
from mongotorch.errors import NotFoundError


def schedule(db: Datalayer, trigger: Any, **given: Any) -> Schedule:
    """A schedule of the usual trainer over the usual documents."""
    chosen = {"trainer": trainer(given.pop("select", db[COLLECTION].find()), **given.pop("trainer", {})), **given}
    return Schedule("s", trigger=trigger, **chosen)


def insert(db: Datalayer, count: int, first: int = 1000) -> None:
    """Insert documents as any other client would: without folds, past the datalayer."""
    rows = points(count)
    db[COLLECTION].raw.insert_many([{**row, "_id": first + row["_id"]} for row in rows])


def work(db: Datalayer) -> None:
    """Fire what is due and run it."""
    Worker(db).run(until_idle=True)


def of(db: Datalayer) -> dict[str, Any]:
    """The runtime document of the one schedule."""
    (document,) = db.schedules()
    return document


def test_new_documents_start_a_run_that_goes_live_when_it_is_better(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select, max_iterations=2)).result()
    db.apply(schedule(db, NewDocuments(30)))
    insert(db, 29)
    work(db)
    assert of(db)["firings"] == 0
    assert of(db)["state"]["inserted"] == 29
    insert(db, 1, first=5000)
    work(db)
    document = of(db)
    assert (document["firings"], document["state"]["inserted"]) == (1, 0)
    assert document["outcome"]["promoted"], document["outcome"]
    live = db.load("model", "m")
    assert live.version == 2
    said = db.show("model", "m", 2)
    assert said["verdict"]["promote"]
    assert said["verdict"]["against"]["version"] == 1
    assert said["verdict"]["challenger"]["objective"] < said["verdict"]["champion"]["objective"]
    assert said["schedule"]["identifier"] == "s"
    assert db[COLLECTION].count({"_fold": {"$exists": False}}) == 30, "nothing is written to them"
    assert [move.to_version for move in db.history("model", "m")] == [1, 2]


def test_documents_count_once_whoever_inserts_them_and_whatever_their_id(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(1000)))
    insert(db, 5)
    insert(db, 7, first=-500)  # before every `_id` that was there
    db.scheduler.step()
    db.scheduler.step()
    assert of(db)["state"]["inserted"] == 12
    insert(db, 3, first=-900)
    db.scheduler.step()
    assert of(db)["state"]["inserted"] == 15


def test_only_documents_of_the_select_count(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(1000), select=db[COLLECTION].find({"y": 1})))
    insert(db, 30)  # a third of them has the label 1
    db["others"].insert_many(points(10))
    db.scheduler.step()
    assert of(db)["state"]["inserted"] == 10


def test_a_paused_schedule_counts_and_does_not_fire(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(10), paused=True))
    insert(db, 10)
    work(db)
    assert (of(db)["firings"], of(db)["state"]["inserted"]) == (0, 10)
    db.resume("s")
    work(db)
    assert of(db)["firings"] == 1
    db.pause("s")
    insert(db, 10, first=3000)
    work(db)
    assert of(db)["firings"] == 1


def test_a_schedule_fires_by_hand_once_a_call(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(10**6), paused=True))
    first, second = db.fire("s", why="because"), db.fire("s")
    assert first.uuid != second.uuid
    work(db)
    # Two jobs of one millisecond run in any order.
    assert sorted(job.result(timeout=5).version for job in (first, second)) == [1, 2]
    assert first.record["parameters"]["reason"] == "because"
    with pytest.raises(NotFoundError, match="nobody"):
        db.fire("nobody")


def test_a_schedule_that_is_applied_again_goes_on_counting(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(100)))
    insert(db, 5)
    db.scheduler.step()
    assert db.apply(schedule(db, NewDocuments(100))).result().version == 0
    assert db.apply(schedule(db, NewDocuments(6))).result().version == 1
    insert(db, 1, first=4000)
    work(db)
    assert of(db)["firings"] == 1


def test_a_removed_schedule_fires_no_more_and_can_begin_anew(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(1)))
    insert(db, 1)
    work(db)
    db.remove("schedule", "s")
    assert db.schedules() == []
    insert(db, 1, first=3000)
    work(db)
    db.apply(schedule(db, NewDocuments(1)))
    insert(db, 1, first=4000)
    work(db)
    assert of(db)["firings"] == 1
    assert db.show("model", "m") == [0, 1, 2]


def test_applying_a_schedule_leaves_what_is_served(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select)).result()
    served = db.load("model", "m")
    db.apply(schedule(db, Every(seconds=1e6), trainer={"model": model(seed=3)}))
    assert db.load("model", "m").uuid == served.uuid
    assert db.show("model", "m") == [0, 1, 2]


def test_a_run_starts_from_what_is_live_and_from_its_optimizer(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, Every(seconds=1e6), gate=Always()))
    first = run_by_hand(db)
    second = run_by_hand(db)
    assert db.show("model", "m", second.version)["start"]["model"] == first.uuid
    steps = second.trainer.optimizer_state["state"][0]["step"]
    assert int(steps) == 24  # twelve of its own, and twelve before
    db.apply(schedule(db, Every(seconds=1e6), gate=Always(), warm_start=False))
    cold = run_by_hand(db)
    assert same(state(cold), state(first))
    assert db.show("model", "m", cold.version)["start"] is None


def test_a_run_starts_from_its_own_weights_where_the_live_model_is_built_otherwise(db: Datalayer) -> None:
    import torch

    select = fill(db)
    db.apply(trainer(select)).result()
    wide = model()
    wide = wide.replace(
        object=torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    )
    db.apply(schedule(db, Every(seconds=1e6), trainer={"model": wide}))
    assert db.show("model", "m", run_by_hand(db).version)["start"] is None


def test_a_run_on_new_documents_alone_forgets_none_that_a_failed_one_left(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, Every(seconds=1e6), gate=Always(), data="new", trainer={"max_iterations": 3}))
    whole = db.show("model", "m", run_by_hand(db).version)
    assert whole["data"]["train"]["count"] == db[COLLECTION].count({"_fold": "train"})
    before = run_by_hand(db)
    assert before.version == 1, "nothing is new, so nothing is trained"
    insert(db, 20)
    db[COLLECTION].raw.insert_one({"_id": 7777, "x": "no vector", "y": 0, "_fold": "train"})
    with pytest.raises(Exception, match="7777"):
        run_by_hand(db)
    db[COLLECTION].raw.delete_one({"_id": 7777})
    after = db.show("model", "m", run_by_hand(db).version)
    fresh = len([n for n in fold_ids(db, "train") if n >= 1000])
    assert after["data"]["train"]["count"] == fresh
    assert fresh > 0


def test_a_challenger_of_noise_is_stored_and_not_live(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select, max_iterations=200)).result()
    good = db.load("model", "m")
    with db.live("model", "m") as handle:
        db.apply(schedule(db, NewDocuments(200)))
        noise = [{**row, "_id": 1000 + row["_id"], "y": (row["y"] + 1) % 3} for row in points(1000)]
        db[COLLECTION].raw.insert_many([{**row, "_fold": "train"} for row in noise])
        work(db)
        outcome = of(db)["outcome"]
        assert not outcome["promoted"]
        stored = db.show("model", "m", outcome["version"])
        assert not stored["verdict"]["promote"]
        assert "worse by" in stored["verdict"]["why"]
        assert db.load("model", "m").uuid == good.uuid
        time.sleep(0.5)
        assert handle.uuid == good.uuid
    assert db.load("model", "m", outcome["version"]).uuid == outcome["uuid"]


def test_a_shadow_is_scored_and_promoted_by_hand(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select, max_iterations=2)).result()
    db.apply(schedule(db, Every(seconds=1e6), gate=Never()))
    shadow = run_by_hand(db)
    verdict = db.show("model", "m", shadow.version)["verdict"]
    assert verdict["challenger"]["objective"] < verdict["champion"]["objective"]
    assert db.load("model", "m").version == 1
    db.promote("model", "m", shadow.version)
    assert db.load("model", "m").uuid == shadow.uuid


def test_a_gate_that_cannot_compare_promotes_nothing(db: Datalayer) -> None:
    select = fill(db)
    db.apply(trainer(select, max_iterations=2)).result()
    db.apply(schedule(db, Every(seconds=1e6), gate=Better(margin=100.0)))
    version = run_by_hand(db).version
    assert "not more than the margin" in db.show("model", "m", version)["verdict"]["why"]
    assert db.load("model", "m").version == 1


def test_a_measurement_of_the_live_model_starts_a_run(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, MetricAbove("objective", 0.0, every_s=3600.0, documents=10)))
    work(db)
    document = of(db)
    assert document["firings"] == 1
    assert document["state"]["scores"]["objective"] > 0
    work(db)
    assert of(db)["firings"] == 1, "one measurement fires once"


def test_a_schedule_that_cannot_be_read_stops_no_other(db: Datalayer) -> None:
    fill(db)
    db.apply(schedule(db, NewDocuments(1)))
    db.apply(schedule(db, NewDocuments(1)).replace(identifier="broken"))
    raw = db[COLLECTION].raw.database["mt.components"]
    raw.update_one({"type_id": "schedule", "identifier": "broken"}, {"$set": {"fields.trigger": {"_codec": "no"}}})
    insert(db, 1)
    work(db)
    fired = {document["_id"]: document["firings"] for document in db.schedules()}
    assert fired == {"broken": 0, "s": 1}
    assert "no codec" in next(d["problem"] for d in db.schedules() if d["_id"] == "broken")


def test_a_preview_says_when_documents_would_have_started_a_run(db: Datalayer) -> None:
    fill(db)
    begun = datetime(2026, 3, 1)
    made = [begun + timedelta(hours=hour) for hour in range(1, 8)]
    db[COLLECTION].raw.insert_many([{"_id": ObjectId.from_datetime(at), "x": [0.0] * 4, "y": 0} for at in made])
    of_three = schedule(db, NewDocuments(3))
    fired = db.preview(of_three, since=begun, until=begun + timedelta(days=1))
    assert [firing.at for firing in fired] == [made[2], made[5]]
    nightly = schedule(db, Cron("0 3 * * *", tz="Europe/Berlin"))
    fired = db.preview(nightly, since=datetime(2026, 3, 28), until=datetime(2026, 3, 31))
    assert [firing.at.hour for firing in fired] == [2, 1, 1], "summer time begins on the second of these nights"
    assert db.schedules() == []


def run_by_hand(db: Datalayer) -> Any:
    """Fire the schedule, run it, and give its model."""
    job = db.fire("s")
    work(db)
    return job.result(timeout=5)
