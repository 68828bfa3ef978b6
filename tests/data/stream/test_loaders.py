"""The stream under torch's own `DataLoader`: its length, its epochs, and whose state it is."""

from __future__ import annotations

import itertools
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mongotorch import Datalayer
from mongotorch.data import Stream, StreamSpec
from mongotorch.errors import DataError, EmptySelectError, LengthUnknownError
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # on two cores

COUNT = 200
SELECT = Query.find("documents")
QUERIES: dict[str, tuple[Query, int | None]] = {
    "all": (SELECT, 200),
    "filtered": (Query.find("documents", {"n": {"$gte": 30}}), 170),
    "sorted": (SELECT.sort("n", -1), 200),
    "part": (SELECT.skip(190).limit(50), 10),
    "limited": (SELECT.sort("n").limit(70), 70),
    "fold of a part": (SELECT.sort("n").limit(70).fold("train"), None),
}
WORKERS = pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True), (2, False), (4, True)])
MONGOD = pytest.mark.parametrize("uri", ["mongod"], indirect=True)  # what workers agree on is not its affair

Make = Callable[..., Stream]


@pytest.fixture
def make(uri: str, database: Any) -> Iterator[Make]:
    """Makes streams over 200 documents, some with an `_id` of another type."""
    identities = [n if n % 5 else f"{n:03d}" for n in range(COUNT)]
    database["documents"].insert_many([{"_id": identities[n], "n": n} for n in range(COUNT)])
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener
    streams: list[Stream] = []

    def stream(**given: Any) -> Stream:
        small = {"batch_size": 16, "prefetch_size": 20, "prefetch_factor": 4, "seed": 5, "shuffle": True}
        streams.append(Stream(opener, StreamSpec(**{"query": SELECT, "key": "n", **small, **given})))
        return streams[-1]

    yield stream
    for made in streams:
        made.close()
    assert not list(Path(tempfile.gettempdir()).glob("mongotorch-stream-*"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def rows(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def epochs_of(make: Make, count: int, **given: Any) -> list[list[list[int]]]:
    alone = make(**given)
    return [rows(alone) for _ in range(count)]


# Length.


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("how", [{}, {"shuffle": False}, {"mode": "memory"}, {"data_prefetch": True}])
def test_the_length_is_the_number_of_batches(make: Make, name: str, how: dict[str, Any]) -> None:
    query, count = QUERIES[name]
    for shard, drop_last in itertools.product([(0, 1), (1, 2), (2, 3)], [False, True]):
        stream = make(query=query, shard=shard, drop_last=drop_last, **how)
        found = len(stream)
        if found:
            assert (found, found) == (len(rows(stream)), len(stream))
        else:
            assert count is not None
            assert count < 16 * shard[1]
    assert count is None or len(make(query=query)) == -(-count // 16)


def test_the_length_of_a_pipeline_is_known_where_it_is_read_once(make: Make) -> None:
    pipeline = Query.aggregate("documents", [{"$match": {"n": {"$lt": 40}}}, {"$sort": {"n": 1}}])
    stream = make(query=pipeline)
    with pytest.raises(LengthUnknownError, match="is a pipeline, and only reading tells") as caught:
        len(stream)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, DataError)
    assert len(rows(stream)) == len(make(query=pipeline, mode="memory")) == 3


def test_the_length_follows_documents_that_come_and_go_between_epochs(make: Make, database: Any) -> None:
    stream = make(shuffle=False)
    assert len(stream) == len(rows(stream)) == 13
    database["documents"].delete_many({"n": {"$gte": 20, "$lt": 60}})
    assert len(stream) == len(rows(stream)) == 10


def test_the_length_of_nothing_is_an_error(make: Make) -> None:
    nothing = make(query=Query.find("documents", {"n": -1}))
    assert nothing
    with pytest.raises(EmptySelectError):
        len(nothing)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_has_the_length_of_its_stream(make: Make, workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(make(), batch_size=None, num_workers=workers)
    assert len(loader) == len(rows(loader)) == 13


# Epochs.


@WORKERS
def test_each_iteration_of_a_loader_is_the_next_epoch(make: Make, workers: int, persistent: bool) -> None:
    epochs = epochs_of(make, 4)
    loader: DataLoader[Any] = DataLoader(
        make(), batch_size=None, num_workers=workers, persistent_workers=persistent
    )
    assert [rows(loader) for _ in range(4)] == epochs
    assert len({json.dumps(epoch) for epoch in epochs}) == 4


@MONGOD
@WORKERS
def test_an_iteration_that_was_left_counts_as_an_epoch(make: Make, workers: int, persistent: bool) -> None:
    epochs = epochs_of(make, 4)
    loader: DataLoader[Any] = DataLoader(
        make(), batch_size=None, num_workers=workers, persistent_workers=persistent
    )
    for _ in range(2):
        assert next(iter(loader)).tolist() in [epoch[0] for epoch in epochs[:2]]
    assert [rows(loader), rows(loader)] == epochs[2:]


@MONGOD
@WORKERS
def test_the_same_random_numbers_before_each_epoch_do_not_repeat_it(
    make: Make, workers: int, persistent: bool
) -> None:
    epochs = epochs_of(make, 3)
    loader: DataLoader[Any] = DataLoader(
        make(), batch_size=None, num_workers=workers, persistent_workers=persistent
    )
    for epoch in epochs:
        torch.manual_seed(0)
        assert rows(loader) == epoch


@WORKERS
def test_a_stream_can_be_moved_between_the_epochs_of_a_loader(make: Make, workers: int, persistent: bool) -> None:
    epochs = epochs_of(make, 4)
    stopped = make()
    list(itertools.islice(iter(stopped), 5))
    stream = make()
    loader: DataLoader[Any] = DataLoader(
        stream, batch_size=None, num_workers=workers, persistent_workers=persistent
    )
    assert rows(loader) == epochs[0]
    stream.set_epoch(3)
    assert rows(loader) == epochs[3]
    stream.set_epoch(1)
    assert [rows(loader), rows(loader)] == epochs[1:3]
    stream.load_state_dict(stopped.state_dict())
    assert rows(loader) == epochs[0][5:]
    assert rows(loader) == epochs[1]
    assert rows(stream) == epochs[2]
    assert rows(loader) == epochs[3]


def test_two_loaders_at_a_time_read_an_epoch_each(make: Make) -> None:
    epochs = epochs_of(make, 2)
    loader: DataLoader[Any] = DataLoader(make(), batch_size=None, num_workers=2)
    first, second = iter(loader), iter(loader)
    found = [[one.tolist(), other.tolist()] for one, other in zip(first, second, strict=True)]
    assert sorted([one for one, _ in found] + [other for _, other in found]) == sorted(epochs[0] + epochs[1])


def test_spawned_workers_agree_on_the_epoch(make: Make, uri: str) -> None:
    if uri.startswith("mongomock"):
        pytest.skip("mongomock lives in one process")
    epochs = epochs_of(make, 2)
    stream = make()
    loader: DataLoader[Any] = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert [rows(loader), rows(loader)] == epochs
    copy = pickle.loads(pickle.dumps(stream))  # a copy for itself does not hear of the loader
    assert rows(copy) == epochs[0]
    copy.close()


def test_a_select_without_documents_is_an_error_under_workers_too(make: Make) -> None:
    for given in ({"query": Query.find("documents", {"n": -1})}, {"batch_size": 300, "drop_last": True}):
        loader: DataLoader[Any] = DataLoader(make(**given), batch_size=None, num_workers=2)
        with pytest.raises(DataError):
            list(loader)


# State.


@pytest.mark.parametrize("workers", [1, 2])
def test_the_process_of_the_loader_does_not_know_the_state_of_its_workers(make: Make, workers: int) -> None:
    stream = make()
    loader: DataLoader[Any] = DataLoader(stream, batch_size=None, num_workers=workers)
    start = stream.state_dict()
    next(iter(loader))
    with pytest.raises(DataError, match="the workers of a DataLoader read this stream"):
        stream.state_dict()
    stream.load_state_dict(start)
    assert stream.state_dict() == start


def test_without_workers_the_stream_knows_its_state_under_a_loader(make: Make) -> None:
    epochs = epochs_of(make, 1)
    stream, other = make(), make()
    batches = iter(DataLoader(stream, batch_size=None))
    list(itertools.islice(batches, 4))
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert rows(other) == epochs[0][4:]


@pytest.mark.parametrize("batch_size", [16, 20, 300])
@pytest.mark.parametrize("drop_last", [False, True])
def test_where_nothing_is_left_of_an_epoch_the_next_one_comes(
    make: Make, batch_size: int, drop_last: bool
) -> None:
    how = {"batch_size": min(batch_size, 200 if drop_last else 300), "drop_last": drop_last}
    epochs = epochs_of(make, 2, **how)
    stopped, resumed = make(**how), make(**how)
    batches = iter(stopped)
    list(itertools.islice(batches, len(epochs[0])))
    resumed.load_state_dict(stopped.state_dict())
    assert rows(resumed) == epochs[1]


def test_the_state_of_a_worker_is_refused_elsewhere(make: Make) -> None:
    stream = make()
    state = {**stream.state_dict(), "turn": [1, 2, 3, False]}
    with pytest.raises(DataError, match="the state of worker 1 of 2 of a loader"):
        stream.load_state_dict(state)


def test_a_datalayers_stream_has_a_length(db: Datalayer) -> None:
    db["documents"].insert_many([{"n": n} for n in range(50)])
    with db.stream(db["documents"].find(), key="n", batch_size=8, fold="train") as stream:
        assert len(stream) == len(list(stream))
