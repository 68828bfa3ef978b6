"""Makes whatever opens or takes something a context manager that closes it or gives it back.

Guarantees: leaving the block does so, however it is left.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Final, Self

_PR_SET_PDEATHSIG: Final = 1
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


class Owner(abc.ABC):
    """Owns resources that have to be closed: a connection, a process, a thread."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function at SIGTERM and SIGINT; in another thread than the main one signals cannot be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop()

    before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Have `malloc` keep up to 128 MB that were freed, for a process that trains (with glibc).

    Each step frees its activations. As a rule they are given back to the system then, which has to clear the same
    pages for the next step: a sixth of a step of a small convolutional network. What the environment says of
    `malloc` counts.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes: larger blocks are given back
            mallopt(_M_TRIM_THRESHOLD, 2**27)
