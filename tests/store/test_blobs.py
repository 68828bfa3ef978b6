"""Blobs are whole or not there, stored once, and verified on reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import mongomock
import pytest
from pymongo.errors import PyMongoError

from mongotorch.errors import IntegrityError, NotFoundError, StoreError
from mongotorch.mongo.connection import open_address
from mongotorch.settings import read_settings
from mongotorch.store import BlobStore
from mongotorch.store.blobs import CHUNK_BYTES


@pytest.fixture
def database() -> Iterator[Any]:
    client: Any = mongomock.MongoClient()
    yield client.shop
    client.close()


@pytest.fixture
def blobs(database: Any) -> BlobStore:
    blobs = BlobStore(database)
    blobs.ensure_indexes()
    return blobs


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES + 5])
def test_a_blob_comes_back_by_the_sha256_of_its_bytes(blobs: BlobStore, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    name = blobs.put(memoryview(data))

    assert name == hashlib.sha256(data).hexdigest()
    assert blobs.get(name) == data


def test_the_same_bytes_are_stored_once(blobs: BlobStore, database: Any) -> None:
    blobs.put(b"abc")
    blobs.put(b"abc")

    assert database["mt.artifacts.files"].count_documents({}) == 1
    assert database["mt.artifacts.chunks"].count_documents({}) == 1


def test_the_second_of_two_writers_leaves_nothing_of_its_own(
    blobs: BlobStore, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put(b"abc")
    monkeypatch.setattr(BlobStore, "touch", lambda self, names: names)  # both looked before either wrote

    assert blobs.get(blobs.put(b"abc")) == b"abc"
    assert database["mt.artifacts.chunks"].count_documents({}) == 1


def test_a_blob_whose_writer_died_is_not_there_and_can_be_written_again(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise PyMongoError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(blobs._files, "insert_many", die)
        with pytest.raises(StoreError, match="killed"):
            blobs.put(b"abc")

    name = hashlib.sha256(b"abc").hexdigest()
    assert not blobs.has(name)
    with pytest.raises(NotFoundError):
        blobs.get(name)
    assert blobs.get(blobs.put(b"abc")) == b"abc"


def test_bytes_that_were_changed_are_refused(blobs: BlobStore, database: Any) -> None:
    name = blobs.put(b"abc")
    database["mt.artifacts.chunks"].update_one({}, {"$set": {"data": b"abd"}})

    with pytest.raises(IntegrityError, match=name):
        blobs.get(name)


def damage(database: Any, how: str) -> None:
    chunks, files = database["mt.artifacts.chunks"], database["mt.artifacts.files"]
    file = files.find_one({})
    if how == "a chunk is gone":
        chunks.delete_one({"n": 1})
    elif how == "all chunks are gone":
        chunks.delete_many({})
    elif how == "a chunk is cut":
        chunks.update_one({"n": 2}, {"$set": {"data": b"x"}})
    elif how == "a chunk is no bytes":
        chunks.update_one({"n": 0}, {"$set": {"data": "text"}})
    elif how == "there is one chunk more":
        chunks.insert_one({"files_id": file["_id"], "n": 3, "data": b"x"})
    elif how == "a chunk has a wrong number":
        chunks.update_one({"n": 1}, {"$set": {"n": -1}})
    elif how == "the length is wrong":
        files.update_one({}, {"$set": {"length": 7}})
    else:
        files.update_one({}, {"$unset": {"chunkSize": ""}})


@pytest.mark.parametrize(
    "how",
    [
        *("a chunk is gone", "all chunks are gone", "a chunk is cut", "a chunk is no bytes"),
        *("there is one chunk more", "a chunk has a wrong number", "the length is wrong", "no chunk size is said"),
    ],
)
def test_a_damaged_blob_is_mended_when_its_bytes_are_stored_again(uri: str, how: str) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256) * 2 + b"end"
    with open_address(uri, read_settings()) as connection:
        blobs = BlobStore(connection.database)
        blobs.ensure_indexes()
        name = blobs.put(data)
        damage(connection.database, how)
        with pytest.raises((IntegrityError, NotFoundError)):
            blobs.get(name)

        assert blobs.put(data) == name

        assert blobs.get(name) == data
        assert connection.database["mt.artifacts.files"].count_documents({}) == 1
        assert connection.database["mt.artifacts.chunks"].count_documents({}) == 3


def test_bytes_that_were_changed_in_place_are_put_back(uri: str) -> None:
    data = b"a" * (CHUNK_BYTES + 5)
    with open_address(uri, read_settings()) as connection:
        blobs = BlobStore(connection.database)
        name = blobs.put(data)
        assert not blobs.mend(data)
        connection.database["mt.artifacts.chunks"].update_one({"n": 1}, {"$set": {"data": b"bbbbb"}})

        assert blobs.mend(data)

        assert blobs.get(name) == data
        assert not blobs.mend(b"never stored")


def test_small_blobs_are_sent_and_read_together(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_address(uri, read_settings()) as connection:
        blobs = BlobStore(connection.database)
        blobs.ensure_indexes()
        known = blobs.put(b"known")
        monkeypatch.setattr(BlobStore, "_touched", lambda self, names: {})  # all looked before one of them wrote
        names = blobs.put_all([b"", b"one", b"known", b"two", large := bytes(3 * CHUNK_BYTES)])
        monkeypatch.undo()

        assert connection.database["mt.artifacts.files"].count_documents({}) == 5
        assert connection.database["mt.artifacts.chunks"].count_documents({}) == 6
        get = blobs.getter([*names, "0" * 64])
        assert [get(name) for name in names] == [b"", b"one", b"known", b"two", large]
        got: Any = get(known)
        got[0] = 0  # each reader may write into its own
        assert get(known) == blobs.get(known) == b"known"
        with pytest.raises(NotFoundError):
            get("0" * 64)
        two = connection.database["mt.artifacts.files"].find_one({"filename": names[3]})
        connection.database["mt.artifacts.chunks"].update_one({"files_id": two["_id"]}, {"$set": {"data": b"tow"}})
        with pytest.raises(IntegrityError):
            blobs.getter(names)(names[3])
