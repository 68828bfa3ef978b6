"""Reads a set of documents once and says which they are: what a run was trained on, and what is new since.

A set is a row of two 64-bit hashes for each document, of its `_id` and of its content, and one digest over all.
The digest is the sum, modulo 2**256, of BLAKE2b-256 over each document as it was read: `_id` and the key's fields,
as raw BSON in the order in which they are stored (so a rewrite that only reorders fields counts as a change). That
is the additive hash of sets of Bellare and Micciancio ("A New Paradigm for Collision-Free Hashing", 1997): no
accident goes unnoticed, and it could be kept up to date document by document. It is no proof against an attacker
who may choose thousands of documents freely (Wagner, "A Generalized Birthday Problem", 2002); signatures are.

Guarantees: the digest does not depend on the order in which documents are read; equal `_id`s have equal hashes,
also `5`, `NumberLong(5)` and `5.0`, which MongoDB treats as one; memory is 16 bytes a document up to
`MOST_MEMBERS` and constant above, where only the count and the digest are kept; as bytes a set is the same on
every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final, Self, final

import bson
import numpy as np
from bson import Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from numpy.typing import NDArray

from mongotorch.data.decode import Reply, among, decode, id_keys, offsets
from mongotorch.data.prefetch import ThreadPrefetcher
from mongotorch.data.read import open_reader
from mongotorch.errors import DataError
from mongotorch.mongo.retry import RetryPolicy
from mongotorch.mongo.server_features import clock_of, cluster_time, is_mock
from mongotorch.query import Query
from mongotorch.signature import Key

Hashes = NDArray[np.uint64]
DIGEST_BYTES: Final = 32
MOST_MEMBERS: Final = 5_000_000
"""Documents, above which a set is known by its count and digest only."""
_MAGIC: Final = b"mtmember"
_HEAD: Final = struct.Struct(f"<8s{DIGEST_BYTES}s")
_BSON: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How many documents one set has that another has not.

    Attributes:
        added: Documents that only the later set holds.
        removed: Documents that only the earlier set holds.
        changed: Documents in both, whose fields differ.
    """

    added: int
    removed: int
    changed: int

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@final
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """The documents of a set.

    Attributes:
        count: How many there are.
        digest: Over all of them, in hex.
        rows: (count, 2) uint64, sorted: the hash of each `_id` and the hash of its content; None where there are
            more than `MOST_MEMBERS`.
    """

    count: int
    digest: str
    rows: Hashes | None = dataclasses.field(repr=False)

    @property
    def ids(self) -> Hashes:
        """The hashes of the `_id`s, ascending. Raises: DataError where the set is too large to be kept."""
        return np.ascontiguousarray(self._rows()[:, 0])

    def holds(self, document_id: Any) -> bool:
        """Whether the set holds the document of an `_id`; two `_id`s in 2**64 are taken for one.

        Raises:
            DataError: The set is too large to be kept, or BSON cannot hold such an `_id`.
        """
        return bool(among(np.array([id_key(document_id)], np.uint64), self.ids)[0])

    def difference(self, other: Members) -> Difference:
        """What came, went and changed from this set to a later one, counted by `_id`.

        Raises:
            DataError: One of them is too large to be kept.
        """
        before, after = _by_id(self._rows()), _by_id(other._rows())
        common, here, there = np.intersect1d(before[0], after[0], assume_unique=True, return_indices=True)
        changed = (before[1][here] != after[1][there]) | (before[2][here] != after[2][there])
        return Difference(
            added=len(after[0]) - len(common),
            removed=len(before[0]) - len(common),
            changed=int(np.count_nonzero(changed)),
        )

    def to_bytes(self) -> bytes:
        """All of it, as a blob. Raises: DataError where the set is too large to be kept."""
        return _HEAD.pack(_MAGIC, bytes.fromhex(self.digest)) + self._rows().astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """The set that `to_bytes` gave. Raises: DataError for anything else."""
        size = len(blob) - _HEAD.size
        if size < 0 or size % 16 or bytes(blob[:8]) != _MAGIC:
            raise DataError("these bytes are not the members of a set of documents")
        rows = np.frombuffer(blob, "<u8", offset=_HEAD.size).reshape(-1, 2).astype(np.uint64)
        return cls(count=len(rows), digest=_HEAD.unpack_from(blob)[1].hex(), rows=rows)

    def _rows(self) -> Hashes:
        if self.rows is None:
            raise DataError(
                f"the members of a set of {self.count} documents were not kept: more than {MOST_MEMBERS}"
            )
        return self.rows


def id_key(document_id: Any) -> int:
    """The hash of an `_id`, 64 bits, as it stands in the rows. Raises: DataError where BSON cannot hold it."""
    try:
        # As the server would give it back: with a date's zone and a UUID's class gone.
        raw = bson.encode({"_id": document_id}, codec_options=_BSON)
    except (BSONError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"BSON cannot hold the _id {document_id!r}: {error}", field="_id") from error
    return int(id_keys(decode(raw, ()).ids)[0])


def _by_id(rows: Hashes) -> tuple[Hashes, Hashes, NDArray[np.int64]]:
    """Each `_id` once, with the sum of its contents and how many it has: a pipeline may give one several times."""
    ids, starts, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
    sums = np.add.reduceat(rows[:, 1], starts) if len(ids) else rows[:0, 1]
    return ids, sums, counts


_READ: Final = 5_000  # documents a reply
_PREFETCH_BYTES: Final = 64 * 2**20


def scan_members(
    database: Any,
    query: Query,
    key: Any,
    *,
    read_deadline_s: float = 60.0,
    most: int = MOST_MEMBERS,
    members: Hashes | None = None,
    without: Hashes | None = None,
) -> Members:
    """Read a set of documents once, and say which they are.

    It is no snapshot: documents that change meanwhile are seen as they are when they are read.

    Args:
        database: A pymongo (or mongomock) database.
        query: The documents, the fold included.
        key: The fields that count besides `_id`; anything that `Key.parse` reads. None: no other field does.
        read_deadline_s: How long a broken read is tried again, in seconds.
        most: Documents, above which `rows` is None.
        members: Hashes of the `_id`s of the only documents that are taken, ascending; None takes all.
        without: Hashes of the `_id`s of documents that are left out, ascending.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    projection = {"_id": 1} if key is None else Key.parse(key).projection
    replies = _replies(database, query, projection, read_deadline_s)
    if members is not None:
        replies = (only(reply, members) for reply in replies)
    if without is not None:
        replies = (only(reply, without, inverted=True) for reply in replies)
    return members_of((reply for reply in replies if len(reply)), most=most)


def members_of(replies: Iterable[Reply], *, most: int = MOST_MEMBERS) -> Members:
    """The set of documents that are given as concatenated BSON, none of them empty; see `scan_members`."""
    kept: list[Hashes] | None = []
    content = ContentDigest()
    for reply in replies:
        digests = content.add(reply)
        if kept is not None and content.count <= most:
            kept.append(_hashes(reply, digests))
        else:
            kept = None
    if kept is None:
        return Members(count=content.count, digest=content.hex, rows=None)
    rows = np.concatenate([np.empty((0, 2), np.uint64), *kept])
    return Members(count=content.count, digest=content.hex, rows=rows[np.lexsort((rows[:, 1], rows[:, 0]))])


@final
class ContentDigest:
    """The digest of a set of documents, added to it in any order.

    Attributes:
        count: How many documents there are so far.
    """

    def __init__(self) -> None:
        self.count, self._total = 0, 0

    def add(self, *replies: Reply) -> NDArray[np.uint32]:
        """Add documents that are given as concatenated BSON; the digests of those of the last reply."""
        digests = np.empty((0, DIGEST_BYTES // 4), np.uint32)
        for reply in replies:
            digests = _digests(reply)
            self.count += len(digests)
            # Sums of 32-bit words cannot overflow 64 bits below 2**32 documents a reply.
            words = digests.sum(axis=0, dtype=np.uint64)
            self._total += sum(int(word) << (32 * n) for n, word in enumerate(words))
        return digests

    @property
    def hex(self) -> str:
        """The digest, as `Members.digest` has it."""
        rest: int = self._total % 2 ** (8 * DIGEST_BYTES)
        return rest.to_bytes(DIGEST_BYTES, "little").hex()


def only(reply: Reply, members: Hashes, *, inverted: bool = False) -> Reply:
    """Those of some documents whose `_id`s are among a set's.

    Args:
        reply: The documents, as concatenated BSON.
        members: Hashes of `_id`s, as `Members.ids` gives them, ascending.
        inverted: Give the other documents.
    """
    if not len(reply):
        return reply
    kept = among(_ids(reply), members) ^ inverted
    if kept.all():
        return reply
    return b"".join(reply[start:end] for (start, end), keep in zip(offsets(reply), kept, strict=True) if keep)


def only_once(replies: Iterable[Reply], members: Hashes) -> Iterator[Reply]:
    """The documents of a set, each once; ends behind the last of them, without reading on.

    Args:
        replies: Documents, as concatenated BSON.
        members: Hashes of `_id`s, as `Members.ids` gives them, ascending.
    """
    left = np.ones(len(members), np.bool_)
    for reply in replies:
        ids = _ids(reply)
        kept = among(ids, members)
        kept[kept] = left[np.searchsorted(members, ids[kept])]
        left[np.searchsorted(members, ids[kept])] = False
        if kept.any():
            cut = zip(offsets(reply), kept, strict=True)
            yield reply if kept.all() else b"".join(reply[start:end] for (start, end), keep in cut if keep)
        if not left.any():
            return


def unseen(
    database: Any, query: Query, seen: Hashes, *, limit: int | None = None, read_deadline_s: float = 60.0
) -> list[Any]:
    """The `_id`s of a query that are not among those of a set, in the order in which they are read.

    Args:
        database: A pymongo (or mongomock) database.
        query: The documents, the fold included.
        seen: Hashes of `_id`s, as `Members.ids` gives them, ascending.
        limit: The most `_id`s to give; None is all.
        read_deadline_s: How long a broken read is tried again, in seconds.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    found: list[Any] = []
    for reply in _replies(database, query, {"_id": 1}, read_deadline_s):
        columns = decode(reply, ())
        new = np.flatnonzero(~among(id_keys(columns.ids), seen))
        if len(new):
            values = columns.ids.values()
            found += [values[row] for row in new.tolist()]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def _replies(database: Any, query: Query, projection: dict[str, int], deadline_s: float) -> Iterator[Reply]:
    """The documents, as replies of concatenated BSON: the server reads the next ones while these are hashed."""
    whole = not query.is_pipeline and query.limited is None and not query.skipped
    # Where all are read, the order of `_id` needs no sort, and a broken cursor is resumed by an index.
    query = dataclasses.replace(query, ordering=()) if whole else query
    reader = open_reader(database, query, projection, RetryPolicy(deadline_s=deadline_s))
    if whole and is_mock(database):  # mongomock cannot sort `_id`s of every type, its reader can
        yield from (reply for reply in reader.head(reader.size()) if len(reply))
        return
    replies = ThreadPrefetcher(reader.drain(0, _READ), most=3, most_bytes=_PREFETCH_BYTES, weigh=len)
    try:
        yield from (reply for reply in replies if len(reply))
    finally:
        replies.close()


def _digests(reply: Reply) -> NDArray[np.uint32]:
    """BLAKE2b-256 of each document, as (n, 8) words."""
    view, blake = memoryview(reply), hashlib.blake2b
    parts = [blake(view[start:end], digest_size=DIGEST_BYTES).digest() for start, end in offsets(reply)]
    return np.frombuffer(b"".join(parts), "<u4").reshape(-1, 8)


def _hashes(reply: Reply, digests: NDArray[np.uint32]) -> Hashes:
    """The rows of a reply's documents."""
    return np.stack([_ids(reply), _contents(digests)], axis=1)


def _contents(digests: NDArray[np.uint32]) -> Hashes:
    return np.ascontiguousarray(digests[:, :2]).view("<u8").astype(np.uint64).reshape(-1)


def _ids(reply: Reply) -> Hashes:
    """The hash of each document's `_id`; one without an `_id` (of a pipeline) is known by its content."""
    columns = decode(reply, ())
    ids = id_keys(columns.ids)
    if isinstance(columns.ids.data, list) and None in columns.ids.data:
        there = ["_id" in RawBSONDocument(reply[start:end]) for start, end in offsets(reply)]
        ids = np.where(there, ids, _contents(_digests(reply)))
    return ids


def watermark(database: Any, *, read_deadline_s: float = 60.0) -> Timestamp | datetime:
    """The cluster time; the server's time, naive UTC, on a standalone server, and this machine's on mongomock.

    Args:
        database: A pymongo (or mongomock) database.
        read_deadline_s: How long a server that does not answer is asked again, in seconds.

    Raises:
        ServerUnavailableError: It did not answer.
    """
    policy = RetryPolicy(deadline_s=read_deadline_s)
    return policy.run(lambda: cluster_time(database) or clock_of(database).now(), "asking for the time")
