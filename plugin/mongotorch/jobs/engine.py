"""Engines: where the jobs of a datalayer run. An engine gets a job's id and a function that runs it, nothing else.

The function finds everything in the database, so a worker in another process can make the same call.

What becomes of a job is logged by `mongotorch.jobs`, one record an event. A record has `event`, `job`, `attempt`
and `component`, and where the event has them `step`, `values`, `version` and `why`. The events: `claimed`,
`validated`, `checkpoint`, `published`, `promoted`, `refused`, `succeeded`, `failed`, `cancelled`, `handed back`,
`lease lost`.
"""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import logging
import os
import platform
import socket
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

from mongotorch._version import __version__
from mongotorch.errors import SettingError
from mongotorch.jobs.launchers import is_launcher

GROUP = "mongotorch.engines"
_log = logging.getLogger("mongotorch.jobs")


class Engine(abc.ABC):
    """Runs jobs. A new engine is a subclass and an entry point in the group `mongotorch.engines`."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abc.abstractmethod
    def submit(self, job_id: str, run: Callable[[str], None]) -> BaseException | None:
        """Have a job run.

        Args:
            job_id: The uuid of a job document with status `queued`.
            run: Runs the job of that id in this process; raises the job's error after it was recorded.

        Returns:
            The job's error, if the engine waited for its end; None if it succeeded or runs elsewhere.

        Raises:
            KeyboardInterrupt: Like every `BaseException` that is not an `Exception`, it stops the caller as well.
        """


@final
class LocalEngine(Engine):
    """Runs a job in the calling thread; `submit` returns when it has ended."""

    name = "local"

    def submit(self, job_id: str, run: Callable[[str], None]) -> BaseException | None:
        """Run the job to its end; see `Engine.submit`."""
        try:
            run(job_id)
        except Exception as error:  # noqa: BLE001 - the `Job` keeps any error of the run
            return error
        return None


@final
class QueueEngine(Engine):
    """Leaves a job in the queue for any worker; `submit` returns at once."""

    name = "queue"

    def submit(self, job_id: str, run: Callable[[str], None]) -> BaseException | None:  # noqa: ARG002
        """Do nothing: workers find the job's document; see `Engine.submit`."""
        return None


def engine_named(name: str) -> Engine:
    """The engine of a name: a built-in one, or one that an installed package offers.

    The name of a launcher is that of the local engine: the calling process claims the job, and starts the ranks.

    Raises:
        SettingError: There is no such engine; the message names those there are.
    """
    engines: dict[str, Callable[[], Engine]] = {LocalEngine.name: LocalEngine, QueueEngine.name: QueueEngine}
    offered = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name in engines:
        return engines[name]()
    if name in offered:
        made: Engine = offered[name].load()()
        return made
    if is_launcher(name):
        return LocalEngine()
    known = ", ".join(sorted({*engines, *offered}))
    raise SettingError(f"compute={name!r}: there is no such engine; there are {known}", setting="compute")


def worker_name() -> str:
    """The name of this process as a worker: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


@functools.cache
def environment() -> dict[str, str]:
    """The versions and the platform that a run here depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pymongo")}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "mongotorch": __version__,
        **packages,
    }


def log_job(
    job: Mapping[str, Any], event: str, detail: str = "", *, level: int = logging.INFO, **fields: Any
) -> None:
    """Log an event of a job.

    Args:
        job: The claimed job document.
        event: What happened.
        detail: The rest of the sentence; without passwords.
        level: The level of the record.
        fields: What the record has besides: `step`, `values`, `version`, `why`.
    """
    if not _log.isEnabledFor(level):
        return
    name = f"job {job['_id']} of {job['type_id']} {job['identifier']!r}"
    more = f"{event}: {detail}" if detail else f"{event} (attempt {job['attempt']})"
    component = f"{job['type_id']} {job['identifier']}"
    given = {"job": job["_id"], "attempt": job["attempt"], "component": component, "event": event}
    _log.log(level, "%s %s", name, more, extra={**given, **fields})
