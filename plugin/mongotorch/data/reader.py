"""Raw BSON out of a collection, range by range, whatever happens to the cursor on the way.

Always: a reader returns each document of a range exactly once, in `_id` order, as bytes; a cursor lives for
one range only, and one that breaks is asked again for what comes after the last `_id` seen, until the
deadline. The reader of mongomock, which has no raw batches, gives the same meaning in the same order.
"""

from __future__ import annotations

import abc
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import bson
from pymongo.errors import (
    PyMongoError,
)

from mongotorch.data.patience import Patience
from mongotorch.query import Query


@final
@dataclass(frozen=True, kw_only=True)
class Span:
    """The documents whose `_id` is between two bounds.

    Attributes:
        lower: The first `_id`, included.
        upper: The last one.
        closed: Whether `upper` is included.
        uniform: Whether all `_id`s of the collection's select have one type, so that `$gte` reaches them all.
    """

    lower: Any
    upper: Any
    closed: bool
    uniform: bool


class Reader(abc.ABC):
    """What the plan and the stream ask of a collection; one per process.

    Args:
        database: A pymongo (or mongomock) database.
        query: What to read; its sort, skip and limit are only honoured by `drain`.
        projection: What of each document.
        patience: How long broken reads are tried again.
    """

    def __init__(self, database: Any, query: Query, projection: Mapping[str, Any], patience: Patience) -> None:
        self.collection = database[query.collection]
        self.query = query
        self.patience = patience
        own = query.projection_document or {}
        computed = any(not isinstance(value, int | float) for value in own.values())
        self.projection = dict(own) if computed else dict(projection)

    @abc.abstractmethod
    def ends(self) -> tuple[Any, Any] | None:
        """The first and the last `_id` of the select, or None where it is empty."""

    @abc.abstractmethod
    def walk(self, span: Span, step: int) -> Iterator[Any]:
        """Every `step`-th `_id` of the span after its first one, in order."""

    @abc.abstractmethod
    def head(self, count: int) -> list[bytes]:
        """The first documents by `_id`, as chunks of concatenated BSON."""

    @abc.abstractmethod
    def read(self, span: Span, expected: int) -> list[bytes]:
        """The documents of a span by `_id`, as chunks of concatenated BSON; about `expected` of them."""

    @abc.abstractmethod
    def drain(self, skip: int, chunk: int) -> Iterator[bytes]:
        """The documents of the query in its own order from the `skip`-th on, about `chunk` at a time."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how many documents the collection has, without counting them."""

    def membership(self) -> list[Any]:
        """What changes when documents come or go: the collection itself, how many match, and the last `_id`.

        For a pipeline it is that of its whole collection.
        """
        source = self.collection
        where = {} if self.query.is_pipeline else self.query.where
        newest = source.find_one(where, {"_id": 1}, sort=[("_id", -1)])
        # A collection that is dropped and made again has another uuid; a server on another port has not.
        known: dict[str, Any] = next(iter(source.database.list_collections(filter={"name": source.name})), {})
        return [source.name, known.get("info", {}).get("uuid"), source.count_documents(where), newest]

    def sample(self, count: int) -> list[Any]:
        """The `_id`s of those that match among `count` random documents of the collection."""
        stages = [{"$sample": {"size": count}}, {"$match": self.query.where}, {"$project": {"_id": 1}}]
        return self.patience.run(
            lambda: [d["_id"] for d in self.collection.aggregate(stages)],
            f"sampling {self.query.collection!r}",
        )


@final
class ServerReader(Reader):
    """Reads from a real server: raw batches, bounded cursors."""

    def ends(self) -> tuple[Any, Any] | None:
        """See `Reader.ends`."""

        def find(direction: int) -> list[Any]:
            cursor = self.collection.find(self.query.where, {"_id": 1}, sort=[("_id", direction)], limit=1)
            return [document["_id"] for document in cursor]

        first = self.patience.run(lambda: find(1), self._what())
        last = self.patience.run(lambda: find(-1), self._what()) if first else []
        return (first[0], last[0]) if first and last else None

    def walk(self, span: Span, step: int) -> Iterator[Any]:
        """See `Reader.walk`."""

        def following(lower: Any) -> list[Any]:
            where, options = self._bounded(Span(lower=lower, upper=span.upper, closed=True, uniform=span.uniform))
            cursor = self.collection.find(where, {"_id": 1}, sort=[("_id", 1)], skip=step, limit=1, **options)
            return [document["_id"] for document in cursor]

        found = self.patience.run(lambda: following(span.lower), self._what())
        while found:
            lower = found[0]
            yield lower
            found = self.patience.run(lambda lower=lower: following(lower), self._what())  # type: ignore[misc]

    def head(self, count: int) -> list[bytes]:
        """See `Reader.head`."""
        return self.patience.run(
            lambda: list(
                self.collection.find_raw_batches(self.query.where, self.projection, sort=[("_id", 1)], limit=count)
            ),
            self._what(),
        )

    def read(self, span: Span, expected: int) -> list[bytes]:
        """See `Reader.read`."""
        chunks: list[bytes] = []
        attempts = self.patience.attempts(self._what())
        while True:
            try:
                for chunk in self._range(span, chunks, expected):
                    attempts.succeeded()
                    chunks.append(chunk)
            except PyMongoError as error:
                attempts.failed(error)
            else:
                return chunks

    def _range(self, span: Span, seen: list[bytes], expected: int) -> Iterator[bytes]:
        after = next((last_id(chunk) for chunk in reversed(seen) if chunk), None)
        where, options = self._bounded(span, after)
        cursor = self.collection.find_raw_batches(
            where, self.projection, sort=[("_id", 1)], batch_size=max(2 * expected, 101), **options
        )
        try:
            yield from cursor
        finally:
            cursor.close()

    def _bounded(self, span: Span, after: tuple[Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The filter of a span, from behind `after`, and what else `find` needs."""
        if span.uniform:
            upper = "$lte" if span.closed else "$lt"
            lower = {"$gte": span.lower} if after is None else {"$gt": after[0]}
            return _both(self.query.where, {"_id": {**lower, upper: span.upper}}), {}
        # `$gte` and `$lt` stay inside one type. Index bounds and `$expr` do not.
        start = span.lower if after is None else after[0]
        exact = [
            {"$gte" if after is None else "$gt": ["$_id", {"$literal": start}]},
            {"$lte" if span.closed else "$lt": ["$_id", {"$literal": span.upper}]},
        ]
        options: dict[str, Any] = {"hint": [("_id", 1)], "min": {"_id": start}}
        if not span.closed:
            options["max"] = {"_id": span.upper}
        return _both(self.query.where, {"$expr": {"$and": exact}}), options

    def drain(self, skip: int, chunk: int) -> Iterator[bytes]:
        """See `Reader.drain`; a broken cursor is replaced by one that skips what was seen."""
        attempts = self.patience.attempts(self._what())
        while True:
            try:
                for raw in self._own(skip, chunk):
                    attempts.succeeded()
                    skip += sum(1 for _ in offsets(raw))
                    yield raw
            except PyMongoError as error:
                attempts.failed(error)
            else:
                return

    def _own(self, skip: int, chunk: int) -> Iterator[bytes]:
        query = self.query
        if query.is_pipeline:
            stages = [
                *(query.stages or []),
                *([{"$skip": skip}] if skip else []),
                {"$project": self.projection},
            ]
            with self.collection.aggregate_raw_batches(stages, batchSize=chunk) as results:
                yield from results
            return
        left = 0 if query.limited is None else query.limited - skip
        if query.limited is not None and left <= 0:
            return
        with self.collection.find_raw_batches(
            query.where, self.projection, sort=total_order(query), skip=query.skipped + skip, limit=left,
            batch_size=chunk,
        ) as cursor:  # fmt: skip
            yield from cursor

    def size(self) -> int:
        """See `Reader.size`."""
        return int(self.patience.run(self.collection.estimated_document_count, self._what()))

    def _what(self) -> str:
        return f"reading collection {self.query.collection!r}"


def total_order(query: Query) -> list[tuple[str, int]]:
    """The query's sort, made total by `_id`, so that a skip means the same each time."""
    ordering = list(query.ordering)
    return ordering if any(name == "_id" for name, _ in ordering) else [*ordering, ("_id", 1)]


def offsets(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where each document of concatenated BSON starts and ends."""
    start = 0
    while start < len(raw):
        end = start + struct.unpack_from("<i", raw, start)[0]
        yield start, end
        start = end


def last_id(raw: bytes) -> tuple[Any]:
    """The `_id` of the last document of concatenated BSON, in a tuple because it may be None."""
    start, end = max(offsets(raw))
    return (bson.decode(raw[start:end])["_id"],)


def _both(where: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {"$and": [dict(where), dict(more)]} if where else dict(more)
