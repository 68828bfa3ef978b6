"""The port between a job and what executes it, and the engine that executes in the calling process.

Always: an engine is told a job's id and never sees an object of the run; what it does for the id is
`perform`, which finds everything else in the database. So the same call can be made by a worker elsewhere.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import ClassVar, final

from mongotorch.errors import SettingError

GROUP = "mongotorch.engines"


class Engine(abc.ABC):
    """Where the runs of a datalayer are executed. A new one is a class and an entry point in the group above."""

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


@final
class QueueEngine(Engine):
    """Leaves the job in the queue, for any worker. `submit` returns at once."""

    name = "queue"

    def submit(self, job_id: str, perform: Callable[[str], None]) -> BaseException | None:  # noqa: ARG002
        """Nothing is left to do: the job document is the message; see `Engine.submit`."""
        return None


def engine_named(name: str) -> Engine:
    """The compute engine of a name: built in, or offered by an installed package.

    Raises:
        SettingError: There is none; the message names those there are.
    """
    engines: dict[str, Callable[[], Engine]] = {LocalEngine.name: LocalEngine, QueueEngine.name: QueueEngine}
    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in engines:
        return engines[name]()
    if name in offered:
        made: Engine = offered[name].load()()
        return made
    known = ", ".join(sorted({*engines, *offered}))
    raise SettingError(f"compute={name!r}: there is no such engine; there are {known}", setting="compute")
