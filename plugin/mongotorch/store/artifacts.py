"""Blobs in GridFS, addressed by their content.

Always: a blob's name is the SHA-256 of its bytes and is checked on every read; chunks are written first and the
file's document last, so a blob is whole or not there; whoever is second to write the same bytes uses the first
one's, and by touching it keeps `gc` away for a while. The layout is that of the GridFS specification, written
with plain collection operations, because the driver's own bucket does not work on mongomock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, cast, final

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import IntegrityError, NotFoundError, StoreError
from mongotorch.store.chunks import CHUNK_BYTES, read_chunks, write_chunks
from mongotorch.store.clock import Later, clock_of
from mongotorch.store.failures import driver_errors
from mongotorch.store.indexes import ensure_index

BUCKET: Final = "mt.artifacts"
UPLOAD_DEADLINE_S: Final = 1800.0
"""An upload that takes longer gives up: `gc`, whose grace is twice that, may take it for a dead one."""
_NAMES_A_TOUCH = 1000


@final
class Artifacts:
    """The blobs of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._files = database[f"{BUCKET}.files"]
        self._chunks = database[f"{BUCKET}.chunks"]
        self._clock = clock_of(database)

    @driver_errors("preparing the blobs")
    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        ensure_index(self._files, "filename", unique=True)
        ensure_index(self._chunks, [("files_id", 1), ("n", 1)], unique=True)

    @driver_errors("storing a blob")
    def put(self, data: bytes | bytearray | memoryview) -> str:
        """Store a blob, if it is not there yet.

        Args:
            data: Its bytes, of any size; not copied as a whole.

        Returns:
            Its name: the SHA-256 in hex.

        Raises:
            StoreError: The upload took longer than `UPLOAD_DEADLINE_S`.
        """
        view = memoryview(data).cast("B")
        name = hashlib.sha256(view).hexdigest()
        if not self.touch([name]):
            return name
        file_id, started = ObjectId(), time.monotonic()
        write_chunks(self._chunks, file_id, view)
        if time.monotonic() - started > UPLOAD_DEADLINE_S:
            self._chunks.delete_many({"files_id": file_id})
            raise StoreError(
                f"blob {name} took longer than {UPLOAD_DEADLINE_S:.0f} s to upload; is the network up to it?"
            )
        file = {"filename": name, "length": view.nbytes, "chunkSize": CHUNK_BYTES, "metadata": WRITTEN}
        try:
            with self._clock.alone():
                times = {"uploadDate": Later(), "touched": Later()}
                self._files.update_one({"_id": file_id}, self._clock.update({**file, **times}), upsert=True)
        except DuplicateKeyError:  # another process was first with the same bytes: its blob is as good
            self._chunks.delete_many({"files_id": file_id})
        return name

    @driver_errors("touching blobs")
    def touch(self, names: Iterable[str]) -> list[str]:
        """Say that blobs are going to be referred to, so that `gc` lets them be for its grace.

        Args:
            names: The blobs.

        Returns:
            Those that are not there.
        """
        wanted = sorted(set(names))
        missing: list[str] = []
        for start in range(0, len(wanted), _NAMES_A_TOUCH):
            some = wanted[start : start + _NAMES_A_TOUCH]
            these = {"filename": {"$in": some}} if len(some) > 1 else {"filename": some[0]}
            with self._clock.alone():
                matched = self._files.update_many(these, self._clock.update({"touched": Later()})).matched_count
            if matched != len(some):
                there = {file["filename"] for file in self._files.find(these, {"filename": 1})}
                missing += [name for name in some if name not in there]
        return missing

    @driver_errors("looking for a blob")
    def has(self, name: str) -> bool:
        """Whether a blob is stored, whole."""
        return self._files.find_one({"filename": name}, {"_id": 1}) is not None

    @driver_errors("reading a blob")
    def get(self, name: str) -> bytes:
        """The bytes of a blob, verified.

        Returns:
            A `bytearray` that is the caller's alone, so that a tensor can live in it without a copy.

        Raises:
            NotFoundError: There is no such blob.
            IntegrityError: The stored bytes are not those of its name.
        """
        file = self._files.find_one({"filename": name})
        if file is None:
            raise NotFoundError(f"no blob {name} in {BUCKET}; the component that names it was not stored whole")
        check_format(file.get("metadata") or {}, f"blob {name}:")
        data, digest = read_chunks(self._chunks, file)
        if digest != name:
            raise IntegrityError(f"blob {name} in {BUCKET} does not hold the bytes of its name; restore it")
        return cast("bytes", data)

    @driver_errors("listing blobs")
    def names(self) -> Iterator[str]:
        """The names of all blobs."""
        return (file["filename"] for file in self._files.find({}, {"filename": 1}))

    @driver_errors("removing a blob")
    def remove(self, name: str) -> None:
        """Remove a blob that nothing refers to; its document first, so that it is never half there."""
        file = self._files.find_one_and_delete({"filename": name})
        if file is not None:
            self._chunks.delete_many({"files_id": file["_id"]})
