"""Makes values safe to show and to store: without passwords (`redact`), and as plain BSON (`plain`).

Guarantees: no password of an address and no token of its options is in what comes out; in doubt more is hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bson import ObjectId

# Of any scheme: a mistyped address contains its password too.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)([^\s:@/]*):[^\s]*@", re.IGNORECASE)
_SECRET_OPTIONS = re.compile(
    r"((?:tlsCertificateKeyFilePassword|proxyPassword|authMechanismProperties)=)[^&\s'\"]*", re.IGNORECASE
)
_INT64 = range(-(2**63), 2**63)
_MAX_TEXT = 100_000  # characters
_MAX_DEPTH = 50


def redact(text: str) -> str:
    """Replace the passwords in an address, or in a text that contains addresses, with `***`.

    Args:
        text: `mongodb://user:password@host/db`, or any text.

    Returns:
        The text with `***` for each password, and for each option that holds a secret.
    """
    return _SECRET_OPTIONS.sub(r"\1***", _USERINFO.sub(r"\1\2:***@", text))


def plain(value: Any, _depth: int = 0) -> Any:
    """The value in plain BSON, for people to read; any value can be converted.

    Args:
        value: Any object. Integers beyond 64 bits, objects that BSON does not have, and containers below the 50th
            level become their `repr`.

    Returns:
        The converted value, its texts redacted and cut at 100,000 characters.
    """
    if value is None or type(value) in (bool, float, bytes, datetime, ObjectId):
        return value
    if type(value) is int and value in _INT64:
        return value
    if isinstance(value, str):
        return redact(value.encode(errors="replace").decode())[:_MAX_TEXT]
    if _depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {plain_key(key): plain(part, _depth + 1) for key, part in value.items()}
    if _depth < _MAX_DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part, _depth + 1) for part in value]
    return plain(repr(value), _depth)


def plain_key(key: Any) -> str:
    """A field name that every server and mongomock accept: `.` and `$` become `_`."""
    return str(key).encode(errors="replace").decode().replace("\0", "?").replace(".", "_").replace("$", "_")
