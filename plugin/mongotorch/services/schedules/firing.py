"""From what was observed to a job: a trigger decides, the firing gets a number, the number gets one job.

Always: the decision, what is left of the observations, and the firing's number are one write; a firing that was
written gets its job from whoever looks next, and a second job for it is the first one, by its key.

Measures what is live on recent documents, for the triggers that look at that.

Always: a measurement that cannot be made is an empty one, with the reason beside it, and is tried again when the
next one is due.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, final

from mongotorch.data import Stream
from mongotorch.errors import MongotorchError
from mongotorch.mongo.connection import Connection
from mongotorch.schedule import Schedule, State, Trigger
from mongotorch.services.schedules.judging import Judge
from mongotorch.services.training.recipe import pair
from mongotorch.services.training.streams import validation_spec
from mongotorch.services.versions.catalog import Loader
from mongotorch.settings import Settings
from mongotorch.store import Jobs, Schedules
from mongotorch.train import TorchModel, score

TYPE_ID: Final = Schedule.type_id
_AGAIN_S: Final = 60.0
"""After so many seconds a schedule is looked at again that could not be read."""
Document = dict[str, Any]


@final
class Firings:
    """Decides and fires.

    Args:
        schedules: The runtime documents.
        jobs: Where firings become jobs.
        loader: Reads the triggers, from components whose signature holds.
    """

    def __init__(self, schedules: Schedules, jobs: Jobs, loader: Loader) -> None:
        self._schedules, self._jobs, self._loader = schedules, jobs, loader
        # A component never changes: its trigger is read once.
        self.trigger_of = functools.lru_cache(maxsize=10_000)(self._trigger)

    def look(self, document: Document, now: datetime) -> Document | None:
        """Ask a schedule's trigger, and see to its firing.

        Args:
            document: The schedule's, as it was read.
            now: The time.

        Returns:
            The document as it is now; None where somebody else has changed it.
        """
        if document["pending"] is not None:
            return self.enqueue(document)
        try:
            before = State.from_document(document["state"])
            decision, state = self.trigger_of(document["component"]).due(now, before)
        except MongotorchError as error:
            return self._schedules.write(
                document, {"problem": str(error), "next_at": now + timedelta(seconds=_AGAIN_S)}
            )
        said = {"state": state.to_document(), "next_at": decision.next_at, "problem": None}
        if not decision.fire:
            changed = {name: value for name, value in said.items() if document.get(name) != value}
            return self._schedules.write(document, changed) if changed else document
        # It is looked at again at once: what is due next is asked of the new state.
        return self.fire(document, reason=decision.reason, at=now, changes={**said, "next_at": now})

    def fire(
        self, document: Document, *, reason: str, at: datetime, changes: Mapping[str, Any] | None = None
    ) -> Document | None:
        """Give a firing its number, and its job.

        Args:
            document: The schedule's, as it was read.
            reason: Why, for people.
            at: When.
            changes: What else is written with it.

        Returns:
            The document as it is now; None where somebody else has changed it, and nothing was fired.
        """
        number = document["firings"] + 1
        pending = {"firing": number, "reason": reason, "at": at, "component": document["component"]}
        fired = self._schedules.write(document, {**(changes or {}), "firings": number, "pending": pending})
        return None if fired is None else self.enqueue(fired)

    def enqueue(self, document: Document) -> Document | None:
        """Make the job of a firing that was written, unless it is there."""
        pending = document["pending"]
        job, _ = self._jobs.add(
            component=pending["component"],
            type_id=TYPE_ID,
            identifier=document["_id"],
            method=f"run-{pending['firing']}",
            key=f"{document['life']}/{pending['firing']}",
            parameters={"firing": pending["firing"], "reason": pending["reason"], "fired": pending["at"]},
        )
        return self._schedules.write(document, {"pending": None, "last": {**pending, "job": job}})

    def _trigger(self, component: str) -> Trigger:
        schedule = self._loader.partly(component, ("trigger", "max_wait"))
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        return schedule.effective_trigger


Record = Mapping[str, Any]


@final
class LiveMetrics:
    """Measures the live models of one database.

    Args:
        connection: The database.
        settings: Of the datalayer.
        firings: Knows the triggers.
        loader: Loads schedules and models.
        judge: Says what is live.
    """

    def __init__(
        self, *, connection: Connection, settings: Settings, firings: Firings, loader: Loader, judge: Judge
    ) -> None:
        self._connection, self._settings = connection, settings
        self._firings, self._loader, self._judge = firings, loader, judge

    def measure(self, document: Record, now: datetime) -> dict[str, Any]:
        """What a schedule's document has to say after a measurement; empty where none is due."""
        try:
            trigger = self._firings.trigger_of(document["component"])
        except MongotorchError:
            return {}  # who asks the trigger next says so
        state = State.from_document(document["state"])
        every_s = trigger.score_every_s
        if every_s is None or (state.scored is not None and (now - state.scored).total_seconds() < every_s):
            return {}
        try:
            values, problem = self._values(document, trigger), None
        except MongotorchError as error:
            values, problem = {}, f"the live model could not be measured: {error}"
        state = dataclasses.replace(state, scores=values, scored=now)
        return {"state": state.to_document(), "problem": problem}

    def _values(self, document: Record, trigger: Trigger) -> dict[str, float]:
        """The objective and the metrics on the newest documents of the fold `valid`, by `_id`."""
        schedule = self._loader.by_uuid(document["component"])
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        trainer, model = pair(schedule.trainer)
        served = self._judge.served(model)
        live = model if served is None else self._loader.by_uuid(served["_id"])
        assert isinstance(live, TorchModel)  # noqa: S101 - for the type checker
        query = trainer.select.fold("valid")
        if not query.is_pipeline:
            query = query.sort("_id", -1).limit(trigger.score_documents or 1000)
        spec = validation_spec(trainer, self._settings, query)
        with Stream(self._connection.opener(), spec, database=self._connection.database) as batches:
            return score(trainer, [live], batches)[0].values
