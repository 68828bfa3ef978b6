"""From an address to an open database, here or in another process.

Always: a connection owns its client and closes it; the address, never the client, is what crosses a process;
no password is in a `repr` or an error. `mongomock://NAME` is one in-memory store a process and name, for as long
as a connection to it is open.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from types import TracebackType
from typing import Any, Self, final

import mongomock
import mongomock.store
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from pymongo import MongoClient
from pymongo.errors import ConfigurationError, InvalidURI
from pymongo.uri_parser import parse_uri

from mongotorch.errors import SettingError
from mongotorch.settings import Settings

DEFAULT_DATABASE = "mongotorch"
_PASSWORD = re.compile(r"(?<=://)([^:/@]*):[^@]*@")
# An in-memory store has no address outside the process, so this table is its address; it holds nothing alive.
_IN_MEMORY: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def redact(uri: str) -> str:
    """The URI without its password."""
    return _PASSWORD.sub(r"\1:***@", uri)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the database of an address, with a client of its own; it can be sent to another process."""

    uri: str = dataclasses.field(repr=False)
    settings: Settings = dataclasses.field(repr=False)

    def __call__(self) -> Any:
        """The driver's database; who calls it closes its client. Raises: SettingError."""
        return _open(self.uri, self.settings)


@final
class Connection:
    """An open database; a context manager that closes its client.

    Args:
        uri: `mongodb://`, `mongodb+srv://` or `mongomock://NAME`; without a database in it, `mongotorch`.
        settings: Timeouts.

    Raises:
        SettingError: The URI cannot be used.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self.kind = "mongomock" if uri.startswith("mongomock://") else "mongodb"
        self._settings = settings
        self._uri = uri
        self.database: Any = _open(uri, settings)
        self.client: Any = self.database.client

    def __repr__(self) -> str:
        return f"Connection({redact(self._uri)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def opener(self) -> Opener:
        """What opens the same database elsewhere."""
        return Opener(uri=self._uri, settings=self._settings)

    def close(self) -> None:
        """Close the client."""
        self.client.close()


def open_address(uri: str, settings: Settings) -> Connection:
    """Open an address. Raises: SettingError when it cannot be used."""
    return Connection(uri, settings)


def _open(uri: str, settings: Settings) -> Any:
    if uri.startswith("mongomock://"):
        name = uri.removeprefix("mongomock://") or DEFAULT_DATABASE
        store = _IN_MEMORY.get(name)
        if store is None:
            make_store: Any = mongomock.store.ServerStore
            store = _IN_MEMORY[name] = make_store()
        return mongomock.MongoClient(_store=store)[name]
    try:
        database = parse_uri(uri, validate=False)["database"] or DEFAULT_DATABASE
        client: MongoClient[dict[str, Any]] = MongoClient(
            uri, appname="mongotorch", serverSelectionTimeoutMS=int(settings.server_timeout_s * 1000)
        )
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise SettingError(f"the URI {redact(uri)!r} cannot be used: {error}", setting="uri") from error
    options: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
    return client.get_database(database, codec_options=options)
