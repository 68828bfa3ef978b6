"""Every way of writing an address gives the same one, with the database in it; its `repr` has no password."""

from __future__ import annotations

from pathlib import Path

import pymongo
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mongotorch.errors import (
    SettingError,
)
from mongotorch.mongo.address import DEFAULT_DATABASE, parse_uri


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


@given(_word, _word, _word)
def test_parsing_twice_is_parsing_once(host: str, name: str, user: str) -> None:
    once = parse_uri(f"mongodb://{user}:pass@{host}:27017/{name}?w=majority")

    assert parse_uri(once.uri) == once
    assert once.database == name
    assert pymongo.uri_parser.parse_uri(once.uri)["database"] == name


def test_no_password_is_in_what_a_connection_shows() -> None:
    address = parse_uri("mongodb://me:s3cret@h/db")

    assert "s3cret" not in repr(address)


@given(_word)
def test_the_default_database_is_used_for_every_host(host: str) -> None:
    assert parse_uri(f"mongodb://{host}").database == DEFAULT_DATABASE
