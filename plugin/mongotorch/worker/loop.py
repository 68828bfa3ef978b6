"""The worker loop: runs queued jobs, one after the other, and fires schedules meanwhile, in the calling process.

Guarantees: one job at a time, since random generators belong to the process. A worker that is told to stop lets
the current run write a checkpoint and hands its job back. A job that raises, whatever it raises, does not end the
worker, and neither does an outage of the database.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import ServerUnavailableError
from mongotorch.resources import on_signal

POLL_S = 0.2
OUTAGE_PAUSE_S = 2.0
_log = logging.getLogger("mongotorch.worker")
Report = Callable[[Mapping[str, Any] | None, str], None]
"""Called with the job document and `claimed`, and with None and how the run ended."""


@final
class Worker:
    """Runs the queued jobs of a datalayer in this process.

    What ends the process (a crash, `os._exit`) ends the worker: `mongotorch worker` and `Supervisor` run jobs in
    processes of their own.

    Args:
        db: The datalayer, with any `compute` setting; the caller closes it.
        schedules: Whether it also fires schedules.
        report: Called before and after each job.

    Attributes:
        failed: How many of the jobs that were run did not succeed.
    """

    def __init__(self, db: Datalayer, *, schedules: bool = True, report: Report | None = None) -> None:
        self._db, self._runner, self._scheduler = db, db.runner, db.scheduler
        self._schedules, self._report = schedules, report or _ignore
        self._stop = threading.Event()
        self.failed = 0

    def __repr__(self) -> str:
        return f"Worker({self._db!r}, schedules={self._schedules}, failed={self.failed})"

    def run(self, until_idle: bool = False) -> int:
        """Run jobs and fire schedules until `stop` is called, or SIGTERM or SIGINT comes (in the main thread).

        Args:
            until_idle: Fire the schedules that are due now, and return when no job waits.

        Returns:
            How many jobs were run, whether they succeeded or failed.

        Raises:
            ServerUnavailableError: With `until_idle`: the database is gone for longer than the driver waits.
                Without it, the worker waits until it is back.
        """
        done = 0
        if until_idle and self._schedules:
            self._scheduler.step()
        in_background = self._schedules and not until_idle
        with on_signal(self.stop), scheduling(self._scheduler.run) if in_background else contextlib.nullcontext():
            while not self._stop.is_set():
                try:
                    job = self._runner.claim()
                    if job is None and until_idle and self._runner.is_idle():
                        break
                except ServerUnavailableError as error:
                    if until_idle:
                        raise
                    _log.warning("the worker waits for the database: %s", error)
                    self._stop.wait(OUTAGE_PAUSE_S)
                    continue
                if job is None:
                    self._stop.wait(POLL_S)
                else:
                    done += self._run_one(job)
        return done

    def once(self) -> bool:
        """Fire the schedules that are due now, and run one job if one can be claimed; whether one was run."""
        if self._schedules:
            self._scheduler.step()
        with on_signal(self.stop):
            job = self._runner.claim()
            return job is not None and self._run_one(job)

    def stop(self) -> None:
        """Make `run` return; the current run writes a checkpoint first, and its job is handed back."""
        self._stop.set()

    def _run_one(self, job: Mapping[str, Any]) -> bool:
        """Run a claimed job; False where it was handed back."""
        self._report(job, "claimed")
        outcome = self._runner.run_claimed(job, self._stop)
        self.failed += outcome == "failed"
        self._report(None, outcome)
        return outcome != "released"


def _ignore(job: Mapping[str, Any] | None, what: str) -> None:
    """Report nothing."""


@contextlib.contextmanager
def scheduling(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Fire schedules from a thread of its own, also while a job runs."""
    ended = threading.Event()
    thread = threading.Thread(target=run, args=(ended,), name="mongotorch-scheduler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
