"""`on_bad_document="skip"` leaves out what does not fit, the same documents in every mode and where it goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import points, same, trainer

from mongotorch import Datalayer
from mongotorch.errors import DataError, FieldMissingError, ParameterError, TransformError

BAD: dict[int, Any] = {  # by number: what is wrong with the document
    3: {"x": [1.0]},
    57: {"x": "text"},
    58: {"x": None},
    101: {},
    160: {"x": [[1.0], [2.0]]},
    199: {"x": ["a", "b"]},
    250: {"x": {"a": 1}},
    251: {"x": [], "y": 1.5},
}
COUNT = 300
GOOD = [n for n in range(COUNT) if n not in BAD]


def fill(db: Datalayer, bad: dict[int, Any] = BAD) -> Any:
    rows = [{"_id": n, "y": n, "n": n, **bad.get(n, {"x": [n / 2, n]})} for n in range(COUNT)]
    db["mixed"].raw.insert_many(rows)
    return db["mixed"].find()


def options(**given: Any) -> dict[str, Any]:
    chosen = {"key": ("x", "y"), "batch_size": 16, "prefetch_size": 50, "prefetch_factor": 4, "shuffle": True}
    return {**chosen, "on_bad_document": "skip", **given}


def rows(batches: list[Any]) -> list[int]:
    return torch.cat([y for _, y in batches]).tolist()


@pytest.mark.parametrize("mode", [{}, {"in_memory": True}, {"download": True}, {"data_prefetch": False}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_what_does_not_fit_is_left_out_and_counted(db: Datalayer, mode: dict[str, Any], shuffle: bool) -> None:
    query = fill(db)
    with db.stream(query, **options(shuffle=shuffle, **mode)) as stream:
        for _ in range(2):
            batches = list(stream)
            assert sorted(rows(batches)) == GOOD
            assert stream.report.skipped == len(BAD)
            assert "document" in stream.report.why
            assert [len(y) for _, y in batches[:-1]] == [16] * (len(batches) - 1)


@pytest.mark.parametrize("number", list(BAD))
def test_each_of_them_is_an_error_unless_it_is_skipped(db: Datalayer, number: int) -> None:
    query = fill(db, {number: BAD[number]})
    with db.stream(query, **options(on_bad_document="raise")) as stream, pytest.raises(DataError):
        list(stream)
    with db.stream(query, **options()) as stream:
        assert sorted(rows(list(stream))) == [n for n in range(COUNT) if n != number]
        assert repr(number) in stream.report.why


@pytest.mark.parametrize("stop", [1, 7, 16])
def test_a_stream_that_goes_on_has_left_out_the_same(db: Datalayer, stop: int) -> None:
    query = fill(db)
    with db.stream(query, **options(seed=3)) as stream:
        whole = list(stream)
    with db.stream(query, **options(seed=3)) as stream:
        running = iter(stream)
        head = [next(running) for _ in range(stop)]
        state = stream.state_dict()
    assert [list(form) for form in state["forms"]] == [["", 2], [""]]  # not decided anew
    with db.stream(query, **options(seed=3)) as stream:
        stream.load_state_dict(state)
        tail = list(stream)
        assert stream.report.skipped == len(BAD)
    assert [len(y) for _, y in [*head, *tail]] == [len(y) for _, y in whole]
    assert rows([*head, *tail]) == rows(whole)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_leave_out_the_same(db: Datalayer, world: int) -> None:
    query = fill(db)
    found = []
    for rank in range(world):
        with db.stream(query, **options(shard=(rank, world), batch_size=4)) as stream:
            found.append(list(stream))
            assert stream.report.skipped == len(BAD)
    assert len({len(batches) for batches in found}) == 1
    seen = sorted(row for batches in found for row in rows(batches))
    assert set(seen) <= set(GOOD)
    assert len(GOOD) - len(seen) < world


def test_workers_leave_out_the_same(db: Datalayer, uri: str) -> None:
    if not uri.startswith("mongodb:"):
        pytest.skip("mongomock lives in one process")
    query = fill(db)
    with db.stream(query, **options()) as alone, db.stream(query, **options(num_workers=2)) as stream:
        assert same(list(stream), list(alone))
        assert stream.report.skipped == len(BAD)


def fails(x: Any, y: int) -> tuple[torch.Tensor, int]:
    if y in BAD or y in range(32, 48):
        raise KeyError(y)
    return torch.tensor([1.0, 2.0]), y


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_fails_makes_its_batch_shorter(db: Datalayer, uri: str, workers: int) -> None:
    if workers and not uri.startswith("mongodb:"):
        pytest.skip("mongomock lives in one process")
    query = fill(db, {})
    left_out = len(BAD) + 16
    chosen = options(transform=fails, shuffle=False, **({"num_workers": workers} if workers else {}))
    with db.stream(query, **chosen) as stream:
        batches = list(stream)
        assert rows(batches) == [n for n in range(COUNT) if n not in BAD and n not in range(32, 48)]
        assert stream.report.skipped == left_out
        assert "KeyError" in stream.report.why
        assert len(batches) == -(-COUNT // 16) - 1  # of one nothing was left
    with db.stream(query, **chosen) as stream:
        running = iter(stream)
        head = [next(running) for _ in range(3)]
        state = stream.state_dict()
    with db.stream(query, **chosen) as stream:
        stream.load_state_dict(state)
        assert same([*head, *stream], batches)
        assert stream.report.skipped == left_out


def test_a_shard_of_which_nothing_is_left_is_an_error(db: Datalayer) -> None:
    query = fill(db, {})
    with (
        db.stream(query, **options(transform=fails, shuffle=False, shard=(1, 2), batch_size=8)) as stream,
        pytest.raises(TransformError, match="all 8 document"),
    ):
        list(stream)


def test_where_nothing_fits_is_said(db: Datalayer) -> None:
    db["mixed"].raw.insert_many([{"_id": n, "y": n} for n in range(10)])
    with db.stream(db["mixed"].find(), **options()) as stream, pytest.raises(DataError, match="10 document"):
        list(stream)


def test_a_run_counts_them_in_its_job_and_its_record(db: Datalayer) -> None:
    for n, point in enumerate(points(100)):
        point["_fold"] = "valid" if n % 5 == 0 else "train"
        if n % 10 == 3:
            del point["x"]
        db["train"].raw.insert_one(point)
    given: dict[str, Any] = {"max_iterations": 12, "loader_kwargs": {"batch_size": 16}}
    with pytest.raises(FieldMissingError):
        db.apply(trainer(db["train"].find(), **given)).result()
    job = db.apply(trainer(db["train"].find(), on_bad_document="skip", **given))
    model = job.result()
    assert job.progress["skipped"] == 10
    stored = db._connection.database["mt.components"].find_one({"_id": model.uuid})
    assert stored["data"]["skipped"] == 10


def test_what_it_may_be_is_checked(db: Datalayer) -> None:
    with pytest.raises(ParameterError, match="on_bad_document"):
        db.stream(db["mixed"].find(), **options(on_bad_document="drop"))
