"""The bytes of one file of GridFS: several chunks a message, some of them under way while others are used.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bson import Binary

from mongotorch.errors import IntegrityError
from mongotorch.store.clock import is_mock

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
