"""MongoDB's own order of `_id`s, in Python, for what the server cannot be asked.

Always: `sort_key` orders any two `_id`s as a sort of MongoDB does, across types as well (the order is that of
the manual, "Comparison/Sort Order"); `same_type` says whether `$gte` and `$lt` reach from one to the other.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from bson import Binary, Code, Decimal128, MaxKey, MinKey, ObjectId, Regex, Timestamp

# The server's canonical types: what compares by value has one number.
MIN_KEY, NULL, NUMBER, STRING, OBJECT, ARRAY, BINARY, OBJECT_ID = -1, 5, 10, 15, 20, 25, 30, 35
BOOL, DATE, TIMESTAMP, REGEX, CODE, MAX_KEY = 40, 45, 47, 50, 60, 127

_TYPES: tuple[tuple[Any, int], ...] = (
    (type(None), NULL),
    (bool, BOOL),  # before int, which it is
    ((int, float, Decimal128), NUMBER),
    (Code, CODE),  # before str, which it is
    (str, STRING),
    ((bytes, uuid.UUID), BINARY),
    (ObjectId, OBJECT_ID),
    (datetime, DATE),
    (Timestamp, TIMESTAMP),
    (Regex, REGEX),
    (Mapping, OBJECT),
    ((list, tuple), ARRAY),
    (MinKey, MIN_KEY),
    (MaxKey, MAX_KEY),
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def canonical_type(value: Any) -> int:
    """The server's number for the type of a value.

    Raises:
        TypeError: No type that BSON has.
    """
    for types, number in _TYPES:
        if isinstance(value, types):
            return number
    raise TypeError(f"{type(value).__name__} has no place in MongoDB's order")


def same_type(first: Any, second: Any) -> bool:
    """Whether `{"$gte": first, "$lte": second}` reaches every value that sorts between the two."""
    kind = canonical_type(first)
    nan = kind == NUMBER and math.isnan(_number(first))
    return kind == canonical_type(second) and not nan


def milliseconds(value: datetime) -> int:
    """Milliseconds since 1970 as BSON stores them; a naive datetime is UTC."""
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    since = aware - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def sort_key(value: Any) -> tuple[Any, ...]:
    """A tuple that sorts as MongoDB sorts the value.

    Raises:
        TypeError: No type that BSON has.
    """
    kind = canonical_type(value)
    if kind == NUMBER:
        exact = value.to_decimal() if isinstance(value, Decimal128) else value
        return (kind, 0, 0) if math.isnan(exact) else (kind, 1, exact)
    if kind == STRING:
        return kind, value.encode()
    if kind == BINARY:
        data, subtype = _binary(value)
        return kind, len(data), subtype, data
    if kind == OBJECT:
        return kind, tuple((canonical_type(v), k.encode(), sort_key(v)) for k, v in value.items())
    if kind == ARRAY:
        return kind, tuple(sort_key(item) for item in value)
    if kind == DATE:
        return kind, milliseconds(value)
    if kind == TIMESTAMP:
        return kind, value.time, value.inc
    if kind == OBJECT_ID:
        return kind, value.binary
    if kind == BOOL:
        return kind, value
    return kind, str(value) if kind in (REGEX, CODE) else 0


def _number(value: Any) -> float:
    return float(value.to_decimal()) if isinstance(value, Decimal128) else float(value)


def _binary(value: Any) -> tuple[bytes, int]:
    if isinstance(value, uuid.UUID):
        return value.bytes, 4
    return bytes(value), value.subtype if isinstance(value, Binary) else 0
