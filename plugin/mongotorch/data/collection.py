"""`db["name"]`: a MongoDB collection whose documents may hold arrays and tensors, each with a fold.

Tensors and numpy arrays are written as stored arrays and read back as tensors, on the CPU and without gradient.

Guarantees: what is inserted here has a `_fold` decided by a hash of its `_id`, so the same document is in the same
fold wherever it is inserted; a tensor comes back with its dtype and shape; `.raw` is the driver's own collection.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import bson
import numpy as np
import torch
from bson import ObjectId
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError
from torch import Tensor

from mongotorch.codecs import ArrayParts
from mongotorch.codecs import decode_document as _decode
from mongotorch.codecs import encode_document as _encode
from mongotorch.data.read import assign_folds, fold_of, mock_documents, query_for
from mongotorch.errors import CodecError, ConflictError, DataError, EmptySelectError, MongotorchError, StoreError
from mongotorch.mongo.driver_errors import driver_errors, is_transient, read_errors, redact, repeated
from mongotorch.mongo.server_features import collection_type, is_mock
from mongotorch.notebook import cut
from mongotorch.query import Query, checked_filter
from mongotorch.split import FOLD_FIELD, FOLDS


def encode_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its tensors and arrays as BSON.

    Raises:
        CodecError: A value that BSON cannot hold; `field` names it.
    """
    return _encode(document, as_array=tensor_parts)


def decode_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its stored arrays as tensors."""
    return _decode(document, from_array=parts_tensor)


def tensor_parts(value: Any) -> ArrayParts | None:
    """What is stored of a tensor; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    flat = value.detach().to("cpu").contiguous().resolve_conj().resolve_neg().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return ArrayParts(dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape), data=data)


def parts_tensor(parts: ArrayParts) -> Any:
    """The tensor of a stored array; a numpy array where torch has no such dtype."""
    dtype = getattr(torch, parts.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return np.frombuffer(parts.data, np.dtype(parts.dtype)).reshape(parts.shape).copy()
    if not len(parts.data):
        return torch.empty(parts.shape, dtype=dtype)
    return torch.frombuffer(bytearray(parts.data), dtype=dtype).reshape(parts.shape)


_INSERT_BATCH = 10_000


class InsertedIds(list[Any]):
    """The `_id`s of inserted documents: a list that prints how many there are, and the first of them."""

    def __repr__(self) -> str:
        first = ", ".join(cut(repr(one), 40) for one in self[:3])
        return f"<{len(self):,} inserted: {first}{', ...' if len(self) > 3 else ''}>"


_DUPLICATE_KEY = 11000


@final
class Collection:
    """One collection of a datalayer.

    Args:
        raw: The driver's collection.
        valid_fraction: Share of inserted documents that go to the `valid` fold, 0 to 1.
    """

    def __init__(self, raw: Any, *, valid_fraction: float) -> None:
        self.raw = raw
        self._valid_fraction = valid_fraction

    def __repr__(self) -> str:
        return f"Collection({self.raw.name!r})"

    @property
    def name(self) -> str:
        """The collection's name."""
        return str(self.raw.name)

    def find(
        self, filter: Mapping[str, Any] | None = None, projection: Mapping[str, Any] | Sequence[str] | None = None
    ) -> Query:
        """A query of this collection; nothing is read yet.

        Args:
            filter: A MongoDB filter; None is every document.
            projection: A MongoDB projection; None is whole documents.

        Raises:
            QueryError: Something in it cannot be stored.
        """
        return Query.find(self.name, filter, projection)

    def aggregate(self, pipeline: Sequence[Mapping[str, Any]]) -> Query:
        """A query of this collection by an aggregation pipeline; nothing is read yet.

        Raises:
            QueryError: Something in it cannot be stored.
        """
        return Query.aggregate(self.name, pipeline)

    def insert_one(self, document: Mapping[str, Any]) -> Any:
        """Insert a document, its arrays and tensors encoded, its fold decided.

        Returns:
            The inserted `_id`.

        Raises:
            DataError: A `_fold` of its own that is none, or what is no document.
            ConflictError: Its `_id` is there already.
            CodecError: A value that BSON cannot hold; `field` names it.
            ServerUnavailableError, StoreError: The server cannot be reached, or refuses it.
        """
        return self.insert_many([document])[0]

    def insert_many(self, documents: Iterable[Mapping[str, Any]]) -> InsertedIds:
        """Insert documents, read lazily, 10,000 at a time.

        Returns:
            The inserted `_id`s, in order: a list, which prints short.

        Raises:
            DataError: A `_fold` of its own that is none, or what are no documents.
            ConflictError: An `_id` is there already; those before it were inserted.
            CodecError: A value that BSON cannot hold; `field` names it.
            ServerUnavailableError, StoreError: The server cannot be reached, or refuses it.
        """
        if isinstance(documents, Mapping | str | bytes) or not isinstance(documents, Iterable):
            raise DataError(f"insert_many takes a list of documents, not a {type(documents).__name__}")
        ids = InsertedIds()
        prepared = (self._prepare(document) for document in documents)
        while batch := list(itertools.islice(prepared, _INSERT_BATCH)):
            with self._errors("inserting into"):
                try:
                    ids.extend(self.raw.insert_many(batch).inserted_ids)
                except BulkWriteError as error:
                    raise _refused(error, self.name, before=len(ids)) from error
                except (OverflowError, ValueError) as error:  # mongomock holds no UUIDs, for one
                    raise CodecError(f"inserting into collection {self.name!r}: {error}") from error
        return ids

    def update_many(
        self, filter: Mapping[str, Any], update: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> int:
        """Update the documents that match; arrays in the update are encoded.

        Returns:
            How many were changed.
        """
        where = checked_filter("filter", filter)
        encoded = encode_document(update) if isinstance(update, Mapping) else [encode_document(u) for u in update]
        with self._errors("updating"):
            return int(self.raw.update_many(where, encoded).modified_count)

    def replace_one(
        self, filter: Mapping[str, Any], replacement: Mapping[str, Any], *, upsert: bool = False
    ) -> int:
        """Replace one document that matches; it keeps its `_id` and its fold.

        Args:
            filter: Which document.
            replacement: What takes its place.
            upsert: Insert it where none matches.

        Returns:
            How many were changed, or inserted.
        """
        where = checked_filter("filter", filter)
        with self._errors("reading"):
            found = self.raw.find_one(where, {"_id": 1, FOLD_FIELD: 1})
        if found is None:
            if upsert:
                self.insert_one({**_equalities(filter), **replacement})
            return int(upsert)
        kept = {key: found[key] for key in ("_id", FOLD_FIELD) if key in found}
        document = self._prepare({**replacement, "_id": kept["_id"]} | kept)
        with self._errors("replacing a document of"):
            return int(self.raw.replace_one({"_id": kept["_id"]}, document).modified_count)

    def delete_many(self, filter: Mapping[str, Any]) -> int:
        """Delete the documents that match.

        Returns:
            How many there were.
        """
        where = checked_filter("filter", filter)
        with self._errors("deleting from"):
            return int(self.raw.delete_many(where).deleted_count)

    def count(self, filter: Mapping[str, Any] | None = None) -> int:
        """How many documents match."""
        where = checked_filter("filter", filter, {})
        with self._errors("counting"):
            return int(self.raw.count_documents(where))

    def assign_folds(self, valid_fraction: float | None = None) -> int:
        """Decide the fold of the documents that have none, because they came another way.

        Args:
            valid_fraction: Share that goes to `valid`, 0 to 1; None is the datalayer's setting (0.05).

        Returns:
            How many were given one.

        Raises:
            ParameterError: A fraction outside of 0 to 1.
            StoreError: The server refuses it, as for views and time series collections.
            ServerUnavailableError: The server cannot be reached.
        """
        with self._errors("giving folds to"):
            return assign_folds(self.raw, self._valid_fraction if valid_fraction is None else valid_fraction)

    def _errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return driver_errors(f"{doing} collection {self.name!r}")

    def _prepare(self, document: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(document, Mapping) or not all(isinstance(name, str) for name in document):
            raise DataError(f"a document is a dict of fields by name, not a {type(document).__name__}")
        encoded = encode_document(document)
        encoded = {"_id": encoded.pop("_id", None) or ObjectId(), **encoded} if "_id" not in document else encoded
        fold = encoded.setdefault(FOLD_FIELD, fold_of(encoded["_id"], self._valid_fraction))
        if fold not in FOLDS:
            raise DataError(
                f"document {encoded['_id']!r}: {FOLD_FIELD!r} is {fold!r}; it must be 'train' or 'valid', "
                "or left out",
                document_id=encoded["_id"],
                field=FOLD_FIELD,
            )
        return encoded


def read_documents(database: Any, query: Query) -> Iterator[dict[str, Any]]:
    """The documents of a query, one by one, arrays as tensors; the cursor is closed at the end.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    if query.fold_name is not None and is_mock(database):
        yield from map(decode_document, mock_documents(database, query, query.projection_document))
        return
    query = query_for(database, query)
    with read_errors(query.collection), contextlib.closing(_cursor(database[query.collection], query)) as cursor:
        for document in cursor:
            yield decode_document(document)


def _cursor(source: Any, query: Query) -> Any:
    """What reads the documents of a query in its own order."""
    if query.runs_as_pipeline:
        projection = query.projection_document
        return source.aggregate([*query.stages, *([{"$project": projection}] if projection else [])])
    cursor = source.find(query.where, query.projection_document, skip=query.skipped)
    cursor = cursor.sort(list(query.ordering)) if query.ordering else cursor
    return cursor.limit(query.limited) if query.limited else cursor


_UUIDS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
_NOT_UPDATED: Final = {"view": "is a view", "timeseries": "is a time series collection"}


def check_updatable(database: Any, name: str) -> None:
    """Refuse a collection that has no document, or whose documents cannot be updated.

    Raises:
        StoreError: It is a view or a time series collection.
        EmptySelectError: It is empty, or there is none of this name.
    """
    with driver_errors(f"looking at collection {name!r}"):
        kind = collection_type(database, name)  # who may not list collections finds out by an update
        if kind in _NOT_UPDATED:
            raise StoreError(f"{name!r} {_NOT_UPDATED[kind]}, whose documents cannot be updated")
        if database[name].find_one({}, {"_id": 1}) is None:
            raise EmptySelectError(f"collection {name!r} has no document, or there is none of this name")


@repeated("writing a field of documents")
def write_field(
    database: Any, name: str, path: str, ids: Sequence[Any], values: Sequence[Any]
) -> tuple[int, StoreError | None]:
    """Set one field of some documents, each to a value of its own; arrays in them are encoded.

    Args:
        database: The driver's database.
        name: The collection.
        path: The field, dotted where it is inside of others.
        ids: The `_id`s; one that is not there is passed over.
        values: As many values.

    Returns:
        How many documents were there and have it now, and what was wrong with the first of the others.

    Raises:
        CodecError: A value that BSON cannot hold; `document_id` names the document, and none was written.
        SettingError: The user may not write.
        ServerUnavailableError: The server cannot be reached.
    """
    fields = [_storable(document_id, path, value, name) for document_id, value in zip(ids, values, strict=True)]
    pairs = list(zip(ids, fields, strict=True))
    if is_mock(database):  # its bulk writes do not take those of this driver
        return sum(
            database[name].update_one({"_id": one}, {"$set": field}).matched_count for one, field in pairs
        ), None
    updates = [UpdateOne({"_id": one}, {"$set": field}) for one, field in pairs]
    try:
        return int(database[name].bulk_write(updates, ordered=False).matched_count), None
    except BulkWriteError as error:
        details: Mapping[str, Any] = error.details or {}
        if is_transient(error) or not details.get("writeErrors"):
            raise
        first: Mapping[str, Any] = details["writeErrors"][0]
        document_id = ids[int(first.get("index", 0))]
        refused = StoreError(
            f"document {document_id!r} of collection {name!r} was refused: {redact(str(first.get('errmsg')))}",
            document_id=document_id,
            field=path,
        )
        refused.__cause__ = error
        return int(details.get("nMatched", 0)), refused


def _storable(document_id: Any, path: str, value: Any, name: str) -> dict[str, Any]:
    try:
        field = encode_document({path: _plain(value)})
        bson.encode({"": field[path]}, codec_options=_UUIDS)
    except (CodecError, BSONError, OverflowError, TypeError, ValueError) as error:
        why = error.message if isinstance(error, CodecError) else str(error)
        raise CodecError(
            f"document {document_id!r} of collection {name!r}: BSON cannot hold the value for {path!r}: {why}",
            document_id=document_id,
            field=path,
        ) from error
    return field


def _plain(value: Any) -> Any:
    """Single numbers in tensors and numpy's own as Python's, so that every client can read them."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _refused(error: BulkWriteError, name: str, *, before: int) -> MongotorchError:
    """What an insertion ended in, with the document."""
    details = error.details or {}
    first: Mapping[str, Any] = next(iter(details.get("writeErrors", ())), {})
    document_id = first.get("op", {}).get("_id")
    done = before + int(details.get("nInserted", 0))
    if first.get("code") == _DUPLICATE_KEY:
        return ConflictError(
            f"document {document_id!r} of collection {name!r}, or another value that must be unique, is there "
            f"already; the {done} document(s) before it were inserted",
            document_id=document_id,
        )
    message = redact(str(first.get("errmsg") or error))
    return StoreError(
        f"document {document_id!r} of collection {name!r} was refused: {message}; the {done} document(s) before "
        "it were inserted",
        document_id=document_id,
    )


def _equalities(filter: Mapping[str, Any]) -> dict[str, Any]:
    # What MongoDB itself would put into an upserted document.
    return {
        key: value
        for key, value in filter.items()
        if not key.startswith("$") and "." not in key and not isinstance(value, Mapping)
    }
