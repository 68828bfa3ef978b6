"""Claiming a job costs the same whatever waits behind it."""

from __future__ import annotations

import statistics
import time
import uuid
from datetime import timedelta
from typing import Any

import pymongo
import pytest

from mongotorch.mongo.connection import open_address
from mongotorch.settings import read_settings
from mongotorch.store import Jobs

FEW, MANY = 100, 100_000
CLAIMS = 40
MOST_APART = 1.5


def queue(database: Any, count: int) -> Jobs:
    """So many queued jobs, of ten priorities."""
    jobs = Jobs(database)
    jobs.ensure_indexes()
    first, _ = jobs.add(component="c", type_id="trainer", identifier="t")
    template = database["mt.jobs"].find_one({"_id": first})
    for start in range(1, count, 10_000):
        database["mt.jobs"].insert_many(
            {
                **template,
                "_id": str(uuid.uuid4()),
                "component": f"c{n}",
                "priority": n % 10,
                "created": template["created"] + timedelta(milliseconds=n),
            }
            for n in range(start, min(start + 10_000, count))
        )
    return jobs


def took_s(jobs: Jobs) -> float:
    """How long a claim takes; the job ends at once, since each job that runs costs a claim a look at its lease."""
    began = time.perf_counter()
    claimed = jobs.claim(worker="w", lease_s=600)
    took = time.perf_counter() - began
    assert claimed is not None
    assert jobs.succeed(claimed["_id"], claimed["attempt"], result="r")
    return took


def test_a_claim_behind_a_hundred_thousand_jobs_takes_as_long_as_behind_a_hundred(mongod: str) -> None:
    name = "t" + uuid.uuid4().hex[:10]
    address = f"mongodb://{mongod}/{{}}?replicaSet=rs0"
    settings = read_settings()
    with (
        open_address(address.format(f"{name}few"), settings) as few,
        open_address(address.format(f"{name}many"), settings) as many,
    ):
        try:
            short, long = queue(few.database, FEW), queue(many.database, MANY)
            took_s(short), took_s(long)  # the first claim plans the query
            # In turns, so that what else the machine does is in both.
            pairs = [(took_s(short), took_s(long)) for _ in range(CLAIMS)]
            ratio = statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)

            many.database.command("profile", 2)
            took_s(long)
            many.database.command("profile", 0)
            looked = many.database["system.profile"].find_one({"command.findAndModify": "mt.jobs"})
        finally:
            with pymongo.MongoClient[dict[str, Any]](f"mongodb://{mongod}/?replicaSet=rs0") as client:
                client.drop_database(f"{name}few")
                client.drop_database(f"{name}many")
    # What the server looked at decides; time is what people see, and leaves room for noise.
    assert looked is not None
    assert looked["docsExamined"] <= 4, looked
    assert not looked.get("hasSortStage"), looked
    assert ratio < MOST_APART * 1.3, ratio


@pytest.mark.parametrize("waiting", [0, 50])
def test_jobs_that_run_or_wait_for_later_are_skipped_in_the_index(mongod: str, waiting: int) -> None:
    """Those of a higher priority that are not ready cost the claim a look at each, and no more."""
    name = "t" + uuid.uuid4().hex[:10]
    with open_address(f"mongodb://{mongod}/{name}?replicaSet=rs0", read_settings()) as connection:
        database = connection.database
        try:
            jobs = queue(database, 2_000)
            ids = [job["_id"] for job in database["mt.jobs"].find({"priority": 9}, {"_id": 1})][:waiting]
            later = database.command("hello")["localTime"] + timedelta(hours=1)
            database["mt.jobs"].update_many({"_id": {"$in": ids}}, {"$set": {"ready_at": later}})
            took_s(jobs)
            database.command("profile", 2)
            took_s(jobs)
            database.command("profile", 0)
            looked = database["system.profile"].find_one({"command.findAndModify": "mt.jobs"})
        finally:
            connection.client.drop_database(name)
    assert looked is not None
    assert looked["docsExamined"] <= waiting + 4, looked
