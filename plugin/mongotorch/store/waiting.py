"""Waiting for a document to reach a state: woken by the server where it can, by looking again where it cannot.

Always: the change stream is open before the first look, so that no change falls between the two; a wait ends
in the document or in an error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.errors import JobTimeoutError
from mongotorch.store.clock import is_mock
from mongotorch.store.failures import driver_errors

POLL_S: Final = 0.05
_MOST_POLL_S: Final = 1.0
_AWAIT_S: Final = 1.0

Document = dict[str, Any]
Wake = Callable[[float], None]


def wait_until(
    collection: Any,
    key: str,
    read: Callable[[], Document],
    done: Callable[[Document], bool],
    timeout_s: float | None,
) -> Document:
    """Wait for a document.

    Args:
        collection: Where it is.
        key: Its `_id`.
        read: Reads it.
        done: Whether it is as wanted.
        timeout_s: Seconds to wait at most; None waits for ever.

    Raises:
        JobTimeoutError: It is not, by then.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _waker(collection, key) as wake:
        while not done(document := read()):
            left = _AWAIT_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise JobTimeoutError(f"job {key} is still {document['status']} after {timeout_s} s; it goes on")
            wake(left)
    return document


@contextlib.contextmanager
def _waker(collection: Any, key: str) -> Iterator[Wake]:
    stream = open_stream(collection, {"documentKey._id": key}, doing="waiting for a job")
    if stream is None:
        yield poller()
        return
    with stream:
        poll = poller()

        def wake(left: float) -> None:
            try:
                if stream.alive and stream.try_next() is not None:
                    return
            except PyMongoError:
                # The stream broke for good (history lost, rights taken): looking again is as good.
                stream.close()
            if not stream.alive:
                poll(left)

        yield wake


def open_stream(collection: Any, match: Document, *, doing: str) -> Any:
    """A change stream whose `try_next` waits for a second at most; None where there is none.

    Args:
        collection: What is watched.
        match: Which changes.
        doing: What it is for, for the message of an error.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    if is_mock(collection):
        return None
    with driver_errors(doing):
        try:
            return collection.watch([{"$match": match}], max_await_time_ms=int(_AWAIT_S * 1000))
        except OperationFailure:  # no replica set, or a user who may not watch: look again instead
            return None


def poller() -> Wake:
    """A wait that is short at first and longer each time, up to a second."""
    pause = POLL_S

    def poll(left: float) -> None:
        nonlocal pause
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _MOST_POLL_S)

    return poll
