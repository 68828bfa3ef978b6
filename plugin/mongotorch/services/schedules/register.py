"""The register of schedules: applies, pauses, previews and forgets them, asks their triggers, and fires.

Guarantees: nothing that happens to a schedule's documents after it was applied is missed, whether a scheduler runs
or not. A schedule that is applied again with changes keeps its counts. A firing's number, the trigger's decision
and its new state are one write; each firing becomes one job, by its key, whoever creates the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import uuid as uuids
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, final

from bson import ObjectId

from mongotorch.errors import ConflictError, MongotorchError, NotFoundError
from mongotorch.mongo.change_stream import baseline
from mongotorch.query import Query
from mongotorch.schedule import Firing, Schedule, State, Trigger, preview
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import Jobs, Schedules
from mongotorch.train import trainer_and_model

_COUNTED: Final = frozenset({"inserted", "changed"})
_RETRY_S: Final = 60.0
"""Seconds until a schedule that could not be read is looked at again."""
Document = dict[str, Any]


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

        Args:
            document: The schedule's, as it was read.
            now: The time.

        Returns:
            The document as it is now; None where another process has changed it.
        """
        if document["pending"] is not None:
            return self._enqueue(document)
        try:
            before = State.from_document(document["state"])
            decision, state = self.trigger_of(document["component"]).due(now, before)
        except MongotorchError as error:
            return self._schedules.write(
                document, {"problem": str(error), "next_at": now + timedelta(seconds=_RETRY_S)}
            )
        record = {"state": state.to_document(), "next_at": decision.next_at, "problem": None}
        if not decision.fire:
            changed = {name: value for name, value in record.items() if document.get(name) != value}
            return self._schedules.write(document, changed) if changed else document
        # It is due at once again: the new state decides when it fires next.
        return self._fire(document, reason=decision.reason, at=now, changes={**record, "next_at": now})

    def record_outcome(self, identifier: str, outcome: Mapping[str, Any]) -> None:
        """Keep the outcome of the newest firing that has ended."""
        with contextlib.suppress(NotFoundError):  # it was removed meanwhile
            self._schedules.change(identifier, {"outcome": dict(outcome)})

    def forget(self, identifier: str) -> None:
        """Forget a schedule whose component was removed; its jobs and the versions it made stay."""
        with contextlib.suppress(NotFoundError):  # it is forgotten already
            if self._catalog.components.peek(self._schedules.get(identifier)["component"]) is None:
                self._schedules.remove(identifier)

    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None) -> list[Firing]:
        """When a schedule would have fired; documents count at the time in their ObjectId.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
        """
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
        job, _ = self._jobs.add(
            component=pending["component"],
            type_id=Schedule.type_id,
            identifier=document["_id"],
            method=f"run-{pending['firing']}",
            key=f"{document['life']}/{pending['firing']}",
            parameters={"firing": pending["firing"], "reason": pending["reason"], "fired": pending["at"]},
        )
        return self._schedules.write(document, {"pending": None, "last": {**pending, "job": job}})

    def _trigger(self, component: str) -> Trigger:
        schedule = self._catalog.load_fields(component, ("trigger", "max_wait"))
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        return schedule.effective_trigger

    def _arrivals(self, select: Query, since: datetime, until: datetime) -> Iterator[datetime]:
        first, last = (ObjectId.from_datetime(moment) for moment in (since, until))
        among = {"_id": {"$gte": first, "$lt": last}}
        where = {"$and": [select.where, among]} if select.where and not select.is_pipeline else among
        found = self._database[select.collection].find(where, {"_id": 1}).sort("_id", 1)
        return (document["_id"].generation_time.astimezone(UTC).replace(tzinfo=None) for document in found)
