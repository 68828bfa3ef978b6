"""Says which fold a document belongs to, stores folds where that is asked for, and checks that a select has them.

The hash is the one behind MongoDB's hashed indexes: the first 8 bytes, little-endian and signed, of the MD5 over
(seed 0, canonical type, value bytes), which the server computes as `$toHashedIndexKey`. A server divides documents
into folds while it reads; for mongomock, which has no such operator, it is done here.

Guarantees: the same `_id` is in the same fold on every client and on the server; where the fraction grows or
shrinks, documents only move from `train` to `valid`, or only back; only `assign_folds` writes.
"""

from __future__ import annotations

import hashlib
import math
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import bson
import mongomock
from bson.codec_options import CodecOptions, DatetimeConversion
from mongomock.aggregate import process_pipeline
from mongomock.filtering import filter_applies
from pymongo.errors import OperationFailure, PyMongoError

from mongotorch.data.decode import ids
from mongotorch.errors import EmptyFoldError, EmptySelectError, FoldMissingError, QueryError
from mongotorch.mongo.driver_errors import MAX_TIME_MS_EXPIRED, NO_SUCH_OPERATOR, has_code, read_errors
from mongotorch.mongo.server_features import documents, is_mock
from mongotorch.query import Query
from mongotorch.split import DEFAULT, FOLD_FIELD, FOLDS, PARTS, ByStoredFold, Fold, HashedPart, Split, threshold

_BATCH = 10_000
_UNASSIGNED = {FOLD_FIELD: {"$nin": list(FOLDS)}}
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
    return "valid" if hashed_index_key(document_id) % PARTS < threshold(valid_fraction) else "train"


def hashed_index_key(value: Any) -> int:
    """The hash of a value, a signed 64-bit integer: that of `$toHashedIndexKey`."""
    digest = hashlib.md5(struct.pack("<i", 0), usedforsecurity=False)
    for part in _hashed_bytes(value, b""):
        digest.update(part)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _hashed_bytes(value: Any, name: bytes) -> Iterator[bytes]:
    """What the server hashes of a value: its type, its name in what it is part of, and its bytes or its parts."""
    value = value.as_doc() if isinstance(value, bson.DBRef) else value
    kind = ids.canonical_type(value)
    yield struct.pack("<i", kind) + name
    if isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else ((str(n), part) for n, part in enumerate(value))
        for key, part in parts:
            yield from _hashed_bytes(part, key.encode() + b"\0")
        yield struct.pack("<i", 0)  # the end of the document has a type as well
    else:
        yield _value_bytes(value, kind)


def assign_folds(collection: Any, valid_fraction: float = 0.05) -> int:
    """Give a fold to every document that has none (or something else under `_fold`).

    On a server it is one update computed there; mongomock, and servers that have no `$toHashedIndexKey`, are
    updated from here in batches of 10,000.

    Args:
        collection: A pymongo (or mongomock) collection.
        valid_fraction: Share that goes to `valid`, 0 to 1, in steps of one millionth.

    Returns:
        How many documents were given a fold.

    Raises:
        ParameterError: A fraction outside of 0 to 1.
    """
    below = threshold(valid_fraction)
    done = 0
    if not is_mock(collection):
        done = _assign_on_server(collection, below)
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


def _assign_on_server(collection: Any, below: int) -> int:
    is_valid = HashedPart(path="_id", low=0, high=below).holds("valid")["$expr"]
    update = [{"$set": {FOLD_FIELD: {"$cond": [is_valid, "valid", "train"]}}}]
    try:
        return int(collection.update_many(_UNASSIGNED, update).modified_count)
    except OperationFailure as error:
        if not has_code(error, NO_SUCH_OPERATOR):  # an older server without `$toHashedIndexKey`
            raise
        return 0


def _batches(ids: Iterable[Any]) -> Iterator[list[Any]]:
    # The cursor is read to its end first: it would meet its own updates otherwise.
    source = iter(list(ids))
    while batch := list(islice(source, _BATCH)):
        yield batch


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
    if number <= low or number >= high:
        return low if number <= low else high
    # As the server does: doubles are cut off, decimals rounded.
    return round(number) if isinstance(value, bson.Decimal128) else int(number)


def fold_by(document: Mapping[str, Any], split: Split | None) -> Fold | None:
    """The fold of a document by a split, None being the default one; None where it is in no fold."""
    return next((fold for fold in FOLDS if _is_in(document, split or DEFAULT, fold)), None)


def _is_in(document: Mapping[str, Any], split: Split, fold: Fold) -> bool:
    """Whether a document is in a fold, as a server decides it."""
    part = split.hashed
    if part is None:
        return _meets(document, split.condition(fold))
    if part.stored and FOLD_FIELD in document:
        return bool(document[FOLD_FIELD] == fold)
    hashed = hashed_index_key(_at(document, part.path.split(".")))
    return ((hashed - part.low) % PARTS < part.high - part.low) == (fold == "valid")


def _meets(document: Mapping[str, Any], condition: Mapping[str, Any]) -> bool:
    return bool(filter_applies(condition, document))  # type: ignore[no-untyped-call]


def _at(value: Any, path: list[str]) -> Any:
    """The value of a path as an expression of the server has it; None where there is none."""
    for n, name in enumerate(path):
        if isinstance(value, list):
            found = [_at(item, path[n:]) for item in value if isinstance(item, Mapping | list)]
            return [item for item in found if item is not None]
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_select(
    database: Any,
    query: Query,
    *,
    folds: Iterable[Fold] = FOLDS,
    unassigned: bool = False,
    seconds: float | None = None,
) -> bool:
    """Refuse a select that cannot be trained on; whether all of it was looked at.

    Args:
        database: A pymongo (or mongomock) database.
        query: The select; its fold does not matter, its split does.
        folds: The folds that are needed; none means that folds do not matter.
        unassigned: Whether documents that are in no fold are left out, and not refused.
        seconds: How long a document that is in no fold is looked for, which can take a scan; None is to the end.

    Raises:
        EmptySelectError: It matches no document.
        FoldMissingError: A document that is in no fold, unless they are left out; `document_id` names it.
        EmptyFoldError: A fold that is needed has no document.
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    needed = tuple(folds)
    if not needed:
        _refuse_empty(database, query)
        return True
    query = query_for(database, query.fold("train", split=query.split))
    split = query.split or DEFAULT
    is_whole, undecided = True, None
    if not unassigned:
        is_whole, undecided = _first_undecided(database, query, split, seconds)
    if undecided is not None:
        raise _in_no_fold(query, split, undecided.get("_id"))
    for fold in needed:
        if first(database, query.fold(fold, split=query.split)) is None:
            _refuse_empty(database, replace(query, fold_name=None, split=None))
            raise EmptyFoldError(
                f"no document of the select is in the {fold!r} fold of collection {query.collection!r}; "
                "add documents, give a trainer `split=` with another share, or train without validation",
                field=FOLD_FIELD,
            )
    return is_whole


def _refuse_empty(database: Any, query: Query) -> None:
    if first(database, query) is None:
        raise EmptySelectError(
            f"the select matches no document in collection {query.collection!r}; insert documents, or change its "
            "filter"
        )


def _first_undecided(
    database: Any, query: Query, split: Split, seconds: float | None
) -> tuple[bool, dict[str, Any] | None]:
    """Whether it was looked for to the end; a document that is in neither fold, None where none was found."""
    if split.undecided is None:
        return True, None
    if not query.is_whole:
        return True, first(database, query, instead=split.undecided)
    unfolded = replace(query, fold_name=None, split=None).filter(split.undecided)
    try:
        return True, first(database, unfolded, seconds=seconds)
    except QueryError as error:
        if seconds is None or not has_code(error.__cause__, MAX_TIME_MS_EXPIRED):
            raise
        return False, None


def _in_no_fold(query: Query, split: Split, document_id: Any) -> FoldMissingError:
    what = f"document {document_id!r} of collection {query.collection!r}"
    if not isinstance(split, ByStoredFold):
        message = f"{what} is in no fold of {split!r}: the field is missing, or its type is another one"
        return FoldMissingError(message, document_id=document_id, field=split.fields[0])
    why = f"{what} has something else than 'train' or 'valid' under {FOLD_FIELD!r}; leave it out by a filter"
    if not split.hashes:
        why = f"{what} has no {FOLD_FIELD!r} of 'train' or 'valid', and this server cannot compute one"
    return FoldMissingError(
        f'{why}, give a trainer `split=`, or call db["{query.collection}"].assign_folds()',
        document_id=document_id,
        field=FOLD_FIELD,
    )


# The clients whose servers can hash; asked once.
_hashing: weakref.WeakSet[Any] = weakref.WeakSet()


def query_for(database: Any, query: Query) -> Query:
    """The query as the server of a database can run it: a server that cannot hash reads stored folds only."""
    if query.fold_name is None or query.split is not None or is_mock(database):
        return query
    client = database.client
    if client in _hashing:
        return query
    nothing = {"_id": bson.MinKey(), "$expr": {"$eq": [{"$toHashedIndexKey": "$_id"}, 0]}}
    try:
        documents(database, query.collection).find_one(nothing, {"_id": 1})
    except OperationFailure as error:
        if has_code(error, NO_SUCH_OPERATOR):
            return replace(query, split=ByStoredFold(hashes=False))
    except PyMongoError:  # what follows meets it as well, and says what it was doing
        pass
    else:
        _hashing.add(client)
    return query


def first(
    database: Any, query: Query, *, instead: Mapping[str, Any] | None = None, seconds: float | None = None
) -> dict[str, Any] | None:
    """The first document of a query, `_id` and fold only where it is a find; None where there is none.

    Args:
        database: A pymongo (or mongomock) database.
        query: The query.
        instead: A condition that a document meets instead of that of the fold.
        seconds: How long a server may take for a find; None is any time.

    Raises:
        QueryError: The server refuses the query, or has taken longer.
        ServerUnavailableError: The server cannot be read.
    """
    with read_errors(query.collection):
        source = documents(database, query.collection)
        if is_mock(database):
            return next(iter(mock_documents(database, query, None, instead=instead)), None)
        if query.runs_as_pipeline:
            before, after = query.stages_around_fold
            condition = query.fold_condition if instead is None else instead
            matched = [] if condition is None else [{"$match": condition}]
            return next(iter(source.aggregate([*before, *matched, *after, {"$limit": 1}])), None)
        limits = {} if seconds is None else {"max_time_ms": max(int(seconds * 1000), 1)}
        shown = {"_id": 1, FOLD_FIELD: 1}
        return next(iter(source.find(query.where, shown, skip=query.skipped, limit=1, **limits)), None)


def count(collection: Any, query: Query, *, mock: bool, seconds: float) -> tuple[int, bool]:
    """How many documents match, and whether that was counted rather than estimated.

    Counting a filter without an index is a scan: it is given up after so many seconds, and what is left is the
    number of documents of the whole collection.
    """
    limits = {} if mock else {"maxTimeMS": max(int(seconds * 1000), 1)}
    try:
        if mock and query.fold_name is not None:
            return len(mock_documents(collection.database, query, {"_id": 1})), True
        if query.runs_as_pipeline:
            stages = [*query.stages, {"$count": "n"}]
            return next((int(found["n"]) for found in collection.aggregate(stages, **limits)), 0), True
        if not query.where:
            found = int(collection.estimated_document_count())
        else:
            found = int(collection.count_documents(query.where, **limits))
    except OperationFailure as error:
        if not has_code(error, MAX_TIME_MS_EXPIRED):
            raise
        return int(collection.estimated_document_count()), False
    found = max(found - query.skipped, 0)
    return found if query.limited is None else min(found, query.limited), True


def mock_documents(
    database: Any, query: Query, projection: Mapping[str, Any] | None, *, instead: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The documents of a query on mongomock, which cannot hash; in its order if it has one, or a skip or limit.

    Args:
        database: A mongomock database.
        query: The query.
        projection: What of each document; None or empty is all. That of the query itself is not read.
        instead: A condition that a document meets instead of that of the fold.
    """

    def of_fold(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if instead is not None:
            return [document for document in found if _meets(document, instead)]
        fold = query.fold_name
        if fold is None:
            return found
        return [document for document in found if _is_in(document, query.split or DEFAULT, fold)]

    def read(query: Query, projection: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        cursor = source.find(query.where, dict(projection) if projection else None)
        cursor = cursor.sort(query.total_order) if query.is_cut or query.ordering else cursor
        return list(cursor.skip(query.skipped).limit(query.limited or 0))

    source, unfolded = database[query.collection], replace(query, fold_name=None)
    if query.is_pipeline:
        before, after = query.stages_around_fold
        after = [*after, {"$project": dict(projection)}] if projection else after
        found = of_fold(list(source.aggregate(before)))
        return list(process_pipeline(found, database, after, None))  # type: ignore[no-untyped-call]
    if query.fold_name is None and instead is None:
        return read(query, projection)
    if query.runs_as_pipeline:
        found = of_fold(read(unfolded, None))
    else:
        ordering = tuple(query.total_order) if query.is_cut else query.ordering
        found = of_fold(read(replace(unfolded, skipped=0, limited=None, ordering=ordering), None))[query.skipped :]
        found = found if query.limited is None else found[: query.limited]
    if not projection or not found:
        return found
    projected: Any = mongomock.MongoClient().memory.documents
    projected.insert_many(found)
    return list(projected.find({}, dict(projection)))
