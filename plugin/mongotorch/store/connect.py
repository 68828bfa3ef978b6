"""From an address to an open database, here or in another process.

Always: a connection owns its client, and its hold on an embedded server, and lets go of both; the address, never
the client, is what crosses a process; no password is in a `repr` or an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri as validate_uri

from mongotorch.errors import SettingError
from mongotorch.owner import Owner
from mongotorch.settings import Settings
from mongotorch.store.address import Address, parse_uri
from mongotorch.store.embedded import EmbeddedServer
from mongotorch.store.failures import driver_errors
from mongotorch.store.mock import MockStore, store_named
from mongotorch.store.redaction import redact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the database of a connection with a client of its own; it can be sent to another process.

    An embedded server is reached at the port where it runs: the connection that made this keeps it running.
    """

    uri: str = dataclasses.field(repr=False)
    database: str
    timeout_s: float
    options: frozenset[str] = frozenset()
    memory: MockStore | None = dataclasses.field(default=None, repr=False)

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
