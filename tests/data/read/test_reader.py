from typing import Any

import bson
import mongomock
import pytest
from bson import Int64
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import ReadPreference
from pymongo.errors import AutoReconnect, CursorNotFound, OperationFailure
from pymongo.read_concern import ReadConcern

from mongotorch.data.decode.raw_bson import Reply, found, last_id, offsets
from mongotorch.data.read.plan import Sizes, make_plan
from mongotorch.data.read.reader import IdRange, ServerReader, open_reader
from mongotorch.errors import DataError, EmptySelectError, QueryError, ServerUnavailableError
from mongotorch.mongo.driver_errors import RetryPolicy, is_transient
from mongotorch.query import Query

ALL = IdRange(lower=0, upper=99, closed=True, uniform=True)


class Collection:
    """Documents 0 to 99, ten in a reply, and what breaks instead of the second reply of a question."""

    name, codec_options, read_preference = "c", CodecOptions[Any](), ReadPreference.PRIMARY
    read_concern = ReadConcern()

    def __init__(self, *breaks: BaseException) -> None:
        self._breaks = list(breaks)
        self.asked: list[dict[str, Any]] = []
        self.killed: list[int] = []
        self.database = self

    def command(self, command: Any, *_: Any, **options: Any) -> Any:
        if command == "killCursors":
            self.killed += options["cursors"]
            return {}
        bounds = command["filter"]["_id"]
        if "$gt" in bounds and self._breaks:
            raise self._breaks.pop(0)
        self.asked.append(bounds)
        start = bounds["$gte"] if "$gte" in bounds else bounds["$gt"] + 1
        batch = [{"_id": n} for n in range(start, min(start + 10, 100))]
        cursor = {"firstBatch": batch, "id": Int64(start + 1 if start < 90 else 0), "ns": "d.c"}
        return RawBSONDocument(bson.encode({"cursor": cursor, "ok": 1.0}))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def retry(self) -> RetryPolicy:
        return RetryPolicy(deadline_s=3.0, sleep=self.sleep, clock=lambda: self.now)


def server_reader(collection: Any, clock: Clock) -> ServerReader:
    return ServerReader({"c": collection}, Query.find("c"), {"_id": 1}, clock.retry())


def ids(chunks: list[Reply]) -> list[Any]:
    return [bson.decode(raw[a:b])["_id"] for raw in chunks for a, b in offsets(raw)]


@pytest.mark.parametrize(
    "error", [AutoReconnect("gone"), CursorNotFound("gone", 43), OperationFailure("stepping down", 189)]
)
def test_what_is_left_is_asked_for_behind_the_last_id(error: BaseException) -> None:
    collection = Collection(error, error)
    assert ids(server_reader(collection, Clock()).read(ALL, 100)) == list(range(100))
    assert collection.asked[0] == {"$gte": 0, "$lte": 99}
    assert collection.asked[1:3] == [{"$gt": 9, "$lte": 99}, {"$gt": 19, "$lte": 99}]
    assert len(collection.asked) == 10
    assert len(collection.killed) == 9


def test_a_server_that_stays_away_ends_in_a_typed_error_after_the_deadline() -> None:
    class Dead(Collection):
        def command(self, command: Any, *_: Any, **options: Any) -> Any:
            raise AutoReconnect("connection refused")

    clock = Clock()
    with pytest.raises(ServerUnavailableError) as caught:
        server_reader(Dead(), clock).read(ALL, 100)
    assert caught.value.setting == "read_deadline_s"
    assert isinstance(caught.value.__cause__, AutoReconnect)
    assert 3.0 <= clock.now < 6.0


def test_a_question_that_is_refused_is_not_asked_again() -> None:
    clock = Clock()
    collection = Collection(OperationFailure("unknown operator", 2))
    with pytest.raises(QueryError):
        server_reader(collection, clock).read(ALL, 100)
    assert clock.now == 0.0
    assert len(collection.asked) == 1


def test_only_lost_connections_cursors_and_primaries_pass() -> None:
    assert is_transient(OperationFailure("not primary", 10107))
    assert not is_transient(OperationFailure("unauthorized", 13))


def test_the_last_id_of_raw_documents_is_found() -> None:
    raw = bson.encode({"_id": None}) + bson.encode({"_id": "b", "x": [1]})
    assert last_id(raw) == ("b",)


def test_a_plan_cuts_without_gap_or_overlap() -> None:
    client: Any = mongomock.MongoClient()
    database = client["plans"]
    database.c.insert_many([{"_id": n if n % 2 else str(n), "x": 1.0} for n in range(95)])
    reader = open_reader(database, Query.find("c"), {"_id": 1, "x": 1}, RetryPolicy())
    plan = make_plan(database, reader, Sizes(prefetch_size=10, prefetch_factor=7, prefetch_bytes=2**20))
    found = [ids(reader.read(plan.bounds(index), 10)) for index in range(len(plan))]
    assert [len(part) for part in found] == [10] * 9 + [5]
    assert len({document_id for part in found for document_id in part}) == 95
    assert plan.window == 3


def test_large_documents_make_smaller_ranges_and_windows() -> None:
    rows, window = Sizes(prefetch_size=1000, prefetch_factor=100, prefetch_bytes=2**20).cut(4096.0)
    assert 2 * rows * window * 4096 <= 2**20
    assert rows >= 1


def test_an_empty_select_has_no_plan() -> None:
    client: Any = mongomock.MongoClient()
    reader = open_reader(client["empty"], Query.find("c"), {"_id": 1}, RetryPolicy())
    with pytest.raises(EmptySelectError):
        make_plan(client["empty"], reader, Sizes(prefetch_size=10, prefetch_factor=3, prefetch_bytes=2**20))


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 99, 100, 101, 1000, 11_111])
@pytest.mark.parametrize("alike", [True, False])
def test_the_documents_of_a_reply_come_out_byte_for_byte(count: int, alike: bool) -> None:
    documents = [{"_id": n, "x": "text" if alike else "text" * (n * 7 % 5)} for n in range(count)]
    cursor = {"ns": "d.c", "firstBatch": documents, "id": Int64(2**40)}
    reply = {"ok": 1.0, "$clusterTime": {"at": 1}, "cursor": cursor, "operationTime": Int64(3)}
    part = found(bson.encode(reply))
    assert bytes(part.documents) == b"".join(map(bson.encode, documents))
    assert part.cursor == 2**40
    assert [bytes(part.documents[a:b]) for a, b in offsets(part.documents)] == list(map(bson.encode, documents))
    assert len(part.documents) == sum(map(len, map(bson.encode, documents)))
    assert not count or last_id(part.documents) == (count - 1,)


@pytest.mark.parametrize("wrong", [-(2**31), -1, 0, 4, 2**20, 2**31 - 1])
def test_a_document_in_a_reply_that_is_not_as_long_as_it_says_is_refused(wrong: int) -> None:
    documents = [{"_id": n, "x": "text" * n} for n in range(5)]
    cursor = {"id": Int64(0), "firstBatch": documents}
    reply = bytearray(bson.encode({"cursor": cursor}))
    at = reply.index(bson.encode(documents[2]))
    reply[at : at + 4] = wrong.to_bytes(4, "little", signed=True)
    with pytest.raises(DataError, match="longer or shorter than it says"):
        found(bytes(reply))


def test_a_reply_with_a_field_of_less_than_no_bytes_is_refused() -> None:
    reply = bytearray(bson.encode({"a": "text", "b": "text", "cursor": {"id": Int64(0), "firstBatch": []}}))
    at = reply.index(b"b\0") + 2
    reply[at : at + 4] = (-25).to_bytes(4, "little", signed=True)  # back to the first field
    with pytest.raises(DataError, match="not understood"):
        found(bytes(reply))


@pytest.mark.parametrize("reply", [{"ok": 1.0}, {"cursor": {"id": Int64(0)}}, {"cursor": {"firstBatch": []}}])
def test_a_reply_that_is_none_of_a_find_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        found(bson.encode(reply))
