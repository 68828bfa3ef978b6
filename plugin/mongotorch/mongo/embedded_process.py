"""Runs one embedded mongod in the background until nobody uses its folder. A script that imports nothing of ours.

    embedded_process.py FOLDER MONGOD [ARGUMENT ...]

Every process that uses the folder holds a shared `flock` on `users.lock`, which the kernel releases however that
process ends. This process waits for the exclusive lock: when it gets it, nobody is left, and it shuts mongod down.

Guarantees: this process holds `keeper.lock` while it lives, and its mongod never outlives it; nobody can take the
shared lock while mongod shuts down.
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
from pathlib import Path

# Its name is from the first release, whose processes may still serve a folder: it must not change.
PROCESS_LOCK = "keeper.lock"
STOP_DEADLINE_S = 60
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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
