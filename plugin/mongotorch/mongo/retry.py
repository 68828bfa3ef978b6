"""How long a broken read is tried again, and which errors are worth it.

Always: an error that passes is waited for until the deadline, counted from the first failure since the last
progress; any other is raised at once, as a typed error with the driver's own as its cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, final

from pymongo.errors import AutoReconnect, CursorNotFound, OperationFailure, PyMongoError, WaitQueueTimeoutError

from mongotorch.errors import QueryError, ServerUnavailableError

T = TypeVar("T")
# Server errors after which the same question, asked again, can be answered.
_PASSING = frozenset({6, 7, 43, 63, 89, 91, 133, 134, 175, 189, 237, 262, 9001, 10058, 10107, 11600, 11602, 13388})
_PASSING_NOT_PRIMARY = frozenset({13435, 13436})
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 2.0


@final
@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a broken read is tried again.

    Attributes:
        deadline_s: Seconds since the last success after which it is given up.
        sleep: Waits for seconds; injected by tests.
        clock: Seconds that only grow; injected by tests.
    """

    deadline_s: float = 60.0
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def attempts(self, what: str) -> Attempts:
        """The tries of one read."""
        return Attempts(patience=self, what=what)

    def run(self, operation: Callable[[], T], what: str) -> T:
        """The result of an operation that can be repeated as a whole."""
        attempts = self.attempts(what)
        while True:
            try:
                return operation()
            except PyMongoError as error:
                attempts.failed(error)


@dataclass(kw_only=True)
class Attempts:
    """Counts the failures of one read since its last success."""

    patience: RetryPolicy
    what: str
    since: float | None = None
    delay: float = field(default=_FIRST_DELAY_S)

    def succeeded(self) -> None:
        """There was progress: the deadline starts anew with the next failure."""
        self.since, self.delay = None, _FIRST_DELAY_S

    def failed(self, error: PyMongoError) -> None:
        """Wait before the next try.

        Raises:
            ServerUnavailableError: The deadline has passed.
            QueryError: The server refuses the question itself.
        """
        if not is_passing(error):
            raise QueryError(f"{self.what} failed: {error}") from error
        now = self.patience.clock()
        self.since = now if self.since is None else self.since
        if now - self.since >= self.patience.deadline_s:
            raise ServerUnavailableError(
                f"{self.what} failed for {self.patience.deadline_s:g} s: {error}; "
                "check the server, or raise read_deadline_s",
                setting="read_deadline_s",
            ) from error
        self.patience.sleep(self.delay)
        self.delay = min(self.delay * 2, _LONGEST_DELAY_S)


def is_passing(error: PyMongoError) -> bool:
    """Whether the same question can be answered later: the connection, the cursor or the primary was lost."""
    if isinstance(error, AutoReconnect | CursorNotFound | WaitQueueTimeoutError):
        return True
    return isinstance(error, OperationFailure) and error.code in _PASSING | _PASSING_NOT_PRIMARY
