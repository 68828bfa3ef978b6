"""Reads a set of documents and says which they are: what a run was trained on, and what is new since.

Always: the digest does not depend on the order in which documents are read; memory is 16 bytes a document up to
`MOST_MEMBERS` and constant above, where there are only the count and the digest.

The digest is the sum, modulo 2**256, of BLAKE2b-256 over each document as it was read: `_id` and the key's fields,
as raw BSON in the order in which they are stored (so a rewrite that only reorders fields counts as a change).
That is the additive hash of sets of Bellare and Micciancio ("A New Paradigm for Collision-Free Hashing", 1997): no
accident goes unnoticed, and it could be kept up to date document by document. It is no proof against somebody
who may choose thousands of documents freely (Wagner, "A Generalized Birthday Problem", 2002); signatures are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from bson.raw_bson import RawBSONDocument
from numpy.typing import NDArray

from mongotorch.data.columns import decode
from mongotorch.data.members import DIGEST_BYTES, MOST_MEMBERS, Hashes, Members, among
from mongotorch.data.mockreader import MockReader, open_reader
from mongotorch.data.patience import Patience
from mongotorch.data.prefetch import Ahead
from mongotorch.data.reader import offsets
from mongotorch.data.replies import Chunk
from mongotorch.key import Key
from mongotorch.query import Query

_READ: Final = 5_000  # documents a reply
_AHEAD_BYTES: Final = 64 * 2**20


def scan_members(
    database: Any, query: Query, key: Any, *, read_deadline_s: float = 60.0, most: int = MOST_MEMBERS
) -> Members:
    """Read a set of documents once, and say which they are.

    It is no snapshot: documents that change meanwhile are seen as they are when they are read.

    Args:
        database: A pymongo (or mongomock) database.
        query: The documents, the fold included.
        key: The fields that count besides `_id`; anything that `Key.parse` reads.
        read_deadline_s: How long a broken read is tried again, in seconds.
        most: Documents, above which `rows` is None.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    return members_of(_chunks(database, query, Key.parse(key).projection, read_deadline_s), most=most)


def members_of(chunks: Iterable[Chunk], *, most: int = MOST_MEMBERS) -> Members:
    """The set of documents that are given as concatenated BSON, none of them empty; see `scan_members`."""
    kept: list[Hashes] | None = []
    count, total = 0, 0
    for chunk in chunks:
        digests = _digests(chunk)
        count += len(digests)
        # Sums of 32-bit words cannot overflow 64 bits below 2**32 documents a chunk.
        words = digests.sum(axis=0, dtype=np.uint64)
        total += sum(int(word) << (32 * n) for n, word in enumerate(words))
        kept = None if kept is None or count > most else [*kept, _hashes(chunk, digests)]
    digest = (total % 2 ** (8 * DIGEST_BYTES)).to_bytes(DIGEST_BYTES, "little").hex()
    if kept is None:
        return Members(count=count, digest=digest, rows=None)
    rows = np.concatenate([np.empty((0, 2), np.uint64), *kept])
    return Members(count=count, digest=digest, rows=rows[np.lexsort((rows[:, 1], rows[:, 0]))])


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
    for chunk in _chunks(database, query, {"_id": 1}, read_deadline_s):
        columns = decode(chunk, ())
        new = np.flatnonzero(~among(columns.id_keys(), seen))
        if len(new):
            values = columns.ids.values()
            found += [values[row] for row in new.tolist()]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def _chunks(database: Any, query: Query, projection: dict[str, int], deadline_s: float) -> Iterator[Chunk]:
    """The documents, as concatenated BSON: the server reads the next ones while some are looked at."""
    whole = not query.is_pipeline and query.limited is None and not query.skipped
    # Where all are read, the order of `_id` needs no sort, and a broken cursor is resumed by an index.
    query = dataclasses.replace(query, ordering=()) if whole else query
    reader = open_reader(database, query, projection, Patience(deadline_s=deadline_s))
    if whole and isinstance(reader, MockReader):  # mongomock cannot sort `_id`s of every type, its reader can
        yield from (chunk for chunk in reader.head(reader.size()) if len(chunk))
        return
    chunks = Ahead(reader.drain(0, _READ), most=3, most_bytes=_AHEAD_BYTES, weigh=len)
    try:
        yield from (chunk for chunk in chunks if len(chunk))
    finally:
        chunks.close()


def _digests(chunk: Chunk) -> NDArray[np.uint32]:
    """BLAKE2b-256 of each document, as (n, 8) words."""
    view, blake = memoryview(chunk), hashlib.blake2b
    parts = [blake(view[start:end], digest_size=DIGEST_BYTES).digest() for start, end in offsets(chunk)]
    return np.frombuffer(b"".join(parts), "<u4").reshape(-1, 8)


def _hashes(chunk: Chunk, digests: NDArray[np.uint32]) -> Hashes:
    """The rows of a chunk's documents; one without an `_id` (of a pipeline) is known by its content."""
    columns = decode(chunk, ())
    contents = np.ascontiguousarray(digests[:, :2]).view("<u8").astype(np.uint64).reshape(-1)
    ids = columns.id_keys()
    if isinstance(columns.ids.data, list) and None in columns.ids.data:
        there = ["_id" in RawBSONDocument(chunk[start:end]) for start, end in offsets(chunk)]
        ids = np.where(there, ids, contents)
    return np.stack([ids, contents], axis=1)
