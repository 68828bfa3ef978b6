"""Opens the database of an address: a server, an embedded server, or mongomock in the memory of this process.

`open_address` gives a `Connection`; its `opener` opens the same database again, in this or another process.

Guarantees: a connection closes its client and releases its embedded server; no password is in a `repr` or an
error; connections of one process to one mongomock name share their data, which lives as long as one of their
clients.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import uuid
import weakref
from typing import Any, Final, final

import mongomock
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from mongomock.store import ServerStore
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri as validate_uri

from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.mongo.address import Address, parse_uri
from mongotorch.mongo.driver_errors import driver_errors, redact
from mongotorch.mongo.embedded_server import EmbeddedServer
from mongotorch.resources import Owner
from mongotorch.settings import Settings

OLDEST_SERVER: Final = "5.0"
OLDEST_WIRE_VERSION: Final = 13  # of that release
_log = logging.getLogger("mongotorch.connection")


@final
class MockServer:
    """The in-memory data of one mongomock name; the data lives as long as this object."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = uuid.uuid4().hex
        self._data: Any = ServerStore()  # type: ignore[no-untyped-call]

    def client(self) -> Any:
        """A new client over the shared data."""
        client: Any = mongomock.MongoClient(_store=self._data, tz_aware=False)
        client.__dict__["_mongotorch_server"] = self  # keeps the data alive
        return client

    def __reduce__(self) -> tuple[Any, ...]:
        return _existing_mock, (self.name, self.token)


_mock_servers: weakref.WeakValueDictionary[str, MockServer] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def mock_server(name: str) -> MockServer:
    """The data of a mongomock name: what is alive in this process, else new and empty."""
    with _lock:
        server = _mock_servers.get(name)
        if server is None:
            server = _mock_servers[name] = MockServer(name)
        return server


def _existing_mock(name: str, token: str) -> MockServer:
    server = _mock_servers.get(name)
    if server is None or server.token != token:
        raise UnsupportedError(
            f"mongomock://{name} lives in the memory of another process; "
            "give the URI of a real server (mongodb://… or embedded:PATH) to read from several processes",
            setting="uri",
        )
    return server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the database of a connection with a new client; it can be pickled and sent to another process.

    It does not keep an embedded server running: the connection that made it does.

    Attributes:
        uri: The server's address; may contain a password.
        database: The database's name.
        timeout_s: Seconds to look for a server, unless the address says it itself.
        options: The lower-case names of the options in the address.
        memory: The data of mongomock; None for a server.
    """

    uri: str = dataclasses.field(repr=False)
    database: str
    timeout_s: float
    options: frozenset[str] = frozenset()
    memory: MockServer | None = dataclasses.field(default=None, repr=False)

    def __call__(self) -> Any:
        """The driver's database; the caller closes its client.

        Raises:
            SettingError: The address cannot be used.
        """
        if self.memory is not None:
            return self.memory.client()[self.database]
        timeout: dict[str, Any] = {"serverSelectionTimeoutMS": int(self.timeout_s * 1000)}
        if "serverselectiontimeoutms" in self.options:
            timeout = {}
        try:
            if self.uri.startswith("mongodb://"):
                # The client only warns about an option that it does not know, and ignores it.
                validate_uri(self.uri, warn=False)
            # Retries override the address: a lost answer must not become a lost or a double write.
            client: MongoClient[dict[str, Any]] = MongoClient(
                self.uri, appname="mongotorch", retryWrites=True, retryReads=True, **timeout
            )
        except (PyMongoError, ValueError) as error:
            why = redact(str(error))
            raise SettingError(f"the URI {redact(self.uri)!r} cannot be used: {why}", setting="uri") from error
        if not client.write_concern.acknowledged:
            client.close()
            raise SettingError(
                f"the URI {redact(self.uri)!r} says w=0: no write would be known to have happened; leave `w` out, "
                "or say w=1 or w=majority",
                setting="uri",
            )
        if client.options.pool_options.max_pool_size == 1:
            client.close()
            raise SettingError(
                f"the URI {redact(self.uri)!r} says maxPoolSize=1: waiting for changes takes one connection all "
                "the time, and others are needed beside it; leave it out, or say maxPoolSize=10",
                setting="uri",
            )
        codec: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
        return client.get_database(self.database, codec_options=codec)


@final
class Connection(Owner):
    """An open database; a context manager that closes it.

    Attributes:
        kind: `mongodb`, `mongomock` or `embedded`.
        uri: The address with the database in it; may contain a password.
        opener: Opens the same database again, in any process, as long as this connection is open.
        database: The driver's database.
        client: The driver's client.
        closed: Whether it was closed.
    """

    def __init__(self, address: Address, opener: Opener, server: EmbeddedServer | None) -> None:
        self.kind = address.kind
        self.closed = False
        self.uri = address.uri
        self.opener = opener
        self._server = server
        self.database: Any = opener()
        self.client: Any = self.database.client

    def __repr__(self) -> str:
        return f"Connection({redact(self.uri)!r})"

    def ping(self) -> None:
        """Ask the server whether it is there; nothing on mongomock.

        Raises:
            ServerUnavailableError: Nothing answers.
            SettingError: The server refuses the user, or is too old.
        """
        if self.kind == "mongomock":
            return
        with driver_errors("connecting", at=redact(self.uri)):
            hello = self.client.admin.command("hello")
        if hello["maxWireVersion"] < OLDEST_WIRE_VERSION:
            raise SettingError(
                f"{redact(self.uri)} is older than MongoDB {OLDEST_SERVER}, which has no snapshot reads; use a "
                "newer one",
                setting="uri",
            )

    def close(self) -> None:
        """Close the client and release the embedded server; does nothing the second time."""
        self.closed = True  # first, so that threads that the closing interrupts can tell why
        self.client.close()
        if self._server is not None:
            self._server.close()


def open_address(uri: str, settings: Settings) -> Connection:
    """Open an address.

    Args:
        uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH[?db=NAME]`.
        settings: `server_timeout_s`, and `mongod` for an embedded server.

    Raises:
        SettingError: The URI cannot be used, or the server refuses the user.
        EmbeddedServerError: The embedded server is not installed, or does not start.
        ServerUnavailableError: Nothing answers at the address.
    """
    address = parse_uri(uri)
    if address.overridden:
        _log.info(
            "of the URI, %s hold for your own collections at most: its records are written with w=majority and "
            "read from the primary, writes and reads are retried, and UUIDs and times are decoded in one way",
            ", ".join(address.overridden),
        )
    server = EmbeddedServer.open(address.path, mongod=settings.mongod) if address.path is not None else None
    opener = Opener(
        uri=server.uri(address.database) if server is not None else address.uri,
        database=address.database,
        timeout_s=settings.server_timeout_s,
        options=address.options,
        memory=mock_server(address.database) if address.kind == "mongomock" else None,
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
