"""From an address to an open database, here or in another process.

Always: a connection owns its client, and its hold on an embedded server, and lets go of both; the address, never
the client, is what crosses a process; no password is in a `repr` or an error.

The in-memory store: mongomock, its data shared by name within one process.

Always: two connections of one process to one name see the same data, for as long as one of them, or an opener
of theirs, is alive; then the data is gone. What needs a real server says so when it is asked for.
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
import weakref
from typing import Any, final

import mongomock
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from mongomock.store import ServerStore
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri as validate_uri

from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.mongo.address import Address, parse_uri
from mongotorch.mongo.embedded_server import EmbeddedServer
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.redact import redact
from mongotorch.resources import Owner
from mongotorch.settings import Settings


@final
class MockServer:
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
_stores: weakref.WeakValueDictionary[str, MockServer] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def store_named(name: str) -> MockServer:
    """The store of a name: the one that is alive in this process, else a new and empty one."""
    with _lock:
        store = _stores.get(name)
        if store is None:
            store = _stores[name] = MockServer(name)
        return store


def _found(name: str, token: str) -> MockServer:
    store = _stores.get(name)
    if store is None or store.token != token:
        raise UnsupportedError(
            f"mongomock://{name} lives in the memory of another process; "
            "give the URI of a real server (mongodb://… or embedded:PATH) to read from several processes",
            setting="uri",
        )
    return store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the database of a connection with a client of its own; it can be sent to another process.

    An embedded server is reached at the port where it runs: the connection that made this keeps it running.
    """

    uri: str = dataclasses.field(repr=False)
    database: str
    timeout_s: float
    options: frozenset[str] = frozenset()
    memory: MockServer | None = dataclasses.field(default=None, repr=False)

    def __call__(self) -> Any:
        """The driver's database; who calls it closes its client. Raises: SettingError."""
        if self.memory is not None:
            return self.memory.client()[self.database]
        timeout: dict[str, Any] = {"serverSelectionTimeoutMS": int(self.timeout_s * 1000)}
        if "serverselectiontimeoutms" in self.options:
            timeout = {}  # the address says it itself
        try:
            if self.uri.startswith("mongodb://"):
                # The client only warns of an option that it does not know, and goes on without it.
                validate_uri(self.uri, warn=False)
            client: MongoClient[dict[str, Any]] = MongoClient(self.uri, appname="mongotorch", **timeout)
        except (PyMongoError, ValueError) as error:
            said = redact(str(error))
            raise SettingError(f"the URI {redact(self.uri)!r} cannot be used: {said}", setting="uri") from error
        codec: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
        return client.get_database(self.database, codec_options=codec)


@final
class Connection(Owner):
    """An open database; a context manager that closes it.

    Attributes:
        kind: What stands behind it: `mongodb`, `mongomock` or `embedded`.
        uri: The address with the database in it; it may hold a password.
        database: The driver's database.
        client: The driver's client.
        closed: Whether it was closed.
    """

    def __init__(self, address: Address, opener: Opener, server: EmbeddedServer | None) -> None:
        self.kind = address.kind
        self.closed = False
        self.uri = address.uri
        self._opener = opener
        self._server = server
        self.database: Any = opener()
        self.client: Any = self.database.client

    def __repr__(self) -> str:
        return f"Connection({redact(self.uri)!r})"

    def opener(self) -> Opener:
        """What opens the same database elsewhere, for as long as this connection is open."""
        return self._opener

    def ping(self) -> None:
        """Ask the server once. Raises: ServerUnavailableError, SettingError when it refuses the user."""
        if self.kind == "mongomock":
            return
        with driver_errors("connecting", at=redact(self.uri)):
            self.client.admin.command("ping")

    def close(self) -> None:
        """Close the client, and let go of the embedded server. Again: nothing."""
        self.closed = True  # first, so that who is interrupted by it knows why
        self.client.close()
        if self._server is not None:
            self._server.close()


def open_address(uri: str, settings: Settings) -> Connection:
    """Open an address.

    Args:
        uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH[?db=NAME]`.
        settings: `server_timeout_s`.

    Raises:
        SettingError: The URI cannot be used.
        EmbeddedServerError: The embedded server is missing here, or does not start.
        ServerUnavailableError: Nothing answers there.
    """
    address = parse_uri(uri)
    server = EmbeddedServer.open(address.path) if address.path is not None else None
    opener = Opener(
        uri=server.uri(address.database) if server is not None else address.uri,
        database=address.database,
        timeout_s=settings.server_timeout_s,
        options=address.options,
        memory=store_named(address.database) if address.kind == "mongomock" else None,
    )
    try:
        connection = Connection(address, opener, server)
    except BaseException:
        if server is not None:
            server.close()
        raise
    try:
        connection.ping()
    except BaseException:
        connection.close()
        raise
    return connection
