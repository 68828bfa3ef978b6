"""What a page costs: every query uses an index, and many runs and versions open quickly.

Times are generous, since the machine may be shared; what must not be is a query that reads a whole collection.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymongo
import pytest
from bson import Int64
from tests.helpers import COLLECTION
from tests.web.pages import as_json, client, fill_with_runs, insert_runs, pages_of

from mongotorch import Datalayer
from mongotorch.store.listing import MOST_TEXT, shown

GENEROUS_S = 3.0  # for a page that takes a tenth of it on a machine of its own


@contextmanager
def without_table_scans(address: str) -> Iterator[None]:
    """The server refuses queries that no index answers."""
    with pymongo.MongoClient[dict[str, Any]](address) as admin:
        admin.admin.command({"setParameter": 1, "notablescan": True})
        try:
            yield
        finally:
            admin.admin.command({"setParameter": 1, "notablescan": False})


def test_every_query_of_every_page_uses_an_index(server_uri: str, mongod: str) -> None:
    with Datalayer.connect(server_uri, valid_fraction=0.2, progress=False) as db:
        job, model = fill_with_runs(db)
        insert_runs(db, 50, entries=5)
        addresses = [address for address in pages_of(db, job, model) if "gc=1" not in address]
        with without_table_scans(f"mongodb://{mongod}/?replicaSet=rs0"):
            with pytest.raises(pymongo.errors.OperationFailure, match="notablescan"):  # it does refuse
                list(db[COLLECTION].raw.database["mt.jobs"].find({"worker": "x"}))
            with client(db) as web:
                for address in [*addresses, "/?status=failed", "/?identifier=trainer-1", "/?skip=10"]:
                    assert web.get(as_json(address)).status_code == 200, address


def test_the_newest_runs_are_not_sorted_in_memory(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        insert_runs(db, 300)
        jobs = db[COLLECTION].raw.database["mt.jobs"]
        plan = jobs.find({}).sort([("created", -1), ("_id", -1)]).limit(200).explain()
        assert "SORT" not in str(plan["queryPlanner"]["winningPlan"]).replace("sortPattern", "")
        assert plan["executionStats"]["totalDocsExamined"] == 200


def quickest(read: Any, times: int = 3) -> float:
    def once() -> float:
        begun = time.perf_counter()
        read()
        return time.perf_counter() - begun

    return min(once() for _ in range(times))


def test_a_thousand_runs_open_quickly(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    is_mock = db.uri.startswith("mongomock")  # which counts and sorts in Python
    runs = insert_runs(db, 100 if is_mock else 1000, entries=5 if is_mock else 200)
    with client(db) as web:
        for address in (
            "/",
            "/?limit=1000",
            f"/runs/{runs[7]}",
            f"/compare?format=json&run={'&run='.join(runs[:10])}",
        ):
            assert quickest(lambda at=address: web.get(at)) < GENEROUS_S, address
        assert web.get("/?limit=1000").text.count('name="run"') == min(len(runs) + 1, 1000)
        assert job
        assert model


def test_a_hundred_versions_open_quickly(db: Datalayer) -> None:
    _, model = fill_with_runs(db)
    database = db[COLLECTION].raw.database
    stored = database["mt.components"].find_one({"_id": model.uuid})
    more = [{**stored, "_id": f"v{n}", "version": n, "job": f"j{n}"} for n in range(2, 102)]
    database["mt.components"].insert_many(more)
    with client(db) as web:
        assert quickest(lambda: web.get("/models/m")) < GENEROUS_S
        assert web.get("/models/m").text.count('name="old"') == 102


def test_memory_does_not_grow_with_the_pages_that_are_asked_for(db: Datalayer) -> None:
    job, _ = fill_with_runs(db)
    insert_runs(db, 100, entries=20)
    addresses = ("/", f"/runs/{job}", "/compare?run=job-00001", "/models/m", "/schedules", "/nowhere", "/runs/x")
    with client(db) as web:
        for _ in range(3):
            for address in addresses:
                web.get(address)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(8):
                for address in addresses:
                    web.get(address)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 3_000_000


@pytest.mark.parametrize("value", ["x" * 10_000_000, ["x" * 1000] * 100_000, {"x" * 100_000: "y"}])
def test_what_is_shown_is_cut(value: Any) -> None:
    text = str(shown(value))
    assert len(text) < 60 * MOST_TEXT


def test_passwords_are_hidden() -> None:
    assert "secret" not in str(shown({"why": "cannot reach mongodb://user:secret@host/db"}))


@pytest.mark.parametrize("value", [2**40, -(2**40), 2**53, 2**62, True])
def test_the_long_integers_of_a_server_are_shown_at_once(value: int) -> None:
    shown_value = shown({"n": Int64(value)})["n"]
    assert shown_value == (value if abs(value) <= 2**53 else str(value))
    assert type(shown_value) is not Int64
