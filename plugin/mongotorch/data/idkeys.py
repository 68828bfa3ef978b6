"""A 64-bit key for each `_id`: what shuffling and sharding hash, stable across runs, machines and versions.

Always: equal `_id`s have equal keys, whatever way they were decoded, and numbers that MongoDB treats as equal
(int32 5, int64 5, double 5.0, decimal 5) too. The mix is the finalizer of splitmix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014), folded over little-endian 8-byte words.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import bson
import numpy as np
from bson import DBRef, Decimal128, ObjectId
from bson.binary import Binary
from numpy.typing import NDArray

from mongotorch.data.column import Column

Keys = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_DOUBLE, _STRING, _DOCUMENT, _BINARY, _OBJECT_ID, _BOOL, _DATE = 0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x09
_INTEGER, _DECIMAL, _OTHER = 0x12, 0x13, 0x7F
_EPOCH = datetime(1970, 1, 1)  # BSON dates decode to naive UTC


def id_keys(ids: Column) -> Keys:
    """The keys of a column of `_id`s, (n,) uint64."""
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


def _fold(tag: int, rows: NDArray[np.uint8]) -> Keys:
    """One key for each row of an (n, size) array of bytes; the size counts too."""
    count, size = rows.shape
    padded = np.zeros((count, -(-size // 8) * 8), np.uint8)
    padded[:, :size] = rows
    keys = np.full(count, (tag << 32) + size, np.uint64)
    for word in padded.view("<u8").T:
        keys = _mix(keys ^ word.astype(np.uint64))
    return _mix(keys)


def _mix(words: Keys) -> Keys:
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _octets(data: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)


def _doubles(data: NDArray[np.float64]) -> Keys:
    whole = (data == np.floor(data)) & (data >= -(2.0**63)) & (data < 2.0**63)
    cleaned = np.where(np.isnan(data), np.nan, data)
    keys = _fold(_DOUBLE, _octets(cleaned.astype("<f8")))
    integers = np.where(whole, data, 0.0).astype("<i8")
    return np.where(whole, _fold(_INTEGER, _octets(integers)), keys)


def _keys_of_values(values: list[Any]) -> Keys:
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
    """The type tag and the bytes of a value, one and the same for values that are equal in MongoDB."""
    if isinstance(value, str) and type(value) is str:
        return _STRING, value.encode()
    if isinstance(value, ObjectId):
        return _OBJECT_ID, value.binary
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int | float | Decimal128):
        return _number(value)
    if isinstance(value, bytes):
        return _BINARY, bytes([value.subtype if isinstance(value, Binary) else 0]) + value
    if isinstance(value, datetime):
        return _DATE, struct.pack("<q", (value - _EPOCH) // timedelta(milliseconds=1))
    tag = _DOCUMENT if isinstance(value, dict) else _OTHER
    return tag, bson.encode({"": _plain(value)})


def _number(value: Any) -> tuple[int, bytes]:
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
    tag, content = _number(value)
    if tag == _INTEGER:
        return struct.unpack("<q", content)[0]
    return struct.unpack("<d", content)[0] if tag == _DOUBLE else Decimal128(content.decode())
