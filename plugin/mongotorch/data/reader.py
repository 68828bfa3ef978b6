"""What the plan and the stream ask of a collection, whatever stands behind it.

Always: a reader returns each document of a range exactly once, in `_id` order, as bytes; the reader of a server
and that of mongomock give the same meaning in the same order.
"""

from __future__ import annotations

import abc
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import bson

from mongotorch.data.patience import Patience
from mongotorch.data.replies import Chunk
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

    Attributes:
        threads: How many spans may be read at a time.
    """

    threads = 1

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
    def head(self, count: int) -> list[Chunk]:
        """The first documents by `_id`, as chunks of concatenated BSON."""

    @abc.abstractmethod
    def read(self, span: Span, expected: int) -> list[Chunk]:
        """The documents of a span by `_id`, as chunks of concatenated BSON; about `expected` of them."""

    @abc.abstractmethod
    def drain(self, skip: int, chunk: int) -> Iterator[Chunk]:
        """The documents of the query in its own order from the `skip`-th on, about `chunk` at a time."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how many documents the collection has, without counting them."""

    def crowded(self) -> bool:
        """Whether there are too few cores for the server, this reader and somebody who trains."""
        return False

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

    def record_numbers(self, ids: list[Any]) -> list[int]:  # noqa: ARG002 - of the interface
        """The server's own number of each of these documents; they ascend with insertion, where there are any.

        An empty list where they are not known, or mean nothing (a clustered collection has none, and those of
        several shards do not compare).
        """
        return []

    def sample(self, count: int) -> list[Any]:
        """The `_id`s of those that match among `count` random documents of the collection."""
        stages = [{"$sample": {"size": count}}, {"$match": self.query.where}, {"$project": {"_id": 1}}]
        return self.patience.run(
            lambda: [d["_id"] for d in self.collection.aggregate(stages)],
            f"sampling {self.query.collection!r}",
        )


def total_order(query: Query) -> list[tuple[str, int]]:
    """The query's sort, made total by `_id`, so that a skip means the same each time."""
    ordering = list(query.ordering)
    return ordering if any(name == "_id" for name, _ in ordering) else [*ordering, ("_id", 1)]


def offsets(raw: Chunk) -> Iterator[tuple[int, int]]:
    """Where each document of concatenated BSON starts and ends."""
    start = 0
    while start < len(raw):
        end = start + struct.unpack_from("<i", raw, start)[0]
        yield start, end
        start = end


def last_id(raw: Chunk) -> tuple[Any]:
    """The `_id` of the last document of concatenated BSON, in a tuple because it may be None."""
    start, end = max(offsets(raw))
    return (bson.decode(raw[start:end])["_id"],)
