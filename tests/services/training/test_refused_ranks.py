"""What several workers cannot do is a typed error that says what is wrong, soon, and nothing is published."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests import run_processes as runs
from tests.services.training.test_ranks import ranks_of, trainer

from mongotorch import Datalayer
from mongotorch.errors import MongotorchError, ServerUnavailableError, SettingError, UnsupportedError
from mongotorch.jobs import environment
from mongotorch.services.training import ranks
from mongotorch.worker.rank import rank_main

pytestmark = pytest.mark.fault
NOBODY = "mongodb://127.0.0.1:1/nobody?directConnection=true&serverSelectionTimeoutMS=2000"
MOST_S = 60.0  # 20 on a machine that does nothing else
find_spec: Callable[..., Any] = importlib.util.find_spec


def with_another_torch(**given: Any) -> None:
    """A rank, the second of which has another version of torch."""
    if os.environ["RANK"] == "1":
        versions = {**environment(), "torch": "1.0.0"}
        vars(ranks)["environment"] = lambda: versions
    rank_main(**given)


def with_another_address(*, settings: dict[str, Any], **given: Any) -> None:
    """A rank, the second of which has an address where nobody is."""
    address = {"uri": NOBODY} if os.environ["RANK"] == "1" else {}
    rank_main(settings={**settings, **address}, **given)


def refused(uri: str, error: type[MongotorchError], words: str, **settings: Any) -> None:
    """A run on two workers ends with this error, soon, and leaves nothing behind."""
    given = {**runs.SETTINGS, "compute": "local", **settings}
    with Datalayer.connect(uri, **given) as db:
        runs.fill(db, 40)
        began = time.monotonic()
        job = db.apply(trainer(db, "several", workers=2))
        found = job.exception()
        assert time.monotonic() - began < MOST_S
        assert type(found) is error, found
        assert words in str(found)
        assert job.status == "failed"
        assert job.record["attempt"] == 1
        assert db.show("model", "several") == [0]
        assert db["mt.checkpoints"].count() <= 1  # for the next attempt
        assert ranks_of() == []


def test_ray_that_is_not_installed(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_ray)
    refused(server_uri, UnsupportedError, "pip install 'mongotorch[ray]'", compute="ray")


def without_ray(name: str, package: str | None = None) -> Any:
    return None if name == "ray" else find_spec(name, package)


@pytest.mark.parametrize(
    ("address", "words"),
    [(None, "RAY_ADDRESS is not set"), ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1")],
)
def test_a_cluster_that_is_not_there(
    server_uri: str, address: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    refused(server_uri, SettingError, words, compute="ray")


def test_a_rank_with_another_version(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "RANK_MAIN", f"{__name__}:with_another_torch")
    refused(server_uri, UnsupportedError, "rank 1 runs with torch 1.0.0")


def test_a_rank_that_cannot_reach_the_database(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "RANK_MAIN", f"{__name__}:with_another_address")
    refused(server_uri, ServerUnavailableError, "127.0.0.1:1")


def test_mongomock() -> None:
    refused("mongomock://refused", UnsupportedError, "mongomock lives in the memory of one process")
