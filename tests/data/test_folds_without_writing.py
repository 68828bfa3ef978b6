"""Folds of documents that nobody gave one, and folds of queries that give a part of their documents."""

from __future__ import annotations

import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from bson import Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from tests.helpers import trainer

from mongotorch import Datalayer, Query
from mongotorch.data.read.folds import check_select, fold_of, hashed_index_key
from mongotorch.errors import EmptyFoldError, FoldMissingError, StoreError
from mongotorch.query import Query as _Query

COUNT = 600


def documents(count: int = COUNT, **given: Any) -> list[dict[str, Any]]:
    return [{"_id": n, "x": [float(n), 1.0, 2.0, 3.0], "y": n % 3, **given} for n in range(count)]


def executed(db: Datalayer, query: Query) -> list[Any]:
    return [document["_id"] for document in db.execute(query)]


def streamed(db: Datalayer, query: Query, **given: Any) -> list[int]:
    usual: dict[str, Any] = {"key": "x", "batch_size": 32, **given}
    with db.stream(query, **usual) as stream:
        return [int(row[0]) for batch in stream for row in batch]


def expected(ids: Any, fold: str, share: float = 0.05) -> list[Any]:
    return [one for one in ids if fold_of(one, share) == fold]


def contents(db: Datalayer, name: str = "c") -> list[dict[str, Any]]:
    return list(db[name].raw.find().sort("_id", 1))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", [{}, {"in_memory": True}, {"download": True}])
def test_documents_without_a_fold_are_in_the_one_of_their_hash(
    db: Datalayer, mode: dict[str, Any], shuffle: bool
) -> None:
    db["c"].raw.insert_many(documents())
    before = contents(db)
    query = db["c"].find()
    for fold in ("train", "valid"):
        ids = expected(range(COUNT), fold)
        assert executed(db, query.fold(fold)) == ids
        assert sorted(streamed(db, query, fold=fold, shuffle=shuffle, **mode)) == ids
    assert contents(db) == before


def test_they_are_those_that_assign_folds_stores(db: Datalayer) -> None:
    ids: list[Any] = [*range(100), *(str(n) for n in range(100)), *({"a": n, "b": str(n)} for n in range(100))]
    ids += [ObjectId(f"{n:024x}") for n in range(100)] + [n + 0.5 for n in range(100)]
    db["c"].raw.insert_many([{"_id": one} for one in ids])
    computed = {fold: executed(db, db["c"].find().fold(fold)) for fold in ("train", "valid")}
    assert sum(map(len, computed.values())) == len(ids)
    db["c"].assign_folds(0.05)
    for fold, found in computed.items():
        stored = [document["_id"] for document in db["c"].raw.find({"_fold": fold})]
        assert sorted(map(repr, found)) == sorted(map(repr, stored))


def test_stored_folds_come_first_and_the_others_are_hashed(db: Datalayer) -> None:
    rows = documents()
    for row in rows[::2]:
        row["_fold"] = "valid" if row["_id"] % 4 else "train"
    db["c"].raw.insert_many(rows)
    stored = {row["_id"]: row["_fold"] for row in rows if "_fold" in row}
    for fold in ("train", "valid"):
        wanted = [n for n in range(COUNT) if stored.get(n, fold_of(n, 0.05)) == fold]
        assert executed(db, db["c"].find().fold(fold)) == wanted
        assert streamed(db, db["c"].find(), fold=fold) == wanted


def test_a_run_trains_and_writes_nothing_to_the_documents(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents())
    before = contents(db)
    model = db.apply(trainer(db["c"].find(), max_iterations=4)).result()
    assert contents(db) == before
    data = db.show("model", model.identifier, model.version)["data"]
    assert data["train"]["count"] == len(expected(range(COUNT), "train"))
    assert data["valid"]["count"] == len(expected(range(COUNT), "valid"))


def test_something_else_under_fold_is_refused(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents())
    db["c"].raw.update_one({"_id": 7}, {"$set": {"_fold": "test"}})
    for select in (db["c"].find(), db["c"].find().limit(500), db["c"].aggregate([{"$limit": 500}])):
        with pytest.raises(FoldMissingError, match="assign_folds") as caught:
            check_select(db["c"].raw.database, select)
        assert (caught.value.document_id, caught.value.field) == (7, "_fold")
    assert 7 not in [*executed(db, db["c"].find().fold("train")), *executed(db, db["c"].find().fold("valid"))]
    check_select(db["c"].raw.database, db["c"].find({"_fold": {"$ne": "test"}}))


def test_too_few_documents_for_a_validation_say_what_to_do(db: Datalayer) -> None:
    few = [n for n in range(COUNT) if fold_of(n, 0.05) == "train"][:10]
    db["c"].raw.insert_many([{"_id": n, "x": 1.0} for n in few])
    with pytest.raises(EmptyFoldError, match="split="):
        check_select(db["c"].raw.database, db["c"].find())


CUT = {
    "limit": lambda c: c.find().sort("_id", -1).limit(100),
    "limit alone": lambda c: c.find().limit(100),
    "skip": lambda c: c.find().skip(500),
    "skip and limit": lambda c: c.find({"y": 1}).sort("y").skip(50).limit(100),
    "pipeline": lambda c: c.aggregate([{"$sort": {"_id": -1}}, {"$limit": 100}]),
    "projected": lambda c: c.aggregate([{"$sort": {"_id": 1}}, {"$project": {"x": 1}}, {"$limit": 200}]),
    "matched": lambda c: c.aggregate([{"$match": {"y": 2}}, {"$project": {"x": 1}}]),
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_a_fold_is_inside_of_what_the_query_gives(db: Datalayer, name: str, stored: bool) -> None:
    rows = documents()
    if stored:
        for row in rows:
            row["_fold"] = fold_of(row["_id"], 0.3)
    db["c"].raw.insert_many(rows)
    query = CUT[name](db["c"])
    whole = streamed(db, query)
    assert 0 < len(whole) < COUNT
    share = 0.3 if stored else 0.05
    for fold in ("train", "valid"):
        wanted = expected(whole, fold, share)
        assert wanted
        assert streamed(db, query, fold=fold) == wanted
        assert executed(db, query.fold(fold)) == wanted
        assert all("_fold" not in document for document in db.execute(query.fold(fold))) or name not in (
            "projected",
            "matched",
        )


def test_a_fold_that_a_pipeline_sets_is_what_counts(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents(_fold="train"))
    by_y = {"$set": {"_fold": {"$cond": [{"$eq": ["$y", 0]}, "valid", "train"]}}}
    query = db["c"].aggregate([by_y, {"$sort": {"_id": 1}}])
    assert executed(db, query.fold("valid")) == list(range(0, COUNT, 3))
    assert streamed(db, query, fold="train") == [n for n in range(COUNT) if n % 3]
    check_select(db["c"].raw.database, query)


def test_a_limit_of_a_fold_counts_its_documents_alone(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents())
    query = db["c"].find().fold("valid").sort("_id", -1).limit(5)
    assert executed(db, query) == expected(range(COUNT), "valid")[::-1][:5]
    assert streamed(db, query) == executed(db, query)


def test_a_run_of_a_limited_select_stays_inside_of_it(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents())
    select = db["c"].find().sort("_id", -1).limit(300)
    model = db.apply(trainer(select, max_iterations=4)).result()
    data = db.show("model", model.identifier, model.version)["data"]
    inside = range(COUNT - 300, COUNT)
    assert data["train"]["count"] == len(expected(inside, "train"))
    assert data["valid"]["count"] == len(expected(inside, "valid"))
    assert _Query.from_document(data["query"]) == select.fold("train")


@pytest.mark.parametrize("fold", ["train", "valid"])
def test_a_stream_of_a_computed_fold_goes_on_where_it_stopped(db: Datalayer, fold: Any) -> None:
    db["c"].raw.insert_many(documents(2000))
    usual: dict[str, Any] = {"key": "x", "batch_size": 16, "shuffle": True, "fold": fold, "prefetch_size": 50}
    with db.stream(db["c"].find(), **usual) as stream:
        batches = iter(stream)
        first = [next(batches)[:, 0].tolist() for _ in range(3)]
        state = stream.state_dict()
        rest = [batch[:, 0].tolist() for batch in batches]
        again = [batch[:, 0].tolist() for batch in stream]
    with db.stream(db["c"].find(), **usual) as stream:
        stream.load_state_dict(state)
        assert [batch[:, 0].tolist() for batch in stream] == rest
        assert [batch[:, 0].tolist() for batch in stream] == again
    seen = Counter(int(n) for batch in [*first, *rest] for n in batch)
    assert sorted(seen.elements()) == expected(range(2000), fold)
    assert sorted(int(n) for batch in again for n in batch) == expected(range(2000), fold)


def test_what_is_deleted_or_moved_is_missing_from_the_next_epoch(db: Datalayer) -> None:
    db["c"].raw.insert_many(documents())
    valid = expected(range(COUNT), "valid")
    with db.stream(db["c"].find(), key="x", batch_size=4, fold="valid") as stream:
        assert [int(row[0]) for batch in stream for row in batch] == valid
        db["c"].raw.delete_one({"_id": valid[3]})
        db["c"].raw.update_one({"_id": valid[5]}, {"$set": {"_fold": "train"}})
        if not db.uri.startswith("mongomock"):
            left = [n for place, n in enumerate(valid) if place not in (3, 5)]
            assert [int(row[0]) for batch in stream for row in batch] == left


VALUES: list[Any] = [
    *(7, -3, 2.9, -2.9, float("nan"), float("inf"), -1e30, 9.3e18, Int64(2**62), True, False, None, "", "x\0y"),
    *(Decimal128("2.5"), Decimal128("-7.9"), Decimal128("NaN"), Decimal128("1E400"), ObjectId(), uuid.UUID(int=5)),
    *(b"abc", Timestamp(5, 6), MinKey(), MaxKey(), Regex("a", "i"), Code("x"), datetime(2024, 1, 2, tzinfo=UTC)),
    *({}, {"a": 1}, {"a": 1.0}, {"a": {"b": [1, "x", None]}, "c": uuid.UUID(int=7)}, [], [1, {"a": 2.5}]),
    bson.DBRef("c", 5),
]


def test_every_value_is_hashed_as_the_server_hashes_it(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        db["c"].raw.insert_many([{"_id": n, "v": value} for n, value in enumerate(VALUES)])
        found = db["c"].raw.aggregate([{"$sort": {"_id": 1}}, {"$project": {"h": {"$toHashedIndexKey": "$v"}}}])
        for document, value in zip(found, VALUES, strict=True):
            assert document["h"] == hashed_index_key(value), value


@pytest.mark.parametrize("kind", ["view", "time series"])
def test_views_and_time_series_can_be_trained_on(server_uri: str, kind: str) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    with Datalayer.connect(server_uri, progress=False) as db:
        raw = db["c"].raw.database
        rows = [{**row, "_id": ObjectId(f"{row['_id']:024x}"), "at": start} for row in documents()]
        for n, row in enumerate(rows):
            row["at"] += timedelta(minutes=n)
        if kind == "view":
            raw["base"].insert_many(rows)
            raw.create_collection("c", viewOn="base", pipeline=[{"$match": {"y": {"$ne": 1}}}])
        else:
            raw.create_collection("c", timeseries={"timeField": "at"})
            raw["c"].insert_many(rows)
        whole = executed(db, db["c"].find().sort("_id"))
        for fold in ("train", "valid"):
            wanted = expected(whole, fold)
            assert executed(db, db["c"].find().sort("_id").fold(fold)) == wanted
            assert len(streamed(db, db["c"].find(), fold=fold, shuffle=True)) == len(wanted)
        before = contents(db)
        model = db.apply(trainer(db["c"].find(), max_iterations=4)).result()
        assert model.version == 1
        with pytest.raises(StoreError, match="giving folds to collection 'c'"):
            db["c"].assign_folds()
        assert contents(db) == before
