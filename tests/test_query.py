"""A Query is a value: equal by content, exact through its document, and refused when it cannot be run."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
from bson import ObjectId

from mongotorch.errors import QueryError
from mongotorch.query import Query
from mongotorch.split import ByGroup


def test_methods_return_new_queries_and_leave_the_old_one() -> None:
    query = Query.find("digits", {"labelled": True})

    query.sort("x").skip(1).limit(2).fold("train").filter({"y": 1})

    assert query == Query.find("digits", {"labelled": True})


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"a.b": {"$in": [1, 2.5, None, float("nan"), -0.0]}},
        {"_id": ObjectId("656f00000000000000000001"), "when": datetime.datetime(2026, 5, 3, 12)},
        {"name": re.compile("^a", re.IGNORECASE), "big": 2**62, "t": (1, 2), "raw": b"\x00\x01"},
        {"$or": [{"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}]},
    ],
)
def test_the_document_of_a_query_gives_the_same_query(condition: dict[str, Any]) -> None:
    query = Query.find("c", condition, ["x", "y"]).sort([("x", -1)]).skip(3).limit(9).fold("valid")

    again = Query.from_document(query.to_document())

    assert again == query
    assert again.digest() == query.digest()
    assert hash(again) == hash(query)


def test_the_document_of_a_pipeline_gives_the_same_pipeline() -> None:
    query = Query.aggregate("c", [{"$match": {"a": 1}}, {"$project": {"b": "$a"}}]).fold("train")

    assert Query.from_document(query.to_document()) == query


def test_the_fold_is_one_more_condition_of_a_find() -> None:
    folded = Query.find("c", {"a": 1}).fold("train")
    assert folded.fold_condition is not None
    assert folded.where == {"$and": [{"a": 1}, folded.fold_condition]}
    assert folded.fold_condition["$or"][0] == {"_fold": "train"}
    assert Query.find("c").fold("valid").where == Query.find("c").fold("valid").fold_condition
    assert not folded.runs_as_pipeline


def test_the_fold_is_of_what_a_limit_gives() -> None:
    folded = Query.find("c", {"a": 1}).sort("b", -1).skip(2).limit(5).fold("train")
    assert folded.where == {"a": 1}
    assert folded.stages == [
        {"$match": {"a": 1}},
        {"$sort": {"b": -1, "_id": 1}},
        {"$skip": 2},
        {"$limit": 5},
        {"$match": folded.fold_condition},
    ]
    assert Query.from_document(folded.to_document()) == folded


def test_a_limit_of_a_fold_is_one() -> None:
    query = Query.find("c").fold("train").limit(5)
    assert not query.runs_as_pipeline
    assert query.where == query.fold_condition
    assert Query.from_document(query.to_document()) == query


def test_a_stored_limit_of_a_fold_keeps_its_meaning() -> None:
    document = {**Query.find("c").limit(5).to_document(), "fold": "train"}
    assert Query.from_document(document) == Query.find("c").fold("train").limit(5)


FOLD = {"$match": Query.find("c").fold("train").fold_condition}
FIRST = {"$geoNear": {"near": [0, 0], "distanceField": "d"}}
TEXT = {"$match": {"$and": [{"a": 1}, {"$text": {"$search": "x"}}]}}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([{"$limit": 5}], [{"$limit": 5}, FOLD]),
        ([{"$match": {"a": 1}}, {"$project": {"x": 1}}], [FOLD, {"$match": {"a": 1}}, {"$project": {"x": 1}}]),
        ([{"$limit": 5}, {"$set": {"b": 1}}], [{"$limit": 5}, FOLD, {"$set": {"b": 1}}]),
        (
            [{"$set": {"_fold": "train"}}, {"$sort": {"a": 1}}],
            [{"$set": {"_fold": "train"}}, FOLD, {"$sort": {"a": 1}}],
        ),
        ([{"$addFields": {"_id": "$a"}}], [{"$addFields": {"_id": "$a"}}, FOLD]),
        ([{"$group": {"_id": "$a"}}], [{"$group": {"_id": "$a"}}, FOLD]),
        ([{"$unwind": "$a"}], [FOLD, {"$unwind": "$a"}]),
        ([{"$unset": "_fold"}], [FOLD, {"$unset": "_fold"}]),
        (
            [{"$project": {"x": 1}}, {"$limit": 5}],
            [{"$project": {"x": 1, "_fold": 1}}, {"$limit": 5}, FOLD, {"$project": {"_fold": 0}}],
        ),
        (
            [{"$project": {"x": 0, "_fold": 0}}, {"$limit": 5}],
            [{"$project": {"x": 0}}, {"$limit": 5}, FOLD, {"$project": {"_fold": 0}}],
        ),
        (
            [{"$project": {"_id": 0, "x": 1}}, {"$limit": 5}],
            [
                {"$project": {"x": 1, "_fold": 1, "_id": 1}},
                {"$limit": 5},
                FOLD,
                {"$project": {"_fold": 0, "_id": 0}},
            ],
        ),
        ([FIRST, {"$project": {"x": 1}}], [FIRST, FOLD, {"$project": {"x": 1}}]),
        ([TEXT], [TEXT, FOLD]),
        ([{"$vectorSearch": {"limit": 5}}], [{"$vectorSearch": {"limit": 5}}, FOLD]),
    ],
)
def test_the_fold_of_a_pipeline_is_of_what_it_gives(stages: list[Any], expected: list[Any]) -> None:
    query = Query.aggregate("c", stages).fold("train")
    assert query.stages == expected
    assert Query.from_document(query.to_document()) == query


def test_a_split_comes_behind_what_sets_its_field() -> None:
    stages: list[dict[str, Any]] = [{"$set": {"user": "$u"}}, {"$match": {"a": 1}}]
    query = Query.aggregate("c", stages).fold("train", split=ByGroup("user"))
    assert query.stages == [stages[0], {"$match": query.fold_condition}, stages[1]]
    assert Query.from_document(query.to_document()) == query


@pytest.mark.parametrize("first", [FIRST, TEXT])
def test_one_more_condition_comes_behind_a_stage_that_has_to_be_the_first(first: dict[str, Any]) -> None:
    query = Query.aggregate("c", [first, {"$limit": 2}]).filter({"a": 1})
    assert query.stages == [first, {"$match": {"a": 1}}, {"$limit": 2}]


def test_filter_keeps_the_conditions_that_were_there() -> None:
    query = Query.find("c", {"a": 1}).filter({"a": {"$gt": 0}})

    assert query.where == {"$and": [{"a": 1}, {"a": {"$gt": 0}}]}


def test_the_order_of_keys_matters_as_it_does_to_mongodb() -> None:
    assert Query.find("c", {"a": {"b": 1, "c": 2}}) != Query.find("c", {"a": {"c": 2, "b": 1}})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Query.find("c", {"a": object()}),
        lambda: Query.find("c", {"a": 2**70}),
        lambda: Query.find(""),
        lambda: Query.find("c", projection="x"),
        lambda: Query.find("c").sort("x", 2),
        lambda: Query.find("c").limit(0),
        lambda: Query.find("c").skip(-1),
        lambda: Query.find("c").fold("test"),  # type: ignore[arg-type]
        lambda: Query.aggregate("c", [{"$out": "d"}]),
        lambda: Query.aggregate("c", [{"match": {}}]),
        lambda: Query.aggregate("c", []).limit(1),
        lambda: Query.from_document({"collection": "c"}),
    ],
)
def test_what_cannot_be_run_or_stored_is_refused_at_once(make: Any) -> None:
    with pytest.raises(QueryError):
        make()


@pytest.mark.parametrize(
    ("query", "repeatable", "keeps_ids"),
    [
        (Query.find("c", {"a": 1}), True, True),
        (Query.find("c", {"$sampleRate": 0.3}), False, True),
        (Query.find("c", {"$expr": {"$lt": [{"$rand": {}}, 0.5]}}), False, True),
        (Query.find("c", {"$expr": {"$gt": ["$at", "$$NOW"]}}), False, True),
        (Query.find("c", {"note": "$sample"}), True, True),
        (Query.aggregate("c", [{"$sample": {"size": 3}}]), False, True),
        (Query.aggregate("c", [{"$lookup": {"from": "d", "pipeline": [{"$sample": {"size": 1}}]}}]), False, True),
        (Query.aggregate("c", [{"$unwind": "$a"}, {"$project": {"_id": 1, "a": 1}}]), True, True),
        (Query.aggregate("c", [{"$project": {"_id": 0, "a": 1}}]), True, False),
        (Query.aggregate("c", [{"$addFields": {"_id": "$a"}}]), True, False),
        (Query.aggregate("c", [{"$unset": ["a", "_id"]}]), True, False),
        (Query.aggregate("c", [{"$group": {"_id": "$a"}}]), True, False),
    ],
)
def test_a_query_says_whether_it_is_random_and_whose_ids_it_gives(
    query: Query, repeatable: bool, keeps_ids: bool
) -> None:
    assert (query.is_repeatable, query.keeps_ids) == (repeatable, keeps_ids)
