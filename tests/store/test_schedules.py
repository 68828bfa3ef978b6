"""The lease of the scheduler that leads: one at a time, and nobody gives up another's."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import Any

import pytest

from mongotorch.errors import NotFoundError
from mongotorch.store import Schedules

BEGIN = datetime(2026, 1, 1)


class Clock:
    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> datetime:
        return self.now


def test_one_scheduler_leads_at_a_time_and_nobody_resigns_for_another(database: Any) -> None:
    clock = Clock()
    schedules = Schedules(database, now=clock)
    assert schedules.lead("a", 10)
    assert not schedules.lead("b", 10)
    schedules.resign("b")
    assert not schedules.lead("b", 10), "b has nothing to give up"
    clock.now += timedelta(seconds=8)
    assert schedules.lead("a", 10), "renewed"
    clock.now += timedelta(seconds=8)
    assert not schedules.lead("b", 10), "the renewed lease goes on"
    clock.now += timedelta(seconds=3)
    assert schedules.lead("b", 10), "it has ended"
    assert not schedules.lead("a", 10)
    schedules.resign("a")
    assert not schedules.lead("c", 10), "what a gives up is not b's"
    schedules.resign("b")
    assert schedules.lead("c", 10)


def test_one_of_many_that_come_at_once_leads(database: Any) -> None:
    start, led = threading.Barrier(8), []

    def take(name: str) -> None:
        start.wait()
        if Schedules(database).lead(name, 30):
            led.append(name)

    threads = [threading.Thread(target=take, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(led) == 1


def test_the_lease_is_no_schedule(database: Any) -> None:
    schedules = Schedules(database)
    schedules.lead("a", 30)
    assert schedules.all() == schedules.readable() == schedules.due(datetime(2100, 1, 1)) == []
    with pytest.raises(NotFoundError):
        schedules.get("#leader")
    schedules.remove("#leader")
    assert not schedules.lead("b", 30)


def test_a_document_changes_only_as_it_was_read(database: Any) -> None:
    schedules = Schedules(database)
    assert schedules.add("s", {"component": "c"})
    assert not schedules.add("s", {"component": "d"})
    read = schedules.get("s")
    written = schedules.write(read, {"known": 1})
    assert written is not None
    assert schedules.write(read, {"known": 2}) is None, "another has written it"
    assert schedules.write(written, {"known": 3}) is not None
    assert schedules.get("s")["known"] == 3
    schedules.note("s", "what is wrong", of="trigger")
    assert (schedules.get("s")["problem"], schedules.get("s")["problem_of"]) == ("what is wrong", "trigger")
