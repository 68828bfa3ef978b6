"""What a new model has to be better than, and what is live, before and after the first version of a schedule."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, model, same, state, trainer

from mongotorch import Always, Better, Datalayer, Every, Gate, Never, Schedule, TorchModel, Worker
from mongotorch.errors import NotFoundError

BETTER = Better()


def refused(champion: Any, challenger: Any) -> bool:
    return False


def start(db: Datalayer, gate: Gate | Any = BETTER, **given: Any) -> None:
    """Apply the one schedule."""
    made = trainer(db[COLLECTION].find(), **given.pop("trainer", {}))
    db.apply(Schedule("s", trainer=made, trigger=Every(seconds=1e6), gate=gate, **given))


def fired(db: Datalayer) -> TorchModel:
    """What a firing by hand publishes."""
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    published: TorchModel = job.result(timeout=5)
    return published


@pytest.mark.parametrize("gate", [Better(), Better(margin=100.0), Always()], ids=repr)
def test_the_first_trained_version_has_nothing_to_be_better_than(db: Datalayer, gate: Gate) -> None:
    fill(db)
    start(db, gate)
    assert db.history("model", "m") == []
    assert not db.load("model", "m").trained
    first = fired(db)
    assert [move.to_version for move in db.history("model", "m")] == [first.version] == [1]
    verdict = db.show("model", "m", 1)["verdict"]
    assert (verdict["against"], verdict["champion"]) == (None, None)
    assert db.load("model", "m").uuid == first.uuid


def test_the_newest_trained_version_is_live_and_champion_whatever_was_applied_since(db: Datalayer) -> None:
    select = fill(db)
    best = db.apply(trainer(select, max_iterations=60)).result()
    start(db, trainer={"model": model(seed=5), "max_iterations": 1}, warm_start=False)
    assert db.load("model", "m").uuid == best.uuid
    worse = fired(db)
    verdict = db.show("model", "m", worse.version)["verdict"]
    assert not verdict["promote"]
    assert verdict["against"]["uuid"] == best.uuid
    assert db.load("model", "m").uuid == best.uuid


def test_what_was_promoted_by_hand_is_the_champion_trained_or_not(db: Datalayer) -> None:
    fill(db)
    start(db)
    db.promote("model", "m", 0)
    first = fired(db)
    verdict = db.show("model", "m", first.version)["verdict"]
    assert verdict["against"]["version"] == 0
    assert verdict["promote"], "it is better than untrained weights"


@pytest.mark.parametrize("gate", [Never(), refused])
def test_a_refused_first_version_is_not_what_a_name_means(
    db: Datalayer, gate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fill(db)
    start(db, gate)
    first = fired(db)
    assert db.history("model", "m") == []
    with caplog.at_level(logging.WARNING, "mongotorch"):
        loaded = db.load("model", "m")
    assert (loaded.version, loaded.trained) == (0, False)
    assert "version 0, which was not trained" in caplog.text
    with db.live("model", "m") as handle:
        assert handle.version == 0
    with pytest.raises(NotFoundError, match=f"name the version to promote, such as {first.version}"):
        db.promote("model", "m")
    assert db.load("model", "m", first.version).uuid == first.uuid
    db.promote("model", "m", first.version)
    assert db.load("model", "m").uuid == first.uuid


def test_where_all_were_refused_the_next_one_is_judged_as_the_first(db: Datalayer) -> None:
    fill(db)
    start(db, refused)
    first = fired(db)
    start(db, Better())
    assert db.history("model", "m") == []
    second = fired(db)
    document = db.show("model", "m", second.version)
    assert (document["verdict"]["why"], document["start"]) == ("nothing is live yet", None)
    assert same(state(second), state(first)), "it starts from the trainer's weights, not from refused ones"
    assert db.load("model", "m").uuid == second.uuid


def test_an_accepted_version_is_served_again_where_a_refused_one_is_newer_and_nothing_is_live(
    db: Datalayer,
) -> None:
    select = fill(db)
    good = db.apply(trainer(select)).result()
    start(db, Never())
    fired(db)
    live = db.apply(trainer(select, max_iterations=13)).result()
    db.promote("model", "m", live.version)
    with db.live("model", "m") as handle:
        db.remove("model", "m", live.version, force=True)
        assert db.load("model", "m").uuid == good.uuid
        assert handle.wait_for(uuid=good.uuid, timeout_s=10)
    assert db.promote("model", "m").to_uuid == good.uuid


def test_a_schedule_of_new_documents_ends_well_where_the_only_version_was_refused(db: Datalayer) -> None:
    fill(db)
    start(db, Never(), data="new", trainer={"max_iterations": 2})
    first = fired(db)
    assert fired(db).uuid == first.uuid
    assert db.schedules()[0]["outcome"]["why"] == "no document is new"


def test_a_name_with_refused_versions_alone_says_so(db: Datalayer) -> None:
    fill(db)
    start(db, Never())
    fired(db)
    db[COLLECTION].raw.database["mt.components"].delete_one({"identifier": "m", "version": 0})
    with pytest.raises(NotFoundError, match="the gate of a schedule refused"):
        db.load("model", "m")
