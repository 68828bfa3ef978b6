"""Blobs in GridFS, addressed by their content.

Always: a blob's name is the SHA-256 of its bytes and is checked on every read; chunks are written first and the
file's document last, so a blob is whole or not there; whoever is second to write the same bytes uses the first
one's. The layout is that of the GridFS specification, written with plain collection operations, because the
driver's own bucket does not work on mongomock; any GridFS client can read it.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, final

from bson import Binary, ObjectId
from pymongo.errors import DuplicateKeyError

from mongotorch.errors import IntegrityError, NotFoundError

BUCKET = "mt.artifacts"
CHUNK_BYTES = 255 * 1024
_CHUNKS_A_WRITE = 64  # about 16 MiB a message, below the server's 48 MB


@final
class Artifacts:
    """The blobs of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._files = database[f"{BUCKET}.files"]
        self._chunks = database[f"{BUCKET}.chunks"]

    def ensure_indexes(self) -> None:
        """Make the indexes that the promises rest on; does nothing where they are there."""
        self._files.create_index("filename", unique=True)
        self._chunks.create_index([("files_id", 1), ("n", 1)], unique=True)

    def put(self, data: bytes | memoryview) -> str:
        """Store a blob, if it is not there yet.

        Args:
            data: Its bytes, of any size.

        Returns:
            Its name: the SHA-256 in hex.
        """
        view = memoryview(data).cast("B")
        name = hashlib.sha256(view).hexdigest()
        if self.has(name):
            return name
        file_id = ObjectId()
        self._write_chunks(file_id, view)
        try:
            self._files.insert_one(
                {
                    "_id": file_id,
                    "filename": name,
                    "length": view.nbytes,
                    "chunkSize": CHUNK_BYTES,
                    "uploadDate": datetime.now(UTC),
                }
            )
        except DuplicateKeyError:  # another process was first with the same bytes: its blob is as good
            self._chunks.delete_many({"files_id": file_id})
        return name

    def has(self, name: str) -> bool:
        """Whether a blob is stored, whole."""
        return self._files.find_one({"filename": name}, {"_id": 1}) is not None

    def get(self, name: str) -> bytes:
        """The bytes of a blob, verified.

        Raises:
            NotFoundError: There is no such blob.
            IntegrityError: The stored bytes are not those of its name.
        """
        file = self._files.find_one({"filename": name})
        if file is None:
            raise NotFoundError(f"no blob {name} in {BUCKET}; the component that names it was not stored whole")
        data = bytearray()
        for chunk in self._chunks.find({"files_id": file["_id"]}).sort("n", 1):
            data += chunk["data"]
        if hashlib.sha256(data).hexdigest() != name:
            raise IntegrityError(f"blob {name} in {BUCKET} does not hold the bytes of its name; restore it")
        return bytes(data)

    def remove(self, name: str) -> None:
        """Remove a blob that nothing refers to; its document first, so that it is never half there."""
        file = self._files.find_one_and_delete({"filename": name})
        if file is not None:
            self._chunks.delete_many({"files_id": file["_id"]})

    def _write_chunks(self, file_id: ObjectId, view: memoryview) -> None:
        starts = range(0, view.nbytes, CHUNK_BYTES)
        for first in range(0, len(starts), _CHUNKS_A_WRITE):
            self._chunks.insert_many(
                [
                    {"files_id": file_id, "n": n, "data": Binary(view[starts[n] : starts[n] + CHUNK_BYTES])}
                    for n in range(first, min(first + _CHUNKS_A_WRITE, len(starts)))
                ]
            )
