"""From what was observed to a job: a trigger decides, the firing gets a number, the number gets one job.

Always: the decision, what is left of the observations, and the firing's number are one write; a firing that was
written gets its job from whoever looks next, and a second job for it is the first one, by its key.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, final

from mongotorch.errors import MongotorchError
from mongotorch.run import Schedule, State, Trigger
from mongotorch.store import Jobs, Schedules
from mongotorch.wiring.load import Loader

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
