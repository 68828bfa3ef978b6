"""What happens to runs and aliases, for mirrors, which pass it on: jobs, their outcomes, and how far a mirror is.

Guarantees: what is recorded as sent stays so until its time is further back than the position.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, final

from pymongo.errors import DuplicateKeyError

from mongotorch.codecs import WRITTEN, check_format
from mongotorch.errors import NotFoundError
from mongotorch.mongo.driver_errors import repeated
from mongotorch.mongo.server_features import Later, clock_of, records
from mongotorch.store.aliases import Aliases, Move
from mongotorch.store.components import Components
from mongotorch.store.jobs import Jobs
from mongotorch.store.metrics import MetricLog

COLLECTION: Final = "mt.mirrors"
EVENTS: Final = ("failed", "published", "promoted", "refused")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened, once.

    Attributes:
        id: Names it, for ever: the same whenever it is looked up.
        kind: One of `EVENTS`: a job `failed`, its model was `published`, the gate of a schedule `refused` that to
            go live, or an alias was `promoted` to a version.
        time: When, by the database's clock, naive UTC.
        details: What people want to know of it; plain BSON.
    """

    id: str
    kind: str
    time: datetime
    details: Mapping[str, Any]


@final
class MirrorPositions:
    """The positions of the mirrors of one database: one document each.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._documents = records(database, COLLECTION)
        self._clock = clock_of(database)

    @repeated("reading the clock")
    def now(self) -> datetime:
        """The time, by the database's clock, naive UTC."""
        return self._clock.now()

    @repeated("reading the position of a mirror")
    def begin(self, name: str) -> tuple[datetime, set[str]]:
        """Where a mirror goes on, from now where it is new.

        Args:
            name: The name of the mirror.

        Returns:
            The time up to which everything was sent, and the ids of what was sent since.

        Raises:
            FormatError: A newer release has written it.
        """
        found = self._documents.find_one({"_id": name})
        if found is None:
            begun = self._clock.update({**WRITTEN, "since": Later(), "sent": []})
            with self._clock.alone(), contextlib.suppress(DuplicateKeyError):  # another process was faster
                self._documents.update_one({"_id": name, "since": None}, begun, upsert=True)
            found = self._documents.find_one({"_id": name})
        check_format(found, "mirror")
        return found["since"], set(found["sent"])

    @repeated("recording what a mirror has sent")
    def record(self, name: str, event: str) -> None:
        """Record that an event was sent, before the next one is."""
        self._documents.update_one({"_id": name}, {"$addToSet": {"sent": event}})

    @repeated("recording the position of a mirror")
    def advance(self, name: str, since: datetime, sent: Iterable[str]) -> None:
        """Record that everything up to a time was sent, and what was sent since."""
        self._documents.update_one({"_id": name}, {"$set": {"since": since, "sent": sorted(sent)}})


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLog:
    """Reads what happened in one database.

    Attributes:
        jobs: The job documents.
        metric_log: What runs measured.
        aliases: The moves of the aliases.
        components: The documents of the versions.
        positions: How far each program has come.
    """

    jobs: Jobs
    metric_log: MetricLog
    aliases: Aliases
    components: Components
    positions: MirrorPositions

    def changed_jobs(self, since: datetime | None) -> list[dict[str, Any]]:
        """The documents of jobs that are open, or have ended since a time; None is all. Raises: FormatError."""
        if since is None:
            return self.jobs.find(limit=0)
        still_open = [job for status in ("queued", "running") for job in self.jobs.find(status=status, limit=0)]
        return [*still_open, *self.jobs.ended(since)]

    def events(self, since: datetime) -> list[RunEvent]:
        """What has happened since a time, in its order. Raises: FormatError, TrustError."""
        found = [event for job in self.jobs.ended(since) for event in self._of_job(job)]
        found += [_of_move(move) for move in self.aliases.moves(since) if move.to_uuid is not None]
        return sorted(found, key=lambda event: (event.time, event.id))

    def _of_job(self, job: Mapping[str, Any]) -> Iterator[RunEvent]:
        about = {"job": job["_id"], "type_id": job.get("type_id"), "identifier": job.get("identifier")}
        named = f"{job['_id']}:{job['attempt']}"
        if job["status"] == "failed":
            error = {name: (job.get("error") or {}).get(name) for name in ("type", "message")}
            details = {**about, "error": error}
            yield RunEvent(id=f"{named}:failed", kind="failed", time=job["finished"], details=details)
        if job["status"] != "succeeded":
            return
        try:
            model = self.components.get(job["result"])
        except NotFoundError:
            return  # it was removed since
        if model.get("job") != job["_id"]:
            return  # a firing without new documents, of which nothing came
        details = {**about, "model": _version(model), "metrics": dict(model.get("metrics") or {})}
        yield RunEvent(id=f"{named}:published", kind="published", time=job["finished"], details=details)
        verdict = model.get("verdict")
        if verdict is not None and not verdict["promote"]:
            details = {**details, "why": verdict["why"]}
            yield RunEvent(id=f"{named}:refused", kind="refused", time=job["finished"], details=details)


def _of_move(move: Move) -> RunEvent:
    ends = {"from": move.from_version, "to": move.to_version, "uuid": move.to_uuid}
    details = {
        "type_id": move.type_id,
        "identifier": move.identifier,
        "alias": move.alias,
        **ends,
        "who": move.who,
        "why": move.why,
        "job": move.job,
    }
    return RunEvent(id=move.to_document()["_id"], kind="promoted", time=move.when, details=details)


def _version(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"uuid": document["_id"], **{name: document[name] for name in ("type_id", "identifier", "version")}}
