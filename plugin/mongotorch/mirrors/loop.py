"""Keeps a mirror up to date: calls it again and again until it is told to stop, also while the database is away.

`mongotorch mirror` is this loop. It never runs in the process of a run, so that no target can slow or end one.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import ServerUnavailableError
from mongotorch.mirrors.base import Mirror

_LONGEST_PAUSE_S: Final = 60.0
_log = logging.getLogger("mongotorch.mirrors")


@final
class Mirroring:
    """Keeps one mirror up to date.

    Args:
        db: The database; the caller closes it.
        mirror: The mirror; the caller closes it.
        every_s: Seconds between two looks.
    """

    def __init__(self, db: Datalayer, mirror: Mirror, *, every_s: float = 1.0) -> None:
        self._db, self._mirror, self._every_s = db, mirror, every_s
        self._stop = threading.Event()

    def run(self) -> None:
        """Mirror until `stop` is called, or SIGTERM or SIGINT comes (in the main thread).

        While the database is away it waits, longer each time, up to a minute.
        """
        pause_s = self._every_s
        with _on_signal(self._stop):
            while not self._stop.is_set():
                try:
                    self._mirror.update(self._db)
                    pause_s = self._every_s
                except ServerUnavailableError as error:
                    pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
                    _log.warning("%s waits for the database: %s", self._mirror.name, error)
                self._stop.wait(pause_s)

    def stop(self) -> None:
        """Make `run` return, after what it is writing."""
        self._stop.set()


@contextmanager
def _on_signal(stop: threading.Event) -> Iterator[None]:
    """Set the event at SIGTERM and SIGINT; in another thread than the main one signals cannot be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()

    before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
