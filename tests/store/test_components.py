"""Versions are unique, and one insert makes two documents visible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mongomock
import pytest

from mongotorch.errors import ConflictError, NotFoundError
from mongotorch.store import Components


@pytest.fixture
def database() -> Iterator[Any]:
    client: Any = mongomock.MongoClient()
    yield client.shop
    client.close()


@pytest.fixture
def components(database: Any) -> Components:
    components = Components(database)
    components.ensure_indexes()
    return components


def document(uuid: str, **more: Any) -> dict[str, Any]:
    return {"_id": uuid, "type_id": "model", "identifier": "digits", "digest": "d-" + uuid, **more}


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
    assert components.versions("model", "digits") == [0, 1]


def test_many_versions_are_listed_without_a_request_for_each(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        components.publish(
            {**document(f"model-{n}"), "identifier": "other", "refs": [f"half-{n}"] if n % 2 else []}
        )
        components.publish(document(f"half-{n}", anchor=f"model-{n}"))
    asked: list[Any] = []
    find = components._documents.find

    def counting(where: Any, shown: Any = None) -> Any:
        asked.append(shown)
        return find(where, shown)

    monkeypatch.setattr(components._documents, "find", counting)
    monkeypatch.delattr(type(components._documents), "find_one")
    assert components.versions("model", "digits") == [1, 3]
    assert len(asked) == 2
    assert all("fields" not in shown for shown in asked), "what a version holds is not read"


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
