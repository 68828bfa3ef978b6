"""The worker: a process that runs queued jobs, one after the other, and fires schedules meanwhile.

Guarantees: one job at a time, since random generators belong to the process. A worker that is told to stop lets
the current run write a checkpoint and hands its job back. A job that fails does not end the worker.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import final

from mongotorch.datalayer import Datalayer

POLL_S = 0.2


@final
class Worker:
    """Runs the queued jobs of a datalayer.

    Args:
        db: The datalayer, with any `compute` setting; the caller closes it.
    """

    def __init__(self, db: Datalayer) -> None:
        self._runner, self._scheduler = db.runner, db.scheduler
        self._stop = threading.Event()

    def run(self, until_idle: bool = False) -> int:
        """Run jobs and fire schedules until `stop` is called, or SIGTERM or SIGINT comes (in the main thread).

        Args:
            until_idle: Fire the schedules that are due now, and return when no job waits.

        Returns:
            How many jobs were run, whether they succeeded or failed.

        Raises:
            ServerUnavailableError: The database is gone for longer than the driver waits.
        """
        done = 0
        if until_idle:
            self._scheduler.step()
        with _on_signal(self.stop), contextlib.nullcontext() if until_idle else self._scheduling():
            while not self._stop.is_set():
                job = self._runner.claim()
                if job is not None:
                    done += self._runner.run_claimed(job, self._stop)
                elif until_idle and self._runner.is_idle():
                    break
                else:
                    self._stop.wait(POLL_S)
        return done

    def once(self) -> bool:
        """Fire the schedules that are due now, and run one job if one can be claimed; whether one was run."""
        self._scheduler.step()
        with _on_signal(self.stop):
            job = self._runner.claim()
            return job is not None and self._runner.run_claimed(job, self._stop)

    def stop(self) -> None:
        """Make `run` return; the current run writes a checkpoint first, and its job is handed back."""
        self._stop.set()

    @contextlib.contextmanager
    def _scheduling(self) -> Iterator[None]:
        """Fire schedules from a thread of its own, also while a job runs."""
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


def run_pool(command: Sequence[str], *, count: int, environment: Mapping[str, str], restart: bool) -> int:
    """Run a command in several processes until SIGTERM or SIGINT comes, or all have ended by themselves.

    Args:
        command: What each process runs.
        count: How many processes.
        environment: Their environment; secrets go here, since other users can see arguments.
        restart: Start a process again that ends with an error.

    Returns:
        The exit code: 0, or that of the last process that ended with an error and was not started again.
    """
    stop = threading.Event()

    def start() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C goes to this process, which stops the others.
        return subprocess.Popen(list(command), env=dict(environment), start_new_session=True)  # noqa: S603

    code = 0
    with _on_signal(stop.set):
        processes = [start() for _ in range(count)]
        try:
            while processes and not stop.wait(POLL_S):
                for ended in [process for process in processes if process.poll() is not None]:
                    processes.remove(ended)
                    if ended.returncode and restart:
                        processes.append(start())
                    code = ended.returncode if not restart else 0
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()
    return code


@contextlib.contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function at SIGTERM and SIGINT; in another thread than the main one signals cannot be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop()

    before = {sign: signal.signal(sign, handle) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
