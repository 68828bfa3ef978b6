"""A process that dies at any write of the publication of a trained model leaves the version before, whole."""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import mongomock.collection
import pymongo.collection
import pytest
from tests.helpers import fill, same, state, trainer

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.services.versions.catalog import Catalog

pytestmark = pytest.mark.fault

WRITES = (
    *("insert_one", "insert_many", "update_one", "update_many", "replace_one", "bulk_write"),
    *("delete_one", "delete_many", "find_one_and_update", "find_one_and_delete", "find_one_and_replace"),
)


class DiedError(BaseException):
    """The process is gone: nothing that follows reaches the database, not even what an error handler writes."""


class Death:
    """Lets this process die at its n-th write, counted from the beginning of a publication."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.left, self.begun, self.dead = at, False, False
        for cls in (mongomock.collection.Collection, pymongo.collection.Collection):
            for name in WRITES:
                patch.setattr(cls, name, self._mortal(getattr(cls, name)))
        publish = Catalog.publish

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.begun = True
            return publish(*args, **kwargs)

        patch.setattr(Catalog, "publish", begin)

    def _mortal(self, write: Any) -> Any:
        def write_or_die(collection: Any, *args: Any, **kwargs: Any) -> Any:
            if self.begun and collection.name.startswith("mt."):
                self.dead = self.dead or self.left == 0
                self.left -= 1
            if self.dead:
                raise DiedError
            return write(collection, *args, **kwargs)

        return write_or_die


def applied(good: TorchModel, at: int) -> TorchTrainer:
    """A run of its own each time, that trains to the same weights."""
    of: Any = good.trainer
    changed: TorchTrainer = of.replace(max_iterations=3, seed=9, prefetch_size=2000 + at)
    return changed


def is_whole(db: Datalayer, uuids: set[str]) -> bool:
    """Whether a trained version is there that was not before; what is there loads, models with their trainers."""
    for kind, name in (("model", "m"), ("trainer", "t")):
        for version in db.show(kind, name):
            loaded = db.load(kind, name, version)
            assert (loaded.identifier, loaded.version) == (name, version)
    new = {uuid for uuid in uuids_of(db) if uuid not in uuids}
    for uuid in new:
        assert db.load(uuid=uuid).trainer.model.uuid == uuid
    assert len(new) <= 1
    return bool(new)


def uuids_of(db: Datalayer) -> set[str]:
    return {db.show("model", "m", version)["_id"] for version in db.show("model", "m")}


def let_the_lease_run_out(db: Datalayer) -> None:
    past = datetime.datetime(2020, 1, 1)
    db["mt.jobs"].raw.update_many({"status": "running"}, {"$set": {"lease_until": past}})


# On the real server workers are killed at each of these writes: test_killed_at_writes.py.
@pytest.mark.parametrize("uri", ["mongomock"], indirect=True)
def test_a_death_at_any_write_leaves_the_version_before_and_can_be_made_good(
    db: Datalayer, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = db.apply(trainer(fill(db))).result()
    expected = state(db.apply(applied(good, -1)).result())
    assert not same(expected, state(good))
    outcomes: list[bool] = []
    while True:
        changed = applied(good, len(outcomes))
        newest, uuids = db.load("model", "m"), uuids_of(db)
        with monkeypatch.context() as patch:
            death = Death(patch, len(outcomes))
            with contextlib.suppress(DiedError):
                db.apply(changed)
        if not death.dead:
            break
        with Datalayer.connect(uri, progress=False) as after:
            outcomes.append(is_whole(after, uuids))
            if not outcomes[-1]:
                assert after.load("model", "m").uuid == newest.uuid
                assert same(state(after.load("model", "m")), state(newest))
            let_the_lease_run_out(after)
            assert same(state(after.apply(changed).result()), expected)
            assert is_whole(after, uuids)
            assert after.jobs(status="running") == []

    # The use of the blobs, then the trainer, then the model, which publishes both; then the job is told.
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 3
    assert outcomes.count(True) >= 1
