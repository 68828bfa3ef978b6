"""The rows of a step are cut into lanes in the same way on any number of shards, and each is there once."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tests.data.stream.shards import opened_shards
from tests.helpers import fill

from mongotorch import Datalayer
from mongotorch.data import Stream
from mongotorch.errors import ParameterError

COUNT = 103  # steps of 24 rows, and one of 7
Step = list[tuple[int, ...]]  # the numbers of the documents of each lane


def noisy(x: Any, n: int) -> tuple[Any, float]:
    return n, torch.rand(()).item()


def streams(db: Datalayer, world: int, **given: Any) -> AbstractContextManager[list[Stream]]:
    usual: dict[str, Any] = {"batch_size": 12, "accumulation": 2, "lanes": 4, "shuffle": True, "seed": 3}
    return opened_shards(db, db["points"].find(), world, {"prefetch_size": 20}, usual | given)


def steps(found: list[Stream], at: int = 1, most: int | None = None) -> list[list[Any]]:
    """The part `at` of the batch of each lane, over all shards, step by step."""
    run = zip(*(itertools.islice(iter(one), most) for one in found), strict=True)
    return [[_numbers(batch, at) for part in parts for batch in part.batches] for parts in run]


def _numbers(batch: Any, at: int) -> list[float]:
    return [] if batch is None else batch[at].tolist()


@pytest.mark.parametrize("given", [{}, {"mode": "memory"}, {"shuffle": False}])
def test_lanes_are_the_same_on_any_number_of_shards(db: Datalayer, given: Any) -> None:
    fill(db, COUNT)
    with streams(db, 1, **given) as one:
        whole = steps(one)
        assert len(one[0]) == len(whole) == 5
    assert [len(lane) for step in whole for lane in step] == [6] * 16 + [2, 2, 2, 1]
    assert sorted(n for step in whole for lane in step for n in lane) == list(range(COUNT))
    for world in (2, 4):
        with streams(db, world, **given) as several:
            assert steps(several) == whole
            assert [len(one) for one in several] == [5] * world


def test_a_step_with_fewer_rows_than_lanes_has_empty_lanes(db: Datalayer) -> None:
    fill(db, 26)
    for world in (1, 2, 8):
        with streams(db, world, lanes=8) as found:
            assert [len(lane) for lane in steps(found)[1]] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_documents_that_transforms_leave_out_are_counted_over_all_shards(db: Datalayer) -> None:
    def picky(x: Any, n: int) -> tuple[Any, float]:
        if n % 10 == 3:
            raise ValueError("a three")
        return n, 0.0

    fill(db, COUNT)
    for world in (1, 2):
        with streams(db, world, transform=picky, on_bad_document="skip") as several:
            total = 0
            for parts in itertools.islice(zip(*several, strict=True), 4):  # behind the fifth begins the next epoch
                for rank, stream in enumerate(several):
                    stream.skip_elsewhere(sum(part.skipped for n, part in enumerate(parts) if n != rank))
                total += sum(part.skipped for part in parts)
                assert [stream.state_dict().get("skipped", 0) for stream in several] == [total] * world
            assert total > 5


def test_a_batch_that_is_not_full_is_left_out_as_without_lanes(db: Datalayer) -> None:
    fill(db, COUNT)  # eight batches of 12, and seven rows
    for world in (1, 4):
        with streams(db, world, drop_last=True) as found:
            assert [sum(map(len, step)) for step in steps(found)] == [24] * 4
            assert [len(one) for one in found] == [4] * world
    fill_more = [{"x": [0.0] * 4, "n": n} for n in range(COUNT, 115)]
    db["points"].insert_many(fill_more)
    with streams(db, 2, drop_last=True) as found:
        assert [sum(map(len, step)) for step in steps(found)] == [24] * 4 + [12]


def test_a_step_goes_on_with_another_number_of_shards(db: Datalayer) -> None:
    fill(db, COUNT)
    with streams(db, 1) as one:
        whole = steps(one)
    with streams(db, 2) as two:
        assert steps(two, most=2) == whole[:2]
        states = [one.state_dict() for one in two]
        assert states[0] == states[1]
    for world in (1, 4):
        with streams(db, world) as others:
            for other in others:
                other.load_state_dict(states[0])
            assert steps(others) == whole[2:]


@pytest.mark.parametrize("processes", [0, 2])
def test_what_a_transform_draws_belongs_to_the_lane(db: Datalayer, processes: int) -> None:
    if processes and db.uri.startswith("mongomock"):
        pytest.skip("other processes do not see mongomock")
    fill(db, COUNT)
    given = {"transform": noisy, "loader": {"num_workers": processes}}
    before = torch.get_rng_state()
    with streams(db, 1, transform=noisy) as one:
        whole = steps(one)
    assert len({value for step in whole for lane in step for value in lane}) == COUNT
    with streams(db, 2, **given) as two:
        assert steps(two) == whole
        assert [len(one) for one in two] == [5, 5]
    assert torch.equal(torch.get_rng_state(), before)


def odd_fail(x: Any, n: int) -> tuple[Any, int]:
    if n % 2:
        raise ValueError("odd")
    return x, n


def test_rows_that_a_transform_leaves_out_leave_out_no_step(db: Datalayer) -> None:
    fill(db, COUNT)
    with streams(db, 4, transform=odd_fail, on_bad_document="skip", batch_size=2, accumulation=2) as found:
        whole = steps(found)
        assert len(whole) == 26
        assert sum(one.report.skipped for one in found) == 51
    assert sorted(n for step in whole for lane in step for n in lane) == list(range(0, COUNT, 2))


def test_whole_batches_are_dealt_out(db: Datalayer) -> None:
    fill(db, COUNT)
    given = {"lanes": 0, "accumulation": 1, "shard_by": "batches", "shuffle": False}
    for world in (1, 2, 4):
        with streams(db, world, **given) as found:
            each = [[batch[1].tolist() for batch in one] for one in found]
            assert [len(one) for one in found] == [len(one) for one in each]
        order = [n for batches in itertools.zip_longest(*each, fillvalue=[]) for batch in batches for n in batch]
        assert order == list(range(COUNT))


def test_lanes_that_shards_cannot_share_are_refused(db: Datalayer) -> None:
    fill(db, 10)
    with pytest.raises(ParameterError, match="3 shard"), streams(db, 3):
        pass
