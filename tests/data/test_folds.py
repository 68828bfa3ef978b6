from collections import Counter
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from bson import Int64, ObjectId

from mongotorch import Datalayer
from mongotorch.data.read.folds import fold_of, hashed_index_key
from mongotorch.errors import ParameterError

# Taken from `$toHashedIndexKey` of MongoDB 6.0.5.
SERVER_HASHES = [
    (7, 9174449368162552349),
    (-3, -8041831605014284334),
    (2.9, 848411777775835583),
    ("text", -1947863280617072965),
    (True, 6405873908747105701),
    (None, 2338878944348059895),
    (b"abc", -5469096009886218469),
    (ObjectId("6b0573e9cd706569d1009c4e"), -3905990349556534216),
    (datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), 3096546342401997802),
    (UUID(int=5), -9196243817323467456),
]


@pytest.mark.parametrize(("document_id", "hashed"), SERVER_HASHES)
def test_the_hash_is_that_of_the_server(document_id: Any, hashed: int) -> None:
    assert hashed_index_key(document_id) == hashed


def test_numbers_that_are_one_to_the_server_share_a_fold() -> None:
    assert hashed_index_key(5) == hashed_index_key(5.0) == hashed_index_key(Int64(5))


def test_the_share_is_about_the_fraction() -> None:
    counts = Counter(fold_of(n, 0.2) for n in range(10_000))
    assert 1800 < counts["valid"] < 2200
    assert {fold_of(n, 0.0) for n in range(100)} == {"train"}
    assert {fold_of(n, 1.0) for n in range(100)} == {"valid"}


def test_a_larger_fraction_only_adds_to_valid() -> None:
    for n in range(1000):
        assert not (fold_of(n, 0.1) == "valid" and fold_of(n, 0.2) == "train")


def test_documents_as_ids_have_a_stable_fold() -> None:
    assert hashed_index_key({"a": 1}) == hashed_index_key({"a": 1}) != hashed_index_key({"a": 2})


@pytest.mark.parametrize("fraction", [-0.1, 1.1, True])
def test_a_fraction_outside_is_refused(fraction: float) -> None:
    with pytest.raises(ParameterError):
        fold_of(1, fraction)


def test_a_document_that_is_replaced_keeps_its_fold(db: Datalayer) -> None:
    by_hand = {0: "valid", 1: "train", 2: "valid", 3: "train"}
    db["c"].raw.insert_many([{"_id": n, "_fold": fold} for n, fold in by_hand.items()])
    for n in by_hand:
        assert db["c"].replace_one({"_id": n}, {"x": n}) == 1
        assert db["c"].replace_one({"_id": n}, {"x": -n - 1, "_fold": "train", "_id": n}) == 1
    assert {found["_id"]: found["_fold"] for found in db["c"].raw.find()} == by_hand
    assert {found["x"] for found in db["c"].raw.find()} == {-1, -2, -3, -4}
