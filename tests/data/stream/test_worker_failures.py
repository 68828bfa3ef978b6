"""Whatever a worker process of a stream fails at is an error, never a wait without end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

import pytest
from tests.helpers import fill
from torch import Tensor
from torch.utils.data import DataLoader

from mongotorch import Datalayer
from mongotorch.errors import DataProcessError
from mongotorch.settings import Settings

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]
WORKERS = pytest.mark.parametrize("workers", [1, 2])


def dies(x: Tensor, n: int) -> tuple[Tensor, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return x, n


def exits(x: Tensor, n: int) -> tuple[Tensor, int]:
    raise SystemExit(3)


def locked(samples: list[Any]) -> Any:
    return {"x": samples[0][0], "lock": threading.Lock()}


def local(samples: list[Any]) -> Any:
    return [samples[0][0], lambda: None]


def read(db: Datalayer, users: bool, workers: int, **given: Any) -> list[Any]:
    own: dict[str, Any] = {} if users else {"num_workers": workers}
    with db.stream(fill(db), key=("x", "n"), batch_size=8, **own, **given) as stream:
        return list(DataLoader(stream, batch_size=None, num_workers=workers) if users else stream)


@WORKERS
@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("collate", [locked, local])
def test_what_cannot_be_pickled_is_an_error(db: Datalayer, workers: int, users: bool, collate: Any) -> None:
    with pytest.raises(DataProcessError, match="cannot hand over the batch that it made"):
        read(db, users, workers, collate_fn=collate)


@WORKERS
@pytest.mark.parametrize("transform", [dies, exits])
def test_a_worker_that_is_gone_is_an_error(db: Datalayer, workers: int, transform: Any) -> None:
    with pytest.raises(DataProcessError, match="a worker process of the stream is gone"):
        read(db, False, workers, transform=transform)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_function_that_a_spawned_worker_cannot_get_is_an_error(db: Datalayer) -> None:
    with pytest.raises(DataProcessError, match="what they are given cannot be pickled"):
        read(db, False, 1, transform=lambda x, n: (x, n), multiprocessing_context="spawn")


def same_sample(x: Any, n: Any) -> Any:
    return x, n


@pytest.mark.parametrize(("transform", "more"), [(None, 10), (same_sample, 0)])
def test_workers_that_read_ahead_give_way_and_those_that_build_samples_do_not(
    db: Datalayer, uri: str, transform: Any, more: int
) -> None:
    if not uri.startswith("mongodb:"):
        pytest.skip("mongomock lives in one process")
    seen = multiprocessing.get_context("fork").Value("i", -100)

    def begin(_worker: int) -> None:
        seen.value = os.nice(0)

    options: dict[str, Any] = {"num_workers": 1, "worker_init_fn": begin, "multiprocessing_context": "fork"}
    query, niceness = fill(db), Settings.model_fields["worker_niceness"].default
    with (
        Datalayer.connect(uri, worker_niceness=niceness) as other,
        other.stream(query, key=("x", "n"), batch_size=8, transform=transform, **options) as stream,
    ):
        assert sum(1 for _ in stream)
    assert seen.value == min(os.nice(0) + more, 19)
