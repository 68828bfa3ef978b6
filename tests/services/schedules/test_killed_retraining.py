"""A worker that dies at any write of a schedule's run: the next one promotes once, with the same bits."""

from __future__ import annotations

import pytest
from tests import run_processes as runs

from mongotorch import Datalayer, Every, Schedule, TorchModel

pytestmark = pytest.mark.fault

STEPS = 12
MOST_WRITES = 200


def die_at(uri: str, db: Datalayer, at: int) -> tuple[TorchModel, bool]:
    """A firing whose first worker dies behind one write; what is live in the end, and whether it died."""
    name = f"dies-{at}"
    trainer = runs.trainer(db, name, in_memory=True, steps=STEPS)
    db.apply(Schedule(name, trainer=trainer, trigger=Every(seconds=1e6)))
    job = db.fire(name)
    process = runs.start(runs.work_once, uri, at, True)
    process.join(60)
    died = process.exitcode == -9
    assert died or process.exitcode == 0
    if died:
        assert db.show("model", name) in ([0], [0, 1]), "no half version is visible"
        db.load("model", name)
        runs.finish(db, job.uuid)
    model: TorchModel = job.result(timeout=10)
    assert db.show("model", name) == [0, 1]
    assert db.load("model", name).uuid == model.uuid, "the better model is live"
    assert [move.to_version for move in db.history("model", name)] == [1], "promoted once"
    outcome = next(document["outcome"] for document in db.schedules() if document["_id"] == name)
    assert outcome["promoted"]
    return model, died


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.soak), 6])
def test_a_retraining_that_dies_at_any_write_is_promoted_once_with_the_same_bits(
    server_uri: str, step: int
) -> None:
    settings = {**runs.SETTINGS, "lease_s": 0.3}
    with Datalayer.connect(server_uri, **settings) as db:
        runs.fill(db, 60)
        whole, died = die_at(server_uri, db, MOST_WRITES)
        assert not died
        deaths = 0
        for at in range(1, MOST_WRITES, step):
            model, died = die_at(server_uri, db, at)
            assert runs.same(runs.weights(model), runs.weights(whole)), at
            if not died:
                break
            deaths += 1
        assert deaths >= 10 // step, "a retraining has at least so many writes"
        db.gc(grace_s=0)
        assert runs.unreached(db) == []
