"""Resume anywhere under other settings, shards, and the stream alone under torch's own loader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import bson
import pytest
import torch
from torch.utils.data import DataLoader

from mongotorch.data import Stream, StreamSpec
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

COUNT = 1009
SELECT = Query.find("documents")

Make = Callable[..., Stream]


@pytest.fixture
def make(uri: str, database: Any) -> Iterator[Make]:
    """Makes streams over 1,009 documents in a random order of insertion."""
    documents = [{"_id": n * 7, "x": [float(n), n / 2], "y": n} for n in range(COUNT)]
    random.Random(2).shuffle(documents)
    database["documents"].insert_many(documents)
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener
    streams: list[Stream] = []

    def stream(**given: Any) -> Stream:
        small = {"batch_size": 16, "prefetch_size": 50, "prefetch_factor": 7, "seed": 5}
        streams.append(Stream(opener, StreamSpec(**{"query": SELECT, "key": ("x", "y"), **small, **given})))
        return streams[-1]

    yield stream
    for made in streams:
        made.close()


def equal(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("uri", ["mongod"], indirect=True)  # in memory, test_stream.py resumes at one position
@pytest.mark.parametrize("shuffle", [True, False])
def test_twenty_random_positions_under_other_settings_have_the_tail_of_the_uninterrupted_run(
    make: Make, shuffle: bool
) -> None:
    whole = list(make(shuffle=shuffle))
    draw = random.Random(shuffle)
    befores: list[dict[str, Any]] = [{}, {"data_prefetch": True}, {"loader": {"num_workers": 1}}]
    afters: list[dict[str, Any]] = [
        {"data_prefetch": True},
        {"data_prefetch": True, "prefetch_size": 9, "prefetch_factor": 1},
        {"prefetch_size": 400, "prefetch_factor": 20},
        {"data_prefetch": True, "prefetch_bytes": 5000},
        {"mode": "memory"},
        {"loader": {"num_workers": 1}},
        {"loader": {"num_workers": 2, "prefetch_factor": 4}, "data_prefetch": True},
    ]
    for number, position in enumerate(draw.sample(range(1, len(whole)), 20)):
        with make(shuffle=shuffle, **draw.choice(befores)) as stopped:
            batches = iter(stopped)
            assert equal(list(islice(batches, position)), whole[:position])
            state = json.dumps(stopped.state_dict())
        assert len(state) <= 1024
        with make(shuffle=shuffle, seed=number, **afters[number % len(afters)]) as resumed:
            resumed.load_state_dict(json.loads(state))
            assert equal(list(resumed), whole[position:]), (position, number)


@pytest.mark.parametrize("size", [10, 240, 5000])
def test_the_state_is_under_a_kilobyte_whatever_the_ids(make: Make, database: Any, size: int) -> None:
    database["documents"].drop()
    database["documents"].insert_many([{"_id": f"{n:04d}" + "é" * size, "x": 0.5, "y": n} for n in range(100)])
    whole = list(make())
    for shuffle in (True, False):
        stream = make(shuffle=shuffle)
        next(iter(stream))
        assert len(json.dumps(stream.state_dict()).encode()) <= 1024
        assert len(bson.encode(stream.state_dict())) <= 1024
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    assert equal(list(resumed), whole[1:])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_under_a_users_loader_the_stream_gives_the_batches_that_it_gives_alone(make: Make, workers: int) -> None:
    alone = make(shuffle=True)
    first, second = list(alone), list(alone)
    stream = make(shuffle=True)
    loader: DataLoader[Any] = DataLoader(stream, batch_size=None, num_workers=workers)
    assert equal(list(loader), first)
    stream.set_epoch(1)
    assert equal(list(loader), second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaded_state_counts_under_a_users_loader(make: Make, workers: int) -> None:
    whole = list(make(shuffle=True))
    stopped = make(shuffle=True)
    for _ in islice(iter(stopped), 5):
        pass
    stream = make(shuffle=True)
    stream.load_state_dict(stopped.state_dict())
    assert equal(list(DataLoader(stream, batch_size=None, num_workers=workers)), whole[5:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_are_disjoint_and_take_equal_steps_under_workers_too(
    make: Make, workers: int, drop_last: bool
) -> None:
    ranks = []
    for rank in range(3):
        stream = make(shuffle=True, shard=(rank, 3), drop_last=drop_last)
        batches = list(DataLoader(stream, batch_size=None, num_workers=workers))
        assert equal(batches, list(make(shuffle=True, shard=(rank, 3), drop_last=drop_last)))
        ranks.append([label for _, y in batches for label in y.tolist()])
        assert len(batches) == len(ranks[0]) // 16 + bool(len(ranks[0]) % 16)
    together = [label for rank in ranks for label in rank]
    assert len(together) == len(set(together)) > COUNT - (48 if drop_last else 3)
    assert {len(rank) for rank in ranks} == {len(ranks[0])}


def test_an_error_in_a_users_worker_is_that_of_the_stream(make: Make, database: Any) -> None:
    database["documents"].update_one({"y": 900}, {"$unset": {"x": ""}})
    loader: DataLoader[Any] = DataLoader(make(), batch_size=None, num_workers=1)
    with pytest.raises(Exception, match="has no field 'x'"):
        list(loader)
