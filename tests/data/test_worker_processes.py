"""Worker processes give way where there are too few cores, and only there."""

from __future__ import annotations

import os

import pytest

from mongotorch.data.prefetch import ReadPressure, Workers


def niceness(_item: int) -> int:
    return os.nice(0)


@pytest.mark.parametrize(("crowded", "more"), [(True, 10), (False, 0)])
def test_a_worker_gives_way_where_it_is_crowded(crowded: bool, more: int) -> None:
    workers = Workers(niceness, {"num_workers": 1}, ReadPressure(crowded=crowded))
    assert list(workers.map(iter([0, 1]), 0)) == [min(os.nice(0) + more, 19)] * 2
    workers.close()


def test_a_users_own_beginning_of_a_worker_is_kept() -> None:
    def begin(worker: int) -> None:
        os.environ["BEGUN"] = str(worker)

    workers = Workers(lambda _: os.environ.get("BEGUN"), {"num_workers": 1, "worker_init_fn": begin})
    assert list(workers.map(iter([0]), 0)) == ["0"]
    workers.close()
    assert "BEGUN" not in os.environ
