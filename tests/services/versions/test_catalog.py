"""Publishing and loading: same content once, one object per uuid, nothing visible before the last insert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import mongomock
import pytest
import torch

from mongotorch.component import Component
from mongotorch.errors import ConflictError, NotFoundError, UnsafeClosureError
from mongotorch.services.versions.catalog import Catalog


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Thing(Component):
    type_id: ClassVar[str] = "thing"

    value: Any = None
    other: Component | None = None


@pytest.fixture
def database() -> Iterator[Any]:
    client: Any = mongomock.MongoClient()
    yield client.shop
    client.close()


@pytest.fixture
def catalog(database: Any) -> Catalog:
    made = Catalog(database)
    made.ensure_indexes()
    return made


def count_documents(database: Any) -> int:
    return sum(database[name].count_documents({}) for name in database.list_collection_names())


def test_what_is_stored_loads_by_uuid_and_by_name(catalog: Catalog) -> None:
    thing = Thing("a", value=torch.arange(3.0))

    stored = catalog.store(thing)

    assert stored == thing.uuid
    for loaded in (catalog.load_uuid(thing.uuid), catalog.load(catalog.find("thing", "a"))):
        assert isinstance(loaded, Thing)
        assert (loaded.uuid, loaded.version) == (thing.uuid, 0)
        assert torch.equal(loaded.value, thing.value)


def test_the_same_content_is_recognised_and_not_stored_again(catalog: Catalog, database: Any) -> None:
    first = catalog.store(Thing("a", value=1))
    before = count_documents(database)

    again = catalog.store(Thing("a", value=1))

    assert again == first
    assert count_documents(database) == before


def test_other_content_is_the_next_version_and_the_first_stays(catalog: Catalog) -> None:
    uuids = [catalog.store(Thing("a", value=value)) for value in (1, 2, 1)]

    versions = [catalog.load(catalog.find("thing", "a", version)) for version in (0, 1, 2)]

    assert [v.value for v in versions if isinstance(v, Thing)] == [1, 2, 1]
    assert [v.uuid for v in versions] == uuids


def test_a_uuid_does_not_move_to_another_content(catalog: Catalog) -> None:
    thing = Thing("a", value=[1])
    catalog.store(thing)
    thing.value.append(2)

    with pytest.raises(ConflictError, match="replace"):
        catalog.store(thing)


def test_a_refused_value_leaves_no_trace(catalog: Catalog, database: Any) -> None:
    client: Any = database.client
    inner = Thing("inner", value=torch.zeros(3))

    with pytest.raises(UnsafeClosureError, match=r"value\.__closure__\['client'\]"):
        catalog.store(Thing("a", value=lambda: client, other=inner))

    assert count_documents(database) == 0


def test_a_part_that_is_stored_already_is_shared(catalog: Catalog) -> None:
    inner = Thing("inner", value=1)
    catalog.store(inner)

    catalog.store(Thing("a", other=Thing("inner", value=1)))

    loaded = catalog.load(catalog.find("thing", "a"))
    assert isinstance(loaded, Thing)
    assert loaded.other is not None
    assert loaded.other.uuid == inner.uuid
    assert catalog.components.versions("thing", "inner") == [0]


class DiedError(Exception):
    pass


def pair() -> tuple[Thing, Thing]:
    model = Thing("model", value=torch.arange(4.0))
    trainer = Thing("trainer", value={"state": torch.ones(2)}, other=model)
    object.__setattr__(model, "other", trainer)
    return model, trainer


def die_at(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let the process die at its n-th write, before it reaches the database."""
    left = iter(range(write))
    collections = (catalog.blobs._files, catalog.blobs._chunks, catalog.components._documents)
    for collection in collections:
        for method in ("insert_one", "insert_many"):
            monkeypatch.setattr(collection, method, mortal(getattr(collection, method), left))


def mortal(write: Any, left: Iterator[int]) -> Any:
    def write_or_die(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise DiedError
        return write(*args, **kwargs)

    return write_or_die


def test_a_death_at_any_write_of_a_publication_leaves_the_version_before(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.store(Thing("model", value=0))
    catalog.store(Thing("trainer", value=0))
    write = 0
    while True:
        model, trainer = pair()
        with monkeypatch.context() as patched:
            die_at(catalog, patched, write)
            try:
                catalog.publish(model, partner=trainer, records={}, blobs={})
                break
            except DiedError:
                pass
        assert catalog.components.versions("thing", "model") == [0]
        assert catalog.components.versions("thing", "trainer") == [0]
        with pytest.raises(NotFoundError):
            catalog.load_uuid(trainer.uuid)
        write += 1

    assert write >= 3
    loaded = catalog.load(catalog.find("thing", "model"))
    assert isinstance(loaded, Thing)
    assert isinstance(loaded.other, Thing)
    assert loaded.other.other is loaded
    assert loaded.uuid == model.uuid
