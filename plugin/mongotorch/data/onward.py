"""The next epoch's windows, on their way while the last ones of this epoch are served.

Always: they are taken by the epoch that they are of, or closed; one that nobody closes is closed with its owner;
a process that was forked meanwhile leaves them alone, because their thread is not in it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any, final

from mongotorch.data.order import Order
from mongotorch.data.prefetch import close_iterator
from mongotorch.data.windows import Window


@final
class Onward:
    """Windows from the first one of an epoch on.

    Args:
        owner: With whom they end at the latest; they must not refer to it.
        order: Of the epoch.
        windows: The windows of that epoch and of all later ones.
    """

    def __init__(self, owner: Any, order: Order, windows: Iterator[Window]) -> None:
        self._order, self._windows, self._home = order, windows, os.getpid()
        self._closing = weakref.finalize(owner, _close, windows, self._home)
        # At exit the thread ends anyway, and a server that is away would be waited for.
        self._closing.atexit = False

    def take(self, order: Order, start: int) -> Iterator[Window] | None:
        """The windows, where they are those of this epoch from this window on; else they are closed."""
        wanted = start == 0 and order == self._order and self._home == os.getpid()
        if wanted and self._closing.detach() is not None:
            return self._windows
        self._closing()
        return None

    def close(self, *, but: int | None = None) -> bool:
        """Stop reading, unless it is this epoch that is read; whether it is stopped."""
        if but != self._order.epoch:
            self._closing()
        return not self._closing.alive


def _close(windows: Iterator[Window], home: int) -> None:
    if os.getpid() == home:
        close_iterator(windows)
