"""What a run with several processes has left over: processes of a mark, orphans too, and ports that are held."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
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


def runs(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening() -> dict[str, int]:
    """The TCP ports on which somebody listens, by the names of the sockets."""
    found: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == _LISTENS:
                found[f"socket:[{parts[9]}]"] = int(parts[1].rpartition(":")[2], 16)
    return found


def sockets(pid: int | str = "self") -> set[str]:
    """The names of the sockets on which a process listens."""
    return set(_held(pid, listening()))


def ports(pid: int | str = "self") -> set[int]:
    """The TCP ports on which a process listens."""
    found = listening()
    return {found[name] for name in _held(pid, found)}


def _held(pid: int | str, names: Mapping[str, int]) -> list[str]:
    held = []
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed in the meantime
            if (name := str(file.readlink())) in names:
                held.append(name)
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
