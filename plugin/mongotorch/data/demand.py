"""How hard to read ahead, by who waits and by what the machine has.

Two questions under way beside a decoder fill a wait for batches soonest. On two cores that also hold the server
they take, while nobody waits, the core of the training again and again: each step becomes longer by more than is
won.

Always: it changes when something is read, never what is read or in which order.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any, final

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_WAITING_S = 0.001  # what was ready is taken sooner


@final
class Demand:
    """Told by who takes windows, asked by who reads them. A new one is that of somebody who waits.

    Args:
        crowded: Whether there are too few cores for the server, the reader and the training at once.
    """

    def __init__(self, *, crowded: bool) -> None:
        self._crowded = crowded
        self._asked_s: float | None = 0.0

    def asked(self) -> None:
        """A window is asked for."""
        self._asked_s = time.monotonic()

    def met(self) -> None:
        """It was given."""
        self._asked_s = None

    def high(self) -> bool:
        """Whether to have several questions under way, rather than to do one thing after the other."""
        asked_s = self._asked_s
        return not self._crowded or (asked_s is not None and time.monotonic() - asked_s > _WAITING_S)


def crowded(client: Any) -> bool:
    """Whether the server that a client is connected to shares two cores or fewer with this process."""
    hosts = [host for host, _ in client.nodes]
    here = all(host in _HERE or host == socket.gethostname() or host.startswith("/") for host in hosts)
    return cores() <= 2 and bool(hosts) and here


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
