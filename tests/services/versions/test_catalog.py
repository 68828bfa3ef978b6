"""Publishing and loading: same content once, one object per uuid, nothing visible before the last insert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import mongomock
import pytest
import torch

from mongotorch.codecs import Codecs
from mongotorch.component import Component
from mongotorch.errors import ConflictError, NotFoundError, UnsafeClosureError
from mongotorch.services.versions.catalog import Loader, Publisher
from mongotorch.store import Aliases, BlobStore, Components
from mongotorch.train.tensor_codec import TorchCodec


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Thing(Component):
    type_id: ClassVar[str] = "thing"

    value: Any = None
    other: Component | None = None


class House:
    def __init__(self, database: Any) -> None:
        self.database = database
        codecs = Codecs.builtin(TorchCodec())
        self.artifacts, self.components = BlobStore(database), Components(database)
        self.aliases = Aliases(database)
        self.artifacts.ensure_indexes()
        self.components.ensure_indexes()
        self.publisher = Publisher(self.components, self.artifacts, codecs)
        self.loader = Loader(self.components, self.artifacts, self.aliases, codecs)

    def writes(self) -> int:
        return sum(self.database[name].count_documents({}) for name in self.database.list_collection_names())


@pytest.fixture
def house() -> Iterator[House]:
    client: Any = mongomock.MongoClient()
    yield House(client.shop)
    client.close()


def test_what_is_stored_loads_by_uuid_and_by_name(house: House) -> None:
    thing = Thing("a", value=torch.arange(3.0))

    stored = house.publisher.store(thing)

    assert stored.new
    for loaded in (house.loader.by_uuid(thing.uuid), house.loader.load(house.loader.find("thing", "a"))):
        assert isinstance(loaded, Thing)
        assert (loaded.uuid, loaded.version) == (thing.uuid, 0)
        assert torch.equal(loaded.value, thing.value)


def test_the_same_content_is_recognised_and_not_stored_again(house: House) -> None:
    first = house.publisher.store(Thing("a", value=1))
    before = house.writes()

    again = house.publisher.store(Thing("a", value=1))

    assert (again.new, again.uuid) == (False, first.uuid)
    assert house.writes() == before


def test_other_content_is_the_next_version_and_the_first_stays(house: House) -> None:
    uuids = [house.publisher.store(Thing("a", value=value)).uuid for value in (1, 2, 1)]

    versions = [house.loader.load(house.loader.find("thing", "a", version)) for version in (0, 1, 2)]

    assert [v.value for v in versions if isinstance(v, Thing)] == [1, 2, 1]
    assert [v.uuid for v in versions] == uuids


def test_a_uuid_does_not_move_to_another_content(house: House) -> None:
    thing = Thing("a", value=[1])
    house.publisher.store(thing)
    thing.value.append(2)

    with pytest.raises(ConflictError, match="replace"):
        house.publisher.store(thing)


def test_a_refused_value_leaves_no_trace(house: House) -> None:
    client: Any = house.database.client
    inner = Thing("inner", value=torch.zeros(3))

    with pytest.raises(UnsafeClosureError, match=r"value\.__closure__\['client'\]"):
        house.publisher.store(Thing("a", value=lambda: client, other=inner))

    assert house.writes() == 0


def test_a_part_that_is_stored_already_is_shared(house: House) -> None:
    inner = Thing("inner", value=1)
    house.publisher.store(inner)

    house.publisher.store(Thing("a", other=Thing("inner", value=1)))

    loaded = house.loader.load(house.loader.find("thing", "a"))
    assert isinstance(loaded, Thing)
    assert loaded.other is not None
    assert loaded.other.uuid == inner.uuid
    assert house.components.versions("thing", "inner") == [0]


class DiedError(Exception):
    pass


def pair() -> tuple[Thing, Thing]:
    model = Thing("model", value=torch.arange(4.0))
    trainer = Thing("trainer", value={"state": torch.ones(2)}, other=model)
    object.__setattr__(model, "other", trainer)
    return model, trainer


def die_at(house: House, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let the process die at its n-th write, before it reaches the database."""
    left = iter(range(write))
    collections = (house.artifacts._files, house.artifacts._chunks, house.components._documents)
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
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.publisher.store(Thing("model", value=0))
    house.publisher.store(Thing("trainer", value=0))
    write = 0
    while True:
        model, trainer = pair()
        with monkeypatch.context() as patched:
            die_at(house, patched, write)
            try:
                house.publisher.publish(model, with_=trainer, facts={})
                break
            except DiedError:
                pass
        assert house.components.versions("thing", "model") == [0]
        assert house.components.versions("thing", "trainer") == [0]
        with pytest.raises(NotFoundError):
            house.loader.by_uuid(trainer.uuid)
        write += 1

    assert write >= 3
    loaded = house.loader.load(house.loader.find("thing", "model"))
    assert isinstance(loaded, Thing)
    assert isinstance(loaded.other, Thing)
    assert loaded.other.other is loaded
    assert loaded.uuid == model.uuid
