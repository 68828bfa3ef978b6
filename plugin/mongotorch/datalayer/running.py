"""What runs through a datalayer: components are applied, and their jobs found again.

Always: a job is found from any process; where it runs is the setting `compute`.
"""

from __future__ import annotations

from typing import Any

from mongotorch.component import Component
from mongotorch.datalayer.base import Opened
from mongotorch.run import Job, Shift


class Running(Opened):
    """The part of a datalayer that has work done."""

    @property
    def shift(self) -> Shift:
        """Where a `Worker` finds the jobs."""
        return self._parts.performer

    def apply(self, component: Component, *, force: bool = False, priority: int = 0) -> Job[Any]:
        """Store a component as a new version and start what it has to run.

        Args:
            component: A trainer with a model, a model with a trainer, or anything that is only stored.
            force: Run although nothing changed.
            priority: Higher is run first, where jobs queue.

        Returns:
            A future; `result()` is the published model, for a component without a run the component.

        Raises:
            ParameterError: A trainer without a model.
            CodecError: A field cannot be stored; nothing was written.
            UnsafeClosureError: A field holds a database client; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        return self._parts.applier.apply(component, force=force, priority=priority)

    def job(self, uuid: str) -> Job[Any]:
        """A run, found again from anywhere. Raises: NotFoundError."""
        return self._parts.applier.job(uuid)

    def jobs(
        self, *, status: str | None = None, identifier: str | None = None, limit: int = 100
    ) -> list[Job[Any]]:
        """Runs, the newest first: `limit` at most, of one status or of the component of one name."""
        found = self._parts.jobs.find(status=status, identifier=identifier, limit=limit)
        return [self._parts.applier.job(record["_id"]) for record in found]
