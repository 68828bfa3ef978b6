"""A run that reads secondaries, of which one lags behind, is trained on the documents that its record names."""

from __future__ import annotations

import threading
import time

import pytest
from pymongo import WriteConcern
from tests.helpers import COLLECTION, Recorder, number_of, points, trainer
from tests.worker.test_elections import ReplicaSet

from mongotorch import Datalayer

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("workers", [0, 1])
def test_a_member_that_lags_behind_is_waited_for(replica_set: ReplicaSet, workers: int) -> None:
    uri = replica_set.uri.replace("w=1", "readPreference=secondary")
    with Datalayer.connect(uri, progress=False) as db:
        raw = db[COLLECTION].raw.with_options(write_concern=WriteConcern(3, wtimeout=60_000))
        raw.insert_many(points(120))
        lagging = next(port for port in replica_set.members if port != replica_set.primary())
        with replica_set.client(lagging) as member:
            member.admin.command("fsync", lock=True)  # as a backup does
            unlock = threading.Timer(3.0, lambda: member.admin.command("fsyncUnlock"))
            unlock.start()  # whatever fails meanwhile
            try:
                rows = [{**row, "_id": 1000 + row["_id"], "n": 1000 + row["n"]} for row in points(120)]
                raw.with_options(write_concern=WriteConcern(2)).insert_many(rows)
                began = time.monotonic()
                for seed in range(6):
                    Recorder.steps.clear()
                    ways = {"in_memory": False, "prefetch_size": 20, "prefetch_factor": 2, "seed": seed}
                    loader = {"batch_size": 16, "shuffle": True, "num_workers": workers}
                    steps = {"max_iterations": 15, "validation_interval": None}
                    data = {"key": ("x", "n"), "objective": number_of, "loader_kwargs": loader}
                    job = db.apply(trainer(db[COLLECTION].find(), Recorder, **data, **ways, **steps))
                    version = db.show("model", "m", job.result().version)
                    read = {n for step in Recorder.steps for n in step}
                    assert version["data"]["train"]["count"] == len(read) > 150
                assert time.monotonic() - began > 2.0, "no run asked the member that lagged behind"
            finally:
                unlock.join()
