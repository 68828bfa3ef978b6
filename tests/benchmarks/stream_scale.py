"""What must not grow with the collection: memory, the first batch, the state; and how well labels are mixed.

Run as a program it drains one collection in a process of its own and prints what that took, as JSON: peak memory
is only honest where nothing else was in the process before.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pymongo import MongoClient
from tests.benchmarks.stream_contenders import BATCH, stream
from tests.benchmarks.stream_data import CLASSES
from torch import Tensor

from mongotorch.data import Stream, StreamSpec
from mongotorch.data.read.plan import COLLECTION
from mongotorch.query import Query


def peak_bytes(uri: str, name: str) -> int:
    """Peak memory of a process that streams a collection once, shuffled, with prefetching."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.stream_scale", uri, name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["peak_bytes"])


def first_batch_seconds(base: Any, name: str, rounds: int) -> float:
    """From a new stream, without a stored plan, to its first shuffled batch; the median."""
    times = []
    for number in range(rounds):
        base[COLLECTION].drop()
        start = time.perf_counter()
        with stream(base, name, seed=number) as made:
            batches = iter(made)
            next(batches)
            times.append(time.perf_counter() - start)
            batches.close()  # type: ignore[attr-defined]
    return statistics.median(times)


def resume_seconds(base: Any, name: str, count: int, rounds: int, share: float = 0.9) -> tuple[float, int]:
    """From a new stream and a state at 90 % of an epoch to its next batch, the median; and the state's bytes."""
    with stream(base, name) as made:
        batches = iter(made)
        for _ in islice(batches, int(count * share) // BATCH):
            pass
        state = json.dumps(made.state_dict())
        expected = next(batches)
        batches.close()  # type: ignore[attr-defined]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        with stream(base, name) as made:
            made.load_state_dict(json.loads(state))
            batches = iter(made)
            found = next(batches)
            times.append(time.perf_counter() - start)
            batches.close()  # type: ignore[attr-defined]
        if not torch.equal(found[0], expected[0]):
            raise AssertionError("the resumed stream yields another batch")
    return statistics.median(times), len(state)


def entropy_ratio(base: Any, name: str, count: int) -> float:
    """The mean label entropy of the batches of an epoch, over that of a true shuffle of the same labels."""
    with stream(base, name) as made:
        labels = [y for _, y in made]
    shuffled = torch.cat(labels)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return _mean(map(_entropy, labels)) / _mean(map(_entropy, torch.split(shuffled, BATCH)))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _entropy(labels: Tensor) -> float:
    shares = torch.bincount(labels, minlength=CLASSES) / len(labels)
    return -math.fsum(share * math.log(share) for share in shares.tolist() if share)


def _drain(uri: str, name: str) -> Iterator[tuple[str, Any]]:
    torch.set_num_threads(1)
    with MongoClient[dict[str, Any]](uri) as client:
        base = client.get_default_database()
        spec = StreamSpec(
            query=Query.find(name), key=("x", "y"), batch_size=BATCH, shuffle=True, data_prefetch=True
        )
        with Stream(lambda: base, spec, database=base) as made:
            yield "rows", sum(len(y) for _, y in made)
    # Not `ru_maxrss`: that of a process starts with the memory of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    yield "peak_bytes", int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(dict(_drain(*sys.argv[1:3]))))
