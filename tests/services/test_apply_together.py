"""The same content applied many times, one after the other or at once: one training, and a job for everybody."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.helpers import fill, trainer

from mongotorch import Datalayer, TorchTrainer


@pytest.mark.parametrize("compute", ["local", "queue"])
def test_twelve_at_once_are_one_training(db: Datalayer, uri: str, compute: str) -> None:
    select = fill(db)
    barrier = threading.Barrier(12)

    def apply(applied: TorchTrainer) -> str:
        with Datalayer.connect(uri, valid_fraction=0.2, progress=False, compute=compute) as own:
            barrier.wait(60)
            job = own.apply(applied)
            if compute == "local":
                assert job.result(timeout=120).version == 1
            return job.uuid

    # A uuid of its own each: the content is what is the same.
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(apply, [trainer(select) for _ in range(12)]))

    assert db["mt.jobs"].raw.count_documents({}) == 1
    assert db.show("trainer", "t") == ([0, 1] if compute == "local" else [0])
    assert db.show("model", "m") == ([0, 1] if compute == "local" else [0])


def test_force_trains_after_many_runs(db: Datalayer) -> None:
    applied = trainer(fill(db), max_iterations=1, validation_interval=None)
    runs = 104  # more than the versions that were once looked through
    versions = [db.apply(applied, force=True).result().version for _ in range(runs)]
    assert versions == list(range(1, runs + 1))
