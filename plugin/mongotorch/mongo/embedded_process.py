"""Runs one embedded mongod in the background until nobody uses its folder. A script that imports nothing of ours.

    embedded_process.py FOLDER MONGOD [ARGUMENT ...]

Every process that uses the folder holds a shared `flock` on `users.lock`, which the kernel releases however that
process ends. This process waits for the exclusive lock: when it gets it, nobody is left, and it shuts mongod down.

Guarantees: this process holds `keeper.lock` while it lives, and its mongod does not outlive it (on macOS, where
the kernel does not see to that, not beyond the next start); nobody can take the shared lock while mongod shuts
down.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

# Its name is from the first release, whose processes may still serve a folder: it must not change.
PROCESS_LOCK = "keeper.lock"
STOP_DEADLINE_S = 60
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop_orphan(folder: Path) -> None:
    """Stop a mongod whose embedded process was killed, where the kernel did not do it (macOS)."""
    try:
        pid = int((folder / "data" / "mongod.lock").read_text())
    except (OSError, ValueError):
        return  # it ended cleanly, which empties the file
    deadline = time.monotonic() + STOP_DEADLINE_S
    with contextlib.suppress(ProcessLookupError):
        if _serves(pid, folder):
            os.kill(pid, signal.SIGTERM)
        while _serves(pid, folder):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def _serves(pid: int, folder: Path) -> bool:
    """Whether a process is the mongod of a folder, and not a dead one or another one with its number."""
    try:
        command = ["ps", "-ww", "-o", "args=", "-p", str(pid)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return False
    return str(folder / "data") in ran.stdout and "--replSet" in ran.stdout


def _stop_when_unused(folder: Path, mongod: subprocess.Popen[bytes]) -> None:
    users = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(users, fcntl.LOCK_EX)
    mongod.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        mongod.wait(STOP_DEADLINE_S)
        return
    mongod.kill()


def main(folder: Path, command: list[str]) -> None:
    """Go into the background, run mongod, and stop it after its last user. Raises: SystemExit."""
    lock = os.open(folder / PROCESS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("another process serves this folder")
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)  # a reader of the caller's output must see its end
    _stop_orphan(folder)
    with (folder / "mongod.log").open("wb") as log:
        # In the main thread: the death signal is sent when the thread that started mongod ends.
        mongod = subprocess.Popen(  # noqa: S603 - the command comes from the code that starts this script
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,  # no thread runs yet
        )
    threading.Thread(target=_stop_when_unused, args=(folder, mongod), daemon=True).start()
    mongod.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
