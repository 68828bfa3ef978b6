"""Three members of a replica set, for the tests that make them elect another primary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.worker.test_elections import ReplicaSet


@pytest.fixture
def replica_set(tmp_path: Path) -> Iterator[ReplicaSet]:
    made = ReplicaSet(tmp_path)
    try:
        made.initiate()
        deadline = time.monotonic() + 60
        while made.primary() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield made
    finally:
        made.close()
