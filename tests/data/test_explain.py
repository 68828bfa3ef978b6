"""What a stream will do is told truly, on both backends as far as it can be known."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from bson import Binary
from bson.binary import BinaryVectorDtype
from tests.helpers import COLLECTION, fill, fold_ids, trainer

from mongotorch import Datalayer
from mongotorch.data import StreamSpec
from mongotorch.data.explain import Explanation, explain
from mongotorch.errors import EmptySelectError, FieldMissingError, QueryError
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

COUNT = 1200
SELECT = Query.find("documents")
TENANT = uuid.UUID(int=7)


@pytest.fixture
def documents(database: Any) -> Any:
    vector = Binary.from_vector([0.5] * 8, BinaryVectorDtype.FLOAT32)
    database["documents"].insert_many(
        [{"_id": n, "x": [0.5] * 8, "v": vector, "y": n, "rare": n % 100} for n in range(COUNT)]
    )
    return database["documents"]


def told(database: Any, query: Query = SELECT, **given: Any) -> Explanation:
    key = given.pop("key", ("x", "y"))
    options = {name: given.pop(name) for name in ("step_seconds", "probe_seconds") if name in given}
    opener = given.pop("opener", lambda: database)
    small = {"batch_size": 64, "prefetch_size": 100, "shuffle": True, **given}
    return explain(database, StreamSpec(query=query, key=key, **small), opener, **options)


def test_documents_bytes_and_times_are_told(documents: Any, database: Any) -> None:
    found = told(database, data_prefetch=True)
    assert (found.documents, found.counted) == (COUNT, True)
    assert COUNT * 100 < found.bytes < COUNT * 200
    assert found.documents_per_second > 100
    assert 0 < found.first_batch_s < 60
    assert 0 < found.buffer_bytes < 2**24
    assert found.bottleneck
    titles = [title for title, _ in found.rows()]
    assert {"documents", "index", "bottleneck", "hint"} <= set(titles)
    assert ("documents", "1,200") in found.rows()


def test_a_filter_without_an_index_is_seen_and_with_one_it_is_served(
    documents: Any, database: Any, request: pytest.FixtureRequest
) -> None:
    query = SELECT.filter({"rare": 7})
    found = told(database, query)
    assert found.documents == COUNT // 100
    if "mongomock" in request.node.name:
        assert (found.index, found.examined, found.served) == (None, None, None)
        assert dict(found.rows())["an index serves the select"] == "unknown"
        return
    assert found.served is False
    assert 'create_index([("rare", 1), ("_id", 1)])' in found.hints[0]
    documents.create_index([("rare", 1), ("_id", 1)])
    better = told(database, query)
    assert better.index == ("rare", "_id")
    assert better.served is True
    assert not [hint for hint in better.hints if "create_index" in hint]
    assert told(database).index == ("_id",)


def test_lists_get_a_hint_and_vectors_do_not(documents: Any, database: Any) -> None:
    assert [hint for hint in told(database).hints if "'x' is a list" in hint]
    assert not [hint for hint in told(database, key=("v", "y")).hints if "list" in hint]


def test_the_slowest_part_is_named(documents: Any, database: Any) -> None:
    slow = told(database, step_seconds=64.0, data_prefetch=True)
    assert slow.bottleneck == "the training step"
    assert slow.documents_per_second == pytest.approx(1.0)
    in_turn = told(database, step_seconds=64.0)
    assert in_turn.documents_per_second < 1.0
    assert [hint for hint in in_turn.hints if "data_prefetch" in hint]
    rounds = iter(range(10**9))
    busy = told(
        database, transform=lambda x, y: (sum(next(rounds) * 0 for _ in range(20_000)), y), probe_seconds=0.1
    )
    assert "transform" in busy.bottleneck
    assert [hint for hint in busy.hints if "num_workers" in hint]


@pytest.mark.parametrize("mode", ["stream", "memory", "download"])
def test_memory_is_that_of_the_mode(documents: Any, database: Any, mode: Any) -> None:
    found = told(database, mode=mode, shuffle=False)
    whole = COUNT * (8 * 8 + 8)
    assert (found.buffer_bytes >= whole) is (mode == "memory")


def test_memory_grows_with_what_is_read_ahead(documents: Any, database: Any) -> None:
    plain = told(database, shuffle=False)
    row_bytes, raw_bytes = plain.buffer_bytes / 200, plain.bytes / COUNT  # one range is read, and one is used
    ahead = told(database, shuffle=False, data_prefetch=True, prefetch_factor=2)
    # Three ranges in the making, two that are ready, and the replies of four on their way.
    assert ahead.buffer_bytes == pytest.approx(500 * row_bytes + 400 * raw_bytes, rel=0.01)


@pytest.mark.parametrize(
    "query",
    [
        SELECT.sort("y", -1).skip(100).limit(300),
        Query.aggregate("documents", [{"$match": {"y": {"$lt": 300}}}]),
    ],
)
def test_queries_with_an_order_of_their_own_are_told_too(documents: Any, database: Any, query: Query) -> None:
    found = told(database, query)
    assert found.documents == 300
    assert found.index is None


def test_what_cannot_be_streamed_is_refused(documents: Any, database: Any) -> None:
    with pytest.raises(EmptySelectError):
        told(database, SELECT.filter({"y": -1}))
    with pytest.raises(FieldMissingError):
        told(database, key=("x", "nothing"))


def test_a_question_that_the_server_refuses_is_refused(server_uri: str) -> None:
    with open_address(server_uri, read_settings()) as connection, pytest.raises(QueryError):
        told(connection.database, SELECT.filter({"y": {"$nonsense": 1}}))


def test_a_datalayer_tells_of_the_training_documents_of_a_trainer(db: Datalayer) -> None:
    select = fill(db)
    found = db.explain(trainer(select))
    assert found.documents == len(fold_ids(db, "train"))
    assert found.documents_per_second > 0


def test_identifiers_that_are_uuids_are_explained(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        rows = [{"_id": uuid.uuid4(), "tenant": TENANT, "x": [0.5] * 4, "y": 0} for _ in range(90)]
        db[COLLECTION].insert_many(rows)
        found = db.explain(trainer(db[COLLECTION].find({"tenant": TENANT})))
    assert 0 < found.documents < 90
    assert found.documents_per_second > 0


def test_it_prints_as_lines_that_fit_a_terminal(documents: Any, database: Any) -> None:
    text = str(told(database))
    assert "  documents " in text
    assert "1,200" in text
    assert max(map(len, text.splitlines())) <= 80
