"""Weights of documents: how often each comes, and that it is the same however it is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bson
import numpy as np
import pytest
from bson import Decimal128
from torch.utils.data import DataLoader

from mongotorch.data import Stream, StreamSpec
from mongotorch.data.decode import build, decode, id_keys
from mongotorch.data.read import weights_of, with_weights
from mongotorch.data.stream.shuffle import Order, row_weights
from mongotorch.errors import DataError, FieldMissingError, LengthUnknownError, ParameterError
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

COUNT = 403
WEIGHTS = [0.0, 0.25, 1, 2.5, 7]
SELECT = Query.find("documents", {"y": {"$gte": 0}})
QUERIES = {
    "by id": SELECT,
    "sorted": SELECT.sort("y"),
    "limited": SELECT.sort("y", -1).skip(7).limit(300),
    "pipeline": Query.aggregate("documents", [{"$match": {"y": {"$gte": 9}}}, {"$sort": {"y": 1}}]),
}
WAYS: dict[str, dict[str, Any]] = {
    "prefetch": {"data_prefetch": True},
    "memory": {"mode": "memory"},
    "download": {"mode": "download"},
    "workers": {"loader": {"num_workers": 2}},
    "samples": {"transform": lambda x, y: (x, y)},
}

Make = Callable[..., Stream]


@pytest.fixture
def make(uri: str, database: Any, tmp_path: Path) -> Iterator[Make]:
    """Makes streams over documents with weights."""
    database["documents"].insert_many(
        {"_id": f"{n:04d}" if n % 3 else n, "x": [float(n), 0.5], "y": n, "w": WEIGHTS[n % 5]}
        for n in range(COUNT)
    )
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener
    streams: list[Stream] = []

    def stream(**given: Any) -> Stream:
        small = {"batch_size": 16, "prefetch_size": 40, "prefetch_factor": 7, "seed": 5, "cache_dir": tmp_path}
        spec = {"query": SELECT, "key": ("x", "y"), "sample_weight": "w", **small, **given}
        streams.append(Stream(opener, StreamSpec(**spec)))
        return streams[-1]

    yield stream
    for made in streams:
        made.close()


def rows(batches: Any) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", QUERIES)
def test_every_way_yields_the_same_rows_as_often_as_their_weights_say(
    make: Make, name: str, shuffle: bool
) -> None:
    plain = make(query=QUERIES[name], shuffle=shuffle)
    epochs = [rows(plain) for _ in range(3)]
    for way in WAYS.values():
        other = make(query=QUERIES[name], shuffle=shuffle, **way)
        assert [rows(other) for _ in range(2)] == epochs[:2]
    times = [Counter(flat(epoch)) for epoch in epochs]
    for y in set(flat(epochs[0])):
        weight = WEIGHTS[y % 5]
        assert all(int(weight) <= each[y] <= int(weight) + (weight % 1 > 0) for each in times)
    assert times[0] != times[1]  # the parts of a weight fall out anew in each epoch
    assert len(set(flat(epochs[0])[:16])) > (8 if shuffle else 2)  # rows that come again lie elsewhere


def test_a_batch_holds_the_values_of_its_documents(make: Make) -> None:
    for x, y in make(shuffle=True):
        assert x.tolist() == [[float(n), 0.5] for n in y.tolist()]


@pytest.mark.parametrize("way", ["prefetch", "memory", "download"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stopped_stream_goes_on_with_the_next_row(make: Make, shuffle: bool, way: str) -> None:
    whole = make(shuffle=shuffle)
    expected = [rows(whole) for _ in range(2)]
    stopped = make(shuffle=shuffle, **WAYS[way])
    running = iter(stopped)
    for taken in range(1, len(expected[0])):
        next(running)
        if taken % 11:
            continue
        state = json.loads(json.dumps(stopped.state_dict()))
        assert len(json.dumps(state)) < 1024
        other = make(shuffle=shuffle, seed=99)
        other.load_state_dict(state)
        assert rows(other.rest()) == expected[0][taken:]
        assert rows(other) == expected[1]


def test_a_stopped_stream_finds_its_row_again_where_documents_before_it_are_gone(
    make: Make, database: Any
) -> None:
    for shuffle in (False, True):
        expected = flat(rows(make(shuffle=shuffle)))
        stopped = make(shuffle=shuffle)
        running = iter(stopped)
        before = flat(rows(next(running) for _ in range(9)))
        last, left = before[-1], expected[len(before) :]
        gone = [y for y in set(before) if y not in left and y != last][:20]
        database["documents"].delete_many({"y": {"$in": gone}})
        other = make(shuffle=shuffle)
        other.load_state_dict(stopped.state_dict())
        assert flat(rows(other.rest())) == left


@pytest.mark.parametrize("uri", ["mongod"], indirect=True)
@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_and_the_workers_of_a_loader_share_the_same_rows(make: Make, shuffle: bool) -> None:
    whole = rows(make(shuffle=shuffle, batch_size=8))
    shards = [rows(make(shuffle=shuffle, batch_size=4, shard=(rank, 2))) for rank in range(2)]
    assert len(shards[0]) == len(shards[1])
    together = [sorted(one + two) for one, two in zip(*shards, strict=True)]
    assert together[:-1] == [sorted(batch) for batch in whole][: len(together) - 1]
    for workers in (0, 1, 2):
        loader = DataLoader(make(shuffle=shuffle, batch_size=8), batch_size=None, num_workers=workers)
        assert rows(loader) == whole


@pytest.mark.parametrize("way", ["prefetch", "memory", "download"])
def test_its_length_is_the_number_of_its_batches(make: Make, way: str) -> None:
    for settings in ({}, {"drop_last": True}, {"shard": (1, 3)}):
        stream = make(shuffle=True, **WAYS[way], **settings)
        lengths = stream.lengths(3)
        assert len(set(lengths)) > 1
        for expected in lengths:
            assert len(list(stream)) == expected
            stream.set_epoch(stream.state_dict()["epoch"])
        assert len(make(shuffle=True, **WAYS[way], **settings)) == lengths[0]


def test_the_length_of_a_pipeline_is_known_where_it_is_read_once(make: Make) -> None:
    query = QUERIES["pipeline"]
    with pytest.raises(LengthUnknownError):
        len(make(query=query))
    assert len(make(query=query, mode="memory")) == len(rows(make(query=query)))


@pytest.mark.parametrize("on_bad_document", ["raise", "skip"])
@pytest.mark.parametrize("bad", [-1.0, "2", ...])
def test_a_weight_that_is_none_is_an_error_or_left_out(
    make: Make, database: Any, bad: Any, on_bad_document: str
) -> None:
    change = {"$unset": {"w": 1}} if bad is ... else {"$set": {"w": bad}}
    database["documents"].update_one({"y": 207}, change)
    for way in ({}, WAYS["memory"], WAYS["download"]):
        stream = make(shuffle=True, on_bad_document=on_bad_document, **way)
        if on_bad_document == "raise":
            with pytest.raises(FieldMissingError if bad is ... else DataError, match="'w'") as raised:
                list(stream)
            assert (raised.value.field, raised.value.document_id) == ("w", 207)
        else:
            assert len(rows(stream)) == make(shuffle=True, on_bad_document="skip", **way).lengths(1)[0]
            assert stream.report.skipped == 1
            assert "'w'" in stream.report.why


def test_weights_may_be_any_numbers_and_have_a_default(make: Make, database: Any) -> None:
    expected = rows(make(shuffle=True))
    assert rows(make(shuffle=True, key=("x", "y", "w"))) == expected
    for y, same in ((3, Decimal128("2.5")), (204, 7.0), (202, True)):
        database["documents"].update_one({"y": y}, {"$set": {"w": same}})
    database["documents"].update_many({"w": 0.25}, {"$unset": {"w": 1}})
    assert rows(make(shuffle=True, defaults={"w": 0.25})) == expected


def test_documents_of_several_layouts_come_as_often(make: Make, database: Any) -> None:
    expected = rows(make(shuffle=True))
    database["documents"].update_many({"y": {"$gte": 160, "$lt": 170}}, {"$set": {"x": [1, 2]}})
    found = make(shuffle=True)
    for (x, y), same in zip(found, expected, strict=True):
        assert y.tolist() == same
        assert x.tolist() == [[1.0, 2.0] if 160 <= n < 170 else [n, 0.5] for n in same]


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "2", None, [1.0], 1001, Decimal128("NaN"), {}, b"1"])
def test_what_is_no_weight_is_named(value: Any) -> None:
    columns = decode([bson.encode({"_id": n, "w": value if n == 2 else 1}) for n in range(5)], ["w"])
    with pytest.raises(DataError, match="'w' of document 2") as raised:
        weights_of(columns, "w")
    assert (raised.value.field, raised.value.document_id) == ("w", 2)
    left = with_weights(columns, "w")
    assert (left.ids.values(), left.skipped) == ([0, 1, 3, 4], 1)


def test_frequencies_follow_the_weights() -> None:
    keys = id_keys(build(list(range(100_000))))
    weights = row_weights(keys, np.where(np.arange(100_000) % 2, 1.8, 0.2))
    counted = np.zeros(2)
    for epoch in range(4):
        times = Order(seed=3, epoch=epoch, shuffle=True, window=50).times(weights)
        counted += [times[0::2].sum(), times[1::2].sum()]
    assert counted.sum() == pytest.approx(400_000, rel=0.002)
    assert counted[1] / counted[0] == pytest.approx(9, rel=0.01)


def test_a_download_of_other_weights_is_not_used(make: Make, database: Any) -> None:
    first = rows(make(mode="download"))
    assert rows(make(mode="download")) == first
    database["documents"].update_one({"y": 10}, {"$set": {"w": 3}})
    assert Counter(flat(rows(make(mode="download"))))[10] == 3
    assert Counter(flat(rows(make(mode="download", sample_weight=None))))[10] == 1


def test_nothing_is_left_where_all_weights_are_zero(make: Make, database: Any) -> None:
    database["documents"].update_many({}, {"$set": {"w": 0}})
    stream = make(shuffle=True)
    assert len(stream) == 0
    with pytest.raises(DataError, match="weights in 'w'"):
        list(stream)


def test_a_state_of_other_weights_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="sample_weight=None"):
        make().load_state_dict(make(sample_weight=None).state_dict())
    with pytest.raises(ParameterError, match="sample_weight"):
        make(sample_weight="")
