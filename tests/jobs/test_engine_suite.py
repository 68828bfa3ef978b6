"""The built-in engines pass the suite that engines inherit."""

from __future__ import annotations

import pytest

from mongotorch.jobs import Engine, LocalEngine, QueueEngine
from mongotorch.testing.engines import EngineSuite, WaitingEngineSuite


class TestLocalEngine(WaitingEngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return LocalEngine()


class TestQueueEngine(EngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return QueueEngine()

    def test_it_leaves_the_job_to_a_worker(self, engine: Engine) -> None:
        performed: list[str] = []

        assert engine.submit("a-job", performed.append) is None

        assert performed == []
