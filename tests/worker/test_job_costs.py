"""What a small job costs beside its steps: requests to the server, and threads. Both are counted, not timed."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from tests.helpers import fill, model, trainer

from mongotorch import Datalayer, Worker

JOBS = 5
MOST_COMMANDS = 31
"""A job of a model whose earlier versions were trained on the same documents reads their set: 2 more."""


class Commands(monitoring.CommandListener):
    """The commands that were sent, by name and collection, while `counts` is set."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.counts = False

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if self.counts:
            self.sent[f"{event.command_name} {event.command[event.command_name]}"] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    client = functools.partial(pymongo.MongoClient, event_listeners=[commands])
    monkeypatch.setattr("mongotorch.mongo.connection.MongoClient", client)
    return commands


@pytest.fixture
def queue(commands: Commands, server_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Datalayer]:
    """With a job that has run: what a process asks once is known. No heart beats, however slow the machine is."""
    monkeypatch.setattr("mongotorch.services.training.job_runner.PROGRESS_S", 600.0)
    with Datalayer.connect(server_uri, compute="queue", progress=False, lease_s=1800.0) as db:
        add(db, 1, "warm", max_iterations=2, validation_interval=None)
        assert Worker(db).run(until_idle=True) == 1
        yield db


def add(db: Datalayer, count: int, name: str, **given: Any) -> None:
    select = db["points"].find() if db["points"].count() else fill(db, 30)
    for n in range(count):
        mine = trainer(select, model=model(seed=n, identifier=f"{name}{n}"), **given)
        db.apply(mine.replace(identifier=f"{name}{n}"))


def test_a_small_job_sends_few_commands_and_starts_one_thread(
    queue: Datalayer, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(queue, JOBS, "small", max_iterations=2, validation_interval=None)
    begin, started = threading.Thread.start, Counter[str]()

    def start(self: threading.Thread) -> None:
        started[self.name.rstrip("0123456789_-")] += 1
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    worker = Worker(queue, schedules=False)
    commands.counts = True
    assert worker.run(until_idle=True) == JOBS
    commands.counts = False

    assert worker.failed == 0
    each = {what: number / JOBS for what, number in sorted(commands.sent.items())}
    assert sum(each.values()) <= MOST_COMMANDS, each
    assert {name: number for name, number in started.items() if name.startswith("mongotorch")} == {
        "mongotorch-heartbeat": JOBS
    }


def test_a_job_that_validates_writes_its_checkpoints_and_little_more(queue: Datalayer, commands: Commands) -> None:
    add(queue, JOBS, "valid", max_iterations=2, validation_interval=1)
    commands.counts = True
    assert Worker(queue, schedules=False).run(until_idle=True) == JOBS
    commands.counts = False

    each = {what: number / JOBS for what, number in sorted(commands.sent.items())}
    # Two further sets of documents are looked at and read, and one checkpoint, of the first validation, is kept.
    assert sum(each.values()) <= MOST_COMMANDS + 25, each
    assert each["delete mt.checkpoints"] <= 2, each
