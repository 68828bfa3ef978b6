"""One flipped bit anywhere in what is stored of a signed component is a typed error before anything is unpickled.

Anywhere: in its document, in the document of a blob's file, in a whole chunk with its number and its owner. What a
flip does not change for a reader (the time of an upload) loads the same values.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import bson
import mongomock
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mongotorch.codecs import pickles
from mongotorch.component import Component
from mongotorch.errors import MongotorchError
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import Trust
from mongotorch.store.signing import HmacKey

pytestmark = pytest.mark.property

COLLECTIONS = ("mt.components", "mt.artifacts.files", "mt.artifacts.chunks")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Net(Component):
    type_id: ClassVar[str] = "net"

    module: Any = None


class House:
    """A database with one signed component of several blobs: a skeleton, small tensors together, a large one."""

    def __init__(self) -> None:
        self.database: Any = mongomock.MongoClient()["flips"]
        key = HmacKey(b"k" * 16)
        self.catalog = Catalog(self.database, Trust(key, (key,), required=True))
        self.module = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40))
        self.uuid = self.catalog.store(Net("n", module=self.module))
        self.documents: list[tuple[str, dict[str, Any]]] = []
        for name in COLLECTIONS:
            found: list[dict[str, Any]] = list(self.database[name].find({}, sort=[("_id", 1)]))
            self.documents += [(name, document) for document in found]

    def put(self, collection: str, old: Any, new: Any) -> None:
        self.database[collection].delete_one({"_id": old["_id"]})
        self.database[collection].insert_one(new)

    def is_same(self, loaded: Any) -> bool:
        """Whether what was loaded is what was stored."""
        mine, other = self.module.state_dict(), loaded.module.state_dict()
        return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


HOUSE = House()


def flipped(document: dict[str, Any], bit: int) -> dict[str, Any]:
    """The document with one bit of its BSON changed; what is no BSON any more, no server would keep."""
    raw = bytearray(bson.encode(document))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        changed = bson.decode(bytes(raw))
        assume(bson.encode(changed) != bson.encode(document) and "_id" in changed)
    except (bson.errors.BSONError, UnicodeError, ValueError, OverflowError):
        assume(False)
    return changed


@pytest.mark.parametrize("collection", COLLECTIONS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_bit_flipped_anywhere_is_an_error_before_anything_is_unpickled(
    collection: str, data: st.DataObject
) -> None:
    of_it = [document for name, document in HOUSE.documents if name == collection]
    document = data.draw(st.sampled_from(of_it))
    changed = flipped(document, data.draw(st.integers(0, len(bson.encode(document)) * 8 - 1)))
    unpickled: list[bool] = []
    load = pickles._Unpickler.load

    def noticed(self: Any) -> Any:
        unpickled.append(True)
        return load(self)

    try:
        HOUSE.put(collection, document, changed)
    except Exception:  # noqa: BLE001 - mongomock refuses it, in its own ways
        HOUSE.database[collection].insert_one(document)
        assume(False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pickles._Unpickler, "load", noticed)
            try:
                loaded = HOUSE.catalog.load_uuid(HOUSE.uuid)
            except MongotorchError:
                assert not unpickled
            else:
                assert collection != "mt.components", "a signed document has no bit that may differ"
                assert HOUSE.is_same(loaded)
    finally:
        HOUSE.put(collection, changed, document)


def test_what_nobody_flipped_loads() -> None:
    assert {name for name, _ in HOUSE.documents} == set(COLLECTIONS)
    assert len(HOUSE.documents) >= 7
    assert HOUSE.is_same(HOUSE.catalog.load_uuid(HOUSE.uuid))
