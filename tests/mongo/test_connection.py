"""Connections: clear errors without passwords, and the shared data of mongomock."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from pymongo.collection import Collection
from pymongo.errors import (
    InvalidOperation,
    PyMongoError,
)

from mongotorch.datalayer import Datalayer
from mongotorch.errors import (
    ServerUnavailableError,
    SettingError,
    StoreError,
    UnsupportedError,
)
from mongotorch.mongo.connection import mock_server, open_address
from mongotorch.mongo.driver_errors import driver_errors
from mongotorch.settings import read_settings


def test_a_server_that_is_not_there_is_said_within_the_timeout() -> None:
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1") as caught:
        open_address("mongodb://me:s3cret@127.0.0.1:1/db", read_settings(server_timeout_s=0.2))

    assert isinstance(caught.value.__cause__, PyMongoError)
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("option", ["readPreference=nonsense", "noSuchOption=1", "w=1&tls=perhaps"])
def test_options_that_the_driver_does_not_know_are_a_setting_error(option: str) -> None:
    with pytest.raises(SettingError) as caught:
        open_address(f"mongodb://me:s3cret@h/db?{option}", read_settings())

    assert "s3cret" not in caught.value.message


def test_two_connections_of_a_process_see_the_same_data(uri: str) -> None:
    with open_address(uri, read_settings()) as first, open_address(uri, read_settings()) as second:
        first.database.notes.insert_one({"_id": 1})
        elsewhere = first.opener()
        assert second.database.notes.count_documents({}) == 1
        assert elsewhere.notes.count_documents({}) == 1
        elsewhere.client.close()


def test_a_closed_connection_says_so() -> None:
    connection = open_address("mongomock://closed", read_settings())
    connection.close()
    connection.close()

    with pytest.raises(StoreError, match="closed"), driver_errors("reading"):
        raise InvalidOperation("Cannot use MongoClient after close")


def test_the_data_of_mongomock_lives_as_long_as_somebody_holds_it() -> None:
    with open_address("mongomock://gone", read_settings()) as connection:
        connection.database.notes.insert_one({})
    del connection
    gc.collect()

    with open_address("mongomock://gone", read_settings()) as connection:
        assert connection.database.notes.count_documents({}) == 0


def test_a_store_of_mongomock_is_found_again_here_and_refused_in_another_process() -> None:
    store = mock_server("here")
    sent = pickle.dumps(store)
    assert pickle.loads(sent) is store

    code = f"import pickle; pickle.loads({sent!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert UnsupportedError.__name__ in ran.stderr
    assert "memory of another process" in ran.stderr


def test_many_threads_get_one_store_of_a_name() -> None:
    together, found = threading.Barrier(8), []

    def look() -> None:
        together.wait()
        found.append(mock_server("many"))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(map(id, found))) == 1


def test_an_empty_address_is_refused_and_not_the_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGOTORCH_URI", "")
    with pytest.raises(SettingError) as caught:
        read_settings()
    assert caught.value.setting == "uri"


def test_a_server_that_is_too_old_is_refused(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mongotorch.mongo.connection.OLDEST_WIRE_VERSION", 99)
    with pytest.raises(SettingError, match="older than MongoDB"):
        open_address(server_uri, read_settings())


def test_indexes_that_are_there_are_not_created_again(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Datalayer.connect(server_uri).close()
    created: list[Any] = []
    monkeypatch.setattr(Collection, "create_index", lambda *given, **_: created.append(given))

    Datalayer.connect(server_uri).close()

    assert created == []
