"""What people do with schedules: apply, pause, resume, fire by hand, remove, and ask when one would have fired.

Always: from the moment a schedule is applied nothing that happens to its documents is missed, whether a scheduler
runs or not; a schedule that is applied changed goes on counting where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid as uuids
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, final

from bson import ObjectId

from mongotorch.errors import ConflictError, NotFoundError
from mongotorch.mongo.change_stream import baseline
from mongotorch.query import Query
from mongotorch.schedule import Firing, Schedule, State, preview
from mongotorch.services.schedules.firing import Firings
from mongotorch.services.schedules.judging import Judge
from mongotorch.services.training.recipe import pair
from mongotorch.services.versions.catalog import Loader
from mongotorch.store import Schedules

TYPE_ID: Final = Schedule.type_id
_COUNTED: Final = frozenset({"inserted", "changed"})
Document = dict[str, Any]


@final
class Register:
    """The schedules of one database, as people see them.

    Args:
        database: The driver's database.
        schedules: The runtime documents.
        firings: Fires by hand.
        loader: Loads schedules.
        judge: Says what is served.
    """

    def __init__(
        self, *, database: Any, schedules: Schedules, firings: Firings, loader: Loader, judge: Judge
    ) -> None:
        self._database, self._schedules, self._firings = database, schedules, firings
        self._loader, self._judge = loader, judge

    def prepare(self, schedule: Schedule) -> None:
        """Before a schedule is stored, with a model of a name that is served already: keep serving that.

        Raises:
            ParameterError: The schedule's trainer has no model.
        """
        trainer, model = pair(schedule.trainer)
        trainer.check_model(model)
        self._judge.hold(model, f"served when schedule {schedule.identifier!r} was applied")

    def put(self, schedule: Schedule, uuid: str) -> None:
        """Begin, or go on, with a schedule that is stored under a uuid."""
        select: Query = pair(schedule.trainer)[0].select
        watches = sorted(schedule.effective_trigger.watches & _COUNTED)
        said = {
            "component": uuid,
            "select": select.to_document(),
            "collection": select.collection,
            "watches": watches,
            "paused": schedule.paused,
            "problem": None,
        }
        while True:
            now = self._schedules.now()
            begun = {**said, **self._begun(select, watches, now), "next_at": now}
            if self._schedules.add(schedule.identifier, begun):
                return
            there = self._schedules.get(schedule.identifier)
            if there["component"] == uuid:
                return
            if there["select"] == said["select"] and there["watches"] == watches:
                begun = {**said, "state": self._kept(there, schedule, now), "next_at": now}
            # else it looks at other documents: what was counted of the old ones means nothing.
            if self._schedules.write(there, begun) is not None:
                return

    def all(self) -> list[Document]:
        """Every schedule's runtime document, by name."""
        return self._schedules.all()

    def pause(self, identifier: str, *, paused: bool) -> Document:
        """Pause or resume; what happens meanwhile is counted. Raises: NotFoundError."""
        return self._schedules.change(identifier, {"paused": paused, "next_at": self._schedules.now()})

    def fire(self, identifier: str, *, reason: str) -> str:
        """Fire by hand, paused or not.

        Returns:
            The job's id.

        Raises:
            NotFoundError: There is no such schedule.
            ConflictError: Somebody else fires it all the time.
        """
        for _ in range(20):
            document: Document | None = self._schedules.get(identifier)
            if document is not None and document["pending"] is not None:
                document = self._firings.enqueue(document)
            if document is None:
                continue
            number = document["firings"] + 1
            fired = self._firings.fire(document, reason=reason, at=self._schedules.now())
            if fired is not None and fired["last"]["firing"] == number:
                return str(fired["last"]["job"])
        raise ConflictError(f"schedule {identifier!r} is written by others all the time; try again")

    def told(self, identifier: str, outcome: Mapping[str, Any]) -> None:
        """Keep what became of the newest firing that has ended."""
        with contextlib.suppress(NotFoundError):  # it was removed meanwhile
            self._schedules.change(identifier, {"outcome": dict(outcome)})

    def forget(self, identifier: str) -> None:
        """Forget a schedule whose component was removed; its jobs and the versions it made stay."""
        with contextlib.suppress(NotFoundError):  # it is forgotten already
            if not self._loader.is_there(self._schedules.get(identifier)["component"]):
                self._schedules.remove(identifier)

    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None) -> list[Firing]:
        """When a schedule would have fired; documents count at the time that their ObjectId says.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
        """
        select: Query = pair(schedule.trainer)[0].select
        end = self._schedules.now() if until is None else until
        return preview(schedule, since=since, until=end, arrivals=self._arrivals(select, since, end))

    def _kept(self, there: Document, schedule: Schedule, now: datetime) -> Document:
        """What was observed so far; what the trigger remembers only where it is the same trigger."""
        state = State.from_document(there["state"])
        if self._firings.trigger_of(there["component"]) != schedule.effective_trigger:
            state = dataclasses.replace(state, since=now, memory={})
        return state.to_document()

    def _arrivals(self, select: Query, since: datetime, until: datetime) -> Iterator[datetime]:
        first, last = (ObjectId.from_datetime(moment) for moment in (since, until))
        among = {"_id": {"$gte": first, "$lt": last}}
        where = {"$and": [select.where, among]} if select.where and not select.is_pipeline else among
        found = self._database[select.collection].find(where, {"_id": 1}).sort("_id", 1)
        return (document["_id"].generation_time.astimezone(UTC).replace(tzinfo=None) for document in found)

    def _begun(self, select: Query, watches: list[str], now: datetime) -> Document:
        begin = {"life": uuids.uuid4().hex, "state": State(since=now).to_document(), "stale": False}
        if not watches:
            return {**begin, "known": 0, "token": None}
        found = baseline(self._database, select)
        return {**begin, "known": found.count, "token": found.token}
