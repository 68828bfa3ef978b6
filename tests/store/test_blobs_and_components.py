"""Blobs are whole or not there; versions are unique; one insert makes two documents visible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import mongomock
import pytest
from pymongo.errors import PyMongoError

from mongotorch.errors import ConflictError, IntegrityError, NotFoundError, StoreError
from mongotorch.store import BlobStore, Components
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


@pytest.fixture
def components(database: Any) -> Components:
    components = Components(database)
    components.ensure_indexes()
    return components


def document(uuid: str, **more: Any) -> dict[str, Any]:
    return {"_id": uuid, "type_id": "model", "identifier": "digits", "digest": "d-" + uuid, **more}


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
        patched.setattr(blobs._files, "update_one", die)
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


def test_versions_count_up_from_zero(components: Components) -> None:
    assert [components.publish(document(uuid)) for uuid in "abc"] == [0, 1, 2]
    assert components.versions("model", "digits") == [0, 1, 2]
    assert components.find("model", "digits")["_id"] == "c"
    assert components.find("model", "digits", 1)["_id"] == "b"


def test_a_number_taken_by_another_process_gives_the_next_one(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = components._documents
    insert = documents.insert_one

    def late(written: dict[str, Any]) -> Any:
        monkeypatch.setattr(documents, "insert_one", insert)
        insert(document("other", version=written["version"]))
        return insert(written)

    monkeypatch.setattr(documents, "insert_one", late)

    assert components.publish(document("mine")) == 1


def test_a_uuid_is_taken_for_ever(components: Components) -> None:
    components.publish(document("a"))

    with pytest.raises(ConflictError):
        components.publish(document("a", digest="another"))


def test_what_waits_for_its_anchor_is_invisible_until_the_anchor_is_there(components: Components) -> None:
    components.publish(document("old"))
    components.publish(document("half", anchor="model"))

    assert components.find("model", "digits")["_id"] == "old"
    assert components.versions("model", "digits") == [0]
    with pytest.raises(NotFoundError):
        components.get("half")

    components.publish({**document("model", refs=["half"]), "identifier": "other"})
    assert components.find("model", "digits")["_id"] == "half"


def test_what_is_missing_is_named_with_what_there_is(components: Components) -> None:
    components.publish(document("a"))

    with pytest.raises(NotFoundError, match=r"version 7 .*\[0\]"):
        components.find("model", "digits", 7)
    with pytest.raises(NotFoundError, match="'letters'"):
        components.find("model", "letters")


def test_users_of_a_component_are_found(components: Components) -> None:
    components.publish(document("a", refs=["b"]))

    assert [user["_id"] for user in components.users("b")] == ["a"]
    assert components.kinds() == ["model"]
    assert components.identifiers("model") == ["digits"]
