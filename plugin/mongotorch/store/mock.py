"""The in-memory store: mongomock, its data shared by name within one process.

Always: two connections of one process to one name see the same data, for as long as one of them, or an opener
of theirs, is alive; then the data is gone. What needs a real server says so when it is asked for.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from typing import Any, final

import mongomock
from mongomock.store import ServerStore

from mongotorch.errors import UnsupportedError


@final
class MockStore:
    """The data behind one name; whoever holds this keeps the data alive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = uuid.uuid4().hex
        self._data: Any = ServerStore()  # type: ignore[no-untyped-call]

    def client(self) -> Any:
        """A client of its own over the shared data."""
        client: Any = mongomock.MongoClient(_store=self._data, tz_aware=False)
        client.__dict__["_mongotorch_store"] = self  # the data lives as long as any client of it
        return client

    def __reduce__(self) -> tuple[Any, ...]:
        return _found, (self.name, self.token)


# By name, since two connections of a process must meet; it holds nothing alive.
_stores: weakref.WeakValueDictionary[str, MockStore] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def store_named(name: str) -> MockStore:
    """The store of a name: the one that is alive in this process, else a new and empty one."""
    with _lock:
        store = _stores.get(name)
        if store is None:
            store = _stores[name] = MockStore(name)
        return store


def _found(name: str, token: str) -> MockStore:
    store = _stores.get(name)
    if store is None or store.token != token:
        raise UnsupportedError(
            f"mongomock://{name} lives in the memory of another process; "
            "give the URI of a real server (mongodb://… or embedded:PATH) to read from several processes",
            setting="uri",
        )
    return store
