"""Retries a broken read, or a write that may be repeated, with a growing pause, until a deadline.

`RetryPolicy` is for reads of documents and for long outages; `repeated` decorates the methods of stores, which an
election must not break.

The deadline counts from the first failure since the last progress: a read of an hour that breaks at its end has
the whole deadline for reconnecting. General retry libraries count from the first call
(docs/decisions/0020-file-locks-and-retries.md).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar, final

from pymongo.errors import PyMongoError, ServerSelectionTimeoutError

from mongotorch.errors import QueryError, ServerUnavailableError
from mongotorch.mongo.error_translation import driver_errors, is_transient

T = TypeVar("T")
P = ParamSpec("P")
REPEAT_S = 15.0
"""How long a method of a store is repeated; its caller decides what follows."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 2.0


@final
@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a broken read is retried.

    Attributes:
        deadline_s: Seconds without progress, from the first failure on, after which the read is given up.
        sleep: Waits for a number of seconds; replaced in tests.
        clock: Monotonic time in seconds; replaced in tests.
    """

    deadline_s: float = 60.0
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def attempts(self, what: str) -> Attempts:
        """The retry state of one read; `what` names the read in errors."""
        return Attempts(policy=self, what=what)

    def run(self, operation: Callable[[], T], what: str) -> T:
        """Call an operation, again as a whole after each transient error, and return its result.

        Args:
            operation: Reads something; may be called several times.
            what: Names it in errors.

        Raises:
            ServerUnavailableError: It still failed at the deadline.
            QueryError: It failed with an error that is not transient.
        """
        attempts = self.attempts(what)
        while True:
            try:
                return operation()
            except PyMongoError as error:
                attempts.failed(error)


@dataclass(kw_only=True)
class Attempts:
    """The retry state of one read."""

    policy: RetryPolicy
    what: str
    failing_since: float | None = None
    delay_s: float = field(default=_FIRST_DELAY_S)

    def succeeded(self) -> None:
        """Record progress: the next failure starts a new deadline."""
        self.failing_since, self.delay_s = None, _FIRST_DELAY_S

    def failed(self, error: PyMongoError) -> None:
        """Wait before the next attempt.

        Raises:
            ServerUnavailableError: The deadline has passed.
            QueryError: The error is not transient.
        """
        if not is_transient(error):
            raise QueryError(f"{self.what} failed: {error}") from error
        now = self.policy.clock()
        self.failing_since = now if self.failing_since is None else self.failing_since
        if now - self.failing_since >= self.policy.deadline_s:
            raise ServerUnavailableError(
                f"{self.what} failed for {self.policy.deadline_s:g} s: {error}; "
                "check the server, or raise read_deadline_s",
                setting="read_deadline_s",
            ) from error
        self.policy.sleep(self.delay_s)
        self.delay_s = min(self.delay_s * 2, _LONGEST_DELAY_S)


def repeated(doing: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a method that may be called twice: it is called again after an error that passes.

    The driver itself sends a write again once, and not every write. Where it found no server, it has waited: then
    nothing is repeated.

    Args:
        doing: What the method does, for the message: "claiming a job".

    Returns:
        The decorator; what it decorates raises as `driver_errors` says.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            deadline, delay_s = time.monotonic() + REPEAT_S, _FIRST_DELAY_S
            with driver_errors(doing):
                while True:
                    try:
                        return method(*args, **kwargs)
                    except PyMongoError as error:
                        lasts = isinstance(error, ServerSelectionTimeoutError) or not is_transient(error)
                        if lasts or time.monotonic() > deadline:
                            raise
                    time.sleep(delay_s)
                    delay_s = min(delay_s * 2, _LONGEST_DELAY_S)

        return call

    return decorate
