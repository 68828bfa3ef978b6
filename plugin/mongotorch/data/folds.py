"""Which fold a document belongs to, decided by a hash of its `_id` and nothing else.

Always: the same `_id` is in the same fold on every client and on the server; a document of `train` at one
fraction never moves to `train` from `valid` when the fraction shrinks or grows around it: `valid` only
gains or loses members. The hash is the one behind MongoDB's hashed indexes: the first 8 bytes,
little-endian and signed, of the MD5 over (seed 0, canonical type, value bytes), which the server computes
as `$toHashedIndexKey`.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo.errors import OperationFailure

from mongotorch.data import bsonorder
from mongotorch.errors import ParameterError
from mongotorch.query import FOLD_FIELD, FOLDS, Fold

_PARTS = 1_000_000  # folds are decided in millionths, in whole numbers, because those are exact everywhere
_BATCH = 10_000
_UNASSIGNED = {FOLD_FIELD: {"$nin": list(FOLDS)}}
# What the server hashes by value; documents are hashed in another form there, so they are hashed here.
_ON_SERVER = ["int", "long", "double", "string", "bool", "date", "binData", "objectId", "null"]

# The driver's options as they are, so that raw value bytes are cut from the same encoding.
_OPTIONS: CodecOptions[Any] = CodecOptions(
    uuid_representation=bson.binary.UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)


def fold_of(document_id: Any, valid_fraction: float) -> Fold:
    """The fold of a document.

    Args:
        document_id: Its `_id`, of any type BSON has.
        valid_fraction: Share that goes to `valid`, 0 to 1, in steps of one millionth.

    Raises:
        ParameterError: A fraction outside of 0 to 1.
    """
    return "valid" if id_hash(document_id) % _PARTS < _threshold(valid_fraction) else "train"


def id_hash(document_id: Any) -> int:
    """The hash of an `_id`, a signed 64-bit integer; that of `$toHashedIndexKey` for scalar `_id`s."""
    kind = bsonorder.canonical_type(document_id)
    value = _value_bytes(document_id, kind)
    digest = hashlib.md5(struct.pack("<ii", 0, kind) + value, usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def assign_folds(collection: Any, valid_fraction: float = 0.05) -> int:
    """Give a fold to every document that has none (or something else under `_fold`).

    On a server it is one update computed there; `_id`s that are documents, and mongomock, are updated from
    here in batches of 10,000.

    Args:
        collection: A pymongo (or mongomock) collection.
        valid_fraction: Share that goes to `valid`, 0 to 1, in steps of one millionth.

    Returns:
        How many documents were given a fold.

    Raises:
        ParameterError: A fraction outside of 0 to 1.
    """
    threshold = _threshold(valid_fraction)
    done = 0
    if not type(collection).__module__.startswith("mongomock"):
        done = _assign_on_server(collection, threshold)
    unassigned = (found["_id"] for found in collection.find(_UNASSIGNED, {"_id": 1}))
    for batch in _batches(unassigned):
        for fold in FOLDS:
            ids = [document_id for document_id in batch if fold_of(document_id, valid_fraction) == fold]
            if ids:
                done += int(
                    collection.update_many(
                        {"_id": {"$in": ids}, **_UNASSIGNED}, {"$set": {FOLD_FIELD: fold}}
                    ).modified_count
                )
    return done


def _assign_on_server(collection: Any, threshold: int) -> int:
    # `$mod` keeps the sign of its first argument; adding the modulus makes it Python's `%`.
    part = {"$mod": [{"$add": [{"$mod": [{"$toHashedIndexKey": "$_id"}, _PARTS]}, _PARTS]}, _PARTS]}
    update = [{"$set": {FOLD_FIELD: {"$cond": [{"$lt": [part, threshold]}, "valid", "train"]}}}]
    where = {**_UNASSIGNED, "_id": {"$type": _ON_SERVER}}
    try:
        return int(collection.update_many(where, update).modified_count)
    except OperationFailure as error:
        if error.code not in (31325, 168, 40324):  # an older server without `$toHashedIndexKey`
            raise
        return 0


def _batches(ids: Iterable[Any]) -> Iterator[list[Any]]:
    # The cursor is read to its end first: it would meet its own updates otherwise.
    source = iter(list(ids))
    while batch := list(islice(source, _BATCH)):
        yield batch


def _threshold(valid_fraction: float) -> int:
    if isinstance(valid_fraction, bool) or not 0 <= valid_fraction <= 1:
        raise ParameterError(f"valid_fraction={valid_fraction!r}: it must be from 0 to 1", field="valid_fraction")
    return round(valid_fraction * _PARTS)


def _value_bytes(document_id: Any, kind: int) -> bytes:
    if kind == bsonorder.NUMBER:
        return struct.pack("<q", _whole(document_id))
    encoded = bson.encode({"": document_id}, codec_options=_OPTIONS)
    return encoded[6:-1]  # after length, type and the empty name; before the end


def _whole(value: Any) -> int:
    number = value.to_decimal() if isinstance(value, bson.Decimal128) else value
    if math.isnan(number):
        return 0
    low, high = -(2**63), 2**63 - 1
    return low if number <= low else high if number >= high else int(number)
