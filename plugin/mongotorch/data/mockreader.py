"""Reading from mongomock, and the choice between it and a real server.

Always: mongomock, which has no raw batches and sorts mixed types otherwise, gives the same documents in the
same order as a server would.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, final

import bson

from mongotorch.data.bsonorder import sort_key
from mongotorch.data.patience import Patience
from mongotorch.data.reader import Reader, Span, total_order
from mongotorch.data.replies import Chunk
from mongotorch.data.serverreader import ServerReader
from mongotorch.query import Query


@final
class MockReader(Reader):
    """Reads from mongomock: takes the select once, sorted as a server sorts, and encodes it when asked."""

    def __init__(self, database: Any, query: Query, projection: Mapping[str, Any], patience: Patience) -> None:
        super().__init__(database, query, projection, patience)
        self._documents: list[dict[str, Any]] | None = None
        self._keys: list[Any] = []

    def _snapshot(self) -> list[dict[str, Any]]:
        if self._documents is None:
            found = list(self.collection.find(self.query.where, self.projection))
            keyed = sorted(((sort_key(d["_id"]), n) for n, d in enumerate(found)))
            self._keys = [key for key, _ in keyed]
            self._documents = [found[n] for _, n in keyed]
        return self._documents

    def _slice(self, span: Span) -> tuple[int, int]:
        self._snapshot()
        upper = sort_key(span.upper)
        end = (bisect.bisect_right if span.closed else bisect.bisect_left)(self._keys, upper)
        return bisect.bisect_left(self._keys, sort_key(span.lower)), end

    def ends(self) -> tuple[Any, Any] | None:
        """See `Reader.ends`."""
        documents = self._snapshot()
        return (documents[0]["_id"], documents[-1]["_id"]) if documents else None

    def walk(self, span: Span, step: int) -> Iterator[Any]:
        """See `Reader.walk`."""
        first, end = self._slice(span)
        documents = self._snapshot()
        yield from (documents[index]["_id"] for index in range(first + step, end, step))

    def head(self, count: int) -> list[Chunk]:
        """See `Reader.head`."""
        return [b"".join(map(bson.encode, self._snapshot()[:count]))]

    def read(self, span: Span, expected: int) -> list[Chunk]:  # noqa: ARG002 - of the interface
        """See `Reader.read`."""
        first, end = self._slice(span)
        return [b"".join(map(bson.encode, self._snapshot()[first:end]))]

    def drain(self, skip: int, chunk: int) -> Iterator[Chunk]:
        """See `Reader.drain`."""
        query = self.query
        if query.is_pipeline:
            found = list(self.collection.aggregate([*(query.stages or []), {"$project": self.projection}]))
        else:
            cursor = self.collection.find(query.where, self.projection).sort(total_order(query))
            found = list(cursor.skip(query.skipped).limit(query.limited or 0))
        for first in range(skip, len(found), chunk):
            yield b"".join(map(bson.encode, found[first : first + chunk]))

    def membership(self) -> list[Any]:
        """See `Reader.membership`; the content itself, since such a collection has no identity."""
        content = b"".join(map(bson.encode, self.collection.find({}, {**self.projection})))
        return [hashlib.sha256(content).hexdigest()]

    def size(self) -> int:
        """See `Reader.size`."""
        return int(self.collection.estimated_document_count())


def open_reader(database: Any, query: Query, projection: Mapping[str, Any], patience: Patience) -> Reader:
    """The reader that fits the database."""
    mock = type(database).__module__.startswith("mongomock")
    return (MockReader if mock else ServerReader)(database, query, projection, patience)
