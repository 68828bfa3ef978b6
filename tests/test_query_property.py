"""Whatever BSON can hold may be in a query, and its document gives the same query again."""

from __future__ import annotations

import datetime
import math
import uuid
from typing import Any

import bson
import pytest
from bson import DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import Binary, UuidRepresentation
from bson.code import Code
from bson.codec_options import CodecOptions
from hypothesis import given
from hypothesis import strategies as st

from mongotorch.query import Query

pytestmark = pytest.mark.property

AS_BSON: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)

# Extended JSON knows one NaN, and so does MongoDB; its sign and payload are nobody's.
floats = st.floats().map(lambda number: math.nan if math.isnan(number) else number)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0.$"), min_size=1, max_size=5)
integers = st.integers(-(2**63), 2**63 - 1)
dates = st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)).map(
    lambda date: date.replace(microsecond=date.microsecond // 1000 * 1000)
)
texts = st.text(st.characters(codec="utf-8"), max_size=5)
patterns = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
subtypes = st.sampled_from([0, 1, 5, 6, 9, 128, 255])
leaves = st.one_of(
    *(st.none(), st.booleans(), integers, floats, texts, st.binary(max_size=5), dates),
    *(st.uuids(), st.just(MinKey()), st.just(MaxKey()), integers.map(Int64)),
    st.binary(min_size=12, max_size=12).map(ObjectId),
    st.builds(Binary, st.binary(max_size=5), subtypes),
    st.builds(Regex, patterns, st.sampled_from([0, 2, 8, 26])),
    st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.decimals(places=3, min_value=-1000, max_value=1000).map(Decimal128),
    st.sampled_from(["NaN", "Infinity", "-0", "1E+6000"]).map(Decimal128),
    st.builds(Code, texts),
    st.builds(DBRef, names, integers),
)
operators = st.sampled_from(
    [
        *("$eq", "$in", "$not", "$and", "$elemMatch", "$regex", "$options", "$type", "$date", "$oid", "$uuid"),
        *("$binary", "$code", "$minKey", "$numberLong", "$numberDouble", "$timestamp", "$undefined", "$ref"),
        *("$$regex", "$$$x", "$symbol", "$dbPointer", "$regularExpression"),
    ]
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(names, operators), inner, max_size=3)
    ),
    max_leaves=8,
)
conditions = st.dictionaries(st.one_of(names, operators), values, max_size=4)


def again(query: Query) -> Query:
    """Through the document as a store gives it back."""
    return Query.from_document(bson.decode(bson.encode(query.to_document())))


def check(query: Query) -> None:
    same = again(query)
    assert same == query
    assert same.body == query.body  # to the bit: NaN is not equal to itself, -0.0 is equal to 0.0
    assert (hash(same), same.digest()) == (hash(query), query.digest())


@given(
    condition=conditions,
    more=conditions,
    order=st.lists(st.tuples(names, st.sampled_from([1, -1])), max_size=3),
    skipped=st.integers(0, 2**40),
    limited=st.integers(1, 2**40),
    fold=st.sampled_from([None, "train", "valid"]),
)
def test_the_document_of_a_find_gives_the_same_query(
    condition: Any, more: Any, order: Any, skipped: int, limited: int, fold: Any
) -> None:
    query = Query.find("c", condition, ["x", "y.z"]).filter(more).sort(order).skip(skipped).limit(limited)

    check(query if fold is None else query.fold(fold))


@given(
    stages=st.lists(st.dictionaries(st.sampled_from(["$match", "$set", "$regex"]), values, min_size=1, max_size=1))
)
def test_the_document_of_a_pipeline_gives_the_same_query(stages: Any) -> None:
    check(Query.aggregate("c", stages).fold("train"))


@given(first=conditions, second=conditions)
def test_two_queries_are_equal_exactly_when_they_say_the_same(first: Any, second: Any) -> None:
    one, two = Query.find("c", first), Query.find("c", second)

    assert (one == two) == (
        bson.encode(first, codec_options=AS_BSON) == bson.encode(second, codec_options=AS_BSON)
    )
    assert (one.digest() == two.digest()) == (one == two)


@pytest.mark.parametrize(
    "condition",
    [
        {"name": {"$regex": "^a", "$options": "i"}},
        {"name": {"$in": ["ab", "c"], "$regex": "^a"}},
        {"name": {"$not": {"$regex": "a"}}},
        {"when": datetime.datetime(2026, 5, 3, tzinfo=datetime.UTC), "key": uuid.UUID(int=5)},
    ],
)
def test_operators_that_look_like_values_stay_operators(condition: dict[str, Any]) -> None:
    query = Query.find("c", condition)

    assert again(query) == query
    assert again(query).where == query.where
