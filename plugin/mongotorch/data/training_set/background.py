"""Scans the documents of a run while it trains, as of one cluster time, so that a large select delays no step.

Until a scan has ended, a stream reads as of its cluster time too, and so sees the same documents; afterwards it
reads what there is now, and leaves out what is not in the set. What a scan finds is in files, so that the workers
of a stream see it as well, and memory does not grow with the set.

Guarantees: a set and its digest are those of `scan_members`, byte for byte; a file appears when it is complete; a
stream that waits for a scan hears of its failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, final

import numpy as np
from bson import Timestamp

from mongotorch.codecs import FileBytes
from mongotorch.data.decode import U64, Reply, offsets
from mongotorch.data.prefetch import ThreadPrefetcher
from mongotorch.data.read import ServerReader, is_snapshot_lost, open_reader
from mongotorch.data.training_set.members import (
    MEMBERS_HEAD,
    MOST_MEMBERS,
    ContentDigest,
    Hashes,
    Members,
    rows_of,
)
from mongotorch.errors import DataError, QueryError
from mongotorch.mongo.driver_errors import RetryPolicy
from mongotorch.query import Query
from mongotorch.signature import Key

_log = logging.getLogger("mongotorch.data")
_STATE_BYTES: Final = 8
_KNOWN, _UNBOUNDED, _FAILED = b"known   ", b"unbound ", b"failed  "
_WAIT_S: Final = 0.05
_PARTS: Final = 32  # files that the rows of a set are sorted into first
_READ: Final = 5_000  # documents a reply
_TRIED: Final = 100
_CHECK_S: Final = 0.2
_LONGEST_SCAN_S: Final = 150.0  # half of how long a server keeps old versions, unless it is told otherwise
_PREFETCH_BYTES: Final = 16 * 2**20
_DOCUMENTS_A_SECOND, _BYTES_A_SECOND = 100_000, 1e8  # of a scan, on a slow day


@final
class PendingMembers:
    """The documents of a set that is being scanned, for the streams of the run; picklable.

    Args:
        path: Where the file of their hashes appears.
        at: The cluster time of the scan.

    Attributes:
        at: The same.
    """

    def __init__(self, path: Path, at: Timestamp) -> None:
        self._path, self.at = path, at
        self._found: tuple[U64 | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_found": None}

    @property
    def is_known(self) -> bool:
        """Whether the scan has ended. Raises: DataError where it has failed."""
        if self._found is None and self._path.exists():
            with self._path.open("rb") as file:
                state = file.read(_STATE_BYTES)
            if state == _FAILED:
                raise DataError("which documents the run may read is not known: the scan of them has failed")
            ids: U64 | None = None
            if state == _KNOWN:
                count = (self._path.stat().st_size - _STATE_BYTES) // 8
                ids = np.empty(0, np.uint64)
                if count:
                    ids = np.memmap(self._path, np.uint64, "r", _STATE_BYTES, (count,)).view(np.ndarray)
            self._found = (ids,)
        return self._found is not None

    @property
    def ids(self) -> U64 | None:
        """Hashes of the `_id`s, ascending, when the scan has ended; None where the set is too large to be kept."""
        return None if self._found is None else self._found[0]

    def wait(self) -> None:
        """Wait for the end of the scan. Raises: DataError where it has failed, or the run has ended."""
        while not self.is_known:
            if not self._path.parent.exists():
                raise DataError("which documents the run may read is not known: the run has ended")
            time.sleep(_WAIT_S)


@final
class ScannedMembers:
    """A set of documents as a scan has found them, in files of a folder.

    Args:
        folder: Where the files are; whoever made it removes it.
        name: What the names of the files begin with.

    Attributes:
        members: The set; its rows are read from the file when they are needed.
        blob: The set as `Members.to_bytes` has it; None where it is too large to be kept.
    """

    members: Members
    blob: FileBytes | None = None

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def pending(self, at: Timestamp) -> PendingMembers:
        """What streams read of it."""
        return PendingMembers(self._path("ids"), at)

    def scan(self, replies: Iterable[Reply], *, goes_on: Callable[[], bool], most: int = MOST_MEMBERS) -> bool:
        """Read the set, once; whether it was read to its end.

        Args:
            replies: Its documents, as concatenated BSON, none of them empty.
            goes_on: Asked after each reply.
            most: Documents, above which only the count and the digest are kept.
        """
        content = ContentDigest()
        parts: _Parts | None = _Parts(self._folder, self._name)
        try:
            for reply in replies:
                digests = content.add(reply)
                if parts is not None and content.count <= most:
                    parts.add(rows_of(reply, digests))
                elif parts is not None:
                    parts.close()
                    parts = None
                    self._show(_UNBOUNDED)
                if not goes_on():
                    return False
            self.members = Members(count=content.count, digest=content.hex, rows=None)
            if parts is not None:
                self._put_in_order(parts, content.hex)
        finally:
            if parts is not None:
                parts.close()
        return True

    def fail(self) -> None:
        """Let no stream wait for the set any more."""
        if not self._path("ids").exists():
            self._show(_FAILED)

    def close(self) -> None:
        """Close the file of the blob."""
        if self.blob is not None:
            self.blob.close()

    def _put_in_order(self, parts: _Parts, digest: str) -> None:
        head, count = MEMBERS_HEAD.pack(*Members.head_of(digest)), 0
        with self._path("rows").open("wb") as rows_file, self._path("building").open("wb") as ids_file:
            rows_file.write(head)
            ids_file.write(_KNOWN)
            for rows in parts.in_order():
                rows.astype("<u8", copy=False).tofile(rows_file)
                np.ascontiguousarray(rows[:, 0]).tofile(ids_file)
                count += len(rows)
        path = self._path("rows")
        self.blob = FileBytes(path)
        shape = (count, 2)
        rows = np.memmap(path, "<u8", "r", len(head), shape) if count else np.empty(shape, np.uint64)
        self.members = Members(count=count, digest=digest, rows=rows.view(np.ndarray))
        self._path("building").replace(self._path("ids"))

    def _show(self, state: bytes) -> None:
        self._path("building").write_bytes(state)
        self._path("building").replace(self._path("ids"))

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._name}.{kind}"


@final
class _Parts:
    """Rows in files by the first bits of their hashes, so that each file can be sorted alone."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files: list[BinaryIO] = []
        for n in range(_PARTS):
            path = folder / f"{name}.part{n}"
            self._files.append(path.open("w+b", buffering=2**15))
            path.unlink()

    def add(self, rows: Hashes) -> None:
        part = (rows[:, 0] >> np.uint64(64 - _PARTS.bit_length() + 1)).astype(np.intp)
        order = np.argsort(part, kind="stable")
        rows, ends = rows[order], np.cumsum(np.bincount(part, minlength=_PARTS))
        for file, group in zip(self._files, np.split(rows, ends[:-1]), strict=True):
            if len(group):
                file.write(group.tobytes())

    def in_order(self) -> Iterator[Hashes]:
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), np.uint64).reshape(-1, 2)
            yield rows[np.lexsort((rows[:, 1], rows[:, 0]))]

    def close(self) -> None:
        for file in self._files:
            file.close()


@final
class BackgroundScan:
    """Scans some sets of documents in a thread, one after the other, as of one cluster time.

    Where the server no longer has that time, because a scan took longer than it keeps old versions of documents,
    what there is then is scanned.

    Args:
        database: A pymongo database of a replica set.
        sets: The documents of each set, by name: queries without a skip, a limit or a pipeline.
        keys: The fields of each set that count besides `_id`, by its name; None: no other field does.
        at: The cluster time.
        folder: Where the files are; whoever made it removes it.
        read_deadline_s: How long a broken read is tried again, in seconds.
        before: Called in the thread before the first scan; what it raises ends that.

    Attributes:
        uncertain: The names of sets that are not those of the cluster time.
    """

    def __init__(
        self,
        database: Any,
        sets: Mapping[str, Query],
        keys: Mapping[str, Any],
        *,
        at: Timestamp,
        folder: Path,
        read_deadline_s: float,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self._database, self._queries, self._keys, self._at = database, dict(sets), keys, at
        self._read_deadline_s, self._before = read_deadline_s, before
        self._sets = {name: ScannedMembers(folder, f"set{n}") for n, name in enumerate(sets)}
        self.uncertain: set[str] = set()
        self._begun, self._closed, self._done = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mongotorch-scan", daemon=True)
        self._error: Exception | None = None
        self._complete = False

    def pending(self, name: str) -> PendingMembers:
        """What streams read of a set."""
        return self._sets[name].pending(self._at)

    def begin(self) -> None:
        """Begin, unless it has begun. Raises: what the scan has raised."""
        with self._begun:
            if not self._thread.is_alive() and not self._done.is_set():
                self._thread.start()
        if self._error is not None:
            raise self._error

    def result(self, check: Callable[[], None]) -> dict[str, ScannedMembers]:
        """The sets, by name, when all are scanned.

        Args:
            check: Called while it is waited for; what it raises ends that.

        Raises:
            DataError: It was ended.
            MongotorchError: What the scan has raised.
        """
        self.begin()
        while not self._done.wait(_CHECK_S):
            check()
        if self._error is not None:
            raise self._error
        if not self._complete:
            raise DataError("the scan of the documents was ended, because the run has ended")
        return self._sets

    def end(self) -> None:
        """End it; streams do not wait for it any more. A second call does nothing."""
        self._closed.set()
        with self._begun:
            if not self._thread.is_alive():
                self._finish()
                return
        self._thread.join()

    def close(self) -> None:
        """End it, and close the files."""
        self.end()
        for one in self._sets.values():
            one.close()

    def _run(self) -> None:
        try:
            self._before()
            self._complete = all(self._scan(name) for name in self._sets)
        except Exception as error:  # noqa: BLE001 - raised in the run
            self._error = error
        finally:
            self._finish()

    def _finish(self) -> None:
        for one in self._sets.values():
            with contextlib.suppress(OSError):  # the folder may be gone
                one.fail()
        self._done.set()

    def _scan(self, name: str) -> bool:
        """Scan one of the sets; whether to its end."""
        if self._closed.is_set():
            return False
        try:
            return self._scan_at(name, self._at)
        except QueryError as error:
            if not is_snapshot_lost(error):
                raise
        _log.warning(
            "the server no longer knows how what the run reads as %r was when the run began: it is scanned as it "
            "is now, and the record of the run says that it is not certain",
            name,
        )
        done = self._scan_at(name, None)
        if done and self._sets[name].members.rows is not None:
            self.uncertain.add(name)
        return done

    def _scan_at(self, name: str, at: Timestamp | None) -> bool:
        reader = _reader(self._database, self._queries[name], self._keys[name], self._read_deadline_s)
        source = reader.drain(0, _READ) if at is None else reader.snapshot(at, _READ)
        replies = ThreadPrefetcher(source, most=3, most_bytes=_PREFETCH_BYTES, weigh=len)
        try:
            filled = (reply for reply in replies if len(reply))
            return self._sets[name].scan(filled, goes_on=lambda: not self._closed.is_set())
        finally:
            replies.close()


def can_scan_at(
    database: Any,
    sets: Mapping[str, Query],
    keys: Mapping[str, Any],
    *,
    at: Timestamp,
    read_deadline_s: float = 60.0,
) -> bool:
    """Whether sets of documents can be scanned as of a cluster time, well before the server forgets it.

    It needs queries that are all of what a filter matches, without an order of their own, and a server that has
    snapshots of the collection.

    Args:
        database: A pymongo database of a replica set.
        sets: The documents of each set, by name.
        keys: The fields of each set that count besides `_id`, by its name.
        at: The cluster time.
        read_deadline_s: How long a broken read is tried again, in seconds.

    Raises:
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    for query in sets.values():
        by_id = tuple(query.ordering) in ((), (("_id", 1),))
        if not (by_id and query.is_whole and query.is_repeatable and query.keeps_ids):
            return False
    seconds = 0.0
    for name, query in sets.items():
        reader = _reader(database, query, keys[name], read_deadline_s)
        try:
            found = next(reader.snapshot(at, _TRIED), b"")
        except QueryError as error:
            _log.info("the documents are scanned before the first step: %s", error)
            return False
        row_bytes = len(found) / max(sum(1 for _ in offsets(found)), 1)
        size = reader.size()
        seconds += min(size, MOST_MEMBERS) / _DOCUMENTS_A_SECOND + size * row_bytes / _BYTES_A_SECOND
    return seconds < _LONGEST_SCAN_S


def _reader(database: Any, query: Query, key: Any, read_deadline_s: float) -> ServerReader:
    projection = {"_id": 1} if key is None else Key.parse(key).projection
    query = dataclasses.replace(query, ordering=())
    reader = open_reader(database, query, projection, RetryPolicy(deadline_s=read_deadline_s))
    assert isinstance(reader, ServerReader)  # noqa: S101 - mongomock has no cluster time
    return reader
