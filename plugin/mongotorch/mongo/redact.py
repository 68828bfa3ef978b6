"""No password in what people read: one place that takes it out of addresses and texts.

Always: what comes out has neither a password nor a token of the address; rather too much is hidden than too
little.

Values for people to read in a document: what BSON has stays, anything else is told by its `repr`.

Always: what comes out can be stored and is no larger than what went in by more than its text; no password of
an address is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bson import ObjectId

# Any scheme: a mistyped one comes with the password too.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)([^\s:@/]*):[^\s]*@", re.IGNORECASE)
_SECRET_OPTIONS = re.compile(
    r"((?:tlsCertificateKeyFilePassword|proxyPassword|authMechanismProperties)=)[^&\s'\"]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """An address, or a text with addresses in it, without passwords.

    Args:
        text: `mongodb://user:password@host/db`, or any text.

    Returns:
        The same with `***` for the password, and for the options that hold secrets.
    """
    return _SECRET_OPTIONS.sub(r"\1***", _USERINFO.sub(r"\1\2:***@", text))


_INT64 = range(-(2**63), 2**63)
_LONGEST = 100_000
_DEEPEST = 50


def plain(value: Any, _depth: int = 0) -> Any:
    """The value as BSON can hold it: integers beyond 64 bits and foreign objects become text."""
    if value is None or type(value) in (bool, float, bytes, datetime, ObjectId):
        return value
    if type(value) is int and value in _INT64:
        return value
    if isinstance(value, str):
        return redact(value.encode(errors="replace").decode())[:_LONGEST]
    if _depth < _DEEPEST and isinstance(value, Mapping):
        return {plain_key(key): plain(part, _depth + 1) for key, part in value.items()}
    if _depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part, _depth + 1) for part in value]
    return plain(repr(value), _depth)


def plain_key(key: Any) -> str:
    """A field name that every store takes."""
    return str(key).encode(errors="replace").decode().replace("\0", "?").replace(".", "_").replace("$", "_")
