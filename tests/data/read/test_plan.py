"""Bounds of ranges from a sample that visits a collection unevenly."""

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import bson
import pymongo
import pytest
from bson import Binary, Int64, ObjectId

from mongotorch.data.decode import offsets
from mongotorch.data.read import Sizes, make_plan, open_reader, resume_plan
from mongotorch.data.read import plan as sampling
from mongotorch.data.read.plan import load_plan, sampled
from mongotorch.data.read.reader import IdRange
from mongotorch.errors import EmptySelectError
from mongotorch.mongo.driver_errors import RetryPolicy
from mongotorch.mongo.server_features import utc_now
from mongotorch.query import Query

SIZE, ROWS = 100_000, 500
WHOLE = IdRange(lower=0, upper=SIZE - 1, closed=True, uniform=True)


class Clumped:
    """Numbers as `_id`s, of which the upper half is visited fifty times as seldom; `spread` lies between two."""

    threads = 2

    def __init__(self, numbers: Any = None, matching: int = 1, spread: int = 1) -> None:
        self._numbers, self._matching, self._spread = numbers, matching, spread
        self.walked = 0

    @property
    def whole(self) -> IdRange:
        return IdRange(lower=0, upper=(SIZE - 1) * self._spread, closed=True, uniform=True)

    def sample(self, count: int, bounds: IdRange) -> list[int]:
        draw = random.Random(0)
        found = {draw.randrange(SIZE // 2) if draw.random() < 0.98 else draw.randrange(SIZE) for _ in range(count)}
        return [n * self._spread for n in sorted(found) if n % self._matching == 0 and 0 < n < SIZE - 1]

    def record_numbers(self, ids: list[int]) -> list[int]:
        return [n // self._spread for n in ids] if self._numbers is None else self._numbers(ids)

    def present(self, ids: list[int]) -> list[int]:
        return [n for n in ids if n % self._spread == 0]

    def walk(self, span: IdRange, step: int) -> Iterator[int]:
        self.walked += 1
        yield from range(span.lower + step * self._spread, span.upper, step * self._spread)

    def check(self, found: tuple[Any, ...] | None) -> None:
        assert found is not None
        assert found[0] == 0
        assert list(found) == sorted(set(found))
        found = tuple(-(-n // self._spread) for n in found)
        assert max(after - before for before, after in pairwise([*found, SIZE])) <= 2 * ROWS
        assert 0.8 < len(found) * ROWS / SIZE < 1.3


@pytest.mark.parametrize("spread", [1, 100])
@pytest.mark.parametrize("seconds", [60.0, -1.0])
def test_ranges_are_about_equal_where_records_tell_how_many_lie_between(
    spread: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_WALK_S", seconds)
    reader: Any = Clumped(spread=spread)
    reader.check(sampled(reader, reader.whole, ROWS, SIZE, most=50_000))
    # Where values have documents everywhere, or no time is left, gaps are cut and not walked.
    assert bool(reader.walked) == (spread > 1 and seconds > 0)


class Jumping(Clumped):
    """ObjectIds of one process, which inserts so many documents a second and then pauses for two."""

    def __init__(self, skipped: int, rate: int = 10_000) -> None:
        super().__init__()
        self._skipped, self._rate = skipped, rate  # one of so many is gone

    def form(self, n: int) -> ObjectId:
        counter = (n + 2**24 - SIZE // 2) % 2**24
        second = 2**30 + 3 * (n // self._rate)
        return ObjectId(second.to_bytes(4, "big") + b"12345" + counter.to_bytes(3, "big"))

    def number(self, one: ObjectId) -> int:
        return (int.from_bytes(one.binary[9:], "big") + SIZE // 2) % 2**24

    @property
    def whole(self) -> IdRange:
        return IdRange(lower=self.form(0), upper=self.form(SIZE - 1), closed=True, uniform=True)

    def sample(self, count: int, bounds: IdRange) -> list[Any]:
        return sorted(self.form(n) for n in super().sample(count, bounds))

    def record_numbers(self, ids: list[Any]) -> list[int]:
        return list(map(self.number, ids))

    def present(self, ids: list[Any]) -> list[Any]:
        numbers = [self.number(one) for one in ids]
        return [
            one
            for n, one in zip(numbers, ids, strict=True)
            if n < SIZE and self.form(n) == one and n % self._skipped
        ]

    def check(self, found: tuple[Any, ...] | None) -> None:
        assert found is not None
        assert list(found) == sorted(set(found))
        super().check(tuple(map(self.number, found)))


def test_bounds_of_object_ids_are_looked_for_where_these_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_WALK_S", -1.0)
    reader: Any = Jumping(skipped=10**9)
    reader.check(sampled(reader, reader.whole, ROWS, SIZE, most=50_000))


@pytest.mark.parametrize("rate", [700, 30_000])
def test_bounds_ascend_where_the_counter_of_object_ids_begins_again(
    rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_WALK_S", -1.0)
    reader: Any = Jumping(skipped=10**9, rate=rate)  # in the middle of a second
    found = sampled(reader, reader.whole, ROWS, SIZE, most=50_000)
    assert found is not None
    assert found[0] == reader.whole.lower
    assert list(found) == sorted(set(found))
    assert found[-1] < reader.whole.upper


def test_a_bound_that_is_gone_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_WALK_S", -1.0)
    reader: Any = Jumping(skipped=5)
    found = sampled(reader, reader.whole, ROWS, SIZE, most=50_000)
    assert found is not None
    numbers = [reader.number(one) for one in found]
    assert numbers == sorted(set(numbers))
    assert max(after - before for before, after in pairwise([*numbers, SIZE])) <= 8 * ROWS


class Counted:
    """Ascending `_id`s of a large collection, each a number in another form."""

    threads = 2

    def __init__(self, form: Any, number: Any, size: int) -> None:
        self._form, self._number, self._size = form, number, size
        self.sampled: list[int] = []

    def sample(self, count: int, bounds: IdRange) -> list[Any]:
        self.sampled.append(count)
        draw = random.Random(len(self.sampled))
        return [self._form(n) for n in sorted(draw.randrange(1, self._size - 1) for _ in range(count))]

    def record_numbers(self, ids: list[Any]) -> list[int]:
        return [self._number(one) + 1 for one in ids]

    def present(self, ids: list[Any]) -> list[Any]:
        return ids

    def walk(self, span: IdRange, step: int) -> Iterator[Any]:
        yield from (self._form(n) for n in range(self._number(span.lower) + step, self._number(span.upper), step))


def object_id(number: int) -> ObjectId:
    return ObjectId(b"\x60" + number.to_bytes(11, "big"))


FORMS: dict[str, tuple[Any, Any]] = {
    "int": (int, int),
    "int64": (Int64, int),
    "ObjectId": (object_id, lambda one: int.from_bytes(one.binary[1:], "big")),
    "str": ("{:012}".format, int),
}


@pytest.mark.parametrize("kind", FORMS)
def test_the_number_of_samples_does_not_grow_with_the_collection(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_WALK_S", 0.02)
    form, number = FORMS[kind]
    size, most = 40_000_000, 0
    reader: Any = Counted(form, number, size)
    whole = IdRange(lower=form(0), upper=form(size - 1), closed=True, uniform=True)
    found = sampled(reader, whole, 1000, size, most=50_000)
    assert found is not None
    numbers = [number(one) for one in found]
    assert numbers == sorted(set(numbers))
    assert all(type(one) in (type(form(0)), int) for one in found)
    most = max(after - before for before, after in pairwise([*numbers, size]))
    assert (most <= 2500, sum(reader.sampled)) == ((True, 2_500) if kind != "str" else (False, 100_000))


@pytest.mark.parametrize("numbers", [lambda ids: [], lambda ids: random.Random(1).sample(range(SIZE), len(ids))])
def test_without_meaning_in_the_records_the_sample_is_thinned(numbers: Any) -> None:
    reader: Any = Clumped(numbers=numbers)
    found = sampled(reader, WHOLE, ROWS, SIZE, most=50_000)
    assert found is not None
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    assert 0.8 < len(found) * ROWS / SIZE < 1.3
    assert reader.walked == 0


def test_few_ranges_are_made_where_many_are_not_allowed_and_none_of_a_poor_sample() -> None:
    reader: Any = Clumped()
    found = sampled(reader, WHOLE, ROWS, SIZE, most=20)
    assert found is not None
    assert len(found) <= 30
    assert sampled(Clumped(matching=5000), WHOLE, ROWS, SIZE, most=20) is None  # type: ignore[arg-type]


def test_a_plan_says_when_it_was_used_last(database: Any) -> None:
    database["c"].insert_many([{"_id": n} for n in range(10)])
    query, sizes = Query.find("c"), Sizes(prefetch_size=4, prefetch_factor=4, prefetch_bytes=2**20)
    reader = open_reader(database, query, {"_id": 1}, RetryPolicy(deadline_s=5))
    plan = make_plan(database, reader, sizes)
    used = database["mt.plans"].find_one({"_id": plan.digest})["used"]
    assert abs(utc_now() - used) < timedelta(minutes=1)
    assert load_plan(database, plan.digest, query) == plan
    assert database["mt.plans"].find_one({"_id": plan.digest})["used"] == used, "not written each time"
    database["mt.plans"].update_one({"_id": plan.digest}, {"$set": {"used": used - timedelta(days=20)}})
    assert make_plan(database, reader, sizes) == plan
    assert database["mt.plans"].find_one({"_id": plan.digest})["used"] >= used
    database["mt.plans"].update_one({"_id": plan.digest}, {"$unset": {"used": 1}})
    assert load_plan(database, plan.digest, query) == plan
    assert database["mt.plans"].find_one({"_id": plan.digest})["used"] >= used


@pytest.mark.parametrize("change", [{"starts": [5]}, {"last": 3}, {"starts": [5], "exact": False}, {"window": 1}])
def test_a_plan_that_was_changed_is_not_used(database: Any, change: dict[str, Any]) -> None:
    database["c"].insert_many([{"_id": n} for n in range(10)])
    query, sizes = Query.find("c"), Sizes(prefetch_size=2, prefetch_factor=8, prefetch_bytes=2**20)
    reader = open_reader(database, query, {"_id": 1}, RetryPolicy(deadline_s=5))
    plan = make_plan(database, reader, sizes)
    assert plan.window != 1

    database["mt.plans"].update_one({"_id": plan.digest}, {"$set": change})

    assert make_plan(database, reader, sizes) == plan
    if change.get("exact") is None:
        assert load_plan(database, plan.digest, query) is None
        assert resume_plan(database, reader, sizes, plan.digest) == plan


def test_a_plan_of_samples_has_each_document_once(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_WALKED", 100)
    ids = [Jumping(skipped=1).form(n) for n in range(0, 30_000, 10)]
    database["jumping"].insert_many([{"_id": one, "x": 1.0} for one in ids])
    reader = open_reader(database, Query.find("jumping"), {"_id": 1, "x": 1}, RetryPolicy())

    walk, walked = type(reader).walk, list[tuple[Any, Any]]()

    def noted(self: Any, bounds: IdRange, step: int) -> Iterator[Any]:
        walked.append((bounds.lower, bounds.upper))
        return walk(self, bounds, step)

    monkeypatch.setattr(type(reader), "walk", noted)
    plan = make_plan(database, reader, Sizes(prefetch_size=50, prefetch_factor=4, prefetch_bytes=2**20))
    assert reader.present([ObjectId(), ids[7], ids[5]]) in ([ids[5], ids[7]], [ids[7], ids[5]])
    assert reader.present([]) == []
    found = [
        bson.decode(reply[start:end])["_id"]
        for index in range(len(plan))
        for reply in reader.read(plan.bounds(index), plan.rows)
        for start, end in offsets(reply)
    ]
    assert found == ids
    assert len(plan) > 10
    assert (ids[0], ids[-1]) not in walked, "all `_id`s were read"


COLLATIONS: dict[str, Any] = {
    "none": None,
    "without case": {"locale": "en", "strength": 1},
    "numbers in texts": {"locale": "en", "numericOrdering": True},
    "accents from behind": {"locale": "fr", "backwards": True},
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("walked", [100, 200_000])
@pytest.mark.parametrize("collation", COLLATIONS)
def test_texts_in_the_order_of_any_collation_are_read_once(
    server_uri: str, monkeypatch: pytest.MonkeyPatch, collation: str, walked: int, *, mixed: bool
) -> None:
    monkeypatch.setattr(sampling, "_WALKED", walked)
    draw = random.Random(1)
    texts = {"".join(draw.choices("aAbBzZ019_-äÄß éE", k=draw.randint(1, 9))) + str(n) for n in range(3000)}
    ids = [*texts, *(list(range(1000)) if mixed else [])]
    with pymongo.MongoClient[dict[str, Any]](server_uri) as client:
        made = {} if collation == "none" else {"collation": COLLATIONS[collation]}
        collection = client.get_database().create_collection("texts", **made)
        collection.insert_many([{"_id": one} for one in ids])
        reader = open_reader(client.get_database(), Query.find("texts"), {"_id": 1}, RetryPolicy())
        sizes = Sizes(prefetch_size=50, prefetch_factor=4, prefetch_bytes=2**20)
        plan = make_plan(client.get_database(), reader, sizes)
        found = [
            bson.decode(reply[start:end])["_id"]
            for index in range(len(plan))
            for reply in reader.read(plan.bounds(index), plan.rows)
            for start, end in offsets(reply)
        ]
        assert found == [document["_id"] for document in collection.find().sort("_id", 1)]
        assert sorted(map(str, found)) == sorted(map(str, ids))
        assert len(plan) > 10


_IDS: list[Any] = [
    3,
    Int64(4),
    2.5,
    "a",
    b"b",
    ObjectId(b"0" * 12),
    Binary(b"1" * 16, 4),
    datetime(2020, 1, 2),
    None,
]


@pytest.mark.parametrize("count", [0, 1, 62, 63, 64, 65])
@pytest.mark.parametrize("prefetch_size", [7, 1000])
def test_what_one_reply_holds_is_cut_as_if_it_was_walked(database: Any, count: int, prefetch_size: int) -> None:
    ids = [*_IDS, *range(100, 200)][:count]
    if count:
        database["rows"].insert_many([{"_id": one, "x": "x" * n} for n, one in enumerate(ids)])
    reader = open_reader(database, Query.find("rows"), {"_id": 1, "x": 1}, RetryPolicy(deadline_s=5))
    sizes = Sizes(prefetch_size=prefetch_size, prefetch_factor=8, prefetch_bytes=10**8)
    if not count:
        with pytest.raises(EmptySelectError):
            make_plan(database, reader, sizes)
        return
    made = make_plan(database, reader, sizes)

    few, row_bytes = reader.probe(64)
    assert (few is None) == (count >= 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reader), "probe", lambda self, most: (None, row_bytes))
        walked = make_plan(database, reader, sizes)
    assert (made.digest, made.exact, len(made)) == (walked.digest, walked.exact, -(-count // prefetch_size))
