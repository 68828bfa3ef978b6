"""What small jobs cost: how many a second workers do, the processor time of each, and the commands it sends.

    python -m tests.benchmarks.bench_jobs [--uri MONGODB-URI] [--jobs 300] [--workers 1 2] [--rounds 1]

A job trains a net of 67 parameters on 30 documents for two steps and publishes it; each has a model and a trainer
of its own. Jobs a second are those of `mongotorch worker --concurrency N`, without the first tenth of them, in
which processes are started. The processor time is that of one worker in this process, and of the server meanwhile,
without the first jobs of the process. On few cores the rate is about the cores over the sum of the two.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pymongo import monitoring
from tests.benchmarks.stream_data import database
from tests.helpers import fill, model, trainer

from mongotorch import Datalayer, Worker
from mongotorch.worker.supervisor import Supervisor

WARM = 10  # jobs that are not counted
DOCUMENTS = 30


class Commands(monitoring.CommandListener):
    """Counts the commands that are sent while it is told to."""

    def __init__(self) -> None:
        self.counts, self.sent = False, Counter[str]()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        """Count it."""
        if self.counts:
            self.sent[f"{event.command_name} {event.command[event.command_name]}"] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Count nothing."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Count nothing."""


def names() -> Iterator[str]:
    """Names that no job had before."""
    start = time.time_ns()
    return (f"j{start + n}" for n in range(10**9))


def add(db: Datalayer, count: int, name: Iterator[str]) -> list[str]:
    """Queue so many jobs; their ids."""
    select = db["points"].find() if db["points"].count() else fill(db, DOCUMENTS)
    jobs = []
    for one in itertools.islice(name, count):
        seed = int(one[1:]) % 2**31  # no two models begin with the same weights
        mine = trainer(select, max_iterations=2, validation_interval=None, seed=seed)
        jobs.append(db.apply(mine.replace(identifier=one, model=model(seed, identifier=one))).uuid)
    return jobs


def rate(uri: str, workers: int, count: int, name: Iterator[str]) -> float:
    """Jobs a second of so many worker processes."""
    with Datalayer.connect(uri, compute="queue", progress=False) as db:
        jobs = add(db, count, name)
        Supervisor(db, count=workers).run("until_idle")
        ended = sorted(one["finished"] for one in db["mt.jobs"].raw.find({"_id": {"$in": jobs}}))
        first = count // 10
        return (count - 1 - first) / float((ended[-1] - ended[first]).total_seconds())


def used_ms(base: Any) -> float:
    """The processor time of the server so far."""
    found = base.client.admin.command("serverStatus")["extra_info"]
    return float(found["user_time_us"] + found["system_time_us"]) / 1000


def alone(
    uri: str, base: Any, count: int, name: Iterator[str], begin: Callable[[], object]
) -> tuple[float, float]:
    """Milliseconds of processor time a job of a worker in this process, and of the server."""
    with Datalayer.connect(uri, compute="queue", progress=False) as db:
        worker = Worker(db, schedules=False)
        add(db, WARM, name)
        worker.run(until_idle=True)
        add(db, count, name)
        begin()
        server_ms, start_s = used_ms(base), time.process_time()
        done = worker.run(until_idle=True)
        return (time.process_time() - start_s) * 1000 / done, (used_ms(base) - server_ms) / done


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uri")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    name = names()
    with database(given.uri) as (uri, base):
        rates: dict[int, list[float]] = {workers: [] for workers in given.workers}
        for _ in range(given.rounds):
            for workers, found in rates.items():
                found.append(rate(uri, workers, given.jobs, name))
        for workers, found in rates.items():
            print(f"{workers} worker(s): {statistics.median(found):.1f} jobs a second")
        client_ms, server_ms = alone(uri, base, given.jobs, name, lambda: None)
        print(f"processor time a job: {client_ms:.1f} ms in the worker, {server_ms:.1f} ms in the server")
        commands = Commands()
        monitoring.register(commands)
        count = max(given.jobs // 10, 1)
        alone(uri, base, count, name, lambda: setattr(commands, "counts", True))
        print(f"commands a job: {commands.sent.total() / count:.1f}")
        for what, sent in commands.sent.most_common():
            print(f"  {sent / count:5.2f} {what}")


if __name__ == "__main__":
    main()
