"""Reads documents as BSON: ranges of `_id`, or a query in its own order, from a real server or from mongomock.

A server is asked for a range with single commands, so that no cursor has to live there. A read that breaks is
continued after the last `_id` seen, until the deadline of its `RetryPolicy`.

Guarantees: each document of a range comes exactly once, in `_id` order, whatever happens to the connection;
mongomock, which has no raw batches and sorts mixed types differently, gives the same documents in the same order;
a client is only used in the process that opened it, and closed by who opened it.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from bson import Int64, MaxKey, Timestamp
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError

from mongotorch.data.decode import Reply, encode, find_command, found, last_id, offsets, same_type, sort_key
from mongotorch.data.read.folds import mock_documents, query_for
from mongotorch.errors import QueryError
from mongotorch.mongo.driver_errors import NO_SNAPSHOT, RetryPolicy, has_code
from mongotorch.mongo.server_features import documents, is_mock
from mongotorch.query import Query


@final
@dataclass(frozen=True, kw_only=True)
class IdRange:
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
    """Reads the documents of a query, as replies of concatenated BSON; one in each process.

    Args:
        database: A pymongo (or mongomock) database.
        query: What to read; its sort, skip and limit are only honoured by `drain`.
        projection: What of each document.
        retry: How long broken reads are tried again.

    Raises:
        QueryError: The query's own projection computes `_id`.

    Attributes:
        threads: How many ranges may be read at a time.
        finds_ids: Whether `_id`s can be looked for.
    """

    threads = 1
    finds_ids = False

    def __init__(self, database: Any, query: Query, projection: Mapping[str, Any], retry: RetryPolicy) -> None:
        self.collection = database[query.collection]
        self.query = query
        self.retry = retry
        own = query.projection_document or {}
        computed = any(not isinstance(value, int | float) for value in own.values())
        if computed and own.get("_id", 1) not in (0, 1):
            raise QueryError(
                "the projection computes `_id`, by which documents are read; give what it computes another name",
                field="projection",
            )
        # Without `_id` nothing could be shuffled, and no broken read continued.
        self.projection = {**own, "_id": 1} if computed else dict(projection)

    @abc.abstractmethod
    def ends(self) -> tuple[Any, Any] | None:
        """The first and the last `_id` of the select, or None where it is empty."""

    @abc.abstractmethod
    def walk(self, bounds: IdRange, step: int) -> Iterator[Any]:
        """Every `step`-th `_id` of a range after its first one, in order."""

    @abc.abstractmethod
    def head(self, count: int, *, last: bool = False) -> list[Reply]:
        """The first documents by `_id`, or the last ones."""

    @abc.abstractmethod
    def read(
        self, bounds: IdRange, expected: int, ids: list[Any] | None = None, *, at: Timestamp | None = None
    ) -> list[Reply]:
        """The documents of a range by `_id`; about `expected` of them.

        Args:
            bounds: The range.
            expected: About how many documents it has.
            ids: The only `_id`s that are looked for, in their order; none of them a regular expression.
            at: The cluster time as of which they are read; None is now. mongomock has none.
        """

    @abc.abstractmethod
    def drain(self, skip: int, rows: int) -> Iterator[Reply]:
        """The documents of the query in its own order from the `skip`-th on, about `rows` at a time."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how many documents the collection has, without counting them."""

    @abc.abstractmethod
    def count(self, bounds: IdRange | None, *, at: Timestamp | None = None) -> int:
        """How many documents a range has now, or had at a cluster time.

        Without a range: how many the query gives, which is no pipeline.
        """

    def probe(self, count: int) -> tuple[list[Any] | None, float]:
        """Read the first documents.

        Args:
            count: How many.

        Returns:
            The `_id`s of all documents of the select, ascending, where they are fewer than that, else None; and
            the mean size of those that were read, as projected.
        """
        documents = [reply[start:end] for reply in self.head(count) for start, end in offsets(reply)]
        ids = [last_id(document)[0] for document in documents] if len(documents) < count else None
        return ids, sum(map(len, documents)) / max(len(documents), 1)

    def own_order(self, skip: int, rows: int) -> Iterator[list[Reply]]:
        """Like `drain`, exactly `rows` documents at a time, the last time fewer."""
        replies = self.drain(skip, rows)
        try:
            yield from regrouped(replies, rows)
        finally:
            replies.close()  # type: ignore[attr-defined]

    def explain_read(self, bounds: IdRange) -> Mapping[str, Any] | None:  # noqa: ARG002 - of the interface
        """How the server reads a range, as its `explain` says it; None where it cannot be asked."""
        return None

    def record_numbers(self, ids: list[Any]) -> list[int]:  # noqa: ARG002 - of the interface
        """The server's own number of each of these documents; they ascend with insertion, where there are any.

        An empty list where they are not known, or mean nothing (a clustered collection has none, and those of
        several shards do not compare).
        """
        return []

    def present(self, ids: list[Any]) -> list[Any]:
        """Those of some `_id`s, none of them a regular expression, that the collection has."""
        if not ids:
            return []
        options = {"batch_size": len(ids) + 1}
        return self.retry.run(
            lambda: [d["_id"] for d in self.collection.find({"_id": {"$in": ids}}, {"_id": 1}, **options)],
            f"reading collection {self.query.collection!r}",
        )

    def sample(self, count: int, bounds: IdRange) -> list[Any]:
        """The `_id`s of those that match and lie between two bounds, among `count` random documents.

        They come in the order of the server, some of them several times.
        """
        stages = [
            {"$sample": {"size": count}},
            {"$match": self._inside(bounds)},
            {"$project": {"_id": 1}},
            {"$sort": {"_id": 1}},  # texts are in the order of the collection's collation
        ]
        return self.retry.run(
            lambda: [d["_id"] for d in self.collection.aggregate(stages, batchSize=count + 1)],
            f"sampling {self.query.collection!r}",
        )

    def _inside(self, bounds: IdRange) -> dict[str, Any]:
        """The filter of what lies between two bounds."""
        return _both(self.query.where, {"_id": {"$gt": bounds.lower, "$lt": bounds.upper}})


def regrouped(replies: Iterator[Reply], rows: int) -> Iterator[list[Reply]]:
    """The same BSON, exactly so many documents at a time, the last time fewer."""
    group: list[Reply] = []
    room = rows
    for reply in replies:
        first = 0
        for _, end in offsets(reply):
            room -= 1
            if room == 0:
                yield [*group, reply[first:end]]
                group, first, room = [], end, rows
        if first < len(reply):
            group.append(reply[first:])
    if group:
        yield group


@final
class ServerReader(Reader):
    """Reads from a real server, a range with one command."""

    threads = 2
    finds_ids = True

    def __init__(self, database: Any, query: Query, projection: Mapping[str, Any], retry: RetryPolicy) -> None:
        super().__init__(database, query, projection, retry)
        self.collection = retry.run(lambda: documents(database, query.collection), "asking for the time")

    def ends(self) -> tuple[Any, Any] | None:
        """See `Reader.ends`."""

        def find(direction: int) -> list[Any]:
            cursor = self.collection.find(self.query.where, {"_id": 1}, sort=[("_id", direction)], limit=1)
            return [document["_id"] for document in cursor]

        first = self.retry.run(lambda: find(1), self._what())
        last = self.retry.run(lambda: find(-1), self._what()) if first else []
        return (first[0], last[0]) if first and last else None

    def walk(self, bounds: IdRange, step: int) -> Iterator[Any]:
        """See `Reader.walk`."""

        def following(lower: Any) -> list[Any]:
            where, options = self._bounded(replace(bounds, lower=lower))
            command = find_command(self.collection, where, {"_id": 1}, 1, skip=step, limit=1, **options)
            return [document["_id"] for document in self._command(command, dict)["cursor"]["firstBatch"]]

        found = self.retry.run(lambda: following(bounds.lower), self._what())
        while found:
            lower = found[0]
            yield lower
            found = self.retry.run(lambda lower=lower: following(lower), self._what())  # type: ignore[misc]

    def record_numbers(self, ids: list[Any]) -> list[int]:
        """See `Reader.record_numbers`."""
        options = {"sort": [("_id", 1)], "show_record_id": True, "batch_size": len(ids) + 1}

        def find() -> list[Any]:
            return list(self.collection.find({"_id": {"$in": ids}}, {"_id": 1}, **options))

        numbers = [document.get("$recordId") for document in self.retry.run(find, self._what())]
        # A document may be gone since the sample was taken: then numbers and documents cannot be matched any more.
        return numbers if len(numbers) == len(ids) and all(type(n) in (int, Int64) for n in numbers) else []

    def head(self, count: int, *, last: bool = False) -> list[Reply]:
        """See `Reader.head`."""
        options: dict[str, Any] = {"sort": [("_id", -1 if last else 1)], "limit": count}
        return self.retry.run(
            lambda: list(self.collection.find_raw_batches(self.query.where, self.projection, **options)),
            self._what(),
        )

    def read(
        self, bounds: IdRange, expected: int, ids: list[Any] | None = None, *, at: Timestamp | None = None
    ) -> list[Reply]:
        """See `Reader.read`."""
        return list(self._replies(bounds, max(2 * expected, 101), ids, at))

    def snapshot(self, at: Timestamp, rows: int) -> Iterator[Reply]:
        """The documents of the select as of a cluster time, by `_id`, about `rows` at a time.

        Raises:
            QueryError: The server has no snapshots, or none of that time any more; see `is_snapshot_lost`.
            ServerUnavailableError: The server cannot be read.
        """

        def end(direction: int) -> list[Any]:
            command = find_command(self.collection, self.query.where, {"_id": 1}, 1, limit=1, **_as_of(at))
            command["sort"] = {"_id": direction}
            return [document["_id"] for document in self._command(command, dict)["cursor"]["firstBatch"]]

        first = self.retry.run(lambda: end(1), self._what())
        last = self.retry.run(lambda: end(-1), self._what()) if first else []
        if first:
            whole = IdRange(lower=first[0], upper=last[0], closed=True, uniform=same_type(first[0], last[0]))
            yield from self._replies(whole, rows, None, at)

    def _replies(self, bounds: IdRange, most: int, ids: list[Any] | None, at: Timestamp | None) -> Iterator[Reply]:
        seen: Reply = b""  # the last reply: where a read goes on that breaks
        attempts = self.retry.attempts(self._what())
        while True:
            try:
                for reply in self._range(bounds, last_id(seen) if seen else None, most, ids, at):
                    attempts.succeeded()
                    seen = reply
                    yield reply
            except PyMongoError as error:
                attempts.failed(error)
            else:
                return

    def _range(
        self, bounds: IdRange, after: tuple[Any] | None, most: int, ids: list[Any] | None, at: Timestamp | None
    ) -> Iterator[Reply]:
        """What is left of a range, asked for with one command a reply: no cursor has to live on the server."""
        while True:
            where, options = self._bounded(bounds, after) if ids is None else self._named(ids, after)
            options |= {} if at is None else _as_of(at)
            command = find_command(self.collection, where, self.projection, most, **options)
            reply = found(self._command(command, RawBSONDocument).raw)
            if reply.documents:
                yield reply.documents
            if not reply.cursor:
                return
            with contextlib.suppress(PyMongoError):  # it would time out by itself
                self.collection.database.command("killCursors", self.collection.name, cursors=[reply.cursor])
            after = last_id(reply.documents)

    def explain_read(self, bounds: IdRange) -> Mapping[str, Any] | None:
        """See `Reader.explain_read`; None also for a user who may read but not explain."""
        where, options = self._bounded(bounds)
        command = find_command(self.collection, where, self.projection, 101, **options)
        command.pop("readConcern", None)
        try:
            answer = self._command({"explain": command, "verbosity": "executionStats"}, dict)
        except PyMongoError:
            return None
        return dict(answer)

    def _command(self, command: dict[str, Any], document_class: Any) -> Any:
        source = self.collection
        options = source.codec_options.with_options(document_class=document_class)
        return source.database.command(command, codec_options=options, read_preference=source.read_preference)

    def _bounded(self, bounds: IdRange, after: tuple[Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The filter of a range, from behind `after`, and what else `find` needs."""
        if bounds.uniform:
            upper = "$lte" if bounds.closed else "$lt"
            lower = {"$gte": bounds.lower} if after is None else {"$gt": after[0]}
            return _both(self.query.where, {"_id": {**lower, upper: bounds.upper}}), {}
        # `$gte` and `$lt` stay inside one type. Index bounds and `$expr` do not.
        start = bounds.lower if after is None else after[0]
        exact = [
            {"$gte" if after is None else "$gt": ["$_id", {"$literal": start}]},
            {"$lte" if bounds.closed else "$lt": ["$_id", {"$literal": bounds.upper}]},
        ]
        options: dict[str, Any] = {"hint": {"_id": 1}}
        if not (bounds.closed and isinstance(bounds.upper, MaxKey)):  # without a `max`, `min` leaves that one out
            options["min"] = {"_id": start}
        if not bounds.closed:
            options["max"] = {"_id": bounds.upper}
        return _both(self.query.where, {"$expr": {"$and": exact}}), options

    def _inside(self, bounds: IdRange) -> dict[str, Any]:
        """The filter of what lies between two bounds, of any types."""
        return self._bounded(replace(bounds, closed=False), (bounds.lower,))[0]

    def _named(self, ids: list[Any], after: tuple[Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The filter of these `_id`s, from behind `after`, which is one of them."""
        left = ids if after is None else ids[ids.index(after[0]) + 1 :]
        return _both(self.query.where, {"_id": {"$in": left}}), {}

    def drain(self, skip: int, rows: int) -> Iterator[Reply]:
        """See `Reader.drain`; a broken cursor is replaced by one that skips what was seen."""
        attempts = self.retry.attempts(self._what())
        while True:
            try:
                for raw in self._own_order(skip, rows):
                    attempts.succeeded()
                    skip += sum(1 for _ in offsets(raw))
                    yield raw
            except PyMongoError as error:
                attempts.failed(error)
            else:
                return

    def _own_order(self, skip: int, rows: int) -> Iterator[Reply]:
        query = self.query
        if query.runs_as_pipeline:
            stages = [
                *query.stages,
                *([{"$skip": skip}] if skip else []),
                {"$project": self.projection},
            ]
            with self.collection.aggregate_raw_batches(stages, batchSize=rows) as results:
                yield from results
            return
        left = 0 if query.limited is None else query.limited - skip
        if query.limited is not None and left <= 0:
            return
        with self.collection.find_raw_batches(
            query.where, self.projection, sort=query.total_order, skip=query.skipped + skip, limit=left,
            batch_size=rows,
        ) as cursor:  # fmt: skip
            yield from cursor

    def count(self, bounds: IdRange | None, *, at: Timestamp | None = None) -> int:
        """See `Reader.count`."""
        where, options = self.query.where, {}
        if at is not None and bounds is not None:
            return self._count_at(bounds, at)
        if bounds is not None:
            where, bounded = self._bounded(bounds)
            options = {"hint": bounded["hint"]} if "hint" in bounded else {}
        elif self.query.runs_as_pipeline:
            stages = [*self.query.stages, {"$count": "count"}]
            counts = self.retry.run(lambda: list(self.collection.aggregate(stages)), self._what())
            return sum(int(found["count"]) for found in counts)
        else:
            bounded = {"skip": self.query.skipped, "limit": self.query.limited}
            options = {name: value for name, value in bounded.items() if value}
        return int(self.retry.run(lambda: self.collection.count_documents(where, **options), self._what()))

    def _count_at(self, bounds: IdRange, at: Timestamp) -> int:
        where, options = self._bounded(bounds)
        options.pop("min", None)
        options.pop("max", None)
        stages = [{"$match": where}, {"$count": "count"}]
        command = {"aggregate": self.collection.name, "pipeline": stages, "cursor": {}, **options, **_as_of(at)}
        answer = self.retry.run(lambda: self._command(command, dict), self._what())
        return sum(int(one["count"]) for one in answer["cursor"]["firstBatch"])

    def size(self) -> int:
        """See `Reader.size`."""
        return int(self.retry.run(self.collection.estimated_document_count, self._what()))

    def _what(self) -> str:
        return f"reading collection {self.query.collection!r}"


def is_snapshot_lost(error: BaseException) -> bool:
    """Whether a read failed because the server cannot tell how the collection was at its cluster time."""
    return has_code(error.__cause__, NO_SNAPSHOT)


def _as_of(at: Timestamp) -> dict[str, Any]:
    return {"readConcern": {"level": "snapshot", "atClusterTime": at}}


def _both(where: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {"$and": [dict(where), dict(more)]} if where else dict(more)


@final
class MockReader(Reader):
    """Reads from mongomock: takes the select once, sorted as a server sorts, and encodes it when asked."""

    def __init__(self, database: Any, query: Query, projection: Mapping[str, Any], retry: RetryPolicy) -> None:
        super().__init__(database, query, projection, retry)
        self._documents: list[dict[str, Any]] | None = None
        self._keys: list[Any] = []

    def _snapshot(self) -> list[dict[str, Any]]:
        if self._documents is None:
            found = mock_documents(self.collection.database, replace(self.query, ordering=()), self.projection)
            keyed = sorted(((sort_key(d["_id"]), n) for n, d in enumerate(found)))
            self._keys = [key for key, _ in keyed]
            self._documents = [found[n] for _, n in keyed]
        return self._documents

    def _slice(self, bounds: IdRange) -> tuple[int, int]:
        self._snapshot()
        upper = sort_key(bounds.upper)
        end = (bisect.bisect_right if bounds.closed else bisect.bisect_left)(self._keys, upper)
        return bisect.bisect_left(self._keys, sort_key(bounds.lower)), end

    def ends(self) -> tuple[Any, Any] | None:
        """See `Reader.ends`."""
        documents = self._snapshot()
        return (documents[0]["_id"], documents[-1]["_id"]) if documents else None

    def walk(self, bounds: IdRange, step: int) -> Iterator[Any]:
        """See `Reader.walk`."""
        first, end = self._slice(bounds)
        documents = self._snapshot()
        yield from (documents[index]["_id"] for index in range(first + step, end, step))

    def head(self, count: int, *, last: bool = False) -> list[Reply]:
        """See `Reader.head`."""
        documents = self._snapshot()
        return [b"".join(map(encode, documents[-count:] if last else documents[:count]))]

    def read(
        self,
        bounds: IdRange,
        expected: int,  # noqa: ARG002 - of the interface
        ids: list[Any] | None = None,  # noqa: ARG002
        *,
        at: Timestamp | None = None,  # noqa: ARG002
    ) -> list[Reply]:
        """See `Reader.read`."""
        first, end = self._slice(bounds)
        return [b"".join(map(encode, self._snapshot()[first:end]))]

    def drain(self, skip: int, rows: int) -> Iterator[Reply]:
        """See `Reader.drain`."""
        query = self.query if self.query.is_pipeline else self.query.sort(self.query.total_order)
        found = mock_documents(self.collection.database, query, self.projection)
        for first in range(skip, len(found), rows):
            yield b"".join(map(encode, found[first : first + rows]))

    def count(self, bounds: IdRange | None, *, at: Timestamp | None = None) -> int:  # noqa: ARG002 - of the interface
        """See `Reader.count`."""
        if bounds is not None:
            first, end = self._slice(bounds)
            return end - first
        return sum(1 for reply in self.drain(0, 1000) for _ in offsets(reply))

    def size(self) -> int:
        """See `Reader.size`."""
        return int(self.collection.estimated_document_count())


def open_reader(database: Any, query: Query, projection: Mapping[str, Any], retry: RetryPolicy) -> Reader:
    """The reader that fits the database."""
    if is_mock(database):
        return MockReader(database, query, projection, retry)
    known = query if query.fold_name is None else query_for(database, query)
    return ServerReader(database, known, projection, retry)


@final
class DatabaseAccess:
    """The database, opened once in each process and closed by who opened it.

    Args:
        open_database: Opens the database; picklable where processes are spawned.
        database: An open database for this process, which is left open.
        query: What is read.
        projection: The fields.
        deadline_s: Seconds after which a broken read is given up.

    Attributes:
        query: What is read.
    """

    def __init__(
        self,
        open_database: Callable[[], Any],
        database: Any,
        *,
        query: Query,
        projection: Mapping[str, Any],
        deadline_s: float,
    ) -> None:
        self._open_database = open_database
        self.query, self._projection = query, projection
        self._retry = RetryPolicy(deadline_s=deadline_s)
        self._given = database
        self._home = os.getpid()
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "_opened": None, "_home": -1}

    def database(self) -> Any:
        """The database in this process: a client does not survive a fork."""
        if self._given is not None and self._home == os.getpid():
            return self._given
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._open_database())
        return self._opened[1]

    def reader(self, query: Query | None = None, projection: Mapping[str, Any] | None = None) -> Reader:
        """A reader in this process; `query` and `projection` in the place of its own."""
        return open_reader(self.database(), query or self.query, projection or self._projection, self._retry)

    def close(self) -> None:
        """Close what was opened in this process."""
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].client.close()
        self._opened = None
