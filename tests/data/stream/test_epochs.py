"""Reading on across the end of an epoch: the same epochs, begun earlier, and nothing left behind."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mongotorch.data import Stream, StreamSpec
from mongotorch.data.stream.windows import WindowReader
from mongotorch.errors import DataError, EmptySelectError
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

COUNT = 1009
WAYS: dict[str, dict[str, Any]] = {
    "thread": {"data_prefetch": True},
    "workers": {"loader": {"num_workers": 2}},
    "kept worker": {"loader": {"num_workers": 1, "persistent_workers": True}},
    "samples": {"data_prefetch": True, "transform": lambda x, y: (x, y + 1)},
    "samples in workers": {
        "data_prefetch": True,
        "transform": lambda x, y: (x, y + 1),
        "loader": {"num_workers": 2},
    },
}
ORDERS: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffle": True},
    "by id": {},
    "own order": {"query": Query.find("documents").sort("y", -1)},
}

Make = Callable[..., Stream]


@pytest.fixture
def documents(database: Any) -> Any:
    database["documents"].insert_many([{"_id": n, "x": [float(n), n / 2], "y": n} for n in range(COUNT)])
    return database["documents"]


@pytest.fixture
def make(uri: str, documents: Any) -> Iterator[Make]:
    """Makes streams that read on, and sees that they leave no thread behind."""
    streams: list[Stream] = []
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener

    def stream(**given: Any) -> Stream:
        small = {"batch_size": 64, "prefetch_size": 20, "prefetch_factor": 8, "seed": 5, "across_epochs": True}
        spec = StreamSpec(**{"query": Query.find("documents"), "key": ("x", "y"), **small, **given})
        streams.append(Stream(opener, spec))
        return streams[-1]

    yield stream
    for made in streams:
        made.close()
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mongotorch-prefetch")]


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_epochs_are_those_of_a_stream_that_stops_at_their_ends(make: Make, way: str, order: str) -> None:
    plain = make(**ORDERS[order], **WAYS[way], across_epochs=False)
    onward = make(**ORDERS[order], **WAYS[way])
    for _ in range(4):
        assert same(list(onward), list(plain))
        assert onward.report.rows == COUNT


@pytest.mark.parametrize("way", ["thread", "kept worker"])
def test_a_state_of_any_epoch_leads_to_the_same_tail(make: Make, way: str) -> None:
    expected = make(shuffle=True)
    epochs = [list(expected) for _ in range(3)]
    stream = make(shuffle=True, **WAYS[way])
    list(stream)
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    state = stream.state_dict()
    other = make(shuffle=True, **WAYS[way])
    list(other)
    other.load_state_dict(state)
    for loaded in (other, stream):  # the second one has an iteration of its own under way
        loaded.load_state_dict(state)
        assert same(list(loaded), epochs[1][5:])
        assert same(list(loaded), epochs[2])


@pytest.mark.parametrize("way", ["thread", "kept worker"])
def test_another_epoch_than_the_next_one_can_be_asked_for(make: Make, way: str) -> None:
    plain, stream = make(shuffle=True), make(shuffle=True, **WAYS[way])
    for epoch in (0, 1, 0, 3, 4, 2):
        plain.set_epoch(epoch)
        stream.set_epoch(epoch)
        assert same(list(stream), list(plain))


def test_what_is_read_ahead_for_another_epoch_is_dropped_at_once(make: Make) -> None:
    stream = make(shuffle=True, **WAYS["thread"])
    list(stream)
    assert readers()
    stream.set_epoch(1)
    assert readers()
    stream.set_epoch(0)
    assert not readers()


@pytest.mark.parametrize("way", ["thread", "kept worker"])
@pytest.mark.parametrize("count", [50, 300])
def test_a_small_collection_is_read_one_epoch_ahead_at_most(
    make: Make, documents: Any, uri: str, count: int, way: str
) -> None:
    if way == "kept worker" and uri.startswith("mongomock"):
        pytest.skip("a worker has a mongomock of its own, where nothing is deleted")
    documents.delete_many({"_id": {"$gte": count}})  # 3 or 15 ranges, where eight may be held
    stream = make(shuffle=True, **WAYS[way])
    list(stream)
    time.sleep(0.3)
    documents.delete_many({})
    assert 0 < sum(len(y) for _, y in stream) <= count
    with pytest.raises(EmptySelectError):
        list(stream)


def test_an_error_behind_the_end_of_an_epoch_is_raised_in_the_next_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, seen = make(shuffle=True, **WAYS["thread"]), 0
    expected = list(make(shuffle=True))
    decode = WindowReader.decode

    def failing(self: WindowReader, replies: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > (self.count or 0):
            raise DataError("of the next epoch")
        return decode(self, replies)

    monkeypatch.setattr(WindowReader, "decode", failing)
    assert same(list(stream), expected)
    with pytest.raises(DataError, match="of the next epoch"):
        list(stream)


def test_a_stream_that_nobody_closes_takes_its_reading_with_it(make: Make, uri: str) -> None:
    with open_address(uri, read_settings()) as connection:
        spec = StreamSpec(
            query=Query.find("documents"), key=("x", "y"), batch_size=64, data_prefetch=True, across_epochs=True
        )
        stream = Stream(connection.opener, spec, database=connection.database)
        list(stream)
        assert readers()
        del stream
        gc.collect()
        assert not readers()


def test_a_forked_loader_reads_for_itself_what_is_on_its_way_here(make: Make) -> None:
    plain, stream = make(shuffle=True), make(shuffle=True, **WAYS["thread"])
    epochs = [list(plain) for _ in range(3)]
    assert same(list(stream), epochs[0])
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert same(list(loader), epochs[1])
    stream.set_epoch(1)
    assert same(list(stream), epochs[1])
    assert same(list(stream), epochs[2])
