"""How hard to read ahead, by who waits and by what the machine has.

Two questions under way beside a decoder fill a wait for batches soonest. On two cores that also hold the server
they take, while nobody waits, the core of the training again and again: each step becomes longer by more than is
won.

Always: it changes when something is read, and whether what nobody takes any more is read to its end; never what
is read or in which order.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeVar, final

T = TypeVar("T")

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_WAITING_S = 0.001  # what was ready is taken sooner


@final
class Demand:
    """Told by who takes windows, asked by who reads them. A new one is that of somebody who waits.

    It may be handed to worker processes when they are started: they see what this process says later. What another
    process says is not heard, since a fork may hold a copy of a reader that is none of its business.

    Args:
        crowded: Whether there are too few cores for the server, the reader and the training at once; kept as an
            attribute.
    """

    def __init__(self, *, crowded: bool) -> None:
        self.crowded, self._home = crowded, os.getpid()
        # Aligned words: each is read and written whole, without a lock.
        self._asked_s, self._turn = RawValue("d", 0.0), RawValue("q", 0)

    def asked(self) -> None:
        """A window is asked for."""
        self._say(time.monotonic())

    def met(self) -> None:
        """It was given."""
        self._say(math.inf)

    def high(self) -> bool:
        """Whether to have several questions under way, rather than to do one thing after the other."""
        return not self.crowded or time.monotonic() - self._asked_s.value > _WAITING_S

    @property
    def turn(self) -> int:
        """Names what is read now, until it is dropped."""
        return int(self._turn.value)

    def drop(self) -> None:
        """What is read now is not wanted any more."""
        if os.getpid() == self._home:
            self._turn.value += 1

    def wanted(self, items: Iterable[T], turn: int) -> Iterator[T]:
        """The items, up to where their turn is dropped."""
        return itertools.takewhile(lambda _: self.turn == turn, items)

    def _say(self, asked_s: float) -> None:
        if os.getpid() == self._home:
            self._asked_s.value = asked_s


def crowded(client: Any) -> bool:
    """Whether the server that a client is connected to shares two cores or fewer with this process."""
    hosts = [host for host, _ in client.nodes]
    here = all(host in _HERE or host == socket.gethostname() or host.startswith("/") for host in hosts)
    return cores() <= 2 and bool(hosts) and here


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
