"""Raw BSON out of a real server, range by range, whatever happens to the connection on the way.

Always: a range is asked for with single questions, so that no cursor has to live on the server; one that breaks
is asked again for what comes after the last `_id` seen, until the deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, final

from bson import Int64
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError

from mongotorch.data.demand import crowded
from mongotorch.data.reader import Reader, Span, last_id, offsets, total_order
from mongotorch.data.replies import Chunk, find_command, found


@final
class ServerReader(Reader):
    """Reads from a real server, as bytes, one question a range."""

    threads = 2

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
            where, options = self.bounded(replace(span, lower=lower))
            command = find_command(self.collection, where, {"_id": 1}, 1, skip=step, limit=1, **options)
            return [document["_id"] for document in self._command(command, dict)["cursor"]["firstBatch"]]

        found = self.patience.run(lambda: following(span.lower), self._what())
        while found:
            lower = found[0]
            yield lower
            found = self.patience.run(lambda lower=lower: following(lower), self._what())  # type: ignore[misc]

    def record_numbers(self, ids: list[Any]) -> list[int]:
        """See `Reader.record_numbers`."""

        def find() -> list[Any]:
            return list(
                self.collection.find({"_id": {"$in": ids}}, {"_id": 1}, sort=[("_id", 1)], show_record_id=True)
            )

        numbers = [document.get("$recordId") for document in self.patience.run(find, self._what())]
        # A document may be gone since the sample was taken: then they cannot be told apart any more.
        return numbers if len(numbers) == len(ids) and all(type(n) in (int, Int64) for n in numbers) else []

    def head(self, count: int) -> list[Chunk]:
        """See `Reader.head`."""
        return self.patience.run(
            lambda: list(
                self.collection.find_raw_batches(self.query.where, self.projection, sort=[("_id", 1)], limit=count)
            ),
            self._what(),
        )

    def read(self, span: Span, expected: int) -> list[Chunk]:
        """See `Reader.read`."""
        chunks: list[Chunk] = []
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

    def _range(self, span: Span, seen: list[Chunk], expected: int) -> Iterator[Chunk]:
        """What is left of a span, asked for with one question a reply: no cursor has to live on the server."""
        after = next((last_id(chunk) for chunk in reversed(seen) if chunk), None)
        while True:
            where, options = self.bounded(span, after)
            command = find_command(self.collection, where, self.projection, max(2 * expected, 101), **options)
            part = found(self._command(command, RawBSONDocument).raw)
            if part.documents:
                yield part.documents
            if not part.cursor:
                return
            with contextlib.suppress(PyMongoError):  # it would time out by itself
                self.collection.database.command("killCursors", self.collection.name, cursors=[part.cursor])
            after = last_id(part.documents)

    def _command(self, command: dict[str, Any], document_class: Any) -> Any:
        source = self.collection
        options = source.codec_options.with_options(document_class=document_class)
        return source.database.command(command, codec_options=options, read_preference=source.read_preference)

    def bounded(self, span: Span, after: tuple[Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
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
        options: dict[str, Any] = {"hint": {"_id": 1}, "min": {"_id": start}}
        if not span.closed:
            options["max"] = {"_id": span.upper}
        return _both(self.query.where, {"$expr": {"$and": exact}}), options

    def drain(self, skip: int, chunk: int) -> Iterator[Chunk]:
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

    def _own(self, skip: int, chunk: int) -> Iterator[Chunk]:
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

    def crowded(self) -> bool:
        """See `Reader.crowded`."""
        return crowded(self.collection.database.client)

    def size(self) -> int:
        """See `Reader.size`."""
        return int(self.patience.run(self.collection.estimated_document_count, self._what()))

    def _what(self) -> str:
        return f"reading collection {self.query.collection!r}"


def _both(where: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {"$and": [dict(where), dict(more)]} if where else dict(more)
