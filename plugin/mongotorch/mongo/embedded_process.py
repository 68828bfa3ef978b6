"""Keeps one embedded mongod for as long as somebody uses its folder. Run as a script; imports nothing of ours.

    embedded_process.py FOLDER MONGOD [ARGUMENT ...]

Every user of the folder holds a shared `flock` on `users.lock`, which the kernel drops however the user ends.
The keeper waits for the exclusive one: when it gets it, nobody is left, and mongod is shut down cleanly.

Always: while the keeper lives it holds `keeper.lock`; when it is gone, so is the mongod that it started; a
user who comes while mongod shuts down cannot get the shared lock, and knows by that.
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
    """Go into the background, run mongod, and stop it after its last user."""
    lock = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("another keeper serves this folder")
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)  # whoever reads the starter's output shall see its end
    with (folder / "mongod.log").open("wb") as log:
        # In this thread, which lives as long as the process: the death signal is bound to the thread.
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
