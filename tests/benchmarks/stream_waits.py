"""Where the training thread of an epoch spends its time: computing, waiting for a core, or waiting for a batch.

    python -m tests.benchmarks.stream_waits --docs 200000 --width 1024

Linux says how long a thread ran and how long it could have run but had no core; what is left of the time it was
blocked, by the GIL, a lock or a socket. A stream that only loses against tensors in memory by waiting for a core
loses by what the server and the reader compute beside it, on a machine that has no core for them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks import stream_contenders as contenders
from tests.benchmarks.stream_data import database, fill, tensors
from tests.benchmarks.stream_rounds import Contender, trained


class Waits:
    """Epochs of one contender, and the seconds of each that this thread spent in the ways of `NAMES`."""

    NAMES = ("wall", "computing", "without a core", "blocked", "in next()")

    def __init__(self, batches: Callable[[], Iterator[Any]], width: int) -> None:
        self._batches = batches
        self._run: Contender = trained(self._timed, width)
        self._in_next = 0.0
        self.seconds: list[tuple[float, ...]] = []

    def run(self) -> None:
        """One epoch."""
        start, (ran, waited), self._in_next = time.perf_counter(), _of_thread(), 0.0
        self._run()
        wall, (ran, waited) = (
            time.perf_counter() - start,
            (now - then for now, then in zip(_of_thread(), (ran, waited), strict=True)),
        )
        self.seconds.append((wall, ran, waited, wall - ran - waited, self._in_next))

    def _timed(self) -> Iterator[Any]:
        batches = iter(self._batches())
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._in_next += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def _of_thread() -> tuple[float, float]:
    """Seconds that this thread ran, and that it waited for a core."""
    stat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text(encoding="ascii").split()
    return int(stat[0]) / 1e9, int(stat[1]) / 1e9


def main() -> None:
    """Measure, the contenders in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layer: 128 is a fast step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uri")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with database(given.uri) as (_, base):
        fill(base, "vectors", given.docs, vectors=True)
        x, y = tensors(given.docs)
        made = {name: contenders.onward(base, "vectors", worker=name == "worker") for name in ("thread", "worker")}
        found = {name: Waits(one.__iter__, given.width) for name, one in made.items()}
        found["hand-sliced"] = Waits(lambda: contenders.hand_sliced(x, y), given.width)
        for number in range(given.rounds + 1):
            for waits in list(found.values())[:: 1 if number % 2 else -1]:
                waits.run()
        for one in made.values():
            one.close()
    print(f"seconds an epoch of {given.docs:,}, medians of {given.rounds}, load {os.getloadavg()[0]:.1f}")
    for name, waits in found.items():
        medians = map(statistics.median, zip(*waits.seconds[1:], strict=True))  # the first one makes the plan
        print(f"{name:12s}", *(f"{what} {s:.2f}" for what, s in zip(Waits.NAMES, medians, strict=True)), sep="  ")


if __name__ == "__main__":
    main()
