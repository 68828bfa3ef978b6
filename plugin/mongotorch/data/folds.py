"""Says which fold a document belongs to, by a hash of its `_id`, and checks that a select can be trained on.

The hash is the one behind MongoDB's hashed indexes: the first 8 bytes, little-endian and signed, of the MD5 over
(seed 0, canonical type, value bytes), which the server computes as `$toHashedIndexKey`.

Guarantees: the same `_id` is in the same fold on every client and on the server; where the fraction grows or
shrinks, documents only move from `train` to `valid`, or only back; a check of a select reads at most a document
each.
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
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.data.decode import ids
from mongotorch.errors import (
    EmptyFoldError,
    EmptySelectError,
    FoldMissingError,
    ParameterError,
    QueryError,
    ServerUnavailableError,
)
from mongotorch.mongo.error_translation import NO_SUCH_OPERATOR, has_code, is_transient
from mongotorch.mongo.server_features import is_mock
from mongotorch.query import FOLD_FIELD, FOLDS, Fold, Query

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
    return "valid" if hashed_index_key(document_id) % _PARTS < _threshold(valid_fraction) else "train"


def hashed_index_key(document_id: Any) -> int:
    """The hash of an `_id`, a signed 64-bit integer; that of `$toHashedIndexKey` for scalar `_id`s."""
    kind = ids.canonical_type(document_id)
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
    if not is_mock(collection):
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
        if not has_code(error, NO_SUCH_OPERATOR):  # an older server without `$toHashedIndexKey`
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
    if kind == ids.NUMBER:
        return struct.pack("<q", _whole(document_id))
    encoded = bson.encode({"": document_id}, codec_options=_OPTIONS)
    return encoded[6:-1]  # after length, type and the empty name; before the end


def _whole(value: Any) -> int:
    number = value.to_decimal() if isinstance(value, bson.Decimal128) else value
    if math.isnan(number):
        return 0
    low, high = -(2**63), 2**63 - 1
    return low if number <= low else high if number >= high else int(number)


def check_select(database: Any, query: Query, *, folds: Iterable[Fold] = FOLDS, unassigned: bool = False) -> None:
    """Refuse a select that cannot be trained on.

    Args:
        database: A pymongo (or mongomock) database.
        query: The select, without a fold.
        folds: The folds that are needed; none means that folds do not matter.
        unassigned: Whether documents without a fold are left out, and not refused.

    Raises:
        EmptySelectError: It matches no document.
        FoldMissingError: A document without a fold, unless they are left out; `document_id` names it.
        EmptyFoldError: A fold that is needed has no document.
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    name = query.collection
    if first(database, query) is None:
        raise EmptySelectError(
            f"the select matches no document in collection {name!r}; insert documents, or change its filter"
        )
    needed = tuple(folds)
    if not needed:
        return
    without = None if unassigned else first(database, query.filter({FOLD_FIELD: {"$nin": list(FOLDS)}}))
    if without is not None:
        document_id = without.get("_id")
        raise FoldMissingError(
            f"document {document_id!r} of collection {name!r} has no {FOLD_FIELD!r} of 'train' or 'valid'; "
            f'insert through the datalayer, or call db["{name}"].assign_folds()',
            document_id=document_id,
            field=FOLD_FIELD,
        )
    for fold in needed:
        if first(database, query.fold(fold)) is None:
            raise EmptyFoldError(
                f"no document of the select is in the {fold!r} fold of collection {name!r}; "
                "add documents, choose another valid_fraction, or train without validation",
                field=FOLD_FIELD,
            )


def first(database: Any, query: Query) -> dict[str, Any] | None:
    """The first document of a query, `_id` and fold only where it is a find; None where there is none."""
    source = database[query.collection]
    try:
        if query.is_pipeline:
            return next(iter(source.aggregate([*(query.stages or []), {"$limit": 1}])), None)
        if query.limited == 0 or not query.skipped:
            found = source.find_one(query.where, {"_id": 1, FOLD_FIELD: 1})
            return None if found is None else dict(found)
        cursor = source.find(query.where, {"_id": 1, FOLD_FIELD: 1}).skip(query.skipped).limit(1)
        return next(iter(cursor), None)
    except PyMongoError as error:
        kind = ServerUnavailableError if is_transient(error) else QueryError
        raise kind(f"reading collection {query.collection!r} failed: {error}") from error
