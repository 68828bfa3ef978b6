"""A process that streams with workers is killed: nothing of it stays behind.

A worker that has a result to hand over would wait for ever for the process that is gone, with its memory and its
connections.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

pytestmark = pytest.mark.fault

COUNT = 60_000  # what is left of a window for the pipe, after its tensors, is more than the pipe holds

PROGRAM = """
import multiprocessing, sys, time
import torch
from mongotorch import Datalayer

with Datalayer.connect(sys.argv[1]) as db:
    options = {"data_prefetch": False, "num_workers": 2, "prefetch_size": 1000}
    with db.stream(db["documents"].find(), key=("x", "y"), batch_size=64, shuffle=True, **options) as stream:
        next(iter(stream))
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


@pytest.fixture
def address(mongod: str) -> Iterator[str]:
    """A fresh database on the server of the session."""
    name = "orphans" + uuid.uuid4().hex[:12]
    address = f"mongodb://{mongod}/{name}?replicaSet=rs0"
    with MongoClient[dict[str, Any]](address) as client:
        client[name]["documents"].insert_many([{"x": float(n), "y": n} for n in range(COUNT)])
        yield address
        client.drop_database(name)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_ticks(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]


def wait_until_idle(pids: list[int]) -> None:
    """Until they are as far ahead as they may be, and their results wait to be taken."""
    before, now = None, [cpu_ticks(pid) for pid in pids]
    while now != before:
        time.sleep(0.5)
        before, now = now, [cpu_ticks(pid) for pid in pids]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_the_process_that_started_them(address: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, address], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert len(workers) == 2
        wait_until_idle(workers)
        assert all(map(alive, workers))
        program.kill()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
