"""A million documents over the processes of four shards: each row once, equal steps, and the memory of one.

    python -m tests.data.stream.test_million_documents [DOCUMENTS]

prints what each shard had.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from tests.run_processes import context

from mongotorch import Datalayer

MILLION: Final = 10**6
ROWS: Final = 4096
"""Rows of a step over all shards."""
_AT_ONCE: Final = 20_000


class Seen(NamedTuple):
    """What one shard had of an epoch.

    Attributes:
        steps: Its steps.
        rows: Documents.
        total: The sum of their numbers.
        bits: One for each document that it had, packed.
        peak_mb: Its most memory.
        seconds: Processor time.
    """

    steps: int
    rows: int
    total: int
    bits: bytes
    peak_mb: float
    seconds: float


def insert(db: Datalayer, count: int, size: int) -> None:
    """Documents that are numbered, with so many numbers besides."""
    draw = np.random.default_rng(0)
    for first in range(0, count, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, count))
        values = draw.standard_normal((len(numbers), size)).tolist()
        db["rows"].raw.insert_many([{"x": x, "n": n} for n, x in zip(numbers, values, strict=True)], ordered=False)


def stream(uri: str, count: int, rank: int, world: int, into: Any) -> None:
    """Be one shard for an epoch."""
    had = np.zeros(count, np.bool_)
    begun, steps, rows, total = time.process_time(), 0, 0, 0
    with Datalayer.connect(uri, progress=False) as db:
        given: dict[str, Any] = {"batch_size": ROWS // world, "shuffle": True, "seed": 1, "shard": (rank, world)}
        with db.stream(db["rows"].find(), key=("x", "n"), data_prefetch=True, **given) as batches:
            for _, numbers in batches:
                found = numbers.numpy()
                steps, rows, total = steps + 1, rows + len(found), total + int(found.sum())
                had[found] = True
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_mb = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    into.put((rank, Seen(steps, rows, total, np.packbits(had).tobytes(), peak_mb, time.process_time() - begun)))


def shards(uri: str, count: int, world: int) -> list[Seen]:
    """What so many shards had, each in a process of its own."""
    found = context().Queue()
    processes = [
        context().Process(target=stream, args=(uri, count, rank, world, found), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    seen = dict(found.get(timeout=1200) for _ in processes)
    for process in processes:
        process.join(60)
    return [seen[rank] for rank in range(world)]


def check(uri: str, count: int, *, is_shown: bool = False) -> None:
    """Let one shard read all, and then four."""
    (one,), four = shards(uri, count, 1), shards(uri, count, 4)
    for name, seen in (("one", one), *((f"rank {rank} of 4", seen) for rank, seen in enumerate(four))):
        if is_shown:
            print(
                f"{name}: {seen.steps} steps, {seen.rows} rows, {seen.peak_mb:.0f} MB, {seen.seconds:.1f} s of CPU"
            )
    assert one.rows == count
    assert {seen.steps for seen in four} == {one.steps} == {-(-count // ROWS)}
    # A last step is dealt out evenly, and leaves over fewer rows than there are shards.
    left = count % ROWS % 4
    bits = np.unpackbits(np.frombuffer(b"".join(seen.bits for seen in four), np.uint8)).reshape(4, -1)
    assert sum(seen.rows for seen in four) == int(bits.any(axis=0).sum()) == count - left
    assert bits.sum(axis=0).max() == 1
    if not left:
        assert sum(seen.total for seen in four) == one.total == count * (count - 1) // 2
    assert max(seen.peak_mb for seen in four) < one.peak_mb + 64


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 150])
def test_each_of_a_million_rows_comes_once_over_four_shards(tmp_path: Path, size: int) -> None:
    with Datalayer.connect(f"embedded:{tmp_path}", progress=False) as db:
        insert(db, MILLION if size == 2 else MILLION // 10, size)
        check(db.uri, MILLION if size == 2 else MILLION // 10)


if __name__ == "__main__":
    documents = int(float(sys.argv[1])) if len(sys.argv) > 1 else MILLION
    for numbers_each, of_them in ((2, documents), (150, documents // 10)):
        with (
            tempfile.TemporaryDirectory() as folder,
            Datalayer.connect(f"embedded:{folder}", progress=False) as opened,
        ):
            insert(opened, of_them, numbers_each)
            print(f"{of_them} documents of {numbers_each} numbers")
            check(opened.uri, of_them, is_shown=True)
