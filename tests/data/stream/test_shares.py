"""A shard that reads the documents of its own rows alone yields the same rows as one that reads all of them."""

from __future__ import annotations

import itertools
import re
import uuid
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from typing import Any

import bson
import numpy as np
import pytest
import torch
from bson import Decimal128, ObjectId
from tests.data.stream.shards import opened_shards

from mongotorch import Datalayer
from mongotorch.data import Stream
from mongotorch.data.read import ServerReader
from mongotorch.data.stream import epochs
from mongotorch.data.stream.shuffle import Share

COUNT = 300
STEP = 24
USUAL: dict[str, Any] = {"batch_size": STEP, "lanes": 4, "shuffle": True, "seed": 3}


def many_ids() -> list[Any]:
    """`_id`s of all types, which sort by type first."""
    makers: list[Any] = [
        lambda n: n,
        lambda n: n + 0.5,
        lambda n: f"{n:03d}" * 9,
        lambda n: ObjectId(f"{n:024x}"),
        lambda n: datetime(2020, 1, 1 + n % 28, n // 28),
        lambda n: bson.Binary.from_uuid(uuid.UUID(int=n)),
        lambda n: {"a": n, "b": [n]},
        lambda n: Decimal128(f"{n}.25"),
        lambda n: {"pattern": re.compile(f"^{n}")},
    ]
    return [None, True, *(makers[n % len(makers)](n) for n in range(COUNT - 2))]


def insert(db: Datalayer, ids: list[Any], size: int = 300) -> None:
    documents = ({"_id": one, "x": [float(n)] * size, "n": n, "w": n % 3 + 0.5} for n, one in enumerate(ids))
    db["rows"].raw.insert_many(list(documents))


def streams(db: Datalayer, world: int, **given: Any) -> AbstractContextManager[list[Stream]]:
    """The streams of all shards, with windows of 40 documents."""
    select = given.pop("select", db["rows"].find())
    return opened_shards(db, select, world, {"prefetch_size": 20, "prefetch_factor": 4}, USUAL | given)


def numbers(batch: Any) -> list[list[float]]:
    """Of a batch, or of each lane of a step, the numbers of the documents."""
    parts = batch.batches if hasattr(batch, "batches") else [batch]
    for part in parts:
        assert part is None or torch.equal(part[0][:, 0], part[1].to(part[0].dtype))
    return [[] if part is None else part[1].tolist() for part in parts]


def steps(found: list[Stream], most: int | None = None) -> list[list[list[float]]]:
    """The numbers of all shards, step by step."""
    run = zip(*(itertools.islice(iter(one), most) for one in found), strict=True)
    return [[lane for batch in parts for lane in numbers(batch)] for parts in run]


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many `_id`s each request looks for, where all documents count as large."""
    found: list[int] = []
    read = ServerReader.read

    def reading(self: Any, bounds: Any, expected: int, ids: Any = None, **given: Any) -> Any:
        found.extend([] if ids is None else [len(ids)])
        return read(self, bounds, expected, ids, **given)

    monkeypatch.setattr(ServerReader, "read", reading)
    monkeypatch.setattr(epochs, "_SAVED_BYTES", 0)
    return found


def doubled(x: Any, n: int) -> tuple[Any, int]:
    return x, n


CASES: list[dict[str, Any]] = [
    {},
    {"shuffle": False, "data_prefetch": True},
    {"data_prefetch": True, "across_epochs": True},
    {"sample_weight": "w"},
    {"sample_weight": "w", "shuffle": False},
    {"transform": doubled, "drop_last": True},
    {"accumulation": 3, "lanes": 8},
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: "-".join(map(str, given)) or "usual")
def test_shards_that_read_their_own_rows_yield_the_same_steps(
    db: Datalayer, looked_for: list[int], given: Any
) -> None:
    insert(db, list(range(COUNT)), size=2)
    with streams(db, 1, **given) as one:
        whole = [steps(one) for _ in range(2)]
        positions = [one[0].state_dict()]
    assert not looked_for
    for world in (2, 4):
        looked_for.clear()
        with streams(db, world, **given) as several:
            assert [steps(several) for _ in range(2)] == whole
            assert [one.state_dict() for one in several] == positions * world
            assert len({one.report for one in several}) == 1
        if not db.uri.startswith("mongomock"):
            assert looked_for


def test_ids_of_all_types_are_looked_for(db: Datalayer, looked_for: list[int]) -> None:
    if db.uri.startswith("mongomock"):
        pytest.skip("mongomock finds no `_id`s")
    insert(db, many_ids(), size=2)
    for fold in (None, "train"):
        select = db["rows"].find() if fold is None else db["rows"].find().fold("train")
        with streams(db, 1, select=select) as one:
            whole = steps(one)
        with streams(db, 4, select=select) as several:
            assert steps(several) == whole
    assert looked_for


def test_batches_and_plain_shards_read_their_part(db: Datalayer, looked_for: list[int]) -> None:
    insert(db, [ObjectId(f"{n:024x}") for n in range(COUNT)], size=2)
    plain: dict[str, Any] = {"lanes": 0, "batch_size": 6}
    for given in ({"shard_by": "batches", "shuffle": False}, {"shard_by": "rows"}):
        with streams(db, 1, **plain, **given) as one:
            whole = [n for step in steps(one) for n in step[0]]
        for world in (2, 3):
            looked_for.clear()
            with streams(db, world, **plain, **given) as several:
                each = [[numbers(batch)[0] for batch in one] for one in several]
            found = [n for batches in itertools.zip_longest(*each, fillvalue=[]) for b in batches for n in b]
            assert found == whole
            if not db.uri.startswith("mongomock") and "batches" in given.values():
                # Of the first window each shard has read all, and nothing twice of the others.
                assert sum(looked_for) == COUNT - 20


def test_a_step_goes_on_with_another_number_of_shards(db: Datalayer, looked_for: list[int]) -> None:
    insert(db, list(range(COUNT)), size=2)
    with streams(db, 1) as one:
        whole = steps(one)
    found, state = list[Any](), None
    for world, most in ((2, 3), (4, 5), (2, 2), (1, None)):
        with streams(db, world) as several:
            if state is not None:
                for stream in several:
                    stream.load_state_dict(state)
            found += steps(several, most)
            state = several[0].state_dict()
            assert all(other.state_dict() == state for other in several)
    assert found == whole
    assert looked_for or db.uri.startswith("mongomock")


def test_a_document_that_goes_meanwhile_is_left_out(
    db: Datalayer, looked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if db.uri.startswith("mongomock"):
        pytest.skip("mongomock is read once")
    insert(db, list(range(COUNT)), size=2)
    read, gone = ServerReader.read, list[int]()

    def reading(self: Any, bounds: Any, expected: int, ids: Any = None, **given: Any) -> Any:
        if ids is not None and not gone:
            gone.append(ids[0])
            db["rows"].raw.delete_one({"_id": ids[0]})
        return read(self, bounds, expected, ids, **given)

    monkeypatch.setattr(ServerReader, "read", reading)
    given = {"lanes": 0, "batch_size": 1, "data_prefetch": False}
    with streams(db, 2, **given) as several:
        found = [n for step in steps(several) for batch in step for n in batch]
    assert len(gone) == 1
    assert len(found) == len(set(found)) == COUNT - 2  # the last round has one row, which nobody gets
    assert gone[0] not in found
    assert looked_for


def test_small_documents_and_those_that_may_be_left_out_are_read_by_all(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch, looked_for: list[int]
) -> None:
    if db.uri.startswith("mongomock"):
        pytest.skip("mongomock finds no `_id`s")
    monkeypatch.undo()
    asked = list[Any]()
    read = ServerReader.read

    def reading(self: Any, bounds: Any, expected: int, ids: Any = None, **given: Any) -> Any:
        asked.append(ids)
        return read(self, bounds, expected, ids, **given)

    monkeypatch.setattr(ServerReader, "read", reading)
    cases: Any = ((2, {}, False), (300, {"on_bad_document": "skip"}, False), (300, {}, True))
    for size, given, is_shared in cases:
        db["rows"].raw.drop()
        insert(db, list(range(COUNT)), size=size)
        asked.clear()
        with streams(db, 2, lanes=2, batch_size=8, **given) as several:
            assert sorted(n for step in steps(several) for lane in step for n in lane) == list(range(COUNT))
        assert any(ids is not None for ids in asked) is is_shared
    assert not looked_for


def test_a_share_is_what_lanes_and_batches_are_cut_by() -> None:
    share = Share(period=10, first=2, stop=5, is_cut_anew=False)
    assert np.flatnonzero(share.rows(7, 20)).tolist() == [5, 6, 7, 15, 16, 17]
    assert share.saved(1000) == 0.7
    anew = replace(share, is_cut_anew=True)
    assert np.flatnonzero(anew.rows(7, 20)).tolist() == [5, 6, 7, *range(13, 20)]
    assert anew.rows(3, 4).all()
    assert anew.saved(4) == 0.0
