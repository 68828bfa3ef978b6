"""Addresses: every way of writing one, with the database in it, and no password where people read."""

from __future__ import annotations

import contextlib
import gc
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson.errors import InvalidDocument
from hypothesis import given
from hypothesis import strategies as st
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    DuplicateKeyError,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
)

from mongotorch.errors import (
    CodecError,
    MongotorchError,
    ServerUnavailableError,
    SettingError,
    StoreError,
    UnsupportedError,
)
from mongotorch.mongo.address import DEFAULT_DATABASE, parse_uri
from mongotorch.mongo.connection import mock_server, open_address
from mongotorch.mongo.error_translation import driver_errors, translated
from mongotorch.mongo.redact import redact
from mongotorch.settings import read_settings


@pytest.mark.parametrize(
    ("uri", "full", "database"),
    [
        ("mongodb://h", "mongodb://h/mongotorch", "mongotorch"),
        ("mongodb://h/", "mongodb://h/mongotorch", "mongotorch"),
        ("MongoDB://h:1,g:2/shop?w=1", "mongodb://h:1,g:2/shop?w=1", "shop"),
        ("mongodb://h/?w=1", "mongodb://h/mongotorch?w=1", "mongotorch"),
        ("mongodb+srv://c.example.net", "mongodb+srv://c.example.net/mongotorch", "mongotorch"),
        ("mongodb://u:p@h", "mongodb://u:p@h/mongotorch?authSource=admin", "mongotorch"),
        ("mongodb://u:p@h/shop", "mongodb://u:p@h/shop", "shop"),
        ("mongodb://u:p@h/?authSource=x", "mongodb://u:p@h/mongotorch?authSource=x", "mongotorch"),
        (
            "mongodb://CN=me@h/?authMechanism=MONGODB-X509",
            "mongodb://CN=me@h/mongotorch?authMechanism=MONGODB-X509&authSource=$external",
            "mongotorch",
        ),
        ("mongomock://shop", "mongomock://shop", "shop"),
        ("mongomock://shop/", "mongomock://shop", "shop"),
        ("embedded:/a/b", "embedded:/a/b?db=mongotorch", "mongotorch"),
        ("embedded:///a/b?db=shop", "embedded:/a/b?db=shop", "shop"),
    ],
)
def test_the_database_is_in_the_address_and_nothing_else_changes(uri: str, full: str, database: str) -> None:
    address = parse_uri(uri)

    assert (address.uri, address.database) == (full, database)
    assert parse_uri(full).uri == full


@pytest.mark.parametrize(
    "uri",
    [
        *("", "shop", "http://h/shop", "mongodb:h", "mongodb://", "mongodb:///shop", "mongomock://"),
        *("mongodb://h/a b", "mongodb://h/a$b", "mongodb://h/" + "x" * 64, "mongomock://a.b"),
        *("embedded:", "embedded:?db=x", "embedded:/a?db=", "embedded:/a?name=x"),
    ],
)
def test_what_is_no_address_is_refused_and_the_setting_named(uri: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_uri(uri)

    assert caught.value.setting == "uri"


def test_a_relative_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    assert parse_uri("embedded:db").path == (tmp_path / "db").resolve()


_word = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
_secret = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=4, max_size=20)


@given(_word, _word, _word)
def test_parsing_twice_is_parsing_once(host: str, name: str, user: str) -> None:
    once = parse_uri(f"mongodb://{user}:pass@{host}:27017/{name}?w=majority")

    assert parse_uri(once.uri) == once
    assert once.database == name
    assert pymongo.uri_parser.parse_uri(once.uri)["database"] == name


@given(_word, _secret, _word, st.sampled_from(["", "?authSource=admin", "/shop?tls=true"]))
def test_no_password_survives_redaction(user: str, secret: str, host: str, rest: str) -> None:
    address = f"mongodb://{user}:<{secret}>@{host}{rest}"

    for text in (address, f"cannot reach {address}, is it up?", f"{address} {address}"):
        assert f"<{secret}>" not in redact(text)
        assert f"mongodb://{user}:***@" in redact(text)


@pytest.mark.parametrize("option", ["tlsCertificateKeyFilePassword", "authMechanismProperties", "proxyPassword"])
def test_options_that_hold_secrets_are_hidden(option: str) -> None:
    found = redact(f"mongodb://h/db?w=1&{option}=s3cret&tls=true")

    assert "s3cret" not in found
    assert found.endswith("&tls=true")


def test_text_without_an_address_stays_as_it_is() -> None:
    text = "a@b: mongodb://h/db has 3 documents, see user@example.net"

    assert redact(text) == text


def test_no_password_is_in_what_a_connection_shows() -> None:
    address = parse_uri("mongodb://me:s3cret@h/db")

    assert "s3cret" not in repr(address)


# Connections.


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
        elsewhere = first.opener()()
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


# Errors of the driver.


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OperationFailure("bad auth", 18), SettingError, "user name or password"),
        (OperationFailure("bad auth", 8000), SettingError, "user name or password"),
        (OperationFailure("not authorized on db", 13), SettingError, "does not allow it"),
        (AutoReconnect("connection refused"), ServerUnavailableError, "cannot be reached"),
        (DuplicateKeyError("E11000"), StoreError, "refused"),
        (InvalidDocument("cannot encode"), CodecError, "cannot encode"),
        (ConfigurationError("odd"), StoreError, "odd"),
        (PyMongoError(""), StoreError, "PyMongoError"),
    ],
)
def test_each_error_of_the_driver_has_its_place_in_the_tree(
    error: Any, kind: type[MongotorchError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught, driver_errors("saving", at="mongodb://h"):
        raise error

    assert caught.value.__cause__ is error
    assert "saving" in caught.value.message


def test_no_error_holds_a_password_and_errors_of_ours_pass() -> None:
    error = OperationFailure("mongodb://me:s3cret@h refused", 99)
    assert "s3cret" not in translated(error, doing="d", at="a").message

    ours = StoreError("ours")
    with contextlib.suppress(StoreError), driver_errors("doing"):
        raise ours
    assert ours.__cause__ is None


@given(_word)
def test_the_default_database_is_used_for_every_host(host: str) -> None:
    assert parse_uri(f"mongodb://{host}").database == DEFAULT_DATABASE
