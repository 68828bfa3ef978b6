"""What is done with schedules through a datalayer: shown, paused, fired by hand, and asked about the past.

Always: a schedule is applied like any component; here is what is done with one that has been.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from mongotorch.datalayer.base import Opened
from mongotorch.run import Clockwork, Firing, Job, Schedule


class Scheduling(Opened):
    """The part of a datalayer that sees to schedules."""

    @property
    def scheduler(self) -> Clockwork:
        """What watches and fires; a `Worker` runs it."""
        return self._parts.scheduler

    def schedules(self) -> list[dict[str, Any]]:
        """Every schedule's runtime document, by name.

        What a person looks for: `_id`, `paused`, `firings`, `next_at`, `state` (what has been counted), `last`
        (the newest firing), `outcome` (of the newest run that has ended), `problem`.
        """
        return self._parts.register.all()

    def pause(self, identifier: str) -> None:
        """Let a schedule fire no more by itself; what happens meanwhile is counted. Raises: NotFoundError."""
        self._parts.register.pause(identifier, paused=True)

    def resume(self, identifier: str) -> None:
        """Let a schedule fire again. Raises: NotFoundError."""
        self._parts.register.pause(identifier, paused=False)

    def fire(self, identifier: str, *, why: str = "by hand") -> Job[Any]:
        """Fire a schedule now, paused or not; a worker runs it.

        Args:
            identifier: The schedule.
            why: What the job says as its reason.

        Returns:
            The run; `result()` is the published model, live or not.

        Raises:
            NotFoundError: There is no such schedule.
            ConflictError: Others write the schedule all the time.
        """
        return self._parts.applier.job(self._parts.register.fire(identifier, reason=why))

    def preview(self, schedule: Schedule, *, since: datetime, until: datetime | None = None) -> list[Firing]:
        """When a schedule, applied or not, would have fired.

        Documents count as having arrived when their ObjectId was made; others are not seen.

        Args:
            schedule: The schedule.
            since: From when on; aware, or naive UTC.
            until: To when; None is now.

        Raises:
            ParameterError: Its trigger looks at measurements, which the past does not have.
        """
        return self._parts.register.preview(schedule, since=since, until=until)
