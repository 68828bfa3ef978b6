"""What was trained is not lost when its publication fails: it is tried again, and kept for a later attempt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from pymongo.errors import AutoReconnect
from tests.helpers import COLLECTION, fill, points, same, state, trainer

from mongotorch import Always, Datalayer, NewDocuments, Schedule, TorchTrainer, Worker
from mongotorch.errors import ServerUnavailableError
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import BlobStore, Checkpoints, Components


class Failing:
    """Lets calls of a method raise."""

    def __init__(
        self, patch: pytest.MonkeyPatch, cls: type, name: str, *, when: Callable[[int], bool], error: Exception
    ) -> None:
        self.calls = 0
        method = getattr(cls, name)

        def failing(*args: Any, **given: Any) -> Any:
            self.calls += 1
            if when(self.calls):
                raise error
            return method(*args, **given)

        patch.setattr(cls, name, failing)


class Steps:
    """Counts steps."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        step = TorchTrainer.take_step

        def stepping(*args: Any, **given: Any) -> Any:
            self.count += 1
            return step(*args, **given)

        patch.setattr(TorchTrainer, "take_step", stepping)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.mark.parametrize("interval", [4, None])
def test_what_could_not_be_published_is_published_by_the_next_attempt_without_a_step(
    db: Datalayer, steps: Steps, interval: int | None
) -> None:
    select = fill(db)
    expected = db.apply(trainer(select, validation_interval=interval).replace(identifier="other")).result()
    applied = trainer(select, validation_interval=interval)
    steps.count = 0
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, Catalog, "publish", when=lambda n: True, error=RuntimeError("no"))
        failed = db.apply(applied)
    assert (failed.status, steps.count) == ("failed", 12)
    db.gc(grace_s=0)

    trained = db.apply(applied).result()

    assert steps.count == 12
    assert same(state(trained), state(expected))
    shown, other = (db.show("model", "m", version) for version in (trained.version, expected.version))
    for name in ("steps", "best_step", "metrics"):
        assert shown[name] == other[name], name
    for name in ("query", "train", "valid", "members"):
        assert shown["data"][name] == other["data"][name], name
    assert db["mt.checkpoints"].count() == 0


def test_a_run_that_failed_by_itself_starts_from_the_beginning(db: Datalayer, steps: Steps) -> None:
    applied = trainer(fill(db))
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, TorchTrainer, "compute_objective", when=lambda n: n == 10, error=RuntimeError("no"))
        assert db.apply(applied).status == "failed"
    steps.count = 0
    db.apply(applied).result()
    assert steps.count == 12


def test_a_run_that_the_database_failed_goes_on_from_its_checkpoint(db: Datalayer, steps: Steps) -> None:
    applied = trainer(fill(db))

    def is_due(number: int) -> bool:
        while number == 10 and db["mt.checkpoints"].count() < 2:
            time.sleep(0.01)  # the checkpoints of steps 4 and 8 are written by a thread
        return number == 10

    with pytest.MonkeyPatch.context() as patch:
        error = ServerUnavailableError("away")
        Failing(patch, TorchTrainer, "compute_objective", when=is_due, error=error)
        failed = db.apply(applied)
    assert failed.error is not None
    assert failed.error["transient"]
    steps.count = 0
    trained = db.apply(applied).result()
    assert steps.count == 4
    assert same(state(trained), state(db.apply(applied.replace(identifier="u"), force=True).result()))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((BlobStore, name) for name in ("put_all", "_upload_together", "_insert_files")),
        *((Components, name) for name in ("publish", "_numbers", "_insert", "_insert_all")),
    ],
)
def test_a_publication_that_cannot_reach_the_database_is_tried_again(
    db: Datalayer, caplog: pytest.LogCaptureFixture, cls: type, name: str
) -> None:
    applied = trainer(fill(db))
    publish = Catalog.publish
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        begun: list[int] = []

        def beginning(*args: Any, **given: Any) -> Any:
            begun.append(1)
            return publish(*args, **given)

        patch.setattr(Catalog, "publish", beginning)
        numbers = iter(range(1, 10**6))
        error = ServerUnavailableError("away")
        Failing(patch, cls, name, when=lambda n: bool(begun) and next(numbers) in (1, 2), error=error)
        trained = db.apply(applied).result()

    assert trained.version == 1
    assert db.show("model", "m") == [0, 1]
    assert db.load("model", "m").trainer.model.uuid == trained.uuid
    assert len(begun) >= 2
    assert "tries again" in caplog.text
    db.gc(grace_s=0)
    assert db.verify().problems == ()
    assert db["mt.components"].count() == 4


def test_a_publication_that_arrived_although_its_answer_was_lost_is_found(db: Datalayer) -> None:
    insert = Components._insert
    with pytest.MonkeyPatch.context() as patch:

        def inserting(self: Components, documents: Any, only_as: Any, attempt: Any) -> int:
            version = insert(self, documents, only_as, attempt)
            if documents[-1].get("job"):
                raise AutoReconnect("the answer was lost")
            return version

        patch.setattr(Components, "_insert", inserting)
        trained = db.apply(trainer(fill(db))).result()

    assert (trained.version, db.show("model", "m")) == (1, [0, 1])
    assert db.load("model", "m").trainer.model.uuid == trained.uuid


def test_what_was_published_is_a_success_though_its_checkpoints_stay(
    db: Datalayer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, Checkpoints, "drop", when=lambda n: True, error=RuntimeError("no"))
    job = db.apply(trainer(fill(db)))
    assert job.result().version == 1
    assert "could not be dropped" in caplog.text
    db.gc(grace_s=0)
    assert db["mt.checkpoints"].count() == 0


def test_a_schedule_publishes_what_it_trained_though_judging_it_failed(db: Datalayer, steps: Steps) -> None:
    select = fill(db)
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(30), gate=Always()))
    db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, Catalog, "pin_champion", when=lambda n: n == 1, error=MemoryError("no"))
        Worker(db).run(until_idle=True)

    assert steps.count == 12
    assert db.load("model", "m").version == 1
