"""A broken read is retried until the deadline, which starts anew after progress."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

from mongotorch.errors import QueryError, ServerUnavailableError
from mongotorch.mongo.retry import RetryPolicy


class Time:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def policy(self, deadline_s: float) -> RetryPolicy:
        return RetryPolicy(deadline_s=deadline_s, sleep=self.sleep, clock=lambda: self.now)


def failing(*errors: PyMongoError) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def operation() -> str:
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "read"

    return calls, operation


def test_transient_errors_are_retried_with_a_growing_pause() -> None:
    time = Time()
    calls, operation = failing(*[AutoReconnect("gone")] * 8)

    assert time.policy(60).run(operation, "reading") == "read"
    assert len(calls) == 9
    assert time.pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_any_other_error_is_raised_at_once() -> None:
    time = Time()
    calls, operation = failing(OperationFailure("bad query", 2))

    with pytest.raises(QueryError, match="reading failed: bad query") as caught:
        time.policy(60).run(operation, "reading")
    assert isinstance(caught.value.__cause__, OperationFailure)
    assert (len(calls), time.pauses) == (1, [])


def test_the_deadline_counts_from_the_first_failure_since_the_last_progress() -> None:
    time = Time()
    attempts = time.policy(1.0).attempts("reading")
    error = AutoReconnect("gone")
    for _ in range(20):
        time.now += 3600.0  # a long read that succeeds in the end
        attempts.failed(error)
        attempts.succeeded()

    _, stays_away = failing(*[error] * 99)
    with pytest.raises(ServerUnavailableError, match="failed for 1 s") as caught:
        time.policy(1.0).run(stays_away, "reading")
    assert sum(time.pauses[20:]) >= 1
    assert caught.value.setting == "read_deadline_s"
    assert caught.value.__cause__ is error
