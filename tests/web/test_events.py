"""Pages that listen hear of changes, from either backend, and cost nothing when they are gone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.helpers import fill, trainer

from mongotorch import Datalayer
from mongotorch.web.events import ChangeEvents
from mongotorch.web.server import serving


def listened(address: str, heard: list[str], ended: threading.Event) -> None:
    with urllib.request.urlopen(address + "events", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                heard += json.loads(line[5:])
    ended.set()


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_page_hears_of_a_run(db: Datalayer) -> None:
    select = fill(db)
    heard: list[str] = []
    ended = threading.Event()
    with serving(db) as address:
        thread = threading.Thread(target=listened, args=(address, heard, ended), daemon=True)
        thread.start()
        time.sleep(0.5)
        db.apply(trainer(select)).result()
        wait_for(lambda: {"jobs", "metrics", "components"} <= set(heard), "the run")
    assert ended.wait(30), "the stream ends with the server"


def test_the_thread_ends_when_nobody_listens(db: Datalayer) -> None:
    async def listen_once(events: ChangeEvents) -> None:
        stream: Any = events.stream()
        assert (await anext(stream)).startswith("retry")
        await stream.aclose()

    with ChangeEvents(db.overview) as events:
        for _ in range(3):
            asyncio.run(listen_once(events))
        wait_for(lambda: events._thread is None, "the end of the thread")
        assert events._listeners == []


def test_a_slow_page_gets_one_event_for_all_that_happened(db: Datalayer) -> None:
    class Busy:
        """Changes without a pause."""

        def follow(self) -> Any:
            import contextlib

            @contextlib.contextmanager
            def follow() -> Iterator[Any]:
                def changes() -> set[str]:
                    time.sleep(0.001)
                    return {"mt.jobs", "mt.metrics"}

                yield changes

            return follow()

    async def read_slowly(events: ChangeEvents) -> list[str]:
        stream: Any = events.stream()
        await anext(stream)
        lines = []
        for _ in range(3):
            await asyncio.sleep(0.2)
            lines.append(await anext(stream))
        await stream.aclose()
        return lines

    with ChangeEvents(Busy()) as events:  # type: ignore[arg-type]
        lines = asyncio.run(read_slowly(events))
    assert lines == ['data: ["jobs", "metrics"]\n\n'] * 3
