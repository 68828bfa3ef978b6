"""`_id`s of any type come once, and what cannot be asked for is refused."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from bson import Binary, Int64, MaxKey, MinKey, ObjectId, Timestamp

from mongotorch import Datalayer, Query
from mongotorch.errors import FieldMissingError, QueryError

IDS: list[Any] = [
    *(3, 2.5, Int64(2**60), "text", ObjectId(), None, True, {"a": 1}, b"bytes", Timestamp(1, 1)),
    *(MinKey(), MaxKey(), Binary.from_uuid(uuid.UUID(int=7)), {"u": Binary.from_uuid(uuid.UUID(int=8)), "n": 1}),
]


def labels(db: Datalayer, **given: Any) -> list[int]:
    with db.stream(db["any"].find(), key=("x", "y"), batch_size=4, **given) as stream:
        return sorted(label for _, y in stream for label in y.tolist())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", [{}, {"prefetch_size": 3}, {"in_memory": True}, {"download": True}])
def test_documents_with_identifiers_of_all_types_come_once(
    db: Datalayer, mode: dict[str, Any], shuffle: bool
) -> None:
    db["any"].raw.insert_many([{"_id": one, "x": 1.0, "y": n} for n, one in enumerate(IDS)])
    assert labels(db, shuffle=shuffle, **mode) == list(range(len(IDS)))


@pytest.mark.parametrize("last", [MaxKey(), MinKey()])
def test_a_document_at_either_end_of_all_identifiers_is_read(db: Datalayer, last: Any) -> None:
    db["any"].raw.insert_many([{"_id": n, "x": 1.0, "y": n} for n in range(20)])
    db["any"].raw.insert_one({"_id": last, "x": 1.0, "y": 20})
    assert labels(db, prefetch_size=5) == list(range(21))
    with db.stream(db["any"].find(), key=("x", "y"), batch_size=4) as stream:
        assert len(stream) == 6


def test_a_query_that_no_server_takes_is_refused_when_it_is_made() -> None:
    with pytest.raises(QueryError, match="MB"):
        Query.find("any", {"_id": {"$in": [ObjectId() for _ in range(900_000)]}})


def test_a_name_with_a_dot_is_refused_with_what_a_path_may_be(db: Datalayer) -> None:
    db["any"].raw.insert_one({"_id": 1, "a": {"b": 1}})
    with (
        db.stream(db["any"].find(), key="a.c", batch_size=1) as stream,
        pytest.raises(FieldMissingError) as caught,
    ):
        list(stream)
    assert "$getField" in str(caught.value)
