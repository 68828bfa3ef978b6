"""Blobs in GridFS, addressed by their content.

Always: a blob's name is the SHA-256 of its bytes and is checked on every read; chunks are written first and the
file's document last, so a blob is whole or not there; whoever is second to write the same bytes uses the first
one's, and by touching it keeps `gc` away for a while. The layout is that of the GridFS specification, written
with plain collection operations, because the driver's own bucket does not work on mongomock.

The bytes of one file of GridFS: several chunks a message, some of them under way while others are used.

A copy goes through a few messages of `SEGMENT_BYTES`, so that a large file costs little memory beside itself.
Larger chunks than GridFS's usual 255 KiB mean fewer documents; the size is a property of each file, so any GridFS
client reads them.

Always: what is read has exactly the length that the file says, chunk by chunk, and was hashed on the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast, final

from bson import Binary, ObjectId
from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import IntegrityError, NotFoundError, StoreError
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.mongo.server_features import Later, clock_of, ensure_index, is_mock

CHUNK_BYTES: Final = 2**20
SEGMENT_BYTES: Final = 4 * CHUNK_BYTES
_THREADS: Final = 2  # one waits for the server while the other copies; more only cost memory
Segment = tuple[int, int]
"""From which byte to which."""


def write_chunks(chunks: Any, file_id: Any, view: memoryview) -> None:
    """Write the chunks of a file.

    Args:
        chunks: The collection.
        file_id: The file's `_id`.
        view: Its bytes; read only while this runs.
    """

    def write(segment: Segment) -> None:
        starts = range(segment[0], segment[1], CHUNK_BYTES)
        documents = [
            {"files_id": file_id, "n": start // CHUNK_BYTES, "data": Binary(view[start : start + CHUNK_BYTES])}
            for start in starts
        ]
        chunks.insert_many(documents)

    segments = _segments(view.nbytes, SEGMENT_BYTES)
    if len(segments) < 2 or is_mock(chunks):
        for segment in segments:
            write(segment)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mongotorch-chunks") as pool:
        written = [pool.submit(write, segment) for segment in segments]
        try:
            for each in written:
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error: nothing more is begun


def read_chunks(chunks: Any, file: Mapping[str, Any]) -> tuple[bytearray, str]:
    """The bytes of a file, and their SHA-256 in hex.

    Args:
        chunks: The collection.
        file: The file's document.

    Raises:
        IntegrityError: A chunk is missing, or has another length than it must have.
    """
    try:
        length, size = int(file["length"]), int(file["chunkSize"])
        count, a_batch = -(-length // size), max(SEGMENT_BYTES // size, 2)
        data = _buffer(length)
    except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise _broken(file, f"its document is not readable ({error})") from error
    digest = hashlib.sha256()
    found = chunks.find({"files_id": file["_id"]}, {"_id": 0, "n": 1, "data": 1}).sort("n", 1)
    n = 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(data)) if length else 0
    with contextlib.closing(found.batch_size(a_batch)) as cursor:
        for batch in _ahead(cursor, a_batch) if count > a_batch else [cursor]:
            for chunk in batch:
                start, part = n * size, chunk["data"]
                if chunk["n"] != n or not isinstance(part, bytes) or len(part) != min(size, length - start):
                    raise _broken(file, f"chunk {n} is missing, or is not whole")
                # Both let the other thread run, and the copy is what first touches the memory, which is slow.
                ctypes.memmove(address + start, part, len(part))
                digest.update(part)
                n += 1
    if n != count:
        raise _broken(file, f"it ends after {n} of {count} chunks")
    return data, digest.hexdigest()


def _buffer(length: int) -> bytearray:
    """A bytearray whose bytes are still to be written: `bytearray(length)` would write zeros first."""
    if length < SEGMENT_BYTES:
        return bytearray(length)
    make = ctypes.pythonapi.PyByteArray_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
    data: bytearray = make(None, length)
    return data


def _ahead(cursor: Any, a_batch: int) -> Iterator[list[Any]]:
    """The batches of a cursor, each fetched while the one before it is used."""
    if is_mock(cursor):
        yield list(cursor)
        return

    def take() -> list[Any]:
        return list(itertools.islice(cursor, a_batch))

    with ThreadPoolExecutor(1, thread_name_prefix="mongotorch-chunks") as pool:
        coming = pool.submit(take)
        while batch := coming.result():
            coming = pool.submit(take)
            yield batch


def _segments(length: int, size: int) -> list[Segment]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _broken(file: Mapping[str, Any], why: str) -> IntegrityError:
    return IntegrityError(f"blob {file.get('filename')} does not hold the bytes of its name: {why}; restore it")


BUCKET: Final = "mt.artifacts"
UPLOAD_DEADLINE_S: Final = 1800.0
"""An upload that takes longer gives up: `gc`, whose grace is twice that, may take it for a dead one."""
_NAMES_A_TOUCH = 1000


@final
class BlobStore:
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
