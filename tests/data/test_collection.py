"""Inserting and changing documents of a collection: refusals are typed and name the document."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch import Datalayer
from mongotorch.errors import CodecError, ConflictError, DataError, QueryError


def test_an_id_that_is_there_already_is_named_with_how_far_it_came(db: Datalayer) -> None:
    db["c"].insert_many([{"_id": 1}, {"_id": 2}])
    with pytest.raises(ConflictError, match=r"document 2 of collection 'c'.*the 1 document") as caught:
        db["c"].insert_many([{"_id": 3}, {"_id": 2}, {"_id": 4}])
    assert caught.value.document_id == 2
    assert caught.value.__cause__ is not None
    assert db["c"].count() == 3
    with pytest.raises(ConflictError):
        db["c"].insert_one({"_id": 1})


def test_what_bson_cannot_hold_is_typed_and_inserts_nothing(db: Datalayer) -> None:
    for document in ({"x": 2**70}, {"x": object()}):
        with pytest.raises(CodecError):
            db["c"].insert_one(document)
    assert db["c"].count() == 0


@pytest.mark.parametrize("documents", [None, 3, "text", {"_id": 1}, [1], [{1: 2}]])
def test_what_are_no_documents_is_refused(db: Datalayer, documents: object) -> None:
    with pytest.raises(DataError):
        db["c"].insert_many(documents)  # type: ignore[arg-type]


def test_a_filter_that_is_none_is_refused_before_anything_is_deleted(db: Datalayer) -> None:
    db["c"].insert_many([{"_id": 1}])
    calls: list[Any] = [db["c"].delete_many, db["c"].count, db["c"].find]
    for call in calls:
        with pytest.raises(QueryError):
            call("x")
    with pytest.raises(QueryError):
        db["c"].delete_many(None)  # type: ignore[arg-type]
    assert db["c"].count() == 1


@pytest.mark.parametrize("name", [None, 3, "", "a$b", "\ud800", "x" * 300])
def test_what_cannot_name_a_collection_is_refused(db: Datalayer, name: str) -> None:
    with pytest.raises(QueryError, match="cannot be the name of a collection"):
        db[name]
