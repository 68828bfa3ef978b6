"""A private mongod over one folder, shared by all processes that open the folder.

The first process that opens the folder starts `embedded_process.py`, which runs mongod until nobody uses the
folder. The folder contains `data/` (mongod's own), `mongod.log`, `port`, `version`, `auth/`
(`embedded_secrets.py`), and three lock files:

- `start.lock`: held by the process that opens or closes the server, one at a time;
- `users.lock`: held shared by every process that uses the server;
- `keeper.lock`: held by the embedded process while it lives.

All are `flock`s, which the kernel releases with their process, so that none can be stale; why not a library:
docs/decisions/0020-file-locks-and-retries.md.

Guarantees: one server a folder, which runs while one user lives and is shut down cleanly after the last one,
however it ended; a server that `open` returns is a writable primary; the data stays. Only who can read the folder
can use the server; a folder of an earlier release, whose server asked for no password, gets one when it starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
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
from mongotorch.mongo import embedded_process, embedded_secrets
from mongotorch.mongo.driver_errors import (
    NOT_AUTHENTICATED,
    NOT_YET_INITIALIZED,
    USER_EXISTS,
    driver_errors,
    has_code,
)
from mongotorch.mongo.embedded_secrets import USER, EmbeddedSecrets, write_private
from mongotorch.mongo.server_binary import (
    ALTERNATIVES,
    Mongod,
    check_folder,
    find_mongod,
    keep_version,
    library_hint,
)
from mongotorch.resources import Owner

HOST: Final = "127.0.0.1"
REPLICA_SET: Final = "mongotorch"
START_DEADLINE_S: Final = 60.0
LOCK_DEADLINE_S: Final = 120.0
_POLL_S: Final = 0.01
_PORT_TRIES: Final = 5
_START_LOCK, _USERS_LOCK, _PROCESS_LOCK = "start.lock", "users.lock", embedded_process.PROCESS_LOCK
_ARGUMENTS: Final = (
    # Not zlib, with which strangers could read the memory of this release (CVE-2025-14847).
    *("--networkMessageCompressors", "snappy,zstd"),
    *("--bind_ip", HOST, "--replSet", REPLICA_SET, "--nounixsocket", "--quiet"),
    *("--oplogSize", "512", "--setParameter", "diagnosticDataCollectionEnabled=false"),
    # No first user without a password: on a machine with several people another one could be faster.
    *("--auth", "--setParameter", "enableLocalhostAuthBypass=false"),
    # There is no other member to take over: nothing to wait for at shutdown.
    *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
)
_CACHE: Final = ("--wiredTigerCacheSizeGB", "0.25")


@final
class EmbeddedServer(Owner):
    """One process's use of the server of a folder; made by `open`, ended by `close`.

    Attributes:
        path: The folder.
        port: Where the server listens, on 127.0.0.1.
    """

    def __init__(self, path: Path, port: int, users: int, *, secrets: EmbeddedSecrets) -> None:
        self.path = path
        self.port = port
        self._secrets = secrets
        self._release = weakref.finalize(self, _release, users, os.getpid())
        self._release.atexit = False  # the kernel releases the lock then

    @classmethod
    def open(cls, path: str | Path, *, mongod: Path | None = None, arguments: Sequence[str] = ()) -> Self:
        """Join the server of a folder, or start it.

        Args:
            path: The folder; made if it does not exist.
            mongod: The program, if this call starts it; None is that of the extra `server`, else that on `PATH`.
            arguments: More arguments for mongod, if this call starts it.

        Raises:
            EmbeddedServerError: mongod is not installed or does not start (the message quotes its log), the folder
                cannot be made or belongs to another user, a lock was not released in time, or a process of an
                earlier release serves the folder.
            ServerVersionError: The folder was used by a newer MongoDB, or by one too old to upgrade from.
        """
        folder = Path(path).expanduser().absolute()
        _make(folder)
        with _locked(folder / _START_LOCK):
            users = _open(folder / _USERS_LOCK)
            try:
                _acquire(users, folder / _USERS_LOCK, fcntl.LOCK_SH)
                secrets = _secrets_of(folder)
                port = _running_port(folder, secrets) or _start(folder, secrets, mongod, tuple(arguments))
            except BaseException:
                os.close(users)
                raise
        return cls(folder, port, users, secrets=secrets)

    def uri(self, database: str = "") -> str:
        """The server's address, with the password."""
        who = f"{USER}:{self._secrets.password}@"
        return f"mongodb://{who}{HOST}:{self.port}/{database}?replicaSet={REPLICA_SET}&authSource=admin"

    def close(self) -> None:
        """Stop using the server; the last user returns when it has stopped. Does nothing the second time.

        Raises:
            EmbeddedServerError: Another process holds a lock for longer than two minutes.
        """
        if not self._release.alive:
            return
        with _locked(self.path / _START_LOCK):
            self._release()
            if not _is_used(self.path):
                wait_for(self.path / _PROCESS_LOCK)


def _make(folder: Path) -> None:
    """Make the folder if it does not exist, and let nobody else into what is in it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # one that exists may have other things in it, for others
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data").chmod(0o700)
    except OSError as error:
        raise EmbeddedServerError(f"the folder of the embedded server cannot be made: {error}") from error


def _secrets_of(folder: Path) -> EmbeddedSecrets:
    if not embedded_secrets.exist_in(folder) and _process_lives(folder):
        raise EmbeddedServerError(_earlier(folder), setting="uri")
    return EmbeddedSecrets.of(folder)


def _release(users: int, owner: int) -> None:
    # A child that was forked meanwhile has a copy of the descriptor, which would keep the lock; and when the child
    # closes its copy, that must not release the lock of its parent.
    if os.getpid() == owner:
        fcntl.flock(users, fcntl.LOCK_UN)
    os.close(users)


def _is_used(folder: Path) -> bool:
    """Whether somebody uses the server; called under the start lock, so that nobody joins meanwhile."""
    with _opened(folder / _USERS_LOCK) as users:
        if _try_lock(users, fcntl.LOCK_EX):
            return False
        # Users hold it shared, or the embedded process holds it exclusively since there are none.
        return _try_lock(users, fcntl.LOCK_SH)


def _running_port(folder: Path, secrets: EmbeddedSecrets) -> int | None:
    """The port of the folder's running server, once it is a writable primary; None if there is none."""
    if not _process_lives(folder):
        return None
    port = _last_port(folder)
    if port is None:
        return None
    try:
        _wait_for_primary(folder, port, secrets)
    except EmbeddedServerError:
        if not _process_lives(folder):
            return None  # it was shutting down
        raise
    return port


def _process_lives(folder: Path) -> bool:
    with _opened(folder / _PROCESS_LOCK) as descriptor:
        return not _try_lock(descriptor, fcntl.LOCK_EX)


def _last_port(folder: Path) -> int | None:
    try:
        return int((folder / "port").read_text())
    except (OSError, ValueError):
        return None


def _start(folder: Path, secrets: EmbeddedSecrets, chosen: Path | None, arguments: tuple[str, ...]) -> int:
    """Start the server and return its port: the one it had before, if that is free."""
    mongod = find_mongod(chosen)
    upgrades = check_folder(folder, mongod)
    last = _last_port(folder)
    cache = () if "--wiredTigerCacheSizeGB" in arguments else _CACHE
    for attempt in range(_PORT_TRIES):
        port = last if attempt == 0 and last and _is_free(last) else _free_port()
        write_private(folder / "port", str(port))
        where = ("--dbpath", str(folder / "data"), "--port", str(port), "--keyFile", str(secrets.key_file))
        _launch(folder, [str(mongod.path), *where, *_ARGUMENTS, *cache, *arguments])
        try:
            _wait_for_primary(folder, port, secrets)
        except EmbeddedServerError as error:
            if "already in use" in error.message and attempt + 1 < _PORT_TRIES:
                continue  # somebody took the port between the check and the start
            raise
        if upgrades:
            _finish_upgrade(port, secrets, mongod)
        keep_version(folder, mongod)
        return port
    raise AssertionError("unreachable")


def _finish_upgrade(port: int, secrets: EmbeddedSecrets, mongod: Mongod) -> None:
    """Let the data have the format of the newer series, without which the series after it would refuse them."""
    command: dict[str, Any] = {"setFeatureCompatibilityVersion": "{}.{}".format(*mongod.version)}
    if mongod.version >= (7, 0, 0):
        command["confirm"] = True
    with contextlib.closing(_client(port, secrets.login())) as client, driver_errors("upgrading the server"):
        client.admin.command(command)


def _launch(folder: Path, command: list[str]) -> None:
    wait_for(folder / _PROCESS_LOCK)
    write_private(folder / "mongod.log", "")  # slow queries are in it, with what they ask for
    # -I -S: the script needs the standard library only, and starts in a few milliseconds.
    started = [sys.executable, "-I", "-S", str(Path(embedded_process.__file__)), str(folder), *command]
    try:
        subprocess.run(started, check=True, capture_output=True, text=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        raise EmbeddedServerError(f"the embedded server of {folder} cannot be started: {why}") from error


def _wait_for_primary(folder: Path, port: int, secrets: EmbeddedSecrets) -> None:
    """Wait until the server is a writable primary that knows the user.

    Its replica set is initiated if it is new or its port changed; the user is made if the data has none.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    with contextlib.closing(_client(port, secrets.member())) as member:
        while not _is_primary(member, f"{HOST}:{port}", folder):
            if not _process_lives(folder):
                raise EmbeddedServerError(_failure(folder, "ended at once"), setting="uri")
            if time.monotonic() > deadline:
                late = f"is no primary after {START_DEADLINE_S:.0f} s"
                raise EmbeddedServerError(_failure(folder, late), setting="uri")
            time.sleep(_POLL_S)
        try:
            _ensure_user(member, port, secrets)
        except PyMongoError as error:
            raise EmbeddedServerError(_failure(folder, "does not let its user in"), setting="uri") from error


def _client(port: int, login: dict[str, Any]) -> MongoClient[dict[str, Any]]:
    # A direct client, closed at the end: one that saw the set before it was initiated keeps the wrong topology.
    timeouts: dict[str, Any] = {
        "serverSelectionTimeoutMS": 200,
        "connectTimeoutMS": 2000,
        "socketTimeoutMS": 20_000,
    }
    return MongoClient(HOST, port, directConnection=True, **timeouts, **login)


def _is_primary(member: MongoClient[dict[str, Any]], host: str, folder: Path) -> bool:
    try:
        hello = member.admin.command("hello")
        if hello.get("isWritablePrimary"):
            return True
        if "setName" not in hello:
            _configure_set(member, host)
    except OperationFailure as error:
        if has_code(error, NOT_AUTHENTICATED):  # the server has another key, or none
            raise EmbeddedServerError(_earlier(folder), setting="uri") from error
        return False
    except PyMongoError:
        return False  # not listening yet, or between two states
    return False


def _ensure_user(member: MongoClient[dict[str, Any]], port: int, secrets: EmbeddedSecrets) -> None:
    """Make the user, or give it the password, unless it can log in."""
    with contextlib.closing(_client(port, secrets.login())) as user:
        try:
            user.admin.command("ping")
        except OperationFailure as error:
            if not has_code(error, NOT_AUTHENTICATED):
                raise
        else:
            return
    given: dict[str, Any] = {"pwd": secrets.password, "roles": ["root"], "mechanisms": ["SCRAM-SHA-256"]}
    try:
        member.admin.command("createUser", USER, **given)
    except OperationFailure as error:
        if not has_code(error, USER_EXISTS):
            raise
        member.admin.command("updateUser", USER, **given)


def _configure_set(client: MongoClient[dict[str, Any]], host: str) -> None:
    members = [{"_id": 0, "host": host}]
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if has_code(error, NOT_YET_INITIALIZED):
            client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": members})
            return
        raise
    if config["members"][0]["host"] != host:
        moved = {**config, "version": config["version"] + 1, "members": [{**config["members"][0], "host": host}]}
        client.admin.command("replSetReconfig", moved, force=True)


def _earlier(folder: Path) -> str:
    return (
        f"the embedded server of {folder} was started by an earlier release, without a password, or with another "
        "key; end the processes that use the folder, and open it again"
    )


def _failure(folder: Path, what: str) -> str:
    log = _log_errors(folder / "mongod.log")
    return f"the embedded mongod of {folder} {what}. Its log: {log}{library_hint(log)}. {ALTERNATIVES}"


def _log_errors(log: Path, lines: int = 5) -> str:
    """The last errors in mongod's log, else its last lines, without the fields that only programs read."""
    entries: list[tuple[bool, str]] = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            detail = json.dumps(entry["attr"]) if "attr" in entry else ""
            entries.append((entry["s"] in "EF", f"{entry['msg']} {detail}".strip()))
        except (ValueError, KeyError, TypeError):
            entries.append((True, line))
    chosen = [text for is_error, text in entries if is_error] or [text for _, text in entries]
    return "\n".join(text[:500] for text in chosen[-lines:]) or "empty"


def _is_free(port: int) -> bool:
    """Whether a server could listen at the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_for(path: Path) -> None:
    """Return when nobody holds the lock of a file. Raises: EmbeddedServerError after two minutes."""
    with _locked(path):
        return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file inside. Raises: EmbeddedServerError after two minutes."""
    with _opened(path) as descriptor:
        _acquire(descriptor, path, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a lock file; the lock that it holds at the end is released."""
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has a copy, which would keep it
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _acquire(descriptor: int, path: Path, kind: int) -> None:
    """Take a lock; polls, since `flock` has no timeout."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    while not _try_lock(descriptor, kind):
        if time.monotonic() >= deadline:
            late = f"the embedded server: {path} is still locked after {LOCK_DEADLINE_S:.0f} s"
            raise EmbeddedServerError(late, setting="uri")
        time.sleep(_POLL_S)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
