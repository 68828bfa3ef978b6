"""The bytes of one file of GridFS: written and read several chunks at a time, by a few threads.

A copy goes through a few messages of `SEGMENT_BYTES`, so that a large file costs little memory beside itself.
Larger chunks than GridFS's usual 255 KiB mean fewer documents; the size is a property of each file, so any GridFS
client reads them.

Always: what is read has exactly the length that the file says, chunk by chunk, and was hashed on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bson import Binary

from mongotorch.errors import IntegrityError
from mongotorch.store.clock import is_mock

CHUNK_BYTES: Final = 2**20
SEGMENT_BYTES: Final = 4 * 2**20
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

    for _ in _spread(write, _segments(view.nbytes, SEGMENT_BYTES), chunks):
        pass


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
        data = bytearray(length)
        segments = _segments(length, max(SEGMENT_BYTES // size, 1) * size)
    except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise _broken(file, f"its document is not readable ({error})") from error
    view = memoryview(data)
    digest = hashlib.sha256()

    def read(segment: Segment) -> Segment:
        _read_segment(chunks, file, view, segment, size)
        return segment

    for start, end in _spread(read, segments, chunks):
        digest.update(view[start:end])  # while the next segments arrive
    view.release()
    return data, digest.hexdigest()


def _read_segment(chunks: Any, file: Mapping[str, Any], view: memoryview, segment: Segment, size: int) -> None:
    start, end = segment
    first, last = start // size, -(-end // size)
    wanted = {"files_id": file["_id"], "n": {"$gte": first, "$lt": last}}
    expected = first
    for chunk in chunks.find(wanted, {"_id": 0, "n": 1, "data": 1}).sort("n", 1).batch_size(last - first + 1):
        at, part = expected * size, chunk["data"]
        if chunk["n"] != expected or not isinstance(part, bytes) or len(part) != min(size, len(view) - at):
            break
        view[at : at + len(part)] = part
        expected += 1
    if expected != last:
        raise _broken(file, f"chunk {expected} is missing, or is not whole")


def _segments(length: int, size: int) -> list[Segment]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _spread(do: Callable[[Segment], Any], segments: list[Segment], collection: Any) -> Iterator[Any]:
    """Do something for each segment, several at a time, and yield what it gave, in order."""
    if len(segments) < 2 or is_mock(collection):
        yield from map(do, segments)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mongotorch-chunks") as pool:
        done = [pool.submit(do, segment) for segment in segments]
        try:
            for future in done:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error: nothing more is begun


def _broken(file: Mapping[str, Any], why: str) -> IntegrityError:
    return IntegrityError(f"blob {file.get('filename')} does not hold the bytes of its name: {why}; restore it")
