"""Tells open pages which records have changed, as server-sent events.

One thread follows the changes for all pages; it runs while a page listens. A page that is slow gets one event for
all that happened meanwhile, so that nothing queues up.

Source: HTML standard, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Final, final

from mongotorch.errors import MongotorchError
from mongotorch.resources import Owner
from mongotorch.services.overview import Overview

MOST_LISTENERS: Final = 200
_QUIET_S: Final = 15.0  # then a comment is sent, so that a page that is gone is noticed
_RETRY_S: Final = 5.0
_log = logging.getLogger("mongotorch.web")


@final
class _Listener:
    """What one page has not been told yet."""

    def __init__(self) -> None:
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._topics: set[str] = set()

    def tell(self, topics: set[str]) -> None:
        """Note changes, in any thread."""
        try:
            self._loop.call_soon_threadsafe(self._note, topics)
        except RuntimeError:  # the loop has ended
            return

    def _note(self, topics: set[str]) -> None:
        self._topics |= topics
        self._changed.set()

    async def next(self) -> set[str]:
        """What has changed since the last call; empty after some seconds without a change."""
        try:
            await asyncio.wait_for(self._changed.wait(), _QUIET_S)
        except TimeoutError:
            return set()
        self._changed.clear()
        topics, self._topics = self._topics, set()
        return topics


@final
class ChangeEvents(Owner):
    """The changes of one database, for any number of pages.

    Args:
        overview: What is followed.
    """

    def __init__(self, overview: Overview) -> None:
        self._overview = overview
        self._listeners: list[_Listener] = []
        self._one = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def close(self) -> None:
        """End the thread and all listening pages."""
        with self._one:
            self._is_closed = True
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.tell(set())

    @property
    def is_full(self) -> bool:
        """Whether as many pages listen as may."""
        return len(self._listeners) >= MOST_LISTENERS

    async def stream(self) -> AsyncIterator[str]:
        """The lines of the event stream of one page, until that page or this object is closed."""
        listener = _Listener()
        with self._one:
            self._listeners.append(listener)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mongotorch-dashboard", daemon=True)
                self._thread.start()
        try:
            yield "retry: 3000\n\n"
            while not self._is_closed:
                topics = await listener.next()
                # `mt.jobs` is `jobs` for pages.
                names = sorted(topic.removeprefix("mt.") for topic in topics)
                yield f"data: {json.dumps(names)}\n\n" if names else ": nothing new\n\n"
        finally:
            with self._one:
                if listener in self._listeners:
                    self._listeners.remove(listener)

    def _run(self) -> None:
        while not self._ends():
            try:
                with self._overview.follow() as changes:
                    while not self._ends():
                        if topics := changes():
                            self._tell(topics)
            except MongotorchError as error:
                _log.warning("the dashboard cannot follow changes, and tries again: %s", error.message)
                time.sleep(_RETRY_S)
            except Exception:  # noqa: BLE001 - this thread is all that open pages have
                if self._is_closed:  # what it follows was closed under it
                    return
                _log.exception("the dashboard cannot follow changes, and tries again")
                time.sleep(_RETRY_S)

    def _ends(self) -> bool:
        """Whether nobody listens any more; then the next page starts another thread."""
        with self._one:
            if self._listeners and not self._is_closed:
                return False
            self._thread = None
            return True

    def _tell(self, topics: set[str]) -> None:
        with self._one:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(topics)
