"""Stores blobs in GridFS under the SHA-256 of their content.

The layout is that of the GridFS specification, written with plain collection operations, because the driver's own
bucket does not work on mongomock. Chunks are larger than GridFS's usual 255 KiB, so that there are fewer
documents; each file says its chunk size, so that any GridFS client can read it.

Guarantees: the hash is checked on every read; chunks are written before the file's document, so that a blob is
whole or not there; what changes while it is stored is refused, so that a name never stands for other bytes; of two
writers of the same bytes the second uses the blob of the first; a touched blob is safe from garbage collection for
its grace period. Nothing of this updates a stored blob, but for mending: a user who may only insert can store.

Who is going to name a blob that is there inserts a document into `USES`, and then looks for the blob. The garbage
collector marks a blob as `REMOVING`, then looks for uses of it, and then removes it, at most `REMOVAL_S` seconds
after the mark. So one of the two sees the other: a writer that meets the mark waits for what becomes of the blob.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import Any, Final, cast, final

from bson import Binary, ObjectId
from pymongo import IndexModel
from pymongo.errors import BulkWriteError, OperationFailure

from mongotorch.codecs import PART_BYTES, WRITTEN, NamedBlob, check_format
from mongotorch.errors import IntegrityError, NotFoundError, StoreError
from mongotorch.mongo.driver_errors import UNAUTHORIZED, has_code, repeated
from mongotorch.mongo.server_features import clock_of, ensure_indexes, is_mock, records

_log = logging.getLogger("mongotorch.store")
# The bucket's name is older than the word blob; databases have it.
BUCKET: Final = "mt.artifacts"
USES: Final = f"{BUCKET}.uses"
"""Which blobs are going to be named by a record: `blobs`, their names, and `touched`, since when."""
USES_KEPT_S: Final = 86_400.0
"""After so many seconds the server removes a document of `USES`."""
REMOVING: Final = "removing"
"""In the document of a blob: since when a collection has been about to remove it."""
REMOVAL_S: Final = 30.0
"""How long after the mark a collection may remove a blob."""
CHUNK_BYTES: Final = PART_BYTES  # so that the checksums of a blob are those of its chunks
SEGMENT_BYTES: Final = 4 * CHUNK_BYTES
"""About how many bytes are sent or received in one message."""
UPLOAD_DEADLINE_S: Final = 1800.0
"""A slower upload gives up: after twice that, the garbage collector may take it for an abandoned one."""
_TOUCH_BATCH: Final = 1000  # names in one document
_CLOCKS_APART_S: Final = 10.0  # between two primaries
_LEAVING_POLL_S: Final = 0.02
_READ_BATCH: Final = 250  # names in one request
_SMALL_BYTES: Final = 2**18
_SENT_TOGETHER: Final = SEGMENT_BYTES // _SMALL_BYTES
_DUPLICATE_KEY: Final = 11000
_THREADS: Final = 2  # one waits for the server while the other copies; more would only cost memory
_UPLOADS: Final = 2  # blobs: what confirms that one is whole takes as long as some of its chunks


@final
class BlobStore:
    """The blobs of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._files = records(database, f"{BUCKET}.files")
        self._chunks = records(database, f"{BUCKET}.chunks")
        self._uses = records(database, USES)
        self._clock = clock_of(database)

    @repeated("preparing the blobs")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        ensure_indexes(self._uses, IndexModel("touched", expireAfterSeconds=int(USES_KEPT_S)))
        ensure_indexes(self._files, IndexModel("filename", unique=True))
        ensure_indexes(self._chunks, IndexModel([("files_id", 1), ("n", 1)], unique=True))

    def put(self, data: bytes | bytearray | memoryview | NamedBlob) -> str:
        """Store a blob; see `put_all`. Its name: the SHA-256 in hex."""
        return self.put_all([data])[0]

    def put_all(self, blobs: Iterable[bytes | bytearray | memoryview | NamedBlob]) -> list[str]:
        """Store the blobs that are not stored yet; one that is stored, and lacks chunks, gets them again.

        Args:
            blobs: The bytes of each, of any size; never copied as a whole. What was named already is not hashed
                again.

        Returns:
            The names of the blobs, each once, in their order: the SHA-256 of each in hex.

        Raises:
            IntegrityError: The bytes changed while they were stored, and are not stored; or a stored blob is
                damaged, and this user may not mend it.
            StoreError: The upload of one took longer than `UPLOAD_DEADLINE_S`.
        """
        named = {blob.name: blob for blob in map(_named, blobs)}
        files = self._touched(sorted(named))
        damaged = self._damaged([files[name] for name in named if name in files], named)
        for name in damaged:
            self._mend_lengths(files[name], named[name], bad=damaged[name])
        self._upload_all([blob for name, blob in named.items() if name not in files])
        return [*named]

    def _upload_all(self, blobs: Sequence[NamedBlob]) -> None:
        """Upload blobs: small ones together; of others, some chunks are on their way while the server confirms."""
        together = [blob for blob in blobs if blob.data.nbytes <= _SMALL_BYTES]
        for start in range(0, len(together), _SENT_TOGETHER):
            self._upload_together(together[start : start + _SENT_TOGETHER])
        blobs = [blob for blob in blobs if blob.data.nbytes > _SMALL_BYTES]
        if (len(blobs) < 2 and sum(blob.data.nbytes for blob in blobs) <= SEGMENT_BYTES) or is_mock(self._chunks):
            for blob in blobs:
                self._upload(blob, None)
            return
        with (
            ThreadPoolExecutor(_THREADS, thread_name_prefix="mongotorch-chunks") as segments,
            ThreadPoolExecutor(_UPLOADS, thread_name_prefix="mongotorch-blobs") as uploads,
        ):
            try:
                for done in [uploads.submit(self._upload, blob, segments) for blob in blobs]:
                    done.result()
            finally:
                uploads.shutdown(cancel_futures=True)  # after an error nothing more is sent

    @repeated("storing a blob")
    def _upload(self, blob: NamedBlob, segments: Executor | None) -> None:
        file_id, started = ObjectId(), time.monotonic()
        try:
            _write_chunks(self._chunks, file_id, blob, segments)
        except IntegrityError:
            self._abandon(file_id)
            raise
        self._insert_files({file_id: blob}, started)

    @repeated("storing blobs")
    def _upload_together(self, blobs: Sequence[NamedBlob]) -> None:
        """Upload blobs of one chunk each."""
        named, started = {ObjectId(): blob for blob in blobs}, time.monotonic()
        chunks = [_chunk(blob, file_id, 0) for file_id, blob in named.items() if blob.data.nbytes]
        if chunks:
            self._chunks.insert_many(chunks)
        self._insert_files(named, started)

    def _insert_files(self, blobs: Mapping[ObjectId, NamedBlob], started: float) -> None:
        """Make blobs visible whose chunks are stored, by the ids of their files."""
        if time.monotonic() - started > UPLOAD_DEADLINE_S:
            for file_id in blobs:
                self._abandon(file_id)
            raise StoreError(
                f"blob {next(iter(blobs.values())).name} took longer than {UPLOAD_DEADLINE_S:.0f} s to upload; is "
                "the network up to it?"
            )
        now = self._clock.recent()
        files = [
            {
                "_id": file_id,
                "filename": blob.name,
                "length": blob.data.nbytes,
                "chunkSize": CHUNK_BYTES,
                "metadata": WRITTEN,
                "uploadDate": now,
                "touched": now,
            }
            for file_id, blob in blobs.items()
        ]
        try:
            with self._clock.alone():
                self._files.insert_many(files, ordered=False)
        except BulkWriteError as error:
            if any(one["code"] != _DUPLICATE_KEY for one in error.details["writeErrors"]):
                raise
            # Another process stored the same bytes first, or an earlier try did.
            there = {file["_id"] for file in self._files.find({"_id": {"$in": [*blobs]}}, {"_id": 1})}
            for file_id in blobs.keys() - there:
                self._abandon(file_id)

    def _abandon(self, file_id: Any) -> None:
        """Remove the chunks of an upload that nobody needs; a worker may not, and leaves them to the collector."""
        try:
            self._chunks.delete_many({"files_id": file_id})
        except OperationFailure as error:
            if not has_code(error, UNAUTHORIZED):
                raise

    def touch(self, names: Iterable[str]) -> list[str]:
        """Protect blobs that a record is going to name from garbage collection, for its grace period.

        Args:
            names: The names of the blobs.

        Returns:
            The names of those that are not stored.
        """
        unique = sorted(set(names))
        stored = self._touched(unique)
        return [name for name in unique if name not in stored]

    @repeated("touching blobs")
    def _touched(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Touch blobs; the documents of those that are stored, by name."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(names), _TOUCH_BATCH):
            batch = names[start : start + _TOUCH_BATCH]
            use = {"_id": ObjectId(), **WRITTEN, "blobs": batch, "touched": self._clock.recent()}
            with self._clock.alone():
                self._uses.insert_one(use)
            found |= {file["filename"]: file for file in self._staying(batch)}
        return found

    def _staying(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The documents of those blobs that are stored, when no collection is about to remove one of them."""
        while True:
            files = list(self._files.find({"filename": {"$in": names}}))
            leaving = [file["_id"] for file in files if REMOVING in file]
            if not leaving or not self._are_leaving(leaving):
                return files
            time.sleep(_LEAVING_POLL_S)

    def _are_leaving(self, ids: Sequence[Any]) -> bool:
        """Whether one of these blobs can still be removed by the collection that has marked it."""
        late = self._clock.due(REMOVING, seconds=REMOVAL_S + _CLOCKS_APART_S)
        where = {"_id": {"$in": ids}, REMOVING: {"$exists": True}, "$nor": [late]}
        return self._files.find_one(where, {"_id": 1}) is not None

    @repeated("looking for a blob")
    def has(self, name: str) -> bool:
        """Whether a blob is stored."""
        return self._files.find_one({"filename": name}, {"_id": 1}) is not None

    @repeated("reading a blob")
    def get(self, name: str) -> bytes:
        """The bytes of a blob, verified.

        Returns:
            A `bytearray` that only the caller has, so that a tensor can use its memory.

        Raises:
            NotFoundError: There is no such blob.
            IntegrityError: The stored bytes do not have the hash that is the blob's name.
            FormatError: A newer release wrote it.
        """
        return self._whole(name, self._files.find_one({"filename": name}))

    def getter(self, names: Iterable[str]) -> Callable[[str], bytes]:
        """A `get` that reads these blobs together, as far as they are small, when it is called first."""
        read = functools.cache(lambda: self._read_together(sorted(set(names))))

        def get(name: str) -> bytes:
            files, small = read()
            if name in small:
                return cast("bytes", bytearray(small[name]))
            return self._read(name, files[name]) if name in files else self.get(name)

        return get

    @repeated("reading a blob")
    def _read(self, name: str, file: Mapping[str, Any]) -> bytes:
        return self._whole(name, file)

    def _whole(self, name: str, file: Mapping[str, Any] | None) -> bytes:
        if file is None:
            raise NotFoundError(f"no blob {name} in {BUCKET}; the component that names it was not stored whole")
        check_format(file.get("metadata") or {}, f"blob {name}:")
        data, digest = _read_chunks(self._chunks, file)
        if digest != name:
            raise IntegrityError(f"blob {name} in {BUCKET} does not hold the bytes of its name; restore it")
        return cast("bytes", data)

    def get_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """The names and bytes of blobs, verified, in any order: small ones come many at a time.

        Args:
            names: The names of the blobs.

        Raises:
            NotFoundError, IntegrityError, FormatError: As `get`.
        """
        unique = sorted(set(names))
        for start in range(0, len(unique), _READ_BATCH):
            batch = unique[start : start + _READ_BATCH]
            _, small = self._read_together(batch)
            yield from small.items()
            yield from ((name, self.get(name)) for name in batch if name not in small)

    @repeated("reading blobs")
    def _read_together(self, names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
        """By name, the documents of some blobs; and the bytes of those that are whole and have one small chunk."""
        shown = {"filename": 1, "length": 1, "chunkSize": 1, "metadata.format": 1}
        files = {file["filename"]: file for file in self._files.find({"filename": {"$in": names}}, shown)}
        small = {file["_id"]: file for file in files.values() if _is_small(file.get("length"))}
        found: dict[str, bytes] = {}
        first = {"files_id": {"$in": [*small]}, "n": 0}
        for chunk in self._chunks.find(first, {"_id": 0, "files_id": 1, "data": 1}) if small else ():
            name, data = small[chunk["files_id"]]["filename"], chunk["data"]
            check_format(small[chunk["files_id"]].get("metadata") or {}, f"blob {name}:")
            if isinstance(data, bytes) and hashlib.sha256(data).hexdigest() == name:
                found[name] = data
        return files, found

    @repeated("listing blobs")
    def names(self) -> Iterator[str]:
        """The names of all blobs."""
        return (file["filename"] for file in self._files.find({}, {"filename": 1}))

    @repeated("removing a blob")
    def remove(self, name: str) -> None:
        """Remove a blob that no record names; its document first, so that it is whole or not there."""
        file = self._files.find_one_and_delete({"filename": name})
        if file is not None:
            self._chunks.delete_many({"files_id": file["_id"]})

    @repeated("mending a blob")
    def mend(self, data: bytes | bytearray | memoryview) -> bool:
        """Write what a stored blob lacks of these bytes, over what is of another length or content.

        Args:
            data: The bytes of the blob.

        Returns:
            Whether anything was written; False where the blob is whole, or is not stored at all.
        """
        blob = NamedBlob.of(data)
        file = self._files.find_one({"filename": blob.name})
        return file is not None and self._mend(file, blob, bad=None)

    def _mend(self, file: Mapping[str, Any], blob: NamedBlob, *, bad: Iterable[int] | None) -> bool:
        """Write these chunks anew, or those that differ, and remove what lies behind the end; may be repeated."""
        view, size = blob.data, CHUNK_BYTES
        count, same = -(-view.nbytes // size), {"files_id": file["_id"]}
        if bad is None:
            parts = {n: view[n * size : (n + 1) * size] for n in range(count)}
            bad = [n for n, part in parts.items() if not self._holds({**same, "n": n}, part)]
        behind = self._chunks.delete_many({**same, "n": {"$not": {"$gte": 0, "$lt": count}}}).deleted_count
        for n in sorted(bad):
            self._chunks.replace_one({**same, "n": n}, _chunk(blob, file["_id"], n), upsert=True)
        right = {"length": view.nbytes, "chunkSize": size}
        wrong = {name: value for name, value in right.items() if file.get(name) != value}
        if wrong:
            self._files.update_one({"_id": file["_id"]}, {"$set": wrong})
        return bool(behind or bad or wrong)

    def _holds(self, where: Mapping[str, Any], part: bytes | memoryview) -> bool:
        found = self._chunks.find_one(where, {"data": 1})
        return found is not None and isinstance(found["data"], bytes) and memoryview(found["data"]) == part

    @repeated("looking at blobs")
    def _damaged(
        self, files: Sequence[Mapping[str, Any]], blobs: Mapping[str, NamedBlob]
    ) -> dict[str, list[int] | None]:
        """Those blobs whose length, or number or length of chunks, is wrong; their wrong chunks, None for all."""
        found: dict[str, list[int] | None] = {}
        lengths = _chunk_lengths(self._chunks, [file["_id"] for file in files]) if files else {}
        for file in files:
            name, size = file["filename"], blobs[file["filename"]].data.nbytes
            if file.get("length") != size or file.get("chunkSize") != CHUNK_BYTES:
                found[name] = None  # a file of another chunk size is compared byte by byte
                continue
            right = {n: min(CHUNK_BYTES, size - n * CHUNK_BYTES) for n in range(-(-size // CHUNK_BYTES))}
            stored = lengths.get(file["_id"], {})
            if stored != right:
                found[name] = [n for n in right if stored.get(n) != right[n]]
        return found

    @repeated("mending a blob")
    def _mend_lengths(self, file: Mapping[str, Any], blob: NamedBlob, *, bad: list[int] | None) -> None:
        try:
            self._mend(file, blob, bad=bad)
        except OperationFailure as error:
            if not has_code(error, UNAUTHORIZED):
                raise
            raise IntegrityError(
                f"blob {blob.name} in {BUCKET} is not whole, and this user may not mend it; run "
                "`mongotorch verify --repair FOLDER` as a user with the role trainer"
            ) from error
        _log.warning("blob %s was not stored whole any more; it was mended", blob.name)


def _is_small(length: Any) -> bool:
    return isinstance(length, int) and 0 < length <= _SMALL_BYTES


def _named(data: bytes | bytearray | memoryview | NamedBlob) -> NamedBlob:
    return data if isinstance(data, NamedBlob) else NamedBlob.of(data)


def _chunk(blob: NamedBlob, file_id: Any, n: int) -> dict[str, Any]:
    """The document of a chunk. Raises: IntegrityError where the bytes changed since they were named."""
    data = Binary(blob.data[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES])
    if not blob.is_same(n, data):
        raise IntegrityError(
            "a tensor changed while it was stored: another thread trains or changes the module; store it when "
            "that has ended, or store a copy of it"
        )
    return {"files_id": file_id, "n": n, "data": data}


def _write_chunks(chunks: Any, file_id: Any, blob: NamedBlob, executor: Executor | None) -> None:
    view = blob.data

    def write(start: int) -> None:
        end = min(start + SEGMENT_BYTES, view.nbytes)
        chunks.insert_many([_chunk(blob, file_id, at // CHUNK_BYTES) for at in range(start, end, CHUNK_BYTES)])

    segments = range(0, view.nbytes, SEGMENT_BYTES)
    if executor is None:
        for start in segments:
            write(start)
        return
    writes = [executor.submit(write, start) for start in segments]
    try:
        for each in writes:
            each.result()
    finally:
        for each in writes:
            each.cancel()  # after an error nothing more is sent
        wait(writes)


def _read_chunks(chunks: Any, file: Mapping[str, Any]) -> tuple[bytearray, str]:
    """The bytes of a file and their SHA-256 in hex. Raises: IntegrityError where a chunk is missing or cut."""
    try:
        length, size = int(file["length"]), int(file["chunkSize"])
        count, batch_size = -(-length // size), max(SEGMENT_BYTES // size, 2)
        data = _uninitialized(length)
    except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise _corrupt(file, f"its document is not readable ({error})") from error
    digest = hashlib.sha256()
    found = chunks.find({"files_id": file["_id"]}, {"_id": 0, "n": 1, "data": 1}).sort("n", 1)
    n = 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(data)) if length else 0
    with contextlib.closing(found.batch_size(batch_size)) as cursor:
        for batch in _prefetched(cursor, batch_size) if count > batch_size else [cursor]:
            for chunk in batch:
                start, part = n * size, chunk["data"]
                if chunk["n"] != n or not isinstance(part, bytes) or len(part) != min(size, length - start):
                    raise _corrupt(file, f"chunk {n} is missing, or is not whole")
                # Both release the GIL for the thread that fetches; the copy is the memory's first, slow access.
                ctypes.memmove(address + start, part, len(part))
                digest.update(part)
                n += 1
    if n != count:
        raise _corrupt(file, f"it ends after {n} of {count} chunks")
    return data, digest.hexdigest()


def _chunk_lengths(chunks: Any, file_ids: Sequence[Any]) -> dict[Any, dict[int, int]]:
    """The number of bytes of each chunk of some files, by file and number; -1 where it holds no bytes."""
    if is_mock(chunks):
        found = chunks.find({"files_id": {"$in": file_ids}})
        each = [(c["files_id"], c["n"], len(c["data"]) if isinstance(c["data"], bytes) else -1) for c in found]
    else:
        is_bytes = {"$eq": [{"$type": "$data"}, "binData"]}
        length = {"$cond": [is_bytes, {"$binarySize": {"$cond": [is_bytes, "$data", ""]}}, -1]}
        shown = {"_id": 0, "files_id": 1, "n": 1, "length": length}
        found = chunks.aggregate([{"$match": {"files_id": {"$in": file_ids}}}, {"$project": shown}])
        each = [(c["files_id"], c["n"], c["length"]) for c in found]
    lengths: dict[Any, dict[int, int]] = {}
    for file_id, n, nbytes in each:
        lengths.setdefault(file_id, {})[n] = nbytes
    return lengths


def _uninitialized(length: int) -> bytearray:
    """A bytearray of a length; a large one without the zeros that `bytearray(length)` would write."""
    if length < SEGMENT_BYTES:
        return bytearray(length)
    make = ctypes.pythonapi.PyByteArray_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
    data: bytearray = make(None, length)
    return data


def _prefetched(cursor: Any, batch_size: int) -> Iterator[list[Any]]:
    """The batches of a cursor, each fetched in a thread while the one before it is used."""
    if is_mock(cursor):
        yield list(cursor)
        return

    def fetch() -> list[Any]:
        return list(itertools.islice(cursor, batch_size))

    with ThreadPoolExecutor(1, thread_name_prefix="mongotorch-chunks") as pool:
        following = pool.submit(fetch)
        while batch := following.result():
            following = pool.submit(fetch)
            yield batch


def _corrupt(file: Mapping[str, Any], why: str) -> IntegrityError:
    return IntegrityError(f"blob {file.get('filename')} does not hold the bytes of its name: {why}; restore it")
