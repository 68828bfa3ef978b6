"""Schedulers that are killed at random: each firing makes exactly one job, whoever leads when."""

from __future__ import annotations

import random
import threading
import time

import pytest
from tests import run_processes as runs

from mongotorch import Datalayer, NewDocuments, Schedule, TorchTrainer

pytestmark = pytest.mark.fault

SCHEDULES, SCHEDULERS = 1000, 3


def test_a_thousand_due_triggers_make_a_thousand_jobs_though_schedulers_are_killed(server_uri: str) -> None:
    with Datalayer.connect(server_uri, **runs.SETTINGS) as db:
        runs.fill(db, 50)
        trainer = runs.trainer(db, "m", in_memory=True)
        apply_many(db, trainer)
        db["rows"].raw.insert_one({"_id": 10_000, "x": [0.0] * 6, "y": 0})
        killed = torment(server_uri, db)
        assert killed >= 5
        fired = list(db["mt.jobs"].raw.aggregate([{"$sortByCount": "$identifier"}]))
        assert len(fired) == SCHEDULES, "none was lost"
        assert {row["count"] for row in fired} == {1}, "none fired twice"
        assert {document["firings"] for document in db.schedules()} == {1}
        assert all(document["pending"] is None for document in db.schedules())


def apply_many(db: Datalayer, trainer: TorchTrainer) -> None:
    """A thousand schedules, each due with the next document."""
    first = Schedule("s-0", trainer=trainer, trigger=NewDocuments(1))
    db.apply(first)
    # One stored trainer and model for all of them: applying each alone would look at the blobs again and again.
    known = db.schedules()[0]
    components, schedules = db["mt.components"].raw, db["mt.schedules"].raw
    stored = components.find_one({"type_id": "schedule"})
    assert stored is not None
    for n in range(1, SCHEDULES):
        identity = {"_id": f"{stored['_id']}-{n}", "identifier": f"s-{n}"}
        components.insert_one({**stored, **identity})
        schedules.insert_one({**known, "_id": f"s-{n}", "component": identity["_id"], "life": f"life-{n}"})


def torment(uri: str, db: Datalayer) -> int:
    """Run three schedulers, kill one after the other, until all schedules have their job; how many were killed."""
    choose, pause = random.Random(3), threading.Event()
    processes = [runs.start(runs.schedule, uri) for _ in range(SCHEDULERS)]
    killed, seen, deadline = 0, 0, time.monotonic() + 240
    while db["mt.jobs"].count() < SCHEDULES or any(document["pending"] for document in db.schedules()):
        assert time.monotonic() < deadline, "schedules were lost"
        pause.wait(choose.uniform(0.5, 2.0))
        jobs = db["mt.jobs"].count()
        if jobs == seen:
            continue  # on a busy machine nobody leads yet: killing on would only test patience
        seen = jobs
        victim = choose.choice(processes)
        victim.kill()
        victim.join()
        killed += 1
        processes.remove(victim)
        processes.append(runs.start(runs.schedule, uri))
    for process in processes:
        process.kill()
        process.join()
    return killed
