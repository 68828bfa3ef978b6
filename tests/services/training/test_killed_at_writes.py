"""A worker that dies at any write of a run, before it or after it: the next one ends with the same bits.

The writes are enumerated, not sampled: claim, checkpoints, points, heartbeats, blobs, documents, the end.
"""

from __future__ import annotations

import pytest
from tests import run_processes as runs

from mongotorch import Datalayer, TorchModel

pytestmark = pytest.mark.fault

STEPS = 12
MOST_WRITES = 400


def die_at(uri: str, db: Datalayer, at: int, *, after: bool) -> tuple[TorchModel, bool]:
    """A run whose first worker dies at one write; the model that is published in the end, and whether it died."""
    name = f"dies-{'after' if after else 'before'}-{at}"
    job = db.apply(runs.trainer(db, name, in_memory=True, steps=STEPS))
    process = runs.start(runs.work_once, uri, at, after)
    process.join(60)
    died = process.exitcode == -9
    if not died:
        assert process.exitcode == 0
        return job.result(timeout=10), False
    visible = db.show("model", name)
    assert visible in ([0], [0, 1]), "no half version is visible"
    for version in visible:
        db.load("model", name, version)
    runs.finish(db, job.uuid)
    model: TorchModel = job.result(timeout=10)
    assert db.show("model", name) == [0, 1]
    assert db.load("model", name).uuid == model.uuid
    return model, True


# A death before a write leaves what one after the write before it leaves: the long runs do both, at each write.
@pytest.mark.parametrize(
    ("after", "step"),
    [pytest.param(False, 1, marks=pytest.mark.soak), pytest.param(True, 1, marks=pytest.mark.soak), (True, 5)],
    ids=["before each", "after each", "after every fifth"],
)
def test_a_worker_that_dies_at_any_write_leaves_a_run_that_ends_with_the_same_bits(
    server_uri: str, after: bool, step: int
) -> None:
    settings = {**runs.SETTINGS, "lease_s": 0.3}
    with Datalayer.connect(server_uri, **settings) as db:
        runs.fill(db, 60)
        whole, died = die_at(server_uri, db, MOST_WRITES, after=after)
        assert not died
        deaths = 0
        for at in range(1, MOST_WRITES, step):
            model, died = die_at(server_uri, db, at, after=after)
            assert runs.same(runs.weights(model), runs.weights(whole)), at
            if not died:
                break
            deaths += 1
        assert deaths >= 10 // step, "a run has at least so many writes"
        assert db["mt.checkpoints"].count() == 0
        db.gc(grace_s=0)
        assert runs.unreached(db) == []
