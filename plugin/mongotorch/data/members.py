"""Which documents a set holds: a row of two 64-bit hashes for each, and one digest over them all.

Always: it is a value; equal `_id`s have equal hashes, also `5`, `NumberLong(5)` and `5.0`, which MongoDB takes for
one; as bytes it is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, Final, Self, final

import bson
import numpy as np
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from numpy.typing import NDArray

from mongotorch.data.columns import decode
from mongotorch.errors import DataError

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
        digest: Over all of them, in hex; see `membership`.
        rows: (count, 2) uint64, sorted: the hash of each `_id` and the hash of its content; None where there are
            more than `MOST_MEMBERS`.
    """

    count: int
    digest: str
    rows: Hashes | None = dataclasses.field(repr=False)

    @property
    def ids(self) -> Hashes:
        """The hashes of the `_id`s, ascending. Raises: DataError where the set is too large to be kept."""
        return self._rows()[:, 0]

    def holds(self, document_id: Any) -> bool:
        """Whether the set holds the document of an `_id`; two `_id`s in 2**64 are taken for one.

        Raises:
            DataError: The set is too large to be kept, or BSON cannot hold such an `_id`.
        """
        return bool(among(np.array([id_hash(document_id)], np.uint64), self.ids)[0])

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


def id_hash(document_id: Any) -> int:
    """The hash of an `_id`, 64 bits, as it stands in the rows. Raises: DataError where BSON cannot hold it."""
    try:
        # As the server would give it back: with a date's zone and a UUID's class gone.
        raw = bson.encode({"_id": document_id}, codec_options=_BSON)
    except (BSONError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"BSON cannot hold the _id {document_id!r}: {error}", field="_id") from error
    return int(decode(raw, ()).id_keys()[0])


def _by_id(rows: Hashes) -> tuple[Hashes, Hashes, NDArray[np.int64]]:
    """Each `_id` once, with the sum of its contents and how many it has: a pipeline may give one several times."""
    ids, starts, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
    sums = np.add.reduceat(rows[:, 1], starts) if len(ids) else rows[:0, 1]
    return ids, sums, counts


def among(hashes: Hashes, ascending: Hashes) -> NDArray[np.bool_]:
    """Which of the hashes are among others that ascend."""
    if not len(ascending):
        return np.zeros(len(hashes), np.bool_)
    found: NDArray[np.bool_] = ascending[np.searchsorted(ascending[:-1], hashes)] == hashes
    return found
