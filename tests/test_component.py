"""A component keeps its identity, is stored field by field, and equals what is loaded from its document."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from mongotorch.codecs import Codecs
from mongotorch.component import (
    Component,
    Encoder,
    begin_component,
    content_digest,
    encode_component,
    fill_component,
)
from mongotorch.errors import CodecError, IdentifierError, ParameterError
from mongotorch.query import Query

CODECS = Codecs.builtin()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Part(Component):
    type_id: ClassVar[str] = "part"

    size: int = 10**100
    select: Query | None = None
    other: Component | None = None
    others: tuple[Component, ...] = ()


class Database:
    """Documents and blobs in two dicts."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}

    def blob(self, name: str) -> bytes:
        return self.blobs[name]

    def store(self, component: Component) -> str:
        if component.uuid in self.documents:
            return component.uuid
        document = self.documents.setdefault(component.uuid, {"_id": component.uuid, "version": 7})
        document.update(type_id=component.type_id, identifier=component.identifier)
        encoder = Encoder(CODECS)
        document.update(encode_component(component, encoder, self.store))
        self.blobs |= {name: bytes(blob.data[:]) for name, blob in encoder.blobs.items()}
        return component.uuid

    def load(self, uuid: str, met: dict[str, Component] | None = None) -> Component:
        met = {} if met is None else met
        if uuid not in met:
            met[uuid] = begin_component(self.documents[uuid], CODECS, self.blob)
            fill_component(met[uuid], self.documents[uuid], CODECS, self.blob, lambda u: self.load(u, met))
        return met[uuid]


@pytest.mark.parametrize("identifier", ["", "a b", ".a", "-a", "ä", "a" * 201, "a/b", "a\n", None])
def test_a_bad_identifier_is_refused_at_construction(identifier: Any) -> None:
    with pytest.raises(IdentifierError):
        Part(identifier)


def test_artifacts_name_fields_that_exist() -> None:
    with pytest.raises(ParameterError, match="colour"):
        Part("p", artifacts={"colour": "dill"})


def test_a_uuid_is_made_and_a_changed_copy_gets_its_own() -> None:
    part = Part("p")

    assert part.uuid
    assert part.replace(size=1).uuid != part.uuid
    assert part.replace(size=1).version is None


def test_a_loaded_component_equals_the_stored_one() -> None:
    database, part = Database(), Part("p", select=Query.find("c", {"a": {"$gt": 1}}).sort("a"))

    loaded = database.load(database.store(part))

    assert loaded == part
    assert (loaded.uuid, loaded.version) == (part.uuid, 7)
    assert isinstance(loaded, Part)
    assert loaded.size == 10**100


def test_another_content_is_not_equal_and_another_uuid_is() -> None:
    assert Part("p", size=1) != Part("p", size=2)
    assert Part("p", size=1) != Part("q", size=1)
    assert Part("p", size=1) == Part("p", size=1)


def test_components_among_the_fields_are_references() -> None:
    database, inner = Database(), Part("inner")
    outer = Part("outer", other=inner, others=(inner, Part("third")))

    loaded = database.load(database.store(outer))

    assert isinstance(loaded, Part)
    assert loaded.other is loaded.others[0]
    assert [c.identifier for c in loaded.others] == ["inner", "third"]
    assert database.documents[outer.uuid]["fields"]["other"] == {
        "_ref": inner.uuid,
        "type_id": "part",
        "identifier": "inner",
    }


def test_two_components_may_refer_to_each_other() -> None:
    database, first = Database(), Part("first")
    second = Part("second", other=first)
    object.__setattr__(first, "other", second)

    loaded = database.load(database.store(first))

    assert isinstance(loaded, Part)
    assert isinstance(loaded.other, Part)
    assert loaded.other.other is loaded
    assert content_digest(loaded, Encoder(CODECS)) == content_digest(first, Encoder(CODECS))


def test_the_codec_of_a_field_can_be_chosen() -> None:
    database, part = Database(), Part("p", size=3, artifacts={"size": "json"})

    loaded = database.load(database.store(part))

    assert database.documents[part.uuid]["fields"]["size"]["_codec"] == "json"
    assert loaded == part


def test_a_field_that_an_older_version_did_not_store_takes_its_default() -> None:
    database, part = Database(), Part("p", size=3)
    uuid = database.store(part)
    del database.documents[uuid]["fields"]["size"]

    loaded = database.load(uuid)

    assert isinstance(loaded, Part)
    assert loaded.size == 10**100


def test_a_document_of_something_else_is_refused() -> None:
    document = {"_id": "u", "class": {"_codec": "name", "name": "builtins.dict"}, "identifier": "p", "version": 0}

    with pytest.raises(CodecError, match="no component"):
        begin_component(document, CODECS, Database().blob)


def test_the_datalayer_it_was_given_is_used_and_not_stored() -> None:
    class Layer:
        def apply(self, component: Component) -> str:
            return component.identifier

    part = Part("p", Layer())

    assert part.apply() == "p"
    assert "db" not in encode_component(part, Encoder(CODECS), lambda c: c.uuid)["fields"]
    with pytest.raises(ParameterError, match="db"):
        Part("p").apply()
