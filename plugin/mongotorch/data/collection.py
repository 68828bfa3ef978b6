"""`db["name"]`: a MongoDB collection whose documents may hold arrays and tensors, each with a fold.

Tensors and numpy arrays are written as stored arrays and read back as tensors, on the CPU and without gradient.

Guarantees: what is inserted here has a `_fold` decided by a hash of its `_id`, so the same document is in the same
fold wherever it is inserted; a tensor comes back with its dtype and shape; `.raw` is the driver's own collection.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from bson import ObjectId
from pymongo.errors import BulkWriteError
from torch import Tensor

from mongotorch.codecs import ArrayParts
from mongotorch.codecs import decode_document as _decode
from mongotorch.codecs import encode_document as _encode
from mongotorch.data.read import assign_folds, fold_of, mock_documents, query_for
from mongotorch.errors import CodecError, ConflictError, DataError, MongotorchError, StoreError
from mongotorch.mongo.driver_errors import driver_errors, redact
from mongotorch.mongo.server_features import is_mock
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
        """
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
    """The documents of a query, one by one, arrays as tensors; the cursor is closed at the end."""
    if query.fold_name is not None and is_mock(database):
        yield from map(decode_document, mock_documents(database, query, query.projection_document))
        return
    query, source = query_for(database, query), database[query.collection]
    if query.runs_as_pipeline:
        projection = query.projection_document
        cursor = source.aggregate([*query.stages, *([{"$project": projection}] if projection else [])])
    else:
        cursor = source.find(query.where, query.projection_document, skip=query.skipped)
        cursor = cursor.sort(list(query.ordering)) if query.ordering else cursor
        cursor = cursor.limit(query.limited) if query.limited else cursor
    try:
        for document in cursor:
            yield decode_document(document)
    finally:
        cursor.close()


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
