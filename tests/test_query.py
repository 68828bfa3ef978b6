"""A Query is a value: equal by content, exact through its document, and refused when it cannot be run."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
from bson import ObjectId

from mongotorch.errors import QueryError
from mongotorch.query import Query


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
    assert Query.find("c", {"a": 1}).fold("train").where == {"$and": [{"a": 1}, {"_fold": "train"}]}
    assert Query.find("c").fold("valid").where == {"_fold": "valid"}


def test_the_fold_is_the_first_stage_of_a_pipeline() -> None:
    query = Query.aggregate("c", [{"$limit": 5}]).fold("train")

    assert query.stages == [{"$match": {"_fold": "train"}}, {"$limit": 5}]


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
