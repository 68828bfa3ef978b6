"""Locks on files, which the kernel drops with the process that holds them: nothing to go stale.

Always: a wait has an end, in an error that names the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mongotorch.errors import EmbeddedServerError

LOCK_DEADLINE_S: Final = 120.0
POLL_S: Final = 0.01


@contextlib.contextmanager
def locked(path: Path, kind: int, deadline_s: float = LOCK_DEADLINE_S) -> Iterator[None]:
    """Hold a lock inside; see `lock`."""
    descriptor = lock(path, kind, deadline_s)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a child too that was forked meanwhile and has a copy
        os.close(descriptor)


def wait_for(path: Path, deadline_s: float = LOCK_DEADLINE_S) -> None:
    """Return when nobody holds the lock. Raises: as `lock` does."""
    with locked(path, fcntl.LOCK_EX, deadline_s):
        return


def lock(path: Path, kind: int, deadline_s: float = LOCK_DEADLINE_S) -> int:
    """A descriptor that holds the lock; polls, so that a wait can end in an error."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            os.close(descriptor)
            if deadline_s:
                waited = f"the embedded server: {path} is still locked after {deadline_s:.0f} s"
                raise EmbeddedServerError(waited, setting="uri") from None
            raise
        return descriptor
