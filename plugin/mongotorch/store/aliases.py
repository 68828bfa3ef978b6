"""Stores the aliases: names that point at a version and can be moved. Each move is a document of its own.

`follow_alias` waits for the next move: by a change stream, or by looking again where there is none.

Guarantees: a move is one insert whose `_id` contains its number, so that of two at once one fails; moves are never
changed or removed, so that the alias can be read as of any time; times do not decrease from one move to the next;
a job moves an alias once; a move is returned only if its signature is valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import socket
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Self, final

from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.component import IDENTIFIER
from mongotorch.errors import ConflictError, IdentifierError, ParameterError, StoreError, TrustError
from mongotorch.mongo.change_stream import Wake, open_stream, poller
from mongotorch.mongo.driver_errors import driver_errors, repeated
from mongotorch.mongo.server_features import Now, clock_of, ensure_indexes, records
from mongotorch.notebook import cut
from mongotorch.store.signing import Trust

COLLECTION: Final = "mt.aliases"
KIND: Final = "alias"
LIVE: Final = "live"
_NAME: Final = ("type_id", "identifier", "alias")


@final
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Move:
    """One move of an alias.

    Attributes:
        type_id: The kind of the versions.
        identifier: The name of the versions.
        alias: The alias.
        n: The number of the move: 1, 2, 3, ...
        from_uuid: The version before the move; None: there was none.
        to_uuid: The version after the move; None: none, since it was removed.
        from_version: The version number of `from_uuid`.
        to_version: The version number of `to_uuid`.
        who: Who moved it.
        when: When, by the database's clock, naive UTC in whole milliseconds.
        why: The reason given.
        job: The job that moved it; None: a person did.
    """

    type_id: str
    identifier: str
    alias: str
    n: int
    from_uuid: str | None
    to_uuid: str | None
    from_version: int | None
    to_version: int | None
    who: str
    when: datetime
    why: str
    job: str | None = None

    def __repr__(self) -> str:
        ends = " -> ".join("nothing" if end is None else str(end) for end in (self.from_version, self.to_version))
        why = f", why={cut(self.why, 100)!r}" if self.why else ""
        what = f"{self.alias!r} of {self.type_id} {self.identifier!r}: {ends}"
        return f"Move({what}, n={self.n}, when={self.when:%Y-%m-%dT%H:%M:%S}, who={cut(self.who, 60)!r}{why})"

    @property
    def name(self) -> tuple[str, str, str]:
        """Kind, identifier and alias."""
        return self.type_id, self.identifier, self.alias

    def to_document(self) -> dict[str, Any]:
        """The document that is stored."""
        fields = dataclasses.asdict(self)
        for end in ("from", "to"):
            fields[end] = fields.pop(f"{end}_uuid")
        return {"_id": f"{self.type_id}/{self.identifier}/{self.alias}#{self.n}", **WRITTEN, **fields}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The move that a document stores. Raises: TrustError where it is no move, or has the `_id` of another."""
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            move = cls(**{name: document[name.removesuffix("_uuid")] for name in names})
        except KeyError as error:
            raise TrustError(f"alias entry {document.get('_id')} lacks {error}; nobody here wrote it") from error
        ends = (move.from_uuid, move.to_uuid)
        if document["_id"] != move.to_document()["_id"] or not all(isinstance(end, str | None) for end in ends):
            raise TrustError(f"alias entry {document['_id']} is no move of that alias; nobody here wrote it")
        return move


@final
class Aliases:
    """The moves of the aliases of one database.

    Args:
        database: The driver's database.
        trust: Signs moves and verifies what is read; None does neither.
        now: A clock instead of the server's, naive UTC; for tests.
    """

    def __init__(self, database: Any, trust: Trust | None = None, now: Now | None = None) -> None:
        self._documents = records(database, COLLECTION)
        self._trust = trust
        self._clock = clock_of(database, now)

    @repeated("preparing the aliases")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        by_name = [(field, 1) for field in _NAME]
        of_job = {"job": {"$type": "string"}}
        ensure_indexes(
            self._documents,
            IndexModel([*by_name, ("n", -1)], unique=True),
            IndexModel([*by_name, ("job", 1)], unique=True, partialFilterExpression=of_job),
            IndexModel("to"),
        )

    @repeated("reading an alias")
    def head(self, type_id: str, identifier: str, alias: str = LIVE) -> Move | None:
        """The newest move; None where the alias was never moved. Raises: TrustError, FormatError."""
        return self._newest(_named(type_id, identifier, alias))

    @repeated("reading an alias")
    def at(self, type_id: str, identifier: str, moment: datetime, alias: str = LIVE) -> Move | None:
        """The newest move at a time (aware, or naive UTC), or None. Raises: TrustError, FormatError."""
        return self._newest({**_named(type_id, identifier, alias), **_until(moment)})

    @repeated("reading the history of an alias")
    def history(
        self, type_id: str, identifier: str, alias: str = LIVE, *, until: datetime | None = None
    ) -> list[Move]:
        """The moves, oldest first, up to `until` (aware, or naive UTC). Raises: TrustError, FormatError."""
        where = {**_named(type_id, identifier, alias), **({} if until is None else _until(until))}
        return [self._checked(document) for document in self._documents.find(where).sort("n", 1)]

    @repeated("reading the history of aliases")
    def moves(self, since: datetime) -> list[Move]:
        """The moves of all aliases since a time (naive UTC), oldest first. Raises: TrustError, FormatError."""
        found = self._documents.find({"when": {"$gte": since}}).sort([("when", 1), ("_id", 1)])
        return [self._checked(document) for document in found]

    @repeated("looking for aliases")
    def names(self, uuids: Iterable[str]) -> list[Move]:
        """The newest moves of the aliases that now name one of these uuids. Raises: TrustError, FormatError."""
        targets = set(uuids)
        found = self._documents.find({"to": {"$in": sorted(targets)}}, dict.fromkeys(_NAME, 1))
        names = sorted({tuple(document[field] for field in _NAME) for document in found})
        heads = (self.head(*name) for name in names)
        return [head for head in heads if head is not None and head.to_uuid in targets]

    @repeated("listing aliases")
    def aliases(self, type_id: str, identifier: str) -> list[str]:
        """The aliases of an identifier that now name a version, sorted. Raises: TrustError, FormatError."""
        known = self._documents.distinct("alias", {"type_id": type_id, "identifier": identifier})
        heads = [self.head(type_id, identifier, alias) for alias in sorted(known)]
        return [head.alias for head in heads if head is not None and head.to_uuid is not None]

    @driver_errors("moving an alias")
    def move(
        self,
        type_id: str,
        identifier: str,
        alias: str = LIVE,
        *,
        to: Mapping[str, Any] | None,
        expected: Move | None,
        who: str,
        why: str,
        job: str | None = None,
    ) -> Move:
        """Move an alias, unless somebody else moved it meanwhile.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            to: The document of the version that it will name; None: no version.
            expected: The newest move that the caller knows; None: it was never moved.
            who: Who moves it.
            why: The reason.
            job: The job that moves it; a job moves an alias once.

        Returns:
            The move; for a job that has moved this alias before, that earlier move.

        Raises:
            ConflictError: Somebody has moved it since; the message says who.
            IdentifierError: The alias is not a valid name.
            ParameterError: The document is of another kind or name.
            TrustError: A stored move is not what a trusted key signed.
            FormatError: A newer release wrote a stored move.
        """
        if not IDENTIFIER.fullmatch(alias):
            raise IdentifierError(
                f"alias {alias!r}: use letters, digits and _ . - (not first), at most 200", field="alias"
            )
        if to is not None and (to["type_id"], to["identifier"]) != (type_id, identifier):
            raise ParameterError(f"{to['_id']} is no version of {type_id} {identifier!r}", field="uuid")
        with self._clock.alone():
            done = self._of_job(type_id, identifier, alias, job)
            if done is not None:
                return done
            self._refuse_if_moved(expected, self.head(type_id, identifier, alias))
            name = _named(type_id, identifier, alias)
            move = self._next(expected, to, **name, who=who, why=why, job=job)
            document = move.to_document()
            if self._trust is not None:
                document = self._trust.sign(document, kind=KIND)
            try:
                self._documents.insert_one(document)
            except DuplicateKeyError:
                done = self._of_job(type_id, identifier, alias, job)
                if done is not None:
                    return done
                self._refuse_if_moved(expected, self.head(type_id, identifier, alias))
                raise
        return move

    def _next(self, before: Move | None, to: Mapping[str, Any] | None, **fields: Any) -> Move:
        now = self._clock.now()
        return Move(
            n=1 if before is None else before.n + 1,
            from_uuid=None if before is None else before.to_uuid,
            to_uuid=None if to is None else to["_id"],
            from_version=None if before is None else before.to_version,
            to_version=None if to is None else to["version"],
            # The clock of a new primary may be behind that of the one before it.
            when=now if before is None else max(now, before.when),
            **fields,
        )

    def _of_job(self, type_id: str, identifier: str, alias: str, job: str | None) -> Move | None:
        return None if job is None else self._newest({**_named(type_id, identifier, alias), "job": job})

    def _newest(self, where: Mapping[str, Any]) -> Move | None:
        found = self._documents.find_one(where, sort=[("n", -1)])
        return None if found is None else self._checked(found)

    def _checked(self, document: Mapping[str, Any]) -> Move:
        check_format(document, KIND)
        if self._trust is not None:
            self._trust.check(document, kind=KIND)
        return Move.from_document(document)

    @staticmethod
    def _refuse_if_moved(expected: Move | None, head: Move | None) -> None:
        if head == expected:
            return
        if head is None:
            raise ConflictError(f"the move that was expected is not there: {expected}")
        names = "nothing" if head.to_uuid is None else f"version {head.to_version}"
        raise ConflictError(
            f"{head.alias!r} of {head.type_id} {head.identifier!r} names {names} since {head.who} moved it at "
            f"{head.when} UTC ({head.why or 'no reason given'}); look again, then decide"
        )


def current_user() -> str:
    """The user of this process, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = "nobody"
    return f"{user}@{socket.gethostname()}"


def _named(type_id: str, identifier: str, alias: str) -> dict[str, Any]:
    return dict(zip(_NAME, (type_id, identifier, alias), strict=True))


def _until(moment: datetime) -> dict[str, Any]:
    naive = moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    return {"when": {"$lte": naive}}


@contextlib.contextmanager
def follow_alias(database: Any, type_id: str, identifier: str, alias: str) -> Iterator[Wake]:
    """Wait for moves of an alias, as a context manager.

    Args:
        database: The driver's database.
        type_id: The kind.
        identifier: The name.
        alias: The alias.

    Yields:
        A function that returns when the alias was moved, or after a second at most. It raises StoreError or
        ServerUnavailableError when the stream broke: look at the alias, and open another one.

    Raises:
        ServerUnavailableError: The server cannot be reached.
    """
    moved = _named(type_id, identifier, alias)
    match = {"operationType": "insert", **{f"fullDocument.{field}": value for field, value in moved.items()}}
    stream = open_stream(records(database, COLLECTION), match, doing="following an alias")
    if stream is None:
        yield poller()
        return

    def wake(left: float) -> None:  # noqa: ARG001 - how long the server waits was set when the stream was opened
        with driver_errors("following an alias"):
            if stream.alive:
                stream.try_next()
                return
        raise StoreError("following an alias: the server ended the change stream")

    with stream:
        yield wake
