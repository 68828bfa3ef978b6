"""What a run with several processes has left over: processes of a mark, orphans too, and ports that are held."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_NAME = "MONGOTORCH_TESTS_MARK"
_LISTENS = "0A"  # the state of a socket in /proc/net/tcp
_DEADLINE_S = 120.0


def marked(monkeypatch: pytest.MonkeyPatch) -> str:
    """Mark all processes that are started from now on, and what they start, whoever their parents will be."""
    mark = secrets.token_hex(16)
    monkeypatch.setenv(_NAME, mark)
    return mark


def of_mark(mark: str) -> dict[int, str]:
    """The other processes with a mark that run, by their numbers, and their command lines."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{_NAME}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if int(folder.name) != os.getpid() and state != "Z":
            found[int(folder.name)] = command
    return found


def ports(pid: int | str = "self") -> set[int]:
    """The TCP ports on which a process listens."""
    listening: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == _LISTENS:
                listening[f"socket:[{parts[9]}]"] = int(parts[1].rpartition(":")[2], 16)
    held: set[int] = set()
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            held.add(listening[str(file.readlink())])
        except (OSError, KeyError):
            continue
    return held


def expect_none(mark: str, before: set[int]) -> None:
    """Wait until no process of a mark runs, and this one listens on no other ports than before."""
    wait_for(lambda: not of_mark(mark), lambda: f"they still run: {of_mark(mark)}")
    assert ports() <= before


def wait_for(happened: Callable[[], object], why: Callable[[], str] = lambda: "it did not happen") -> None:
    """Wait for something, for as long as a busy machine may need."""
    deadline = time.monotonic() + _DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)
