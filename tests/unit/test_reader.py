from collections.abc import Iterator
from typing import Any

import bson
import mongomock
import pytest
from pymongo.errors import AutoReconnect, CursorNotFound, OperationFailure

from mongotorch.data.mockreader import open_reader
from mongotorch.data.patience import Patience, is_passing
from mongotorch.data.plan import Sizes, make_plan
from mongotorch.data.reader import ServerReader, Span, last_id, offsets
from mongotorch.errors import EmptySelectError, QueryError, ServerUnavailableError
from mongotorch.query import Query

ALL = Span(lower=0, upper=99, closed=True, uniform=True)


class Cursor:
    """Ten documents a batch, and what a broken connection does after some of them."""

    def __init__(self, ids: list[int], breaks: BaseException | None) -> None:
        self._ids, self._breaks = ids, breaks

    def __iter__(self) -> Iterator[bytes]:
        if self._breaks is not None:
            yield b"".join(bson.encode({"_id": n}) for n in self._ids[:10])
            raise self._breaks
        for first in range(0, len(self._ids), 10):
            yield b"".join(bson.encode({"_id": n}) for n in self._ids[first : first + 10])

    def close(self) -> None:
        pass


class Collection:
    def __init__(self, *breaks: BaseException) -> None:
        self._breaks = list(breaks)
        self.asked: list[dict[str, Any]] = []

    def find_raw_batches(self, where: dict[str, Any], *_: Any, **__: Any) -> Cursor:
        bounds = where["_id"]
        self.asked.append(bounds)
        start = bounds["$gte"] if "$gte" in bounds else bounds["$gt"] + 1
        return Cursor(list(range(start, 100)), self._breaks.pop(0) if self._breaks else None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self) -> Patience:
        return Patience(deadline_s=3.0, sleep=self.sleep, clock=lambda: self.now)


def server_reader(collection: Any, clock: Clock) -> ServerReader:
    return ServerReader({"c": collection}, Query.find("c"), {"_id": 1}, clock.patience())


def ids(chunks: list[bytes]) -> list[Any]:
    return [bson.decode(raw[a:b])["_id"] for raw in chunks for a, b in offsets(raw)]


@pytest.mark.parametrize(
    "error", [AutoReconnect("gone"), CursorNotFound("gone", 43), OperationFailure("stepping down", 189)]
)
def test_a_broken_cursor_is_replaced_behind_the_last_id(error: BaseException) -> None:
    collection = Collection(error, error)
    assert ids(server_reader(collection, Clock()).read(ALL, 100)) == list(range(100))
    assert collection.asked[1] == {"$gt": 9, "$lte": 99}
    assert collection.asked[2] == {"$gt": 19, "$lte": 99}


def test_a_server_that_stays_away_ends_in_a_typed_error_after_the_deadline() -> None:
    class Dead(Collection):
        def find_raw_batches(self, where: dict[str, Any], *_: Any, **__: Any) -> Cursor:
            raise AutoReconnect("connection refused")

    clock = Clock()
    with pytest.raises(ServerUnavailableError) as caught:
        server_reader(Dead(), clock).read(ALL, 100)
    assert caught.value.setting == "read_deadline_s"
    assert isinstance(caught.value.__cause__, AutoReconnect)
    assert 3.0 <= clock.now < 6.0


def test_a_question_that_is_refused_is_not_asked_again() -> None:
    clock = Clock()
    with pytest.raises(QueryError):
        server_reader(Collection(OperationFailure("unknown operator", 2)), clock).read(ALL, 100)
    assert clock.now == 0.0


def test_only_lost_connections_cursors_and_primaries_pass() -> None:
    assert is_passing(OperationFailure("not primary", 10107))
    assert not is_passing(OperationFailure("unauthorized", 13))


def test_the_last_id_of_raw_documents_is_found() -> None:
    raw = bson.encode({"_id": None}) + bson.encode({"_id": "b", "x": [1]})
    assert last_id(raw) == ("b",)


def test_a_plan_cuts_without_gap_or_overlap() -> None:
    client: Any = mongomock.MongoClient()
    database = client["plans"]
    database.c.insert_many([{"_id": n if n % 2 else str(n), "x": 1.0} for n in range(95)])
    reader = open_reader(database, Query.find("c"), {"_id": 1, "x": 1}, Patience())
    plan = make_plan(database, reader, Sizes(prefetch_size=10, prefetch_factor=7, prefetch_bytes=2**20))
    found = [ids(reader.read(plan.span(index), 10)) for index in range(len(plan))]
    assert [len(part) for part in found] == [10] * 9 + [5]
    assert len({document_id for part in found for document_id in part}) == 95
    assert plan.window == 3


def test_large_documents_make_smaller_ranges_and_windows() -> None:
    rows, window = Sizes(prefetch_size=1000, prefetch_factor=100, prefetch_bytes=2**20).cut(4096.0)
    assert 2 * rows * window * 4096 <= 2**20
    assert rows >= 1


def test_an_empty_select_has_no_plan() -> None:
    client: Any = mongomock.MongoClient()
    reader = open_reader(client["empty"], Query.find("c"), {"_id": 1}, Patience())
    with pytest.raises(EmptySelectError):
        make_plan(client["empty"], reader, Sizes(prefetch_size=10, prefetch_factor=3, prefetch_bytes=2**20))
