"""A process that is killed at any write of a garbage collection, before it or after it: SIGKILL, on a real server.

The writes are enumerated, not sampled. Always: the versions that were there load, and the next collection leaves
nothing over.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from pymongo import monitoring
from tests import run_processes as runs

from mongotorch import Datalayer, TorchModel
from mongotorch.store import BlobStore, Checkpoints, Components, Jobs
from mongotorch.store.blobs import CHUNK_BYTES

pytestmark = pytest.mark.fault

MOST_WRITES = 100
SEEDS = (0, 1)  # of the two versions that must outlive every collection


def collect(uri: str, at: int, after: bool) -> None:
    """Collect once; be killed at one of the writes on the way."""
    monitoring.register(runs.Killer(at, after=after))
    with Datalayer.connect(uri) as db:
        db.gc(grace_s=0)


def net(seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(64, 64)


def litter(db: Datalayer, number: int) -> None:
    """One of everything that a collection takes away, whatever it has to do for that."""
    database: Any = db["mt.jobs"].raw.database
    blobs, components, jobs = BlobStore(database), Components(database), Jobs(database)
    job, _ = jobs.add(component=f"c{number}", type_id="trainer", identifier="t")
    claimed = jobs.claim(worker="w", lease_s=600, job_id=job)
    assert claimed is not None
    state = blobs.put(f"state {number}".encode())
    assert Checkpoints(database).put(job, claimed["attempt"], 1, {}, [state])
    jobs.cancel(job)
    half = blobs.put(f"half {number}".encode())
    document = {"_id": f"half {number}", "type_id": "model", "identifier": "half", "digest": "d", "refs": []}
    components.publish({**document, "blobs": [half], "anchor": "nothing"})
    blobs.put(f"{number:06}".encode() * CHUNK_BYTES)
    database["mt.artifacts.chunks"].insert_one({"files_id": f"dead {number}", "n": 0, "data": b"x"})


def the_versions_load(db: Datalayer) -> None:
    assert db.show("model") == ["kept"]
    assert db.show("model", "kept") == list(SEEDS)
    for seed in SEEDS:
        loaded: Any = db.load("model", "kept", seed)
        assert torch.equal(loaded.object.weight, net(seed).weight)


def counts(db: Datalayer) -> dict[str, int]:
    """How many documents each of the collections has that `gc` cleans."""
    names = ("mt.components", "mt.artifacts.files", "mt.artifacts.chunks", "mt.checkpoints", "mt.garbage")
    return {name: db[name].raw.count_documents({}) for name in names}


# A death before a write leaves what a death after the write before it leaves: the long runs do both.
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.soak), True], ids=["before", "after"])
def test_a_collection_that_is_killed_at_any_write_loses_no_version_and_the_next_leaves_nothing_over(
    server_uri: str, after: bool
) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        for seed in SEEDS:
            db.apply(TorchModel("kept", object=net(seed)))
        clean = counts(db)
        deaths = 0
        for at in range(1, MOST_WRITES):
            litter(db, at)
            assert counts(db)["mt.components"] == clean["mt.components"] + 1
            process = runs.start(collect, server_uri, at, after)
            process.join(60)
            the_versions_load(db)
            db.gc(grace_s=0)
            the_versions_load(db)
            assert runs.unreached(db) == [], at
            assert counts(db) == clean, at
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            deaths += 1
        else:
            pytest.fail("no collection came to its end")
        assert deaths >= 10, "a collection of all this has at least so many writes"
