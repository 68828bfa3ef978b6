"""Runs ranks from a process of their own, the driver, which a launcher starts and which ends with it.

A driver gets what it is to run over its standard input, which stays open: when it is closed, because the run has
to end or the launching process is gone, the driver kills its ranks and ends. What ranks and driver have to say
about errors they write into a folder that both remove.

Guarantees: an address or a key is in no command line and no environment variable. However the launching process
or the driver ends, no rank outlives it by more than seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, final

import bson

from mongotorch.errors import JobProcessError, MongotorchError, WorkerLostError
from mongotorch.jobs.failures import described, rebuilt
from mongotorch.jobs.launchers.base import RankCall, imported
from mongotorch.resources import die_with_parent

LOOK_S: Final = 0.1
"""How often the launching process looks at its driver, and whether the run may go on."""
END_S: Final = 5.0
"""How long a driver that was told to end has to kill its ranks by itself."""
_LAST_S: Final = 2.0  # how long a rank that has lost another one stays, for that one to be seen first
_LONGEST_LINE: Final = 64 * 2**10  # bytes of what a rank prints
_log = logging.getLogger("mongotorch.ranks")
_DRIVER: Final = "driver"  # in the name of its file, in place of the number of a rank


@final
@dataclass(frozen=True, kw_only=True)
class Drive:
    """What a driver runs.

    Attributes:
        drive: The importable name of the function that the driver calls with this; it returns when all ranks have
            returned, and else raises.
        call: What each rank calls.
        workers: How many ranks.
        folder: Where errors are written.
        options: More that the function needs, by name.
    """

    drive: str
    call: RankCall
    workers: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@final
class RankEndedError(Exception):
    """Raised by `Drive.drive`: ranks have ended by themselves.

    Args:
        codes: The exit codes by the numbers of ranks, as `subprocess` gives them.
    """

    def __init__(self, codes: Mapping[int, int]) -> None:
        super().__init__(f"ranks ended: {dict(codes)}")
        self.codes = dict(codes)


def run_driver(
    drive: str,
    call: RankCall,
    *,
    workers: int,
    check: Callable[[], None],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Run ranks from a driver, and return when all have returned.

    Args:
        drive: As in `Drive`.
        call: As in `Drive`.
        workers: As in `Drive`.
        check: As in `Launcher.run`.
        options: As in `Drive`.

    Raises:
        JobProcessError: The process of a rank, or the driver, ended before its end.
        Exception: What a rank raised.
    """
    folder = Path(tempfile.mkdtemp(prefix="mongotorch-ranks-"))
    try:
        what = Drive(drive=drive, call=call, workers=workers, folder=folder, options=options or {})
        code = _driven(what, check)
        error = _first_error(folder, workers)
        if error is not None:
            raise error
        if code != 0:
            raise JobProcessError(f"the process that watches the ranks {_how(code)}; its output says more")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _driven(what: Drive, check: Callable[[], None]) -> int:
    """Start a driver, and wait for its end; it is ended where `check` raises. Returns its exit code."""
    command = [sys.executable, "-c", f"from {__name__} import drive_ranks; drive_ranks()"]
    # What ranks print goes where this process logs, so that the log has one format; else straight to stderr.
    stderr = subprocess.PIPE if logging.getLogger("mongotorch").handlers else None
    # A session of its own: Ctrl-C is for the launching process, and all of the group can be killed at once.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True)  # noqa: S603
    reader = threading.Thread(target=_log_lines, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None  # noqa: S101 - for the type checker
            process.stdin.write(pickle.dumps((sys.path, what)))
            process.stdin.flush()
        while process.poll() is None:
            check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
        return process.returncode
    finally:
        _end(process)
        reader.join(END_S)


def _log_lines(stream: IO[bytes] | None) -> None:
    """Log what ranks and their driver write to stderr, line by line, to its end."""
    if stream is None:
        return
    with stream, contextlib.suppress(OSError):
        # A progress bar writes all its lines over each other: only the last one is read.
        while line := stream.readline(_LONGEST_LINE):
            text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
            if text:
                _log.warning("%s", text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a driver end its ranks, and kill what is left of its process group."""
    with contextlib.suppress(OSError):
        assert process.stdin is not None  # noqa: S101 - for the type checker
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as the system does when memory runs out" * (name == "SIGKILL"))


def _first_error(folder: Path, workers: int) -> Exception | None:
    """The error that the others follow from; None where there is none."""
    found = {path.stem: bson.decode(path.read_bytes()) for path in folder.glob("*.bson")}
    codes = {int(rank): code for rank, code in found.get(_DRIVER, {}).get("codes", {}).items()}
    own = [one for name, one in found.items() if name != _DRIVER or "error" in one]
    causes = [one for one in own if not one.get("follows")]
    if causes:
        return _error_of(min(causes, key=lambda one: one["at"]), workers)
    dead = {rank: code for rank, code in codes.items() if str(rank) not in found and code != -signal.SIGTERM}
    if dead:
        rank, code = min(dead.items())
        return JobProcessError(f"the process of rank {rank} of {workers} {_how(code)}")
    return _error_of(min(own, key=lambda one: one["at"]), workers) if own else None


def _error_of(found: Mapping[str, Any], workers: int) -> Exception:
    return rebuilt(found["error"], where=found["where"].format(workers=workers))


# In the driver, and in its ranks


def run_rank(call: RankCall, folder: Path, rank: int) -> None:
    """Call the function of a rank in this process; after an error, leave its description and end the process.

    Args:
        call: The function.
        folder: Where errors are written.
        rank: The number of this rank.
    """
    die_with_parent()
    faulthandler.enable()
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the error of the run
        leave(folder, str(rank), error, where=f"rank {rank} of {{workers}}")
        _flush()
        if follows(error):
            time.sleep(_LAST_S)
        # Not by an exception: at its exit, a process may wait for ranks that are gone.
        os._exit(1)


def leave(folder: Path, name: str, error: BaseException, *, where: str) -> None:
    """Write the description of an error where the launching process finds it."""
    write_description(folder, name, description_of(error, where=where))


def description_of(error: BaseException, *, where: str) -> dict[str, Any]:
    """An error as plain BSON, with where and when it was raised, and whether it follows from another one."""
    description = described(error)
    try:
        bson.encode(description)
    except Exception:  # noqa: BLE001 - the `_id` of a document may be anything
        description["document_id"] = repr(description["document_id"])
    return {"where": where, "at": time.time(), "follows": follows(error), "error": description}


def follows(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    return isinstance(error, WorkerLostError)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def drive_ranks() -> None:
    """Be the driver: run what the launching process has sent, and end this process."""
    launching = os.getppid()
    path, what = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launching process takes Ctrl-C
    threading.Thread(target=_end_with, args=(launching, what.folder), daemon=True).start()
    code = 1
    try:
        imported(what.drive)(what)
        code = 0
    except RankEndedError as failed:
        codes = {str(rank): number for rank, number in failed.codes.items()}
        write_description(what.folder, _DRIVER, {"codes": codes})
    except MongotorchError as error:
        leave(what.folder, _DRIVER, error, where="the process that watches the ranks")
    except BaseException as error:  # noqa: BLE001 - such as that a process which starts ranks was killed
        ended = JobProcessError(f"the ranks could not be started or watched: {type(error).__name__}: {error}")
        ended.__cause__ = error
        leave(what.folder, _DRIVER, ended, where="the process that watches the ranks")
    _flush()
    os._exit(code)


def write_description(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write what a rank, or the driver, has to say where the launching process finds it."""
    data = bson.encode(content)
    with contextlib.suppress(OSError):  # the folder is gone: nobody asks any more
        (folder / f".{name}").write_bytes(data)
        (folder / f".{name}").rename(folder / f"{name}.bson")


def _end_with(launching: int, folder: Path) -> None:
    """Kill the whole process group when the standard input is closed, or the launching process is gone."""
    with contextlib.suppress(OSError):
        # A process that was forked from the launching one may have its end of the pipe still open.
        while os.getppid() == launching:
            if select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
                break
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
