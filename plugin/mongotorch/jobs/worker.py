"""The worker: fires schedules, and takes jobs out of the queue, one after the other, for as long as it is wanted.

Always: one job at a time (the generators of randomness belong to the process); told to stop, it lets the run
that is under way write a checkpoint and hands the job back; a job that fails does not end the worker.

Several workers side by side, each a process of its own.

Always: a process is told to stop once, and waited for; one that dies is started again, unless all are told to
stop; nothing but the command and the environment crosses to them.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, final

POLL_S = 0.2


class Shift(Protocol):
    """What a worker needs of the place where jobs are."""

    def claim(self) -> Mapping[str, Any] | None:
        """Take a job; None where there is none to take."""

    def take(self, job: Mapping[str, Any], stop: threading.Event) -> bool:
        """Do a claimed job, record how it ended; True if it did. Stops early, and hands back, when told."""

    def is_idle(self) -> bool:
        """Whether no job waits, not even for its time."""


class Clockwork(Protocol):
    """What fires schedules."""

    def run(self, stop: threading.Event) -> None:
        """Watch and fire until told to stop, whatever the database does meanwhile."""

    def step(self) -> bool:
        """Count and fire what is due now, once; False where somebody else sees to that."""


class Employer(Protocol):
    """What has work: a datalayer."""

    @property
    def scheduler(self) -> Clockwork:
        """What fires its schedules."""

    @property
    def shift(self) -> Shift:
        """Where its jobs are."""


@final
class Worker:
    """Works the queue of a datalayer.

    Args:
        db: The datalayer, which stays its owner's; any `compute` setting.
    """

    def __init__(self, db: Employer) -> None:
        self._shift, self._scheduler = db.shift, db.scheduler
        self._stop = threading.Event()

    def run(self, until_idle: bool = False) -> int:
        """Work until `stop` is called, or SIGTERM or SIGINT comes (in the main thread); schedules fire meanwhile.

        Args:
            until_idle: Fire what is due now, and return when no job waits.

        Returns:
            How many jobs were performed, whether they succeeded or failed.

        Raises:
            ServerUnavailableError: The database is gone for longer than the driver waits.
        """
        done = 0
        if until_idle:
            self._scheduler.step()
        with self._signals(), contextlib.nullcontext() if until_idle else self._scheduling():
            while not self._stop.is_set():
                job = self._shift.claim()
                if job is not None:
                    done += self._shift.take(job, self._stop)
                elif until_idle and self._shift.is_idle():
                    break
                else:
                    self._stop.wait(POLL_S)
        return done

    def once(self) -> bool:
        """Fire what is due now, and perform one job if one can be claimed; whether one was."""
        self._scheduler.step()
        with self._signals():
            job = self._shift.claim()
            return job is not None and self._shift.take(job, self._stop)

    def stop(self) -> None:
        """Make `run` return: after a checkpoint of the run that is under way, whose job is handed back."""
        self._stop.set()

    @contextlib.contextmanager
    def _scheduling(self) -> Iterator[None]:
        """Schedules fire from a thread of their own, also while a job runs."""
        ended = threading.Event()
        thread = threading.Thread(
            target=self._scheduler.run, args=(ended,), name="mongotorch-scheduler", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self.stop()

        before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)


_POLL_S = 0.2


def run_pool(command: Sequence[str], *, count: int, environment: Mapping[str, str], again: bool) -> int:
    """Run a command in several processes until SIGTERM or SIGINT comes, or all have ended by themselves.

    Args:
        command: What each process runs.
        count: How many.
        environment: Theirs; secrets go here, since arguments are for all to see.
        again: Start a process again that ends with an error.

    Returns:
        The exit code: 0, or that of the last process that ended with an error and was not started again.
    """
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()

    def start() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C goes to this process, which tells the others.
        return subprocess.Popen(list(command), env=dict(environment), start_new_session=True)  # noqa: S603

    before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
    processes = [start() for _ in range(count)]
    code = 0
    try:
        while processes and not stop.wait(_POLL_S):
            for ended in [process for process in processes if process.poll() is not None]:
                processes.remove(ended)
                if ended.returncode and again:
                    processes.append(start())
                code = ended.returncode if not again else 0
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
        for sign, handler in before.items():
            signal.signal(sign, handler)
    return code
