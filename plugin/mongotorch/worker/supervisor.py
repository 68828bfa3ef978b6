"""Runs jobs in child processes: watches them, kills the ones that do not end, and starts others in their place.

Each child runs many jobs, one after the other, as `Worker` does, and says over a pipe which one it has. Children
are forked from a process that has loaded everything and opened nothing, so that a new one is there at once.

Guarantees: what a job does to its process ends the child and nothing else, and is recorded in the job. A job that
was cancelled, took longer than `max_runtime_s` or has to stop is killed after `stop_grace_s` seconds if it does
not end by itself. No process of a job outlives the supervisor, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import JobProcessError, MongotorchError, ServerUnavailableError
from mongotorch.jobs.failures import RUNTIME_MARGIN_S, too_long
from mongotorch.resources import die_with_parent, on_signal
from mongotorch.worker.loop import Worker, scheduling

_log = logging.getLogger("mongotorch.worker")
LOOK_S: Final = 1.0
"""How often the supervisor asks whether a job that runs was cancelled."""
_STARTS: Final = 5
"""How many children in a row may end before they have claimed anything, where the supervisor has an end."""
_LONGEST_PAUSE_S: Final = 30.0
Mode = str
"""`once`, `until_idle` or `forever`."""


@final
@dataclasses.dataclass(kw_only=True)
class Tally:
    """What a supervisor's children did.

    Attributes:
        done: How many jobs were run, whether they succeeded or failed.
        failed: How many of these attempts failed.
    """

    done: int = 0
    failed: int = 0


def _nothing() -> None:
    """Configure nothing."""


@final
class Supervisor:
    """Runs the queued jobs of a datalayer in child processes, and fires schedules in this one.

    Args:
        db: The datalayer, of any server; the caller closes it.
        count: How many children, which is how many jobs run at once.
        configure: Called first in each child, to set up logging; importable by name.
    """

    def __init__(self, db: Datalayer, *, count: int = 1, configure: Callable[[], None] = _nothing) -> None:
        self._db, self._count, self._configure = db, count, configure
        self._stop = threading.Event()
        # With SIGTERM and SIGINT as they are by default: children are started before handlers are set, and later.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mongotorch.worker.preload"])

    def run(self, mode: Mode = "forever") -> Tally:
        """Run jobs until `stop` is called, or SIGTERM or SIGINT comes, or there is nothing left to do.

        Args:
            mode: `forever`; `until_idle` returns when no job waits; `once` lets each child run one job.

        Raises:
            ServerUnavailableError: Not `forever`, and the children cannot reach the database.
        """
        tally = Tally()
        if mode != "forever":
            self._db.scheduler.step()
        background = scheduling(self._db.scheduler.run) if mode == "forever" else contextlib.nullcontext()
        with on_signal(self._stop.set), background:
            children = [self._start(mode) for _ in range(self._count)]
            try:
                while children:
                    _wait(children)
                    children = self._turn(children, mode, tally)
            finally:
                for child in children:
                    child.kill()
        return tally

    def stop(self) -> None:
        """Make `run` return; the runs write a checkpoint first, and their jobs are handed back."""
        self._stop.set()

    def _turn(self, children: Sequence[_Child], mode: Mode, tally: Tally) -> list[_Child]:
        """Look at every child once, and return those that are there afterwards."""
        kept: list[_Child] = []
        for child in children:
            child.read(tally)
            if not child.has_ended:
                self._watch(child)
                kept.append(child)
            elif not self._settle(child, mode, tally):
                kept.append(self._start(mode, after=child))
        return kept

    def _start(self, mode: Mode, after: _Child | None = None) -> _Child:
        """Start a child; one that replaces others that ended at once waits before it connects."""
        starts = 0 if after is None or after.claimed_any else after.starts + 1
        if starts >= _STARTS and mode != "forever":
            raise ServerUnavailableError(
                f"{starts} processes for jobs in a row ended before they claimed one; their output says why"
            )
        pause_s = 0.0 if not starts else min(2.0 ** (starts - 1), _LONGEST_PAUSE_S)
        ours, theirs = self._context.Pipe()
        arguments = (self._db.settings.model_dump(), mode, theirs, self._configure, pause_s)
        process = self._context.Process(target=_run_jobs, args=arguments, name="mongotorch-jobs")
        process.start()
        theirs.close()
        return _Child(process, ours, starts=starts)

    def _watch(self, child: _Child) -> None:
        """Tell a child to stop, and kill it where it does not do what it should."""
        now, grace_s = time.monotonic(), self._db.settings.stop_grace_s
        if self._stop.is_set() and child.stopping_since is None:
            child.stopping_since = now
            child.signal(signal.SIGTERM)
        if child.stopping_since is not None and now - child.stopping_since > grace_s:
            child.kill()
        elif child.job is None:
            return
        elif child.job.limit_s is not None and now - child.job.begun > child.job.limit_s + RUNTIME_MARGIN_S:
            child.too_long = True
            child.kill()
        elif now - child.looked > LOOK_S:
            child.looked = now
            if self._holds(child.job):
                child.lost = None
            elif child.lost is None:
                child.lost = now
            elif now - child.lost > grace_s:
                _log.warning("job %s was cancelled and did not stop; its process is killed", child.job.id)
                child.kill()

    def _holds(self, job: _Running) -> bool:
        try:
            return self._db.runner.holds(job.id, job.attempt)
        except MongotorchError:
            return True  # the database is away: nothing is known

    def _settle(self, child: _Child, mode: Mode, tally: Tally) -> bool:
        """Record what became of the job of a child that has ended; whether no other child takes its place."""
        child.kill()  # what it has started goes too
        runner, job, stopping = self._db.runner, child.job, self._stop.is_set()
        try:
            if job is not None and stopping and child.stopping_since is not None and child.killed:
                runner.release_killed(job.id, job.attempt)
                _log.warning("job %s did not stop; it was killed and handed back", job.id)
            elif job is not None and (child.lost is None or not child.killed):
                tally.done, tally.failed = tally.done + 1, tally.failed + 1
                error = too_long(job.id, job.limit_s or 0) if child.too_long else _process_error(child.exit_code)
                runner.fail_killed(job.id, job.attempt, error, retry=not child.too_long)
        except MongotorchError as error:  # the lease ends, and then another worker takes it
            _log.warning("the end of job %s could not be recorded: %s", job and job.id, error)
        return stopping or child.is_done or (mode == "once" and job is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Running:
    """The job that a child runs."""

    id: str
    attempt: int
    limit_s: float | None
    begun: float


class _Child:
    """One child process, and what it has said."""

    def __init__(self, process: Any, pipe: Any, *, starts: int) -> None:
        self.process, self.pipe, self.starts = process, pipe, starts
        self.job: _Running | None = None
        self.claimed_any = self.is_done = self.killed = self.too_long = False
        self.stopping_since: float | None = None
        self.lost: float | None = None
        self.looked = time.monotonic()

    @property
    def has_ended(self) -> bool:
        return not self.process.is_alive()

    @property
    def exit_code(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def read(self, tally: Tally) -> None:
        """Take in what the child has said."""
        try:
            while not self.pipe.closed and self.pipe.poll():
                self._take(self.pipe.recv(), tally)
        except (EOFError, OSError):  # it has ended, or has closed what it had open
            self.pipe.close()

    def _take(self, message: Mapping[str, Any], tally: Tally) -> None:
        self.lost = None
        if message["what"] == "done":
            self.is_done = True
        elif message["what"] == "claimed":
            self.claimed_any, self.looked = True, time.monotonic()
            self.job = _Running(
                id=message["id"], attempt=message["attempt"], limit_s=message["limit_s"], begun=time.monotonic()
            )
        else:
            self.job = None
            tally.done += message["what"] != "released"
            tally.failed += message["what"] == "failed"

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill the child and its whole process group, and wait for it."""
        self.killed = self.killed or not self.has_ended
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL) if not self.has_ended else None
        self.process.join()


def _wait(children: Sequence[_Child]) -> None:
    """Return when a child says something or ends, or a fifth of a second has passed."""
    sources = [child.process.sentinel for child in children]
    sources += [child.pipe for child in children if not child.pipe.closed]
    multiprocessing.connection.wait(sources, timeout=0.2)


def _process_error(code: int | None) -> JobProcessError:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = f"was killed by {name}" + (", as the system does when memory runs out" * (name == "SIGKILL"))
    else:
        why = f"ended with exit code {code} in the middle of the run: something in it called os._exit or crashed"
    return JobProcessError(
        f"the process of the run {why}; look at what the trainer calls, and at the worker's output"
    )


def _run_jobs(
    settings: Mapping[str, Any], mode: Mode, pipe: Any, configure: Callable[[], None], pause_s: float
) -> None:
    """The child: a worker without schedules, which reports what it runs; ends itself."""
    os.setsid()  # a group of its own: it is killed with all that it has started
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor takes Ctrl-C
    faulthandler.enable()
    configure()
    time.sleep(pause_s)

    def report(job: Mapping[str, Any] | None, what: str) -> None:
        message: dict[str, Any] = {"what": what}
        if job is not None:
            limit_s = job.get("max_runtime_s") or db.settings.max_runtime_s
            message |= {"id": job["_id"], "attempt": job["attempt"], "limit_s": limit_s}
        pipe.send(message)

    with Datalayer.connect(**settings) as db:
        worker = Worker(db, schedules=False, report=report)
        if mode == "once":
            worker.once()
        else:
            worker.run(until_idle=mode == "until_idle")
        pipe.send({"what": "done"})
