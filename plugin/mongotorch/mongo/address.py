"""Parses the address of a database, without opening anything.

Guarantees: every way of writing an address gives the same `Address`, with the database in it; adding the database
does not change where the user is authenticated; `repr` hides the password.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote

from mongotorch.errors import SettingError
from mongotorch.mongo.driver_errors import redact

DEFAULT_DATABASE = "mongotorch"
Kind = Literal["mongodb", "mongomock", "embedded"]
OVERRIDDEN: Final = {
    "w": "majority",
    "wtimeoutms": "",
    "journal": "true",
    "readconcernlevel": "majority",
    "readpreference": "primary",
    "readpreferencetags": "",
    "maxstalenessseconds": "-1",
    "retrywrites": "true",
    "retryreads": "true",
    "uuidrepresentation": "standard",
    "tz_aware": "false",
    "unicode_decode_error_handler": "strict",
}
"""Options that mongotorch sets itself, in lower case, with what it sets."""
_DATABASE = re.compile(r"[^/\\. \"$*<>:|?\0]+")
_MAX_BYTES = 63  # MongoDB's limit
_SCHEMES = "mongodb://HOST/DATABASE, mongodb+srv://…, mongomock://NAME or embedded:PATH"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """A parsed address.

    Attributes:
        kind: `mongodb`, `mongomock` or `embedded`.
        uri: The address with the database in it; may contain a password.
        database: The database's name.
        path: The absolute folder of an embedded server; None for the other kinds.
        options: The lower-case names of the options in the address.
        overridden: The options that do not hold for mongotorch's own records, or for no read at all, as written.
    """

    kind: Kind
    uri: str = dataclasses.field(repr=False)
    database: str
    path: Path | None = None
    options: frozenset[str] = frozenset()
    overridden: tuple[str, ...] = ()


def parse_uri(uri: str) -> Address:
    """Parse an address; nothing is opened or resolved.

    Args:
        uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH[?db=NAME]`; without a
            database in it, the database is `mongotorch`.

    Raises:
        SettingError: It is none of these, or the name of the database is not valid.
    """
    scheme, _, rest = uri.partition(":")
    match scheme.lower():
        case "mongodb" | "mongodb+srv" if rest.startswith("//"):
            return _parse_server(scheme.lower(), rest[2:])
        case "mongomock" if rest.startswith("//"):
            name = _checked(rest[2:].rstrip("/"), uri)
            return Address(kind="mongomock", uri=f"mongomock://{name}", database=name)
        case "embedded":
            return _parse_embedded(uri, rest)
        case _:
            raise _refused(uri, f"is no address; use {_SCHEMES}")


def _parse_server(scheme: str, rest: str) -> Address:
    uri = f"{scheme}://{rest}"
    body, _, query = rest.partition("?")
    user, at, location = body.rpartition("@")
    hosts, _, name = location.partition("/")
    if not hosts:
        raise _refused(uri, "names no host")
    if "/" in user:
        raise _refused(uri, "has a / before the @; in a user name or a password write it as %2F")
    options = {key.lower(): value for key, value in parse_qsl(query, keep_blank_values=True)}
    if not name and user and "authsource" not in options:
        # Without a database the driver authenticates against `admin`; naming one must not move that.
        source = _auth_source(options.get("authmechanism", ""))
        query = "&".join(part for part in (query, source) if part)
    database = _checked(unquote(name) or DEFAULT_DATABASE, uri)
    full = f"{scheme}://{user}{at}{hosts}/{name or DEFAULT_DATABASE}" + (f"?{query}" if query else "")
    overridden = tuple(
        f"{key}={value}"
        for key, value in parse_qsl(query, keep_blank_values=True)
        if key.lower() in OVERRIDDEN and value.lower() != OVERRIDDEN[key.lower()]
    )
    return Address(kind="mongodb", uri=full, database=database, options=frozenset(options), overridden=overridden)


def _auth_source(mechanism: str) -> str:
    if not mechanism or mechanism.upper().startswith(("DEFAULT", "SCRAM")):
        return "authSource=admin"
    return "authSource=$external"


def _parse_embedded(uri: str, rest: str) -> Address:
    folder, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    name = options.pop("db", DEFAULT_DATABASE)
    if options:
        raise _refused(uri, f"has options {sorted(options)}; an embedded address takes only `db`")
    folder = folder.removeprefix("//")  # written like a URL
    if not folder:
        raise _refused(uri, "names no folder")
    path = Path(folder).expanduser().absolute()
    return Address(
        kind="embedded", uri=f"embedded:{path}?db={_checked(name, uri)}", database=name, path=path.resolve()
    )


def _checked(name: str, uri: str) -> str:
    if not _DATABASE.fullmatch(name) or len(name.encode()) > _MAX_BYTES:
        raise _refused(
            uri,
            f"names the database {name!r}; MongoDB allows up to {_MAX_BYTES} bytes without / \\ . $ or spaces",
        )
    return name


def _refused(uri: str, why: str) -> SettingError:
    return SettingError(f"uri {redact(uri)!r} {why}", setting="uri")
