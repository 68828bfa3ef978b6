"""Hashes and orders `_id`s: a 64-bit key for each, and MongoDB's own sort order in Python.

Shuffling and sharding use the keys: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), folded over the little-endian 8-byte words of a value. The order is that of the MongoDB manual,
"Comparison/Sort Order", across types as well.

Guarantees: keys are the same on every machine and in every release; `_id`s that are equal in MongoDB (int32 5,
int64 5, double 5.0, decimal 5) have equal keys, whatever way they were decoded.
"""

from __future__ import annotations

import math
import struct
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import bson
import numpy as np
from bson import Binary, Code, DBRef, Decimal128, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from numpy.typing import NDArray

from mongotorch.data.decode.columns import Column

U64 = NDArray[np.uint64]
_MASK = 2**64 - 1
# The type of a value in its key, as BSON has it; part of every key, so these never change.
_DOUBLE, _STRING, _DOCUMENT, _BINARY, _OBJECT_ID, _BOOL, _DATE = 0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x09
_INTEGER, _DECIMAL, _OTHER = 0x12, 0x13, 0x7F


def mix(values: U64) -> U64:
    """The output function of splitmix64 at each value; shape and dtype (uint64) are kept."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def salt(*parts: int) -> np.uint64:
    """One number that depends on several integers, of any size and sign, and on their order."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state ^ np.array([part & _MASK], dtype=np.uint64))
    return np.uint64(state[0])


def pack_ids(ids: Column) -> bytes:
    """Documents that hold an `_id` and nothing else, as concatenated BSON; numbers that are equal stay equal."""
    width, tag = {
        "oid": (12, _OBJECT_ID),
        "int64": (8, _INTEGER),
        "float64": (8, _DOUBLE),
    }.get("oid" if ids.kind == "oid" else ids.dtype if ids.kind == "number" else "", (0, 0))
    if not width or not isinstance(ids.data, np.ndarray):
        return b"".join(encode({"_id": document_id}) for document_id in ids.values())
    frame = struct.pack("<iB", width + 10, tag) + b"_id\0" + bytes(width + 1)
    rows = np.tile(np.frombuffer(frame, np.uint8), (len(ids), 1))
    rows[:, 9 : 9 + width] = np.ascontiguousarray(ids.data).view(np.uint8).reshape(len(ids), width)
    return rows.tobytes()


def among(keys: U64, ascending: U64) -> NDArray[np.bool_]:
    """Which of the keys are among others that ascend; (n,) bool."""
    if not len(ascending):
        return np.zeros(len(keys), np.bool_)
    found: NDArray[np.bool_] = ascending[np.searchsorted(ascending[:-1], keys)] == keys
    return found


def id_keys(ids: Column) -> U64:
    """A stable 64-bit key for each `_id`, equal for ids that are equal in MongoDB; (n,) uint64."""
    data = ids.data
    if isinstance(data, list) or ids.kind == "array" or data.ndim > 2 or (ids.kind == "number" and data.ndim > 1):
        return _keys_of_values(ids.values())
    if ids.kind == "oid":
        return _fold(_OBJECT_ID, data)
    if ids.kind == "date":
        return _fold(_DATE, _octets(data.astype("<i8")))
    if data.dtype == np.bool_:
        return _fold(_BOOL, _octets(data))
    return _fold(_INTEGER, _octets(data.astype("<i8"))) if data.dtype.kind == "i" else _doubles(data)


def _fold(tag: int, rows: NDArray[np.uint8]) -> U64:
    """One key for each row of an (n, size) array of bytes; the size counts too."""
    count, size = rows.shape
    padded = np.zeros((count, -(-size // 8) * 8), np.uint8)
    padded[:, :size] = rows
    keys = np.full(count, (tag << 32) + size, np.uint64)
    for word in padded.view("<u8").T:
        keys = mix(keys ^ word.astype(np.uint64))
    return mix(keys)


def _octets(data: NDArray[Any]) -> NDArray[np.uint8]:
    width = data.itemsize * math.prod(data.shape[1:])  # not left to numpy, which knows none for no rows
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(data), width)


def _doubles(data: NDArray[np.float64]) -> U64:
    whole = (data == np.floor(data)) & (data >= -(2.0**63)) & (data < 2.0**63)
    cleaned = np.where(np.isnan(data), np.nan, data)
    keys = _fold(_DOUBLE, _octets(cleaned.astype("<f8")))
    integers = np.where(whole, data, 0.0).astype("<i8")
    return np.where(whole, _fold(_INTEGER, _octets(integers)), keys)


def _keys_of_values(values: list[Any]) -> U64:
    keys = np.empty(len(values), np.uint64)
    groups: dict[tuple[int, int], tuple[list[int], list[bytes]]] = {}
    for row, value in enumerate(values):
        tag, content = _canonical(value)
        rows, contents = groups.setdefault((tag, len(content)), ([], []))
        rows.append(row)
        contents.append(content)
    for (tag, size), (rows, contents) in groups.items():
        octets = np.frombuffer(b"".join(contents), np.uint8).reshape(len(rows), size)
        keys[np.array(rows)] = _fold(tag, octets)
    return keys


def _canonical(value: Any) -> tuple[int, bytes]:
    """The type tag and the bytes of a value, the same for values that are equal in MongoDB."""
    if isinstance(value, str) and type(value) is str:
        return _STRING, value.encode()
    if isinstance(value, uuid.UUID):
        value = Binary.from_uuid(value)
    if isinstance(value, ObjectId):
        return _OBJECT_ID, value.binary
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int | float | Decimal128):
        return _number_bytes(value)
    if isinstance(value, bytes):
        return _BINARY, bytes([value.subtype if isinstance(value, Binary) else 0]) + value
    if isinstance(value, datetime):
        return _DATE, struct.pack("<q", milliseconds(value))
    tag = _DOCUMENT if isinstance(value, dict) else _OTHER
    return tag, encode({"": _plain(value)})


def _number_bytes(value: Any) -> tuple[int, bytes]:
    exact = value.to_decimal() if isinstance(value, Decimal128) else value
    if isinstance(exact, Decimal) and exact.is_nan():
        exact = math.nan
    if isinstance(exact, float) and math.isnan(exact):
        return _DOUBLE, struct.pack("<d", np.nan)
    if math.isfinite(exact) and -(2**63) <= exact < 2**63 and exact == int(exact):
        return _INTEGER, struct.pack("<q", int(exact))
    if isinstance(exact, float) or float(exact) == exact:
        return _DOUBLE, struct.pack("<d", float(exact))
    return _DECIMAL, str(exact.normalize()).encode()


def _plain(value: Any) -> Any:
    """Equal numbers inside sub-documents in one BSON form."""
    if isinstance(value, DBRef):
        value = value.as_doc()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal128):
        return value
    tag, content = _number_bytes(value)
    if tag == _INTEGER:
        return struct.unpack("<q", content)[0]
    return struct.unpack("<d", content)[0] if tag == _DOUBLE else Decimal128(content.decode())


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
    raise TypeError(f"{type(value).__name__} is not in MongoDB's sort order")


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


_STANDARD: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)


def encode(document: Mapping[str, Any]) -> bytes:
    """A document as BSON, with UUIDs as the server and the driver's standard have them."""
    return bson.encode(document, codec_options=_STANDARD)
