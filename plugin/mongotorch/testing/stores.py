"""The tests of a database behind an address, for a class to inherit; each test goes through a datalayer."""

# ruff: noqa: S101 - these are tests

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, final

import numpy as np
import pytest

from mongotorch.component import Component
from mongotorch.datalayer import Datalayer
from mongotorch.errors import ConflictError, IntegrityError, InUseError, NotFoundError

AT_ONCE = 8
LARGE = 5_000_000  # bytes: several chunks


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Thing(Component):
    """A component that is only stored.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made when none is given.
        artifacts: `{field: codec name}`, over the default choice of codec.
        value: Anything.
        other: Another component.
    """

    type_id: ClassVar[str] = "thing"

    value: Any = None
    other: Component | None = None


class StoreSuite:
    """The tests of a backend: a class that inherits it, called `Test…`, defines the fixture `address`."""

    @pytest.fixture
    def address(self) -> str:
        """The address of an empty database, for one test."""
        raise NotImplementedError("define the fixture `address`")

    @pytest.fixture
    def db(self, address: str) -> Iterator[Datalayer]:
        """A datalayer over it."""
        with Datalayer.connect(address, progress=False) as db:
            yield db

    def test_documents_come_back_with_their_arrays(self, db: Datalayer) -> None:
        """The dtype and the shape of each array, and everything else as it was."""
        arrays = {
            dtype: np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("float32", "int8", "bool", "int64")
        }
        flat = {name + "s": array.reshape(-1) for name, array in arrays.items()}
        db["things"].insert_one({"_id": 1, "name": "a", "list": [1, 2.5], "flat": flat, **arrays})

        (found,) = db.execute(db["things"].find())

        assert (found["_id"], found["name"], found["list"]) == (1, "a", [1, 2.5])
        for name, array in {**arrays, **{name: flat[name] for name in flat}}.items():
            again = np.asarray(found[name] if name in found else found["flat"][name])
            np.testing.assert_array_equal(again, array)
            assert again.dtype == array.dtype

    def test_another_connection_sees_what_is_stored(self, db: Datalayer, address: str) -> None:
        """Documents and components, for as long as the first is open at least."""
        db["things"].insert_one({"_id": 1})
        stored = db.apply(Thing("a", value=1)).result()

        with Datalayer.connect(address) as other:
            assert other["things"].count() == 1
            assert other.load(uuid=stored.uuid) == stored

    def test_versions_count_from_zero_and_each_loads_what_it_was(self, db: Datalayer) -> None:
        """By name, by name and version, and by uuid."""
        stored = [db.apply(Thing("a", value=np.full(3, n))).result() for n in range(3)]

        assert [thing.version for thing in stored] == [0, 1, 2] == db.show("thing", "a")
        for n, thing in enumerate(stored):
            for loaded in (db.load("thing", "a", n), db.load(uuid=thing.uuid)):
                np.testing.assert_array_equal(loaded.value, np.full(3, n))
        assert db.load("thing", "a").version == 2

    def test_the_same_content_is_recognised(self, db: Datalayer) -> None:
        """No version, no document, no blob more."""
        first = db.apply(Thing("a", value=np.arange(9))).result()
        before = _counts(db)

        again = db.apply(Thing("a", value=np.arange(9))).result()

        assert (again.uuid, again.version) == (first.uuid, 0)
        assert _counts(db) == before

    def test_several_at_once_get_a_version_each(self, db: Datalayer, address: str) -> None:
        """None twice, none missing, and each uuid loads what was applied under it."""
        start = threading.Barrier(AT_ONCE)

        def apply(n: int) -> Any:
            with Datalayer.connect(address, progress=False) as own:
                start.wait()
                return own.apply(Thing("a", value=np.full(4, n))).result()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            stored = list(pool.map(apply, range(AT_ONCE)))

        assert sorted(thing.version for thing in stored) == list(range(AT_ONCE))
        for n, thing in enumerate(stored):
            np.testing.assert_array_equal(db.load(uuid=thing.uuid).value, np.full(4, n))

    def test_several_that_apply_the_same_blob_at_once_store_it_once(self, db: Datalayer, address: str) -> None:
        """A blob is its content."""
        start = threading.Barrier(AT_ONCE)

        def apply(n: int) -> None:
            with Datalayer.connect(address, progress=False) as own:
                start.wait()
                own.apply(Thing(f"a{n}", value=np.arange(1000)))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(apply, range(AT_ONCE)))

        assert db["mt.artifacts.files"].raw.count_documents({}) == 1
        for n in range(AT_ONCE):
            np.testing.assert_array_equal(db.load("thing", f"a{n}").value, np.arange(1000))

    def test_a_large_blob_comes_back_and_is_stored_once(self, db: Datalayer) -> None:
        """Of several chunks, under two names."""
        data = np.random.default_rng(0).integers(0, 256, LARGE, dtype=np.uint8)
        for name in ("a", "b"):
            db.apply(Thing(name, value=data))

        for name in ("a", "b"):
            assert np.array_equal(db.load("thing", name).value, data)
        assert db["mt.artifacts.files"].raw.count_documents({"length": LARGE}) == 1

    def test_bytes_that_were_changed_are_refused(self, db: Datalayer) -> None:
        """A blob is checked against its name whenever it is read."""
        db.apply(Thing("a", value=np.arange(9)))
        db["mt.artifacts.chunks"].raw.update_one({}, {"$set": {"data": b"\x00" * 72}})

        with pytest.raises(IntegrityError):
            db.load("thing", "a")

    def test_what_is_published_never_changes(self, db: Datalayer) -> None:
        """Whatever comes after it."""
        first = db.apply(Thing("a", value=np.arange(9))).result()
        before = db.show("thing", "a", 0)

        db.apply(first.replace(value=np.arange(8)))
        db.apply(Thing("b", other=first))
        db.remove("thing", "a", 1)

        assert db.show("thing", "a", 0) == before
        assert db.load(uuid=first.uuid) == first

    def test_a_uuid_is_one_stored_version_for_ever(self, db: Datalayer) -> None:
        """A second, different component under it is refused, and leaves no trace."""
        first = db.apply(Thing("a", value=1)).result()
        before = _counts(db)

        with pytest.raises(ConflictError):
            db.apply(Thing("a", uuid=first.uuid, value=np.arange(9)))

        assert _counts(db) == before
        assert db.load(uuid=first.uuid).value == 1

    def test_removing_takes_only_what_nothing_else_uses(self, db: Datalayer) -> None:
        """A component in use stays, and so does a blob that another one shares."""
        inner = db.apply(Thing("a", value=np.arange(9))).result()
        db.apply(Thing("b", value=np.arange(9), other=inner))

        with pytest.raises(InUseError):
            db.remove("thing", "a")
        assert db.remove("thing", "b") == 1

        assert db.load("thing", "a") == inner
        with pytest.raises(NotFoundError):
            db.load("thing", "b")


def _counts(db: Datalayer) -> dict[str, int]:
    names = ("mt.components", "mt.artifacts.files", "mt.artifacts.chunks", "mt.jobs")
    return {name: db[name].raw.count_documents({}) for name in names}
