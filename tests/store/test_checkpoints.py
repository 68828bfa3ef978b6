"""The last two states of a job are kept, whole, and only who holds the job adds one. On both backends."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch.errors import IntegrityError
from mongotorch.store import BlobStore, Checkpoints, Jobs


class Run:
    def __init__(self, database: Any) -> None:
        self.checkpoints, self.blobs, self.jobs = Checkpoints(database), BlobStore(database), Jobs(database)
        for room in (self.checkpoints, self.blobs, self.jobs):
            room.ensure_indexes()
        self.job, _ = self.jobs.add(component="c", type_id="trainer", identifier="digits")
        self.attempt = self.claim()

    def claim(self) -> int:
        claimed = self.jobs.claim(worker="w", lease_s=60)
        assert claimed is not None
        return int(claimed["attempt"])

    def put(self, step: int, attempt: int | None = None) -> bool:
        blob = self.blobs.put(f"state {step}".encode())
        return self.checkpoints.put(self.job, attempt or self.attempt, step, {"step": step}, [blob])


@pytest.fixture
def run(database: Any) -> Run:
    return Run(database)


def test_the_last_two_are_kept_and_the_newest_is_found(run: Run, database: Any) -> None:
    assert run.checkpoints.newest(run.job) is None

    assert [run.put(step) for step in (100, 200, 300)] == [True] * 3

    newest = run.checkpoints.newest(run.job)
    assert newest is not None
    assert (newest["step"], newest["body"]) == (300, {"step": 300})
    assert run.blobs.get(newest["blobs"][0]) == b"state 300"
    assert sorted(c["step"] for c in database["mt.checkpoints"].find()) == [200, 300]


def test_the_same_step_again_takes_the_place_of_what_was_said(run: Run, database: Any) -> None:
    run.put(100)
    run.put(100)

    assert database["mt.checkpoints"].count_documents({}) == 1


def test_who_lost_the_job_writes_none(run: Run) -> None:
    run.put(100)
    run.jobs.release(run.job, run.attempt)
    heir = run.claim()

    assert not run.put(900, run.attempt)
    assert run.put(50, heir)

    newest = run.checkpoints.newest(run.job)
    assert newest is not None
    assert newest["step"] == 50


def test_a_cancelled_job_writes_none(run: Run) -> None:
    run.jobs.cancel(run.job)

    assert not run.put(100)
    assert run.checkpoints.newest(run.job) is None


def test_a_checkpoint_without_its_blobs_is_refused(run: Run) -> None:
    with pytest.raises(IntegrityError, match="abc"):
        run.checkpoints.put(run.job, run.attempt, 1, {}, ["abc"])

    assert run.checkpoints.newest(run.job) is None


def test_dropping_takes_those_of_one_job_only(run: Run) -> None:
    run.put(100)
    run.put(200)
    other, _ = run.jobs.add(component="d", type_id="trainer", identifier="digits")
    attempt = run.claim()
    run.checkpoints.put(other, attempt, 1, {}, [])

    assert run.checkpoints.drop(run.job) == 2
    assert run.checkpoints.newest(run.job) is None
    assert run.checkpoints.newest(other) is not None
