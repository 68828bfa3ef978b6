"""The register of schedules: applies, pauses, previews and forgets them, counts, asks their triggers, and fires.

At most one firing of a schedule waits for a worker, besides those that people ask for: what is due meanwhile is
for the next one.

Guarantees: nothing that happens to a schedule's documents after it was applied is missed, whether a scheduler runs
or not, and a change is counted once, however often it is read: a count and the position behind it are one write. A
document counts as arrived when it is in the select and was inserted, or when an update touched a field that the
select asks for; folds that are assigned to documents do not count. A schedule that is applied again with changes
keeps its counts. A firing's number, the trigger's decision and its new state are one write; each firing becomes
one job, by its key, whoever creates the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, final

from bson import ObjectId, Timestamp

from mongotorch.errors import ConflictError, MongotorchError, NotFoundError, ParameterError
from mongotorch.mongo.change_stream import Baseline, Change, baseline, counted, counted_at
from mongotorch.mongo.driver_errors import read_errors
from mongotorch.query import Query
from mongotorch.schedule import Firing, Schedule, State, Trigger, preview
from mongotorch.services.versions.catalog import Catalog
from mongotorch.split import FOLD_FIELD
from mongotorch.store import Jobs, Schedules
from mongotorch.train import trainer_and_model

_COUNTED: Final = frozenset({"inserted", "changed"})
_log = logging.getLogger("mongotorch.schedules")
_WAIT_S: Final = 1.0
"""Seconds until a schedule is looked at again whose newest firing still waits for a worker."""
Document = dict[str, Any]


def log_schedule(
    schedule: str, event: str, why: str, *, level: int = logging.INFO, job: str | None = None
) -> None:
    """Log an event of a schedule, with `event`, `schedule`, `why` and `job` in the record.

    Args:
        schedule: Its name.
        event: `fired`, or `problem`.
        why: Why; without passwords.
        level: The level of the record.
        job: The job that came of it.
    """
    about = {"schedule": schedule, "event": event, "why": why} | ({} if job is None else {"job": job})
    _log.log(
        level, "schedule %r %s: %s", schedule, event if job is None else f"{event} job {job}", why, extra=about
    )


def failure(job: Mapping[str, Any], why: str) -> dict[str, Any]:
    """The fields of a schedule's document that say that its run failed.

    Args:
        job: The run's job.
        why: Why it failed, for people.
    """
    outcome = {"job": job["_id"], "model": None, "version": None, "uuid": None, "promoted": False}
    problem = f"its run (job {job['_id']}) failed: {why}"
    return {"outcome": {**outcome, "why": f"failed: {why}"}, "problem": problem, "problem_of": "run"}


def _without_problem(document: Mapping[str, Any]) -> dict[str, Any]:
    """No problem any more, unless it is one of something else than of asking the trigger."""
    kept = document.get("problem") is not None and document.get("problem_of") in ("run", "measurement")
    return {} if kept else {"problem": None, "problem_of": None}


@final
class Register:
    """The schedules of one database.

    Args:
        database: The driver's database.
        schedules: The runtime documents.
        jobs: Where firings become jobs.
        catalog: Stores schedules and reads their triggers.
    """

    def __init__(self, database: Any, schedules: Schedules, jobs: Jobs, catalog: Catalog) -> None:
        self._database, self._schedules, self._jobs, self._catalog = database, schedules, jobs, catalog
        # A component never changes: its trigger is read once.
        self.trigger_of = functools.lru_cache(maxsize=10_000)(self._trigger)

    def apply(self, schedule: Schedule) -> str:
        """Store a schedule, and start it; a trained version of its model that is served becomes live.

        Returns:
            The uuid that it is stored under.

        Raises:
            ParameterError: The schedule's trainer has no model.
            CodecError: A field cannot be stored; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        trainer, model = trainer_and_model(schedule.trainer)
        trainer.check_model(model)
        self._catalog.pin_champion(model, f"served when schedule {schedule.identifier!r} was applied")
        uuid = self._catalog.store(schedule)
        self._put(schedule, trainer.select, uuid)
        return uuid

    def all(self) -> list[Document]:
        """Every schedule's runtime document, by name."""
        return self._schedules.all()

    def pause(self, identifier: str, *, paused: bool) -> Document:
        """Pause or resume a schedule; its documents are counted meanwhile. Raises: NotFoundError."""
        return self._schedules.change(identifier, {"paused": paused, "next_at": self._schedules.now()})

    def fire_now(self, identifier: str, *, reason: str) -> str:
        """Fire a schedule by hand, paused or not.

        Returns:
            The job's id.

        Raises:
            NotFoundError: There is no such schedule.
            ConflictError: Other processes write the schedule again and again.
        """
        for _ in range(20):
            document: Document | None = self._schedules.get(identifier)
            if document is not None and document["pending"] is not None:
                document = self._enqueue(document)
            if document is None:
                continue
            number = document["firings"] + 1
            fired = self._fire(document, reason=reason, at=self._schedules.now(), changes={})
            if fired is not None and fired["last"]["firing"] == number:
                return str(fired["last"]["job"])
        raise ConflictError(f"schedule {identifier!r} is written by others all the time; try again")

    def look(self, document: Document, now: datetime) -> Document | None:
        """Ask a schedule's trigger, and fire if it says so; a firing without a job gets its job.

        Where the job of the last firing still waits for a worker, it does not fire, and is looked at again soon.

        Args:
            document: The schedule's, as it was read.
            now: The time.

        Returns:
            The document as it is now; None where another process has changed it.
        """
        if document["pending"] is not None:
            return self._enqueue(document)
        before = State.from_document(document["state"])
        decision, state = self.trigger_of(document["component"]).due(now, before)
        record = {"state": state.to_document(), "next_at": decision.next_at, **_without_problem(document)}
        if decision.fire and self._is_waiting(document):
            # Nothing is consumed: the firing that comes once that job has begun is for all that is there by then.
            record = {"next_at": now + timedelta(seconds=_WAIT_S), **_without_problem(document)}
        elif decision.fire:
            # It is due at once again: the new state decides when it fires next.
            return self._fire(document, reason=decision.reason, at=now, changes={**record, "next_at": now})
        changed = {name: value for name, value in record.items() if document.get(name) != value}
        return self._schedules.write(document, changed) if changed else document

    def settle(self, document: Document) -> dict[str, Any]:
        """What changes in a schedule's document because its newest run failed or was cancelled.

        A run that raises tells by itself; one whose worker died, or that was cancelled, does not.
        """
        last, outcome = document.get("last") or {}, document.get("outcome") or {}
        job_id = last.get("job")
        if job_id is None or outcome.get("job") == job_id:
            return {}
        try:
            job = self._jobs.get(job_id)
        except NotFoundError:
            return {}
        if job["status"] not in ("failed", "cancelled"):
            return {}
        error = job.get("error") or {}
        found = failure(job, f"{error.get('type', 'error')}: {error.get('message', 'unknown')}")
        return found if job["status"] == "failed" else {"outcome": {**found["outcome"], "why": "it was cancelled"}}

    def _is_waiting(self, document: Document) -> bool:
        """Whether the job of a schedule's newest firing has not begun yet."""
        last = document.get("last") or {}
        try:
            return bool(last) and self._jobs.get(last["job"])["status"] == "queued"
        except NotFoundError:
            return False

    def record_outcome(self, identifier: str, changes: Mapping[str, Any]) -> None:
        """Keep the outcome of the newest firing that has ended, and its problem if it failed."""
        with contextlib.suppress(NotFoundError):  # it was removed meanwhile
            document = self._schedules.get(identifier)
            if "problem" not in changes and document.get("problem_of") == "run":
                changes = {**changes, "problem": None, "problem_of": None}
            self._schedules.change(identifier, changes)

    def forget(self, identifier: str) -> None:
        """Forget a schedule whose component was removed; its jobs and the versions it made stay."""
        with contextlib.suppress(NotFoundError):  # it is forgotten already
            if self._catalog.components.peek(self._schedules.get(identifier)["component"]) is None:
                self._schedules.remove(identifier)

    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None) -> list[Firing]:
        """When a schedule would have fired; documents count at the time in their ObjectId.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
            QueryError: The server refuses the trainer's query.
            ServerUnavailableError: The server cannot be read.
        """
        if not isinstance(schedule, Schedule):
            raise ParameterError(f"schedule must be a Schedule, not a {type(schedule).__name__}", field="schedule")
        select = trainer_and_model(schedule.trainer)[0].select
        end = self._schedules.now() if until is None else until
        return preview(schedule, since=since, until=end, arrivals=self._arrivals(select, since, end))

    def _put(self, schedule: Schedule, select: Query, uuid: str) -> None:
        """Write the runtime document of a schedule that is stored under a uuid."""
        watches = sorted(schedule.effective_trigger.watches & _COUNTED)
        record = {
            "component": uuid,
            "select": select.to_document(),
            "collection": select.collection,
            "watches": watches,
            "paused": schedule.paused,
            "problem": None,
            "problem_of": None,
        }
        while True:
            now = self._schedules.now()
            begun = {**record, **self._begun(select, watches, now), "next_at": now}
            if self._schedules.add(schedule.identifier, begun):
                return
            old = self._schedules.get(schedule.identifier)
            if old["component"] == uuid:
                return
            if old["select"] == record["select"] and old["watches"] == watches:
                begun = {**record, "state": self._kept_state(old, schedule, now), "next_at": now}
            # Otherwise it looks at other documents, and the counts of the old ones mean nothing.
            if self._schedules.write(old, begun) is not None:
                return

    def _begun(self, select: Query, watches: list[str], now: datetime) -> Document:
        begun = {"life": uuids.uuid4().hex, "state": State(since=now).to_document(), "stale": False}
        if not watches:
            return {**begun, "known": 0, "token": None}
        found = baseline(self._database, select)
        return {**begun, "known": found.count, "token": found.token}

    def _kept_state(self, old: Document, schedule: Schedule, now: datetime) -> Document:
        """The counts so far; the memory of the trigger only if it is the same trigger."""
        state = State.from_document(old["state"])
        if self.trigger_of(old["component"]) != schedule.effective_trigger:
            state = dataclasses.replace(state, since=now, memory={})
        return state.to_document()

    def _fire(
        self, document: Document, *, reason: str, at: datetime, changes: Mapping[str, Any]
    ) -> Document | None:
        """Give a firing its number, together with other changes, and its job; None: the document had changed."""
        number = document["firings"] + 1
        pending = {"firing": number, "reason": reason, "at": at, "component": document["component"]}
        fired = self._schedules.write(document, {**changes, "firings": number, "pending": pending})
        return None if fired is None else self._enqueue(fired)

    def _enqueue(self, document: Document) -> Document | None:
        """Create the job of a firing that was written, unless it is there."""
        pending = document["pending"]
        job, is_new = self._jobs.add(
            component=pending["component"],
            type_id=Schedule.type_id,
            identifier=document["_id"],
            method=f"run-{pending['firing']}",
            key=f"{document['life']}/{pending['firing']}",
            parameters={"firing": pending["firing"], "reason": pending["reason"], "fired": pending["at"]},
        )
        if is_new:
            log_schedule(document["_id"], "fired", pending["reason"], job=job)
        return self._schedules.write(document, {"pending": None, "last": {**pending, "job": job}})

    def _trigger(self, component: str) -> Trigger:
        schedule = self._catalog.load_fields(component, ("trigger", "max_wait"))
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        return schedule.effective_trigger

    def _arrivals(self, select: Query, since: datetime, until: datetime) -> Iterator[datetime]:
        first, last = (ObjectId.from_datetime(moment) for moment in (since, until))
        among = {"_id": {"$gte": first, "$lt": last}}
        where = {"$and": [select.where, among]} if select.where and not select.is_pipeline else among
        with read_errors(select.collection):
            for document in self._database[select.collection].find(where, {"_id": 1}).sort("_id", 1):
                yield document["_id"].generation_time.astimezone(UTC).replace(tzinfo=None)


# Counting

_AT_ONCE: Final = 1000
_NONE: Final = type(None)
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "_id": (str,),
    "rev": (int,),
    "component": (str,),
    "collection": (str,),
    "life": (str,),
    "watches": (list,),
    "known": (int,),
    "stale": (bool,),
    "paused": (bool,),
    "firings": (int,),
    "state": (dict,),
    "select": (dict,),
    "token": (dict, _NONE),
    "pending": (dict, _NONE),
    "last": (dict, _NONE),
    "outcome": (dict, _NONE),
    "next_at": (datetime, _NONE),
}
"""The types of a runtime document's fields."""
Record = Mapping[str, Any]


@final
class Counts:
    """Counts documents of selects; equal questions of several schedules are asked once.

    Args:
        database: The driver's database.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        self._known: dict[tuple[Query, str], int] = {}

    def __call__(self, query: Query, ids: Sequence[Any]) -> int:
        """How many of these documents are in the select now."""
        key = (query, repr(ids))
        if key not in self._known:
            parts = (ids[at : at + _AT_ONCE] for at in range(0, len(ids), _AT_ONCE))
            self._known[key] = sum(counted(self._database, query, part) for part in parts)
        return self._known[key]

    def at(self, query: Query, at: Timestamp) -> int:
        """How many documents were in the select at a cluster time."""
        key = (query, repr(at))
        if key not in self._known:
            self._known[key] = counted_at(self._database, query, at)
        return self._known[key]


def defect_of(document: Record) -> str | None:
    """Why a schedule's runtime document cannot be used, in words; None where it can."""
    for name, kinds in _KINDS.items():
        if not isinstance(document.get(name), kinds):
            return f"its field {name!r} is {document.get(name)!r}"
    token, pending = document.get("token"), document.get("pending")
    if token is not None and not isinstance(token.get("_data"), str):
        return f"its field 'token' is {token!r}"
    if pending is not None and not pending.keys() >= {"firing", "reason", "at", "component"}:
        return f"its field 'pending' is {pending!r}"
    try:
        State.from_document(document["state"])
        Query.from_document(document["select"])
    except (MongotorchError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"its state or its select is not readable ({type(error).__name__}: {error})"
    return None


def tally(count: Counts, document: Record, changes: Sequence[Change], now: datetime) -> dict[str, Any]:
    """How some changes change a schedule's document.

    Args:
        count: Counts documents.
        document: The schedule's.
        changes: In their order, of any collection, read behind the document's token or before it.
        now: The time at which they were read.

    Returns:
        The fields to write; empty where none of the changes is new to this schedule.
    """
    among = [change for change in changes if change.collection == document["collection"]]
    mine = [change for change in among if is_behind(change.token, document["token"])]
    if not mine:
        return {}
    query = Query.from_document(document["select"])
    where = {} if query.is_pipeline else query.where
    asked = frozenset(paths_of(where))
    # What happened before the collection was dropped or replaced was of documents that are gone.
    cut = max((n for n, change in enumerate(mine, 1) if change.kind in ("drop", "rename")), default=0)
    emptied, later = mine[:cut], mine[cut:]
    updates = [change for change in later if change.kind in ("update", "replace") and not _is_fold(change)]
    inserted = _ids(change for change in later if change.kind == "insert")
    entered = _ids(change for change in updates if _touches(change, asked))
    deleted = sum(change.kind == "delete" for change in later)
    vanished, known = (document["known"], 0) if emptied else (0, document["known"])
    added = count(query, inserted)
    if emptied and emptied[-1].kind == "rename":
        added += count.at(query, emptied[-1].at)
    arrived = added + count(query, [key for key in entered if key not in inserted])
    changed = added + count(query, _ids(updates)) + deleted + vanished
    # Whether a deleted document was in the select, or a changed one left it, only a new count can tell.
    is_inexact = bool(where) and (deleted > 0 or bool(entered))
    return {
        "token": mine[-1].token,
        "known": known + added - (0 if where else deleted),
        "stale": document["stale"] or is_inexact or bool(emptied),
        **_observed(document, arrived, changed, now),
    }


def recounted(document: Record, found: Baseline, now: datetime) -> dict[str, Any]:
    """How a new count of its documents changes a schedule's document, where the changes cannot be read.

    Documents that arrived and left between two counts cancel out.
    """
    more = found.count - document["known"]
    if not more and found.token is None:
        return {}
    return {
        "token": found.token,
        "known": found.count,
        "stale": False,
        **_observed(document, max(more, 0), abs(more), now),
    }


def is_behind(token: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one position in the change stream comes after another: tokens compare as text."""
    return bool(token["_data"] > other["_data"])


def paths_of(where: Any) -> Iterator[str]:
    """The paths that a filter names; those of an `$expr` are not looked for."""
    if isinstance(where, list):
        for part in where:
            yield from paths_of(part)
    elif isinstance(where, Mapping):
        for name, part in where.items():
            if name.startswith("$"):
                yield from paths_of(part) if name in ("$and", "$or", "$nor") else ()
            else:
                yield name


def _observed(document: Record, arrived: int, changed: int, now: datetime) -> dict[str, Any]:
    if not arrived and not changed:
        return {}
    state = State.from_document(document["state"])
    state = dataclasses.replace(
        state,
        inserted=state.inserted + arrived,
        changed=state.changed + changed,
        arrived=state.arrived or now,
    )
    return {"state": state.to_document(), "next_at": now}


def _is_fold(change: Change) -> bool:
    return change.fields == {FOLD_FIELD}


def _touches(change: Change, asked: frozenset[str]) -> bool:
    if change.kind == "replace":
        return bool(asked)
    tops = {path.partition(".")[0] for path in asked}
    return any(field.partition(".")[0] in tops for field in change.fields)


def _ids(changes: Any) -> list[Any]:
    """The `_id`s, each once; they need not be hashable."""
    seen: dict[str, Any] = {}
    for change in changes:
        seen.setdefault(repr(change.document_id), change.document_id)
    return list(seen.values())
