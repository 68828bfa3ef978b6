"""Which documents a set holds: the same digest in any order, and differences that are those of set algebra."""

from __future__ import annotations

import datetime
import random
import uuid
from typing import Any

import bson
import numpy as np
import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import COLLECTION, points

from mongotorch import Query
from mongotorch.data import Members, scan_members, unseen
from mongotorch.data.training_set import id_key, members_of
from mongotorch.errors import DataError, QueryError
from mongotorch.mongo.connection import open_address
from mongotorch.mongo.server_features import watermark
from mongotorch.settings import read_settings

ALL = Query.find(COLLECTION)
KEY = ("x", "y")
MIXED = [
    *(1, 2.5, Int64(2**40), "1", b"1", True, None, Decimal128("0.1"), datetime.datetime(2020, 1, 2)),
    *(ObjectId("65a000000000000000000001"), {"a": 1}, {"a": "1"}, Binary(b"1" * 16, 4), Timestamp(1, 1)),
]
NOT_IN_MOCK = (bool, Decimal128)  # mongomock takes True for 1, and cannot hash the other


def scan(database: Any, query: Query = ALL, key: Any = KEY, **given: Any) -> Members:
    return scan_members(database, query, key, **given)


def put(database: Any, documents: list[dict[str, Any]], seed: int | None = None) -> None:
    mixed = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(mixed)
    database[COLLECTION].drop()
    database[COLLECTION].insert_many(mixed)


def mixed_ids(database: Any) -> list[Any]:
    """`_id`s of all types that the backend can hold together."""
    mock = type(database).__module__.startswith("mongomock")
    return [one for one in MIXED if not mock or type(one) not in NOT_IN_MOCK]


def counts(before: Members, after: Members) -> tuple[int, int, int]:
    found = before.difference(after)
    return found.added, found.removed, found.changed


def test_the_order_of_insertion_does_not_matter_and_any_change_does(database: Any) -> None:
    documents = [*points(50), *({"_id": one, "x": [0.5], "y": 1} for one in mixed_ids(database)[1:])]
    put(database, documents, seed=1)
    first = scan(database)
    put(database, documents, seed=2)
    second = scan(database)

    assert first.count == len(documents)
    assert (first.count, first.digest) == (second.count, second.digest)
    assert first.to_bytes() == second.to_bytes()
    assert counts(first, second) == (0, 0, 0)
    assert not first.difference(second)

    database[COLLECTION].update_one({"_id": 3}, {"$set": {"y": 2}})
    assert scan(database).digest != first.digest
    assert counts(first, scan(database)) == (0, 0, 1)
    database[COLLECTION].update_one({"_id": 3}, {"$set": {"y": 0}})
    assert scan(database).digest == first.digest


def test_inserts_deletes_and_updates_are_told_apart(database: Any) -> None:
    put(database, points(40))
    before = scan(database)
    database[COLLECTION].delete_many({"_id": {"$lt": 3}})
    database[COLLECTION].insert_many({"_id": 100 + n, "x": [1.0], "y": 0} for n in range(5))
    database[COLLECTION].update_many({"_id": {"$gte": 30, "$lt": 37}}, {"$set": {"x": [9.0]}})

    after = scan(database)

    assert counts(before, after) == (5, 3, 7)
    assert counts(after, before) == (3, 5, 7)
    assert (before.count, after.count) == (40, 42)


def test_fields_outside_of_the_key_and_documents_outside_of_the_query_do_not_count(database: Any) -> None:
    put(database, [{**document, "_fold": "train" if document["n"] % 2 else "valid"} for document in points(30)])
    before = scan(database, ALL.fold("train"))
    database[COLLECTION].update_many({}, {"$set": {"note": "new"}})
    database[COLLECTION].delete_many({"_fold": "valid"})

    assert before.count == 15
    assert scan(database, ALL.fold("train")).digest == before.digest
    assert scan(database, ALL.fold("train"), ("x", "n")).digest != before.digest


def test_sorted_limited_and_skipped_queries_and_pipelines_are_read_as_they_say(database: Any) -> None:
    put(database, points(30), seed=3)
    stages: list[dict[str, Any]] = [{"$match": {"n": {"$gte": 5}}}, {"$sort": {"n": 1}}, {"$limit": 10}]
    some = {n: scan(database, Query.find(COLLECTION, {"n": {"$gte": 5, "$lt": 5 + n}})).digest for n in (3, 10)}

    assert scan(database, ALL.sort("n", -1)).digest == scan(database).digest
    assert scan(database, ALL.sort("n").skip(5).limit(3)).digest == some[3]
    assert scan(database, Query.aggregate(COLLECTION, stages)).digest == some[10]


def test_a_cursor_that_dies_loses_and_repeats_nothing(server_uri: str) -> None:
    with open_address(server_uri, read_settings()) as connection:
        put(connection.database, [{"_id": n, "x": n} for n in range(12_000)])
        whole = scan(connection.database, key="x")
        data = {"failCommands": ["getMore"], "closeConnection": True, "appName": "mongotorch"}
        before = connection.client.admin.command("configureFailPoint", "failCommand", mode="off")
        connection.client.admin.command("configureFailPoint", "failCommand", mode={"times": 2}, data=data)

        again = scan(connection.database, key="x")

        after = connection.client.admin.command("configureFailPoint", "failCommand", mode="off")
        assert after["count"] - before["count"] == 2, "the cursor died"
        assert (again.count, again.digest) == (12_000, whole.digest)


def test_a_query_that_the_server_refuses_is_an_error(server_uri: str) -> None:
    with open_address(server_uri, read_settings()) as connection, pytest.raises(QueryError, match="nope"):
        scan(connection.database, Query.aggregate(COLLECTION, [{"$nope": {}}]))


def test_a_pipeline_may_give_no_id_or_one_id_several_times(database: Any) -> None:
    put(database, [{"_id": n, "x": [n, n + 1], "y": 0} for n in range(10)])
    unwound = Query.aggregate(COLLECTION, [{"$unwind": "$x"}])
    nameless = Query.aggregate(COLLECTION, [{"$project": {"_id": 0, "x": 1, "y": 1}}])
    before = scan(database, unwound), scan(database, nameless)
    assert (before[0].count, before[1].count) == (20, 10)
    assert before[1].difference(scan(database, nameless)) == before[0].difference(scan(database, unwound))

    database[COLLECTION].update_one({"_id": 4}, {"$set": {"x": [4, 6]}})

    assert counts(before[0], scan(database, unwound)) == (0, 0, 1)
    assert counts(before[1], scan(database, nameless)) == (1, 1, 0)


def test_documents_without_an_id_are_told_apart_from_the_id_null(database: Any) -> None:
    put(database, [{"_id": None, "x": 1}])

    found = scan(database, key="x")

    assert found.holds(None)
    assert not scan(database, Query.aggregate(COLLECTION, [{"$project": {"_id": 0}}]), "x").holds(None)


def test_an_id_is_found_whatever_its_type(database: Any) -> None:
    put(database, [{"_id": one, "x": 1, "y": 1} for one in mixed_ids(database)])
    held = scan(database)

    assert all(held.holds(one) for one in mixed_ids(database))
    assert all(held.holds(one) for one in (Int64(1), 1.0, uuid.UUID(bytes=b"1" * 16)))
    assert held.holds(datetime.datetime(2020, 1, 2, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1))))
    assert not any(held.holds(one) for one in (3, "2", b"2", False, {"a": 2}, ObjectId()))
    with pytest.raises(DataError, match="BSON cannot hold"):
        held.holds(object())


def test_a_blob_gives_the_same_set_back(database: Any) -> None:
    put(database, points(20))
    held = scan(database)

    again = Members.from_bytes(held.to_bytes())

    assert (again.count, again.digest) == (20, held.digest)
    assert np.array_equal(again.ids, held.ids)
    assert again.to_bytes() == held.to_bytes()
    for wrong in (b"", b"mtmember", held.to_bytes()[:-1], b"x" + held.to_bytes()[1:]):
        with pytest.raises(DataError, match="not the members"):
            Members.from_bytes(wrong)


def test_a_large_set_keeps_its_count_and_digest_only(database: Any) -> None:
    put(database, points(20))
    whole, counted = scan(database), scan(database, most=19)

    assert (counted.count, counted.digest, counted.rows) == (20, whole.digest, None)
    assert scan(database, most=20).rows is not None
    for ask in (counted.to_bytes, lambda: counted.holds(1), lambda: whole.difference(counted)):
        with pytest.raises(DataError, match="were not kept"):
            ask()


def test_an_empty_set_is_a_set(database: Any) -> None:
    nothing = scan(database)
    put(database, points(2))

    assert (nothing.count, nothing.digest, nothing.holds(1)) == (0, "0" * 64, False)
    assert counts(nothing, scan(database)) == (2, 0, 0)
    assert Members.from_bytes(nothing.to_bytes()).count == 0


def test_what_a_set_has_not_seen_is_found(database: Any) -> None:
    put(database, [*points(30), {"_id": "a"}, {"_id": ObjectId("65a000000000000000000001")}])
    seen = scan(database, Query.find(COLLECTION, {"n": {"$lt": 27}})).ids

    assert unseen(database, ALL, seen) == [27, 28, 29, "a", ObjectId("65a000000000000000000001")]
    assert unseen(database, ALL, seen, limit=2) == [27, 28]
    assert unseen(database, ALL, seen[:0], limit=3) == [0, 1, 2]
    assert unseen(database, ALL, scan(database).ids) == []


def test_the_watermark_is_after_what_was_written_before(database: Any) -> None:
    times = []
    for n in range(3):
        database[COLLECTION].insert_one({"_id": n})
        times.append(watermark(database))

    mock = type(database).__module__.startswith("mongomock")
    assert {type(time) for time in times} == {datetime.datetime if mock else Timestamp}
    assert times == sorted(times)
    assert mock or len(set(times)) == 3


IDS = st.one_of(
    st.integers(-5, 5),
    st.floats(-2, 2, width=16),
    st.text("ab", max_size=2),
    st.booleans(),
    st.binary(max_size=2),
    st.integers(0, 5).map(lambda n: ObjectId(n.to_bytes(12, "big"))),
    st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2),
)
SETS = st.lists(st.tuples(IDS, st.integers(0, 2)), max_size=12)


def same_id(document_id: Any) -> Any:
    """What MongoDB takes for one `_id`, as something that Python hashes alike."""
    number = isinstance(document_id, int | float) and not isinstance(document_id, bool)
    return float(document_id) if number else bson.encode({"": document_id})


@settings(max_examples=200, deadline=None)
@given(SETS, SETS)
def test_a_difference_is_that_of_set_algebra(first: Any, second: Any) -> None:
    found, expected = [], []
    for documents in (first, second):
        unique = {same_id(one): bson.encode({"_id": one, "x": value}) for one, value in documents}
        found.append(members_of(chunk for chunk in (b"".join(unique.values()),) if chunk))
        expected.append(unique)  # a number that is rewritten as another type of number is a change, too

    before, after = expected
    changed = sum(before[key] != after[key] for key in before.keys() & after.keys())
    assert counts(*found) == (len(after.keys() - before.keys()), len(before.keys() - after.keys()), changed)
    assert (found[0].digest == found[1].digest) == (before == after)
    assert all(found[1].holds(one) == (same_id(one) in after) for one, _ in first)


def test_the_hash_of_an_id_is_the_same_for_ever() -> None:
    pinned = {"a": 5471376321617047279, 5: 5973369693393996862, None: 372149273847722810}

    assert {one: id_key(one) for one in pinned} == pinned
