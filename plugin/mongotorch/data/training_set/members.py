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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Self, final

import numpy as np
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from numpy.typing import NDArray

from mongotorch.data.decode import Documents, Reply, among, decode, encode, id_keys, offsets
from mongotorch.data.prefetch import ThreadPrefetcher, close_iterator
from mongotorch.data.read import open_reader
from mongotorch.errors import DataError
from mongotorch.mongo.driver_errors import RetryPolicy
from mongotorch.mongo.server_features import is_mock
from mongotorch.query import Query
from mongotorch.signature import Key

Hashes = NDArray[np.uint64]
DIGEST_BYTES: Final = 32
MOST_MEMBERS: Final = 5_000_000
"""Documents, above which a set is known by its count and digest only."""
_MAGIC: Final = b"mtmember"
MEMBERS_HEAD: Final = struct.Struct(f"<8s{DIGEST_BYTES}s")
"""What the bytes of a set begin with."""


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
        return MEMBERS_HEAD.pack(*self.head_of(self.digest)) + self._rows().astype("<u8").tobytes()

    @staticmethod
    def head_of(digest: str) -> tuple[bytes, bytes]:
        """The values of `MEMBERS_HEAD` for the set of a digest."""
        return _MAGIC, bytes.fromhex(digest)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """The set that `to_bytes` gave. Raises: DataError for anything else."""
        size = len(blob) - MEMBERS_HEAD.size
        if size < 0 or size % 16 or bytes(blob[:8]) != _MAGIC:
            raise DataError("these bytes are not the members of a set of documents")
        rows = np.frombuffer(blob, "<u8", offset=MEMBERS_HEAD.size).reshape(-1, 2).astype(np.uint64, copy=False)
        return cls(count=len(rows), digest=MEMBERS_HEAD.unpack_from(blob)[1].hex(), rows=rows)

    def _rows(self) -> Hashes:
        if self.rows is None:
            raise DataError(
                f"the members of a set of {self.count} documents were not kept: more than {MOST_MEMBERS}"
            )
        return self.rows


_DELTA: Final = b"mtdelta1"
_DELTA_HEAD: Final = struct.Struct(f"<8s{DIGEST_BYTES}sQIIQ")  # magic, digest, count, position, ancestors, removed
_STEP: Final = 8  # a chain has at most 7 deltas for each power of 8 in its position
_NAME_BYTES: Final = 32
_COMPARED: Final = 1_000  # rows of two sets that are compared at a time


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """How a stored set differs from another one; the first of a chain has the whole set.

    Attributes:
        digest: Of the set.
        count: How many documents the set has.
        position: How many sets were stored before it, since the last whole one.
        ancestors: The names of the blobs of the sets that it builds on, the whole one first.
        removed: The hashes of the `_id`s of the last ancestor that the set lacks, or has with other fields.
        added: The rows that it has besides, sorted as `Members.rows` are.
    """

    digest: str
    count: int
    position: int
    ancestors: tuple[str, ...]
    removed: Hashes = dataclasses.field(repr=False)
    added: Hashes = dataclasses.field(repr=False)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """What a blob holds. Raises: DataError where it is none of a set of documents."""
        if bytes(blob[:8]) == _MAGIC:
            whole = Members.from_bytes(blob)
            none = np.empty(0, np.uint64)
            return cls(
                digest=whole.digest, count=whole.count, position=0, ancestors=(), removed=none, added=whole._rows()
            )
        if len(blob) < _DELTA_HEAD.size or bytes(blob[:8]) != _DELTA:
            raise DataError("these bytes are not the members of a set of documents")
        _, digest, count, position, ancestors, removed = _DELTA_HEAD.unpack_from(blob)
        names_end = _DELTA_HEAD.size + ancestors * _NAME_BYTES
        added_start = names_end + removed * 8
        if len(blob) < added_start or (len(blob) - added_start) % 16:
            raise DataError("these bytes are not the members of a set of documents")
        names = bytes(blob[_DELTA_HEAD.size : names_end]).hex()
        return cls(
            digest=digest.hex(),
            count=count,
            position=position,
            ancestors=tuple(names[at : at + 2 * _NAME_BYTES] for at in range(0, len(names), 2 * _NAME_BYTES)),
            removed=np.frombuffer(blob, "<u8", removed, names_end).astype(np.uint64, copy=False),
            added=np.frombuffer(blob, "<u8", offset=added_start).reshape(-1, 2).astype(np.uint64, copy=False),
        )

    def to_bytes(self) -> bytes:
        """All of it, as a blob."""
        head = _DELTA_HEAD.pack(
            _DELTA,
            bytes.fromhex(self.digest),
            self.count,
            self.position,
            len(self.ancestors),
            len(self.removed),
        )
        names = b"".join(map(bytes.fromhex, self.ancestors))
        return head + names + self.removed.astype("<u8").tobytes() + self.added.astype("<u8").tobytes()

    @classmethod
    def look_up(cls, blob: bytes, key: int) -> tuple[bool | None, str | None]:
        """Whether a set holds the document of an `_id`'s hash, and the name of its last ancestor, if any.

        None: as that ancestor does. Raises: DataError where the blob is none of a set of documents.
        """
        # Most deltas do not name the document at all, which their bytes tell faster than their rows.
        is_delta = bytes(blob[:8]) == _DELTA and len(blob) >= _DELTA_HEAD.size
        if is_delta and key.to_bytes(8, "little") not in blob:
            ancestors = _DELTA_HEAD.unpack_from(blob)[4]
            end = _DELTA_HEAD.size + ancestors * _NAME_BYTES
            if ancestors and end <= len(blob):
                return None, bytes(blob[end - _NAME_BYTES : end]).hex()
        found, one = cls.from_bytes(blob), np.array([key], np.uint64)
        before = found.ancestors[-1] if found.ancestors else None
        if among(one, np.ascontiguousarray(found.added[:, 0]))[0]:
            return True, before
        return (False if before is None or among(one, found.removed)[0] else None), before


@final
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredMembers:
    """A set as it is stored: whole, or by what differs from a set that is stored already.

    The chain of a set has few deltas, and each is against a near set: the set at position p builds on that at p
    without the last of its octal digits that is not zero, less one (as skip deltas of Subversion do). So a set is
    read with a few requests, and a set that changes little costs little, however many there are.

    Attributes:
        members: The set.
        blobs: The blobs that it is made of, by name: that of the whole set first, its own last.
    """

    members: Members
    blobs: Mapping[str, bytes] = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The name of its own blob."""
        return list(self.blobs)[-1]

    @classmethod
    def made(cls, members: Members, before: StoredMembers | None = None) -> Self:
        """Store a set after another one.

        Args:
            members: The set.
            before: A set that is stored, and that is likely to be almost the same.

        Raises:
            DataError: The set is too large to be kept.
        """
        if before is not None and (made := cls.after(members, before)) is not None:
            return made
        whole = members.to_bytes()
        return cls(members=members, blobs={_name(whole): whole})

    @classmethod
    def after(cls, members: Members, before: StoredMembers) -> Self | None:
        """A set as what differs from another one; None where it is better stored whole. Raises: see `made`."""
        if (members.digest, members.count) == (before.members.digest, before.members.count):
            return cls(members=members, blobs=before.blobs)
        found = _delta(members, before)
        if found is None:
            return None
        delta, chain = found
        blob, whole_bytes = delta.to_bytes(), MEMBERS_HEAD.size + 16 * members.count
        deltas = len(blob) + sum(len(one) for one in list(chain.values())[1:])
        if 2 * len(blob) > whole_bytes or deltas > whole_bytes:
            return None
        return cls(members=members, blobs={**chain, _name(blob): blob})

    @classmethod
    def read(cls, name: str, get: Callable[[Iterable[str]], Iterable[tuple[str, bytes]]]) -> Self:
        """Read a set.

        Args:
            name: The name of its own blob.
            get: Reads blobs by their names.

        Raises:
            DataError: A blob is not what it should be.
        """
        own = dict(get([name]))[name]
        ancestors = Delta.from_bytes(own).ancestors if bytes(own[:8]) != _MAGIC else ()
        read = dict(get(ancestors)) if ancestors else {}
        blobs = {**{ancestor: read[ancestor] for ancestor in ancestors}, name: own}
        return cls(members=_composed([Delta.from_bytes(blob) for blob in blobs.values()]), blobs=blobs)


def _name(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _delta(members: Members, before: StoredMembers) -> tuple[Delta, dict[str, bytes]] | None:
    """How a set differs from the one that it builds on, and the chain up to that; None: it is stored whole."""
    chain = {name: Delta.from_bytes(blob) for name, blob in before.blobs.items()}
    position = list(chain.values())[-1].position + 1
    step = 1
    while position % (step * _STEP) == 0:
        step *= _STEP
    names = [name for name, delta in chain.items() if delta.position <= position - step]
    of_base = before.members if len(names) == len(chain) else _composed([chain[name] for name in names])
    base, rows = of_base._rows(), members._rows()
    if not len(base) or not len(rows):
        return None
    unequal = [pair for pair in _aligned(base, rows) if not np.array_equal(*pair)]
    # Where an `_id` comes several times, it does not say which row went. A base of several blobs has none such.
    if any(map(_has_several, [part for _, part in unequal] + ([base] if len(names) == 1 else []))):
        return None
    parts = [(base[:0, 0], rows[:0]), *(_differing(*pair) for pair in unequal)]
    delta = Delta(
        digest=members.digest,
        count=members.count,
        position=position,
        ancestors=tuple(names),
        removed=np.concatenate([removed for removed, _ in parts]),
        added=np.concatenate([added for _, added in parts]),
    )
    return delta, {name: before.blobs[name] for name in names}


def _aligned(base: Hashes, rows: Hashes) -> Iterator[tuple[Hashes, Hashes]]:
    """Two sets of rows, in parts of the same `_id`s: most are equal, and the others take little memory."""
    count = max(len(base) // _COMPARED, 1)
    bounds = base[np.arange(1, count) * len(base) // count, 0]
    yield from zip(
        np.split(base, np.searchsorted(base[:, 0], bounds)),
        np.split(rows, np.searchsorted(rows[:, 0], bounds)),
        strict=True,
    )


def _has_several(rows: Hashes) -> bool:
    """Whether an `_id` comes several times."""
    return bool((rows[1:, 0] == rows[:-1, 0]).any())


def _differing(base: Hashes, rows: Hashes) -> tuple[Hashes, Hashes]:
    """The hashes of the `_id`s that the second set lacks or has with other fields, and the rows it has besides."""
    if not len(base):
        return base[:, 0], rows
    at = np.minimum(np.searchsorted(base[:, 0], rows[:, 0]), len(base) - 1)
    same, removed = (base[at] == rows).all(axis=1), np.ones(len(base), np.bool_)
    removed[at[same]] = False
    return base[removed, 0], rows[~same]


def _composed(chain: list[Delta]) -> Members:
    """The set that a chain of deltas ends with."""
    root, rest, last = chain[0].added, chain[1:], chain[-1]
    if rest:
        # What happened to each `_id`, the newest first: only that counts.
        events = np.concatenate([part for delta in reversed(rest) for part in _events(delta)])
        ids, newest = np.unique(events[:, 0], return_index=True)
        added = events[newest][events[newest, 2] == 1][:, :2]
        # A set is far larger than what changes in it: that is looked for in the set, and not the other way round.
        there = np.ascontiguousarray(root[:, 0])
        root = np.delete(root, np.searchsorted(there, ids[among(ids, there)]), axis=0)
        root = np.insert(root, np.searchsorted(root[:, 0], added[:, 0]), added, axis=0)
    if len(root) != last.count:
        raise DataError(f"a set of {last.count} documents came out as one of {len(root)}; a blob of it is wrong")
    return Members(count=last.count, digest=last.digest, rows=root)


def _events(delta: Delta) -> tuple[Hashes, Hashes]:
    """What a delta does, the newest first: (`_id`, content, 1 for added and 0 for removed)."""
    removed = np.zeros((len(delta.removed), 3), np.uint64)
    removed[:, 0] = delta.removed
    return np.insert(delta.added, 2, 1, axis=1), removed


def id_key(document_id: Any) -> int:
    """The hash of an `_id`, 64 bits, as it stands in the rows. Raises: DataError where BSON cannot hold it."""
    try:
        # As the server would give it back: with a date's zone and a UUID's class gone.
        raw = encode({"_id": document_id})
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
_FULL_BYTES: Final = 2**23  # of a reply that may have been cut for its size, which is 16 MB at most
_LARGE: Final = 250_000  # documents, which are scanned in about a second


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
            kept.append(rows_of(reply, digests))
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


def is_large(database: Any, query: Query, *, read_deadline_s: float = 60.0) -> bool:
    """Whether a scan of a query's collection takes a second or more, by the server's estimate of its size.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    reader = open_reader(database, query, {"_id": 1}, RetryPolicy(deadline_s=read_deadline_s))
    return reader.size() > _LARGE


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
    whole = query.is_whole
    # Where all are read, the order of `_id` needs no sort, and a broken cursor is resumed by an index.
    query = dataclasses.replace(query, ordering=()) if whole else query
    reader = open_reader(database, query, projection, RetryPolicy(deadline_s=deadline_s))
    if whole and is_mock(database):  # mongomock cannot sort `_id`s of every type, its reader can
        yield from (reply for reply in reader.head(reader.size()) if len(reply))
        return
    replies = source = reader.drain(0, _READ)
    try:
        first = next(source, b"")
        if len(first):
            yield first
        # One that is not full is the last: a thread would only be waited for.
        if len(first) > _FULL_BYTES or sum(1 for _ in offsets(first)) >= _READ:
            replies = ThreadPrefetcher(source, most=3, most_bytes=_PREFETCH_BYTES, weigh=len)
        yield from (reply for reply in replies if len(reply))
    finally:
        close_iterator(replies)


def _digests(reply: Reply) -> NDArray[np.uint32]:
    """BLAKE2b-256 of each document, as (n, 8) words."""
    view, blake = reply if isinstance(reply, Documents) else memoryview(reply), hashlib.blake2b
    parts = [blake(view[start:end], digest_size=DIGEST_BYTES).digest() for start, end in offsets(reply)]
    return np.frombuffer(b"".join(parts), "<u4").reshape(-1, 8)


def rows_of(reply: Reply, digests: NDArray[np.uint32]) -> Hashes:
    """The rows of a reply's documents, whose digests `ContentDigest.add` gave; not sorted."""
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
