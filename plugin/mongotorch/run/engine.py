"""The port between a job and what executes it, and the engine that executes in the calling process.

Always: an engine is told a job's id and never sees an object of the run; what it does for the id is
`perform`, which finds everything else in the database. So the same call can be made by a worker elsewhere.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, final


class Engine(abc.ABC):
    """Where the runs of a datalayer are executed."""

    name: ClassVar[str]

    @abc.abstractmethod
    def submit(self, job_id: str, perform: Callable[[str], None]) -> BaseException | None:
        """Have a job executed.

        Args:
            job_id: The uuid of a job document with status `queued`.
            perform: Executes the job of that id here; raises what the run raised, after it has recorded it.

        Returns:
            What the run raised, if the engine waited for its end; None if it succeeded or goes on elsewhere.

        Raises:
            KeyboardInterrupt: As every `BaseException` that is no `Exception`: it stops the caller as well.
        """


@final
class LocalEngine(Engine):
    """Runs a job at once, in the calling thread. `submit` returns when the run has ended."""

    name = "local"

    def submit(self, job_id: str, perform: Callable[[str], None]) -> BaseException | None:
        """Execute the job and wait for its end; see `Engine.submit`."""
        try:
            perform(job_id)
        except Exception as error:  # noqa: BLE001 - a future keeps what the run raised, whatever it is
            return error
        return None
