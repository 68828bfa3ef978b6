"""A year of hourly versions and of jobs: what they take, what retention leaves, and how long asking takes then.

`pytest -m soak -s tests/services/test_growth.py` prints the figures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import COLLECTION, fill, trainer
from tests.web.pages import client
from typer.testing import CliRunner

from mongotorch import Datalayer
from mongotorch.cli import app
from mongotorch.data import Members, StoredMembers, id_key
from mongotorch.store import Jobs

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
NEW = 100  # documents a version
AT_ONCE = 5_000  # records that are inserted together
BEGUN = datetime(2026, 1, 1)
ONE = "the one"
"""The `_id` of the document that is asked about."""


def quickest(ask: Callable[[], Any], times: int = 3) -> float:
    """The seconds of the quickest of some calls."""

    def once() -> float:
        began = time.perf_counter()
        ask()
        return time.perf_counter() - began

    return min(once() for _ in range(times))


def sets(documents: int, versions: int) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.uint64]]]]:
    """The rows of one set of documents after the other, and its number: in each some come and as many go."""
    draw = np.random.default_rng(0)
    rows = np.unique(draw.integers(0, 2**63, (documents, 2), np.uint64), axis=0)
    for version in range(versions):
        rows = rows.copy()
        # What comes lies in the order where what goes was: so nothing has to be sorted.
        at = np.unique(draw.integers(1, documents - 1, NEW))
        at = at[np.diff(at, prepend=0) > 1]
        rows[at, 0] = rows[at - 1, 0] + 1 + (rows[at + 1, 0] - rows[at - 1, 0] - 1) // 2
        rows[at, 1] = draw.integers(0, 2**63, len(at), np.uint64)
        if version == versions // 2:
            rows[np.searchsorted(rows[:, 0], id_key(ONE)) - 1] = id_key(ONE), 1
        yield version, rows


def insert_versions(db: Datalayer, documents: int, versions: int) -> list[int]:
    """Versions from 2 on, as hourly retraining publishes them; those that were trained on `ONE`."""
    published = db["mt.components"].raw.find_one({"identifier": "m", "version": 1})
    assert published is not None
    store, before, key = db._services.catalog.blobs, None, id_key(ONE)
    known, records, blobs = [], [], []
    for number, rows in sets(documents, versions):
        version = number + 2
        made = StoredMembers.made(Members(count=len(rows), digest=f"{version:064x}", rows=rows), before)
        blobs += [blob for name, blob in made.blobs.items() if before is None or name not in before.blobs]
        before = made
        data = {**published["data"], "members": made.name, "train": {"count": len(rows), "digest": made.name}}
        record = {"_id": f"v{version}", "version": version, "data": data, "blobs": sorted(made.blobs)}
        created = {"created": BEGUN + timedelta(hours=version), "job": f"j{version}"}
        records.append({**published, **record, **created})
        at = np.searchsorted(rows[:, 0], key)
        if at < len(rows) and rows[at, 0] == key:
            known.append(version)
        if len(records) == NEW or number == versions - 1:
            store.put_all(blobs)
            db["mt.components"].raw.insert_many(records)
            records, blobs = [], []
    return known


def insert_jobs(db: Datalayer, count: int, versions: int) -> None:
    """Jobs that have ended in the year up to now, each with a measurement; the first ones published versions."""
    jobs, metrics = db["mt.jobs"].raw, db["mt.metrics"].raw
    job, measured = jobs.find_one({"status": "succeeded"}), metrics.find_one({})
    assert job is not None
    assert measured is not None
    now = Jobs(jobs.database)._clock.now()
    for start in range(0, count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, count))
        ids = [f"j{n}" if n < versions + 2 else f"{n:032x}" for n in numbers]
        times = [now - timedelta(days=365) * (1 - n / count) - timedelta(minutes=5) for n in numbers]
        fields = ["created", "started", "finished"]
        outcomes = [{} if n % 20 else {"status": "failed"} for n in numbers]
        jobs.insert_many(
            [
                {**job, "_id": name, "component": f"c{name}", **dict.fromkeys(fields, at), **outcome}
                for name, at, outcome in zip(ids, times, outcomes, strict=True)
            ],
            ordered=False,
        )
        metrics.insert_many(
            [{**measured, "_id": f"{name}:1", "job": name, "at": at} for name, at in zip(ids, times, strict=True)],
            ordered=False,
        )


def storage(db: Datalayer) -> str:
    """What each collection of records takes, in words."""
    found = []
    for name in ("mt.components", "mt.artifacts.chunks", "mt.jobs", "mt.metrics"):
        stats = db["x"].raw.database.command("collStats", name)
        free = stats["wiredTiger"]["block-manager"]["file bytes available for reuse"]
        sizes = {"documents": stats["size"], "file": stats["storageSize"], "of it free": free}
        sizes["indexes"] = stats["totalIndexSize"]
        words = ", ".join(f"{what} {nbytes / 1e6:,.0f} MB" for what, nbytes in sizes.items())
        found.append(f"  {name}: {stats['count']:,} records, {words}")
    return "\n".join(found)


def asked(db: Datalayer, job: str) -> dict[str, float]:
    """How many seconds each question takes."""
    jobs = Jobs(db["mt.jobs"].raw.database)
    run = CliRunner()
    with client(db) as web:
        questions: dict[str, Callable[[], Any]] = {
            "load": lambda: db.load("model", "m", 1),
            "load the newest": lambda: db.load("model", "m"),
            "show": lambda: db.show("model", "m"),
            "trained_on": lambda: db.trained_on(ONE, collection=COLLECTION),
            "jobs": db.jobs,
            "jobs that failed": lambda: db.jobs(status="failed"),
            "jobs of a name": lambda: db.jobs(identifier="t"),
            "job": lambda: db.job(job),
            "claim": lambda: jobs.claim(worker="w", lease_s=1.0),
            "jobs that ended lately": lambda: jobs.ended(jobs._clock.now() - timedelta(minutes=10)),
            "mongotorch jobs": lambda: run.invoke(app, ["jobs", "--uri", db.uri], catch_exceptions=False),
            "page of runs": lambda: web.get("/"),
            "page of failed runs": lambda: web.get("/?status=failed"),
            "page of a model": lambda: web.get("/models/m"),
            "page of schedules": lambda: web.get("/schedules"),
        }
        return {name: quickest(ask) for name, ask in questions.items()}


@contextmanager
def working(uri: str) -> Iterator[list[float]]:
    """Jobs that come, are claimed and end all the time; the seconds of each."""
    ended, took = threading.Event(), [0.0]

    def work() -> None:
        with Datalayer.connect(uri, progress=False) as db:
            jobs, n = Jobs(db["mt.jobs"].raw.database), 0
            while not ended.wait(0.02):
                began, n = time.perf_counter(), n + 1
                name, _ = jobs.add(component=f"beside {n}", type_id="trainer", identifier="beside")
                claimed = jobs.claim(worker="w", lease_s=60.0)
                assert claimed is not None
                assert jobs.succeed(name, claimed["attempt"], result="none")
                took.append(time.perf_counter() - began)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()


def show(title: str, took: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items()))


@pytest.mark.parametrize(
    ("documents", "versions", "jobs"),
    [(20_000, 2_000, 20_000), (1_000_000, 10_000, 1_000_000)],
    ids=["a fortieth", "a year"],
)
def test_a_year_is_small_and_answers_in_a_second(
    server_uri: str, tmp_path: Path, documents: int, versions: int, jobs: int
) -> None:
    given: dict[str, Any] = {"cache_dir": tmp_path, "progress": False, "valid_fraction": 0.2}
    with Datalayer.connect(server_uri, keep_jobs_days=30, **given) as db:
        job = db.apply(trainer(fill(db), max_iterations=4))
        job.result()
        began = time.monotonic()
        known = insert_versions(db, documents, versions)
        print(f"\n{versions:,} versions of {documents:,} documents in {time.monotonic() - began:,.0f} s")
        began = time.monotonic()
        insert_jobs(db, jobs, versions)
        print(f"{jobs:,} jobs in {time.monotonic() - began:,.0f} s")
        look(db, server_uri, known, job=job.uuid, most_bytes=0.1 * 16 * documents * versions)


def look(db: Datalayer, uri: str, known: list[int], *, job: str, most_bytes: float) -> None:
    """Say what there is, collect the garbage, and look whether the rest is right and quickly found."""
    files, jobs = db["mt.artifacts.files"].raw, db["mt.jobs"].raw
    kept = {one["job"] for one in db["mt.components"].raw.find({}, {"job": 1}) if "job" in one}
    print(storage(db))
    show("before retention", asked(db, job))
    nbytes = sum(file["length"] for file in files.find({}, {"length": 1}))
    began = time.monotonic()
    with working(uri) as beside:
        removed = db.gc().jobs
    took = time.monotonic() - began
    middle, worst = float(np.median(beside)), max(beside)
    print(
        f"retention removed {removed:,} jobs in {took:,.0f} s; beside it a job took {middle:.3f} s, {worst:.2f} s"
    )
    print(storage(db))
    show("after retention", after := asked(db, job))
    newest = db["mt.components"].raw.find_one({"identifier": "m"}, sort=[("version", -1)])
    assert newest is not None
    get = db._services.catalog.blobs.get_many
    read = quickest(lambda: StoredMembers.read(newest["data"]["members"], get))
    print(f"blobs {nbytes / 1e6:,.0f} MB; the newest set is read in {read:.2f} s")
    assert sorted(one.version for one in db.trained_on(ONE, collection=COLLECTION)) == known
    old = {"finished": {"$lt": Jobs(jobs.database)._clock.now() - timedelta(days=31)}}
    assert {one["_id"] for one in jobs.find(old, {"_id": 1})} <= kept
    assert nbytes < most_bytes
    assert worst < 1.0, "a worker does not wait for retention"
    assert {name: seconds for name, seconds in after.items() if seconds > 1.0} == {}
