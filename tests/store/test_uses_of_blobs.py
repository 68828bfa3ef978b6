"""A blob that somebody is going to name is not collected, whatever a collection and a writer do at once."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from mongotorch.mongo.server_features import utc_now
from mongotorch.store import BlobStore, Components, GarbageCollector
from mongotorch.store import blobs as module

ANCIENT = timedelta(days=30)


@pytest.fixture
def old(database: Any) -> str:
    """A blob that nobody has needed for a month."""
    blobs = BlobStore(database)
    blobs.ensure_indexes()
    name = blobs.put(b"old")
    database["mt.artifacts.files"].update_one({}, {"$set": {"touched": utc_now() - ANCIENT}})
    database["mt.artifacts.uses"].delete_many({})
    return name


def publish(database: Any, name: str) -> None:
    document = {"_id": "a", "type_id": "thing", "identifier": "a", "digest": "d", "refs": [], "blobs": [name]}
    Components(database).publish(document)


def test_storing_updates_nothing_that_is_stored(database: Any, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobStore(database)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("update_one", "update_many", "replace_one", "delete_many", "delete_one"):
        monkeypatch.setattr(blobs._files, name, refused)
        monkeypatch.setattr(blobs._chunks, name, refused)
    assert blobs.put_all([b"old", b"new", b"new"])[0] == old
    assert database["mt.artifacts.uses"].count_documents({}) == 1, "one write for all of them"


def test_an_unused_old_blob_is_collected_and_a_used_one_is_not(database: Any, old: str) -> None:
    assert GarbageCollector(database).collect(dry_run=True).blobs == (old,)
    BlobStore(database).touch([old])

    assert GarbageCollector(database).collect(dry_run=True).blobs == ()
    kept = GarbageCollector(database).collect()
    assert (kept.blobs, kept.waiting) == ((), 1)
    assert BlobStore(database).get(old) == b"old"


def test_a_use_ends_with_its_grace_period(database: Any, old: str) -> None:
    BlobStore(database).touch([old])
    database["mt.artifacts.uses"].update_one({}, {"$set": {"touched": utc_now() - ANCIENT}})

    assert GarbageCollector(database).collect().blobs == (old,)
    assert database["mt.artifacts.uses"].count_documents({}) == 0


@pytest.mark.parametrize("when", ["before the mark", "after the mark", "before the delete"])
def test_a_use_at_any_moment_of_a_collection_keeps_the_blob_or_stores_it_again(
    database: Any, old: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, published = GarbageCollector(database), threading.Event()

    def writer() -> None:
        assert BlobStore(database).put(b"old") == old
        publish(database, old)
        published.set()

    thread = threading.Thread(target=writer)
    used, delete = collector._used, collector._files.delete_many

    def at_uses(where: dict[str, Any]) -> set[str]:
        if when == ("after the mark" if where else "before the mark"):
            thread.start()
            published.wait(0.3)  # one that meets the mark waits for the collection
        return used(where)

    def at_delete(where: dict[str, Any]) -> Any:
        if when == "before the delete":
            thread.start()
            published.wait(0.3)
        return delete(where)

    monkeypatch.setattr(collector, "_used", at_uses)
    monkeypatch.setattr(collector._files, "delete_many", at_delete)
    collected = collector.collect()
    thread.join(20)

    assert published.is_set()
    assert BlobStore(database).get(old) == b"old"
    assert GarbageCollector(database).collect().blobs == ()
    if when == "before the mark":
        assert collected.blobs == ()
    assert database["mt.artifacts.files"].count_documents({"removing": {"$exists": True}}) == 0


def test_a_version_that_is_published_between_the_look_and_the_mark_keeps_its_blob(
    database: Any, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = GarbageCollector(database)
    reachable = collector._reachable

    def slow(*given: Any) -> set[str]:
        names = reachable(*given)
        publish(database, old)
        database["mt.artifacts.uses"].delete_many({})  # its use has ended by now
        return names

    monkeypatch.setattr(collector, "_reachable", slow)
    assert collector.collect().blobs == ()
    assert BlobStore(database).get(old) == b"old"


def test_a_blob_that_an_earlier_release_touches_after_the_mark_stays(
    database: Any, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = GarbageCollector(database)
    real = collector._files.delete_many

    def meanwhile(*given: Any) -> Any:
        database["mt.artifacts.files"].update_one({}, {"$set": {"touched": utc_now()}})
        return real(*given)

    monkeypatch.setattr(collector._files, "delete_many", meanwhile)
    assert collector.collect().blobs == ()
    assert BlobStore(database).get(old) == b"old"


def test_a_collection_that_sleeps_after_the_mark_removes_nothing(
    database: Any, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = GarbageCollector(database)
    real = collector._files.delete_many

    def late(*given: Any) -> Any:
        past = utc_now() - timedelta(seconds=module.REMOVAL_S + 1)
        database["mt.artifacts.files"].update_one({}, {"$set": {"removing": past}})
        return real(*given)

    monkeypatch.setattr(collector._files, "delete_many", late)
    assert collector.collect().blobs == ()
    assert BlobStore(database).get(old) == b"old"


def test_a_mark_that_a_dead_collection_left_is_waited_for_and_no_longer(
    database: Any, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = database["mt.artifacts.files"]
    monkeypatch.setattr(module, "REMOVAL_S", 0.3)
    monkeypatch.setattr(module, "_CLOCKS_APART_S", 0.2)
    files.update_one({}, {"$set": {"removing": utc_now(), "remover": "dead"}})

    begun = time.monotonic()
    assert BlobStore(database).touch([old]) == []
    assert 0.3 < time.monotonic() - begun < 20
    assert BlobStore(database).touch([old]) == []
    assert GarbageCollector(database).collect().blobs == ()


def test_writers_and_collections_at_once_lose_nothing(server_uri: str) -> None:
    """Over and over the same few blobs are named, forgotten and collected; a name always has its bytes."""
    import pymongo

    wrong: list[str] = []
    until = time.monotonic() + 4
    with contextlib.closing(pymongo.MongoClient[dict[str, Any]](server_uri)) as client:
        database = client.get_default_database()
        BlobStore(database).ensure_indexes()
        Components(database).ensure_indexes()

        def write(number: int) -> None:
            blobs, components = BlobStore(database), Components(database)
            while time.monotonic() < until:
                name = blobs.put(b"%d" % (number % 2))
                document = {"_id": f"{number}", "type_id": "t", "identifier": f"{number}", "digest": "d"}
                components.publish({**document, "refs": [], "blobs": [name]})
                if blobs.get(name) != b"%d" % (number % 2):
                    wrong.append(name)
                components.remove(f"{number}")
                time.sleep(0.02)

        def collect() -> None:
            while time.monotonic() < until:
                GarbageCollector(database, grace_s=0.2).collect()

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        threads += [threading.Thread(target=collect) for _ in range(2)]
        failed: list[Any] = []
        before, threading.excepthook = threading.excepthook, failed.append
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            threading.excepthook = before
    assert wrong == []
    assert [str(each.exc_value) for each in failed] == []
