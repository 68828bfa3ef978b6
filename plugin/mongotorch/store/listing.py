"""Reads records for people: the newest first, short, and whatever they hold.

What the dashboard shows comes from here. It is for looking only: signatures are not checked, nothing is unpickled,
and nothing is written.

Guarantees: each query over records is answered from an index; a record that lacks fields, has other types in them,
text that is no UTF-8 or a date beyond the year 9999 hides no other one; no text is longer than `MOST_TEXT`
characters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, final

from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo.errors import OperationFailure

from mongotorch.errors import StoreError
from mongotorch.mongo.change_stream import open_stream
from mongotorch.mongo.driver_errors import driver_errors, redact, repeated
from mongotorch.mongo.server_features import clock_of, is_mock, records
from mongotorch.store.aliases import COLLECTION as ALIASES
from mongotorch.store.blobs import BUCKET
from mongotorch.store.checkpoints import COLLECTION as CHECKPOINTS
from mongotorch.store.components import COLLECTION as COMPONENTS
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.metrics import COLLECTION as METRICS
from mongotorch.store.predictions import COLLECTION as PREDICTIONS
from mongotorch.store.predictions import of_versions
from mongotorch.store.schedules import COLLECTION as SCHEDULES

MOST_TEXT: Final = 20_000
"""The longest text that is shown, in characters."""
MOST_MEASUREMENTS: Final = 20_000
"""The most measurements of one run that are read."""
_MOST_ITEMS: Final = 500  # of one list or mapping
_MOST_KEY: Final = 200  # characters of a field's name
_DEEPEST: Final = 12
_EXACT: Final = 2**53  # up to which every reader of JSON keeps integers
_OPTIONS: CodecOptions[dict[str, Any]] = CodecOptions(
    uuid_representation=UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
_JOB_FIELDS: Final = (
    *("type_id", "identifier", "method", "status", "progress", "created", "started", "finished", "lease_until"),
    *("worker", "attempt", "max_attempts", "error.type", "error.message", "result", "component"),
)
_VERSION_FIELDS: Final = (
    *("type_id", "identifier", "version", "created", "job", "parent", "start", "schedule", "metrics", "verdict"),
    *("steps", "best_step", "seed", "blobs", "environment", "data.query", "data.train", "data.valid"),
    *("data.read_at", "fields.trainer"),
)
Document = dict[str, Any]
FOLLOWED: Final = (JOBS, METRICS, COMPONENTS, ALIASES, SCHEDULES, PREDICTIONS)
"""The collections whose changes `Listing.follow` tells."""
_GATHER_S: Final = 0.25


def shown(value: Any, _depth: int = 0) -> Any:
    """Any stored value in the types of JSON, passwords hidden, long texts and lists cut.

    Times become ISO 8601 in UTC; numbers that are not finite, and what JSON does not have, become text.
    """
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= _EXACT else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, datetime):
        utc = value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
        return utc.isoformat(timespec="milliseconds") + "Z"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if _depth < _DEEPEST and isinstance(value, Mapping):
        pairs = value.items() if len(value) <= _MOST_ITEMS else itertools.islice(value.items(), _MOST_ITEMS)
        return {_text(str(key), _MOST_KEY): shown(part, _depth + 1) for key, part in pairs}
    if _depth < _DEEPEST and isinstance(value, list | tuple):
        return [shown(part, _depth + 1) for part in value[:_MOST_ITEMS]]
    return _text(str(value))


def _shown_record(document: Mapping[str, Any]) -> Document:
    """A record as `shown` gives it, with the names of all of its blobs."""
    whole = {"blobs": _texts(document["blobs"])} if "blobs" in document else {}
    return {**shown(document), **whole}


def _text(value: str, most: int = MOST_TEXT) -> str:
    if len(value) <= most and value.isascii() and ":" not in value and "=" not in value:
        return value  # most texts of ten thousand measurements
    text = value[:most].encode(errors="replace").decode()
    text = redact(text) if ":" in text or "=" in text else text
    return f"{text}… ({len(value):,} characters)" if len(value) > most else text


@final
class Listing:
    """The records of one database, as people look at them; see `shown`.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._database, self._clock = database, clock_of(database)
        self._mock = is_mock(database)

    def _of(self, name: str) -> Any:
        collection = records(self._database, name)
        return collection if self._mock else collection.with_options(codec_options=_OPTIONS)

    def _read(self, name: str, where: Mapping[str, Any], fields: Iterable[str], **how: Any) -> list[Document]:
        """The documents that match, each cut as soon as it is read."""
        # mongomock fails at a path into a value that is no mapping: it gives the whole field.
        asked = dict.fromkeys((field.partition(".")[0] if self._mock else field for field in fields), 1) or None
        with self._reading():
            return [_shown_record(document) for document in self._of(name).find(where, asked, **how)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        # mongomock's collections are dicts: another thread must not write into them meanwhile.
        with self._clock.alone():
            yield

    @contextlib.contextmanager
    def follow(self) -> Iterator[Callable[[], set[str]]]:
        """Wait for changes of records, as a context manager.

        Yields:
            A function that returns after a second at most: the names of the collections that have changed. Where
            there are no change streams these are all of them, every second.

        Raises:
            ServerUnavailableError: The server cannot be reached.
        """
        match = {"ns.coll": {"$in": list(FOLLOWED)}}
        stream = open_stream(self._database, match, doing="following what changes")
        if stream is None:
            yield _every_second
            return

        def wait() -> set[str]:
            found: set[str] = set()
            with driver_errors("following what changes"):
                until = time.monotonic() + _GATHER_S
                while (event := stream.try_next()) is not None:
                    found.add(event["ns"]["coll"])
                    if len(found) == len(FOLLOWED) or time.monotonic() >= until:
                        break
            if not stream.alive:
                raise StoreError("following what changes: the server ended the change stream")
            return found

        with stream:
            yield wait

    @repeated("asking the time")
    def now(self) -> str:
        """The time by the database's clock."""
        return str(shown(self._clock.now()))

    # Runs

    @repeated("reading jobs")
    def jobs(
        self, *, status: str | None = None, identifier: str | None = None, limit: int = 100, skip: int = 0
    ) -> list[Document]:
        """The newest jobs that match, newest first.

        Args:
            status: Only those of this status.
            identifier: Only those of the component of this name.
            limit: At most so many.
            skip: Without the first so many.
        """
        asked = {"status": status, "identifier": identifier}
        where = {name: value for name, value in asked.items() if value is not None}
        order = [("created", -1), ("_id", -1)]
        return self._read(JOBS, where, _JOB_FIELDS, sort=order, skip=skip, limit=limit)

    @repeated("counting jobs")
    def count_jobs(self) -> dict[str, int]:
        """How many jobs there are of each status."""
        statuses = ("queued", "running", "succeeded", "failed", "cancelled")
        with self._reading():
            return {status: int(self._of(JOBS).count_documents({"status": status})) for status in statuses}

    @repeated("reading a job")
    def job(self, job_id: str) -> Document | None:
        """A whole job document; None where there is none."""
        found = self._read(JOBS, {"_id": job_id}, ())
        return found[0] if found else None

    @repeated("reading jobs")
    def jobs_of(self, ids: Sequence[str]) -> list[Document]:
        """The jobs of these ids."""
        return self._read(JOBS, {"_id": {"$in": list(ids)}}, _JOB_FIELDS)

    @repeated("reading metrics")
    def measurements(self, job_id: str) -> list[Document]:
        """What a run has measured, by step: `step`, `kind`, `values`, `at`; at most `MOST_MEASUREMENTS`."""
        fields = {"step": 1, "kind": 1, "values": 1, "at": 1, "_id": 0}
        order = [("step", 1), ("kind", 1)]
        with self._reading():
            cursor = self._of(METRICS).find({"job": job_id}, fields, sort=order, limit=MOST_MEASUREMENTS)
            return [shown(entry) for entry in cursor]

    @repeated("reading checkpoints")
    def checkpoints(self, job_id: str) -> list[Document]:
        """The checkpoints of a run, the newest first, with the bytes of their blobs as `nbytes`."""
        order = [("attempt", -1), ("step", -1)]
        fields = ("attempt", "step", "blobs")
        found = self._read(CHECKPOINTS, {"job": job_id}, fields, sort=order, limit=100)
        sizes = self.sizes(name for document in found for name in _texts(document.get("blobs")))
        for document in found:
            names = dict.fromkeys(_texts(document.pop("blobs", None)))
            document["nbytes"] = sum(sizes.get(name, 0) for name in names)
        return found

    # Versions

    @repeated("listing identifiers")
    def names(self, type_id: str) -> list[Document]:
        """The names of a kind, in order: `identifier`, the number of `versions`, the `newest` one, `created`."""
        group = {
            "_id": "$identifier",
            "versions": {"$sum": 1},
            "newest": {"$max": "$version"},
            "created": {"$max": "$created"},
        }
        stages = [{"$match": {"type_id": type_id}}, {"$group": group}, {"$sort": {"_id": 1}}]
        with self._reading():
            found = [shown(document) for document in self._of(COMPONENTS).aggregate(stages)]
        return [{"identifier": document.pop("_id"), **document} for document in found]

    @repeated("listing versions")
    def versions(self, type_id: str, identifier: str, *, limit: int = 200) -> list[Document]:
        """The newest versions of a name, the newest first."""
        where = {"type_id": type_id, "identifier": identifier}
        return self._read(COMPONENTS, where, _VERSION_FIELDS, sort=[("version", -1)], limit=limit)

    @repeated("reading components")
    def components(self, uuids: Iterable[str]) -> dict[str, Document]:
        """The versions of these uuids, by uuid; those that are gone are left out."""
        found = self._read(COMPONENTS, {"_id": {"$in": list(uuids)}}, _VERSION_FIELDS)
        return {str(document["_id"]): document for document in found}

    @repeated("reading a component")
    def published(self, job_id: str) -> Document | None:
        """The version that a job has published; None where it has not."""
        # The index holds only jobs that are text: without `$type` the server does not see that it has this one.
        mine = {"job": {"$eq": job_id, "$type": "string"}, "anchor": None}
        found = self._read(COMPONENTS, mine, _VERSION_FIELDS, limit=1)
        return found[0] if found else None

    @repeated("reading aliases")
    def moves(self, type_id: str, identifier: str | None = None, *, limit: int = 500) -> list[Document]:
        """The newest moves of the aliases of a name, or of all names of a kind; by alias, the newest first."""
        where = {"type_id": type_id} | ({} if identifier is None else {"identifier": identifier})
        order = [("type_id", 1), ("identifier", 1), ("alias", 1), ("n", -1)]
        return self._read(ALIASES, where, (), sort=order, limit=limit)

    @repeated("reading the blobs")
    def sizes(self, blobs: Iterable[str]) -> dict[str, int]:
        """The bytes of each of these blobs; those that are gone are left out."""
        names = list(dict.fromkeys(blobs))
        found = self._read(f"{BUCKET}.files", {"filename": {"$in": names}}, ("filename", "length"))
        return {
            str(file.get("filename")): length for file in found if isinstance(length := file.get("length"), int)
        }

    @repeated("reading the predictions")
    def predictions(self, uuids: Sequence[str], *, limit: int = 200) -> list[Document]:
        """Into which fields these versions have written predictions, by version, collection and field."""
        return self._read(PREDICTIONS, of_versions(uuids), (), sort=[("_id", 1)], limit=limit) if uuids else []

    # Schedules, the user's collections, and what is kept

    @repeated("reading the schedules")
    def schedules(self) -> list[Document]:
        """The runtime documents of all schedules, by name."""
        names = {"_id": {"$type": "string", "$ne": "#leader"}}
        return self._read(SCHEDULES, names, (), sort=[("_id", 1)], limit=1000)

    @repeated("reading a component")
    def fields(self, uuid: str) -> Document:
        """The stored fields of a version, as they are; empty where it is gone."""
        with self._reading():
            found = self._of(COMPONENTS).find_one({"_id": uuid}, {"fields": 1})
        fields = (found or {}).get("fields")
        return dict(fields) if isinstance(fields, Mapping) else {}

    @repeated("listing collections")
    def collections(self) -> list[str]:
        """The names of the collections that are not mongotorch's own, sorted."""
        with self._reading():
            names = self._database.list_collection_names()
        return sorted(name for name in names if not name.startswith(("mt.", "system.")))

    @repeated("measuring what is kept")
    def storage(self) -> list[Document]:
        """Each collection of mongotorch's: `name`, how many `documents`, and the `nbytes` on disk, if known."""
        with self._reading():
            names = [name for name in self._database.list_collection_names() if name.startswith("mt.")]
            return [self._measured(name) for name in sorted(names)]

    def _measured(self, name: str) -> Document:
        documents = int(self._database[name].estimated_document_count())
        nbytes = None
        if not self._mock:
            with contextlib.suppress(OperationFailure):  # a user who may not look at statistics
                stages: list[Document] = [{"$collStats": {"storageStats": {}}}]
                nbytes = next(iter(self._database[name].aggregate(stages)))["storageStats"].get("totalSize")
        return {"name": name, "documents": documents, "nbytes": nbytes}


def _every_second() -> set[str]:
    time.sleep(1.0)
    return set(FOLLOWED)


def _texts(value: Any) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
