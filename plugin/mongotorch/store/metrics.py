"""Stores what runs measure: one document for each job, step and kind, so that no document grows with the run.

Guarantees: writing the same job, step and kind again, as a resumed run does, replaces the entry. An attempt that
has lost its job writes none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

from pymongo import IndexModel, UpdateOne
from pymongo.errors import BulkWriteError, PyMongoError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.mongo.change_stream import open_stream, poller
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import Later, clock_of, ensure_indexes, is_mock, records
from mongotorch.store.jobs import COLLECTION as JOBS
from mongotorch.store.jobs import plain_key, running

COLLECTION: Final = "mt.metrics"
_POLL_S: Final = 0.5
_DUPLICATE_KEY: Final = 11000


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricEntry:
    """What one entry says.

    Attributes:
        step: The number of optimizer steps taken.
        kind: What was measured: `train` or `valid`.
        values: The measured values by name.
        steps: Of `train`: the number of steps whose means the values are; 0 where there is none.
        age_s: Seconds since it was measured.
    """

    step: int
    kind: str
    values: Mapping[str, float]
    steps: int = 0
    age_s: float = 0.0


@final
class MetricLog:
    """The metric entries of one database.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = records(database, COLLECTION)
        self._jobs = records(database, JOBS)
        self._clock = clock_of(database)

    @repeated("preparing the metrics")
    def ensure_indexes(self) -> None:
        """Create the indexes if they do not exist."""
        ensure_indexes(
            self._documents,
            IndexModel([("job", 1), ("step", 1), ("kind", 1)], unique=True),
            IndexModel([("component", 1), ("step", 1)]),
        )

    def add(self, *, job: str, component: str, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one entry, over the one of the same job, step and kind; see `write`."""
        self.write([MetricEntry(step=step, kind=kind, values=values)], job=job, component=component)

    @repeated("writing metrics")
    def write(
        self, measured: Sequence[MetricEntry], *, job: str, component: str, attempt: int | None = None
    ) -> bool:
        """Write entries in one request, each over the one of the same job, step and kind.

        Args:
            measured: What was measured.
            job: The job's id.
            component: The uuid of what is trained.
            attempt: Write only while the job runs under this attempt; None checks nothing.

        Returns:
            False: the job no longer runs under the attempt, and nothing was written.
        """
        with self._clock.alone():
            if attempt is not None and self._jobs.find_one(running(job, attempt), {"_id": 1}) is None:
                return False
            updates = [self._update(one, job, component) for one in measured]
            if is_mock(self._documents):  # it does not understand the bulk writes of newer drivers
                for key, update in updates:
                    self._documents.update_one(key, update, upsert=True)
            elif updates:
                requests = [UpdateOne(key, update, upsert=True) for key, update in updates]
                self._documents.bulk_write(requests, ordered=False)
        return True

    def _update(self, measured: MetricEntry, job: str, component: str) -> tuple[dict[str, Any], Any]:
        entry = {
            "job": job,
            "step": int(measured.step),
            "kind": measured.kind,
            **WRITTEN,
            "component": component,
            "values": {plain_key(name): float(value) for name, value in measured.values.items()},
            "at": Later(-measured.age_s),
        }
        if measured.steps:
            entry["steps"] = measured.steps
        # The _id follows from the entry, so that two writers at once meet in one document.
        return {"_id": f"{job}:{measured.step}:{measured.kind}"}, self._clock.update(entry)

    @repeated("storing what an imported version measured")
    def put_back(self, job: str, entries: Iterable[Any]) -> None:
        """Store the entries of a job that ran in another database, with their times.

        Args:
            job: The job's id.
            entries: As `of` gives them there; those that are none are left out.
        """
        found = {entry["_id"]: entry for entry in map(_plain_entry, entries) if entry and entry["job"] == job}
        there = {entry["_id"] for entry in self._documents.find({"job": job}, {"_id": 1})}
        new = [entry for _id, entry in found.items() if _id not in there]
        if new:
            try:
                with self._clock.alone():
                    self._documents.insert_many(new, ordered=False)
            except BulkWriteError as error:
                # Another process imports the same version: its entries are these.
                if any(one.get("code") != _DUPLICATE_KEY for one in error.details["writeErrors"]):
                    raise

    @repeated("reading metrics")
    def of(self, job: str) -> list[dict[str, Any]]:
        """The entries of a job, by step and kind. Raises: FormatError."""
        found = list(self._documents.find({"job": job}).sort([("step", 1), ("kind", 1)]))
        for entry in found:
            check_format(entry, "metric")
        return found

    def follow(
        self, job: str, known: set[tuple[int, str]], has_ended: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """The entries of a job as they come, by a change stream or by looking again, until the job has ended.

        Args:
            job: The job's id.
            known: Step and kind of the entries that are left out; what is given is added.
            has_ended: Whether the job has ended.

        Raises:
            ServerUnavailableError: The server cannot be reached.
        """
        of_job = {"operationType": "insert", "fullDocument.job": job}
        stream = open_stream(self._documents, of_job, doing="following metrics")
        with stream if stream is not None else contextlib.nullcontext():
            poll, ended = poller(), False
            while True:
                for entry in self.of(job):
                    if (entry["step"], entry["kind"]) not in known:
                        known.add((entry["step"], entry["kind"]))
                        yield entry
                if ended:
                    return
                # In this order: what is written before the end is seen by one more look.
                ended = has_ended()
                if not ended:
                    _await(stream, known, poll)

    @repeated("removing metrics")
    def remove(self, job: str, *, after: int = -1) -> int:
        """Remove the entries of a job, those after a step alone if one is given, and return how many."""
        where = {"job": job} if after < 0 else {"job": job, "step": {"$gt": after}}
        return int(self._documents.delete_many(where).deleted_count)

    @repeated("thinning metrics")
    def thin(self, job: str, interval: int) -> int:
        """Remove the `train` entries of a job whose step is no multiple of a number, and return how many."""
        of_job: dict[str, Any] = {"job": job, "kind": "train"}
        if is_mock(self._documents):  # it has no `$mod`
            steps = [entry["step"] for entry in self._documents.find(of_job) if entry["step"] % interval]
            where = {**of_job, "step": {"$in": steps}}
        else:
            where = {**of_job, "$nor": [{"step": {"$mod": [interval, 0]}}]}
        with self._clock.alone():
            return int(self._documents.delete_many(where).deleted_count)


def _plain_entry(entry: Any) -> dict[str, Any] | None:
    """An entry with what it has to have and nothing else; None for what is none."""
    if not isinstance(entry, Mapping):
        return None
    job, step, kind, values = (entry.get(name) for name in ("job", "step", "kind", "values"))
    right = isinstance(job, str) and isinstance(step, int) and kind in ("train", "valid")
    if not right or not isinstance(values, Mapping) or not isinstance(entry.get("at"), datetime):
        return None
    numbers = {plain_key(name): float(value) for name, value in values.items() if isinstance(value, int | float)}
    steps = {"steps": int(entry["steps"])} if isinstance(entry.get("steps"), int) else {}
    about = {"component": str(entry.get("component")), "values": numbers, "at": entry["at"], **steps}
    return {"_id": f"{job}:{step}:{kind}", "job": job, "step": step, "kind": kind, **WRITTEN, **about}


def _await(stream: Any, known: set[tuple[int, str]], poll: Callable[[float], None]) -> None:
    """Wait until there may be a further entry, for a second at most."""
    if stream is None or not stream.alive:
        poll(_POLL_S)
        return
    try:
        while (change := stream.try_next()) is not None:
            entry = change["fullDocument"]
            if (entry["step"], entry["kind"]) not in known:
                return
    except PyMongoError:
        stream.close()  # it cannot be resumed: looking again does as well
