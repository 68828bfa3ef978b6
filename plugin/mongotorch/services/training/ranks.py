"""Ranks, the processes that train one model together: how many, started by which launcher, and what rank 0 holds.

`Ranks` is for the process that has claimed the job: it keeps the lease, and publishes. `RankLease` is for rank 0,
which writes progress, measurements and checkpoints.

Guarantees: what cannot run is refused before a rank is started. Ranks get the settings of the launching process if
they are on its machine, else only those that are neither secrets nor addresses nor folders.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self, final

from mongotorch.errors import JobCancelledError, UnsupportedError
from mongotorch.jobs import Lease, environment
from mongotorch.jobs.failures import too_long
from mongotorch.jobs.launchers import Launcher, RankCall, is_launcher, launcher_named
from mongotorch.mongo.connection import Connection
from mongotorch.settings import Settings
from mongotorch.store import Jobs
from mongotorch.store.jobs import HAND_BACK, number, running
from mongotorch.train import Group, Lanes

RANK_MAIN: Final = "mongotorch.worker.rank:rank_main"
DEFAULT_LAUNCHER: Final = "torchrun"
_LOOK_S: Final = 0.5  # how often rank 0 looks at its job and writes its progress
_OWN: Final = frozenset(
    {
        *("uri", "uri_file", "embedded_path", "mongod", "cache_dir", "compute", "launcher", "progress"),
        *("signing_key", "signing_key_file", "webhook_secret"),
    }
)
"""The settings that a rank on another machine has of its own."""


@final
class Ranks:
    """Starts the ranks of a run, and watches them.

    Args:
        connection: The database.
        settings: The datalayer's; `launcher` says which launcher.
        jobs: The job documents.
    """

    def __init__(self, connection: Connection, settings: Settings, jobs: Jobs) -> None:
        self._connection, self._settings, self._jobs = connection, settings, jobs

    def needed(self, lanes: Lanes, *, device: Callable[[], str]) -> int | None:
        """How many ranks a run gets; None where it runs in the calling process.

        Args:
            lanes: Of the trainer.
            device: Gives the type of device that it computes on.

        Raises:
            UnsupportedError: The database, or the launcher, cannot be used by several ranks, or there is no room.
            SettingError: There is no such launcher.
        """
        name = self._launcher_name()
        if name is None and lanes.workers[1] == 1:
            return None
        launcher = launcher_named(name or DEFAULT_LAUNCHER)
        if launcher.name == "local" and lanes.workers[0] == 1:
            return None
        self._check_database(launcher)
        launcher.check()
        free = launcher.free(lanes.resources, device=device())
        return chosen_workers(lanes.possible, free, launcher=launcher.name)

    def check(self, workers: int, *, device: str) -> None:
        """Refuse a number of ranks that cannot be started now.

        Args:
            workers: How many.
            device: The type of device that they compute on.

        Raises:
            UnsupportedError, SettingError: As `needed`.
        """
        launcher = self._launcher()
        self._check_database(launcher)
        launcher.check()
        chosen_workers((workers,), launcher.free({}, device=device), launcher=launcher.name)

    def run(self, job: Mapping[str, Any], lanes: Lanes, lease: Lease, *, workers: int, device: str) -> None:
        """Run the ranks of a claimed job, and return when they have ended: the last checkpoint has the result.

        Args:
            job: The claimed job document.
            lanes: Of the trainer.
            lease: The attempt's hold on the job.
            workers: How many ranks.
            device: The type of device that they compute on.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it.
            JobProcessError: A rank ended, or was killed, before its end.
            Exception: What a rank raised.
        """
        is_asked = False

        def check() -> None:
            nonlocal is_asked
            lease.check()
            if lease.is_stopping and not is_asked:
                is_asked = self._jobs.ask_to_hand_back(job["_id"], job["attempt"])

        arguments = {"job_id": job["_id"], "attempt": job["attempt"]}
        self.call(RANK_MAIN, arguments, workers=workers, resources=lanes.resources, device=device, check=check)
        lease.progress = dict(self._jobs.get(job["_id"]).get("progress") or {})

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        workers: int,
        device: str,
        resources: Mapping[str, float] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Have ranks call a function, and return when they have ended.

        Args:
            function: Its importable name.
            arguments: What it needs besides `settings` and `is_elsewhere`, by name: plain values, no secrets.
            workers: How many ranks.
            device: The type of device that they compute on.
            resources: What a rank needs, by name.
            check: As in `Launcher.run`.

        Raises:
            JobProcessError: A rank ended, or was killed, before its end.
            Exception: What a rank, or `check`, raised.
        """
        launcher = self._launcher()
        given = self._settings.model_dump()
        if launcher.is_on_one_machine:
            given |= {"uri": self._connection.uri, "uri_file": None}
        else:
            given = {name: value for name, value in given.items() if name not in _OWN}
        more = {"settings": given, "is_elsewhere": not launcher.is_on_one_machine}
        call = RankCall(function=function, arguments={**arguments, **more})
        launcher.run(call, workers=workers, resources=resources or {}, device=device, check=check)

    def _launcher(self) -> Launcher:
        return launcher_named(self._launcher_name() or DEFAULT_LAUNCHER)

    def _launcher_name(self) -> str | None:
        """The launcher that the settings name; None where they name none."""
        launcher, compute = self._settings.launcher, self._settings.compute
        if launcher is None and compute not in ("local", "queue") and is_launcher(compute):
            return compute
        return launcher

    def _check_database(self, launcher: Launcher) -> None:
        kind = self._connection.kind
        if kind == "mongomock":
            raise UnsupportedError(
                "mongomock lives in the memory of one process, and each of several workers opens the database "
                "itself; use a real server (mongodb://… or embedded:PATH), or 1 worker",
                setting="uri",
            )
        if kind == "embedded" and not launcher.is_on_one_machine:
            raise UnsupportedError(
                f"the embedded server is for the processes of one machine, and the launcher {launcher.name!r} may "
                "run workers on several; use a server that all of them reach (mongodb://…)",
                setting="uri",
            )


def chosen_workers(possible: Sequence[int], free: int | None, *, launcher: str) -> int:
    """The largest of these numbers of workers, ascending, that there is room for.

    Raises:
        UnsupportedError: There is not enough room.
    """
    fitting = [number for number in possible if free is None or number <= free]
    if not fitting:
        raise UnsupportedError(
            f"{possible[0]} worker(s) are needed at least, and the launcher {launcher!r} has room for {free} at "
            "present; ask for fewer workers (a trainer's compute_kwargs take (least, most)) or for other "
            "resources, or add machines",
            setting="launcher",
        )
    return fitting[-1]


@final
class RankLease:
    """What rank 0 has in place of a lease, which the launching process keeps; a context manager.

    A thread of its own writes the progress, and looks whether the job still runs under this attempt, and whether
    it was asked to end.

    Args:
        jobs: The job documents.
        job: The claimed job document.

    Attributes:
        progress: What is written into the job's document next.
    """

    def __init__(self, jobs: Jobs, job: Mapping[str, Any]) -> None:
        self._jobs, self._id, self._attempt = jobs, job["_id"], job["attempt"]
        self._limit_s, self._begun_s = number(job, "max_runtime_s"), time.monotonic()
        self._reached = job.get("reached") or 0
        self._is_lost = self._is_stopping = self._is_asked_to_end = False
        self._ended = threading.Event()
        self._written: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="mongotorch-rank", daemon=True)
        self.progress: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the checkpoint says how far the run came
            self._write()

    @property
    def is_stopping(self) -> bool:
        """Whether the run has to write a checkpoint and to hand the job back."""
        return self._is_stopping

    @property
    def is_asked_to_end(self) -> bool:
        """Whether the run was asked to end, and to publish the best so far."""
        return self._is_asked_to_end

    def check(self) -> None:
        """Return if the run may go on. Raises: JobCancelledError, JobRuntimeError."""
        if self._limit_s and time.monotonic() - self._begun_s > self._limit_s:
            raise too_long(self._id, self._limit_s)
        if self._is_lost:
            raise JobCancelledError(
                f"job {self._id}: attempt {self._attempt} was cancelled, or another worker has it; this attempt "
                "publishes nothing"
            )

    def look(self) -> None:
        """See what the job's document says by now."""
        job = self._jobs.get(self._id)
        self._is_lost = self._is_lost or any(job.get(k) != v for k, v in running(self._id, self._attempt).items())
        self._is_asked_to_end = self._is_asked_to_end or job.get("stop") is not None
        self._is_stopping = self._is_stopping or job.get(HAND_BACK) == self._attempt

    def _write(self) -> None:
        if self.progress is self._written:
            return
        written, step = self.progress, self.progress.get("step", 0)
        reached = step if step > self._reached else None
        self._jobs.heartbeat(self._id, self._attempt, lease_s=None, progress=written, reached=reached)
        self._written, self._reached = written, max(step, self._reached)

    def _run(self) -> None:
        while not self._is_lost and not self._ended.wait(_LOOK_S):
            # Whatever it raises, mostly that the database is away: the run ends by its lease, not by this.
            with contextlib.suppress(Exception):
                self._write()
                self.look()


class RankTraining(Protocol):
    """Trains the jobs of one kind."""

    def recipe(self, job: Mapping[str, Any]) -> Any:
        """What a job trains."""

    def train_rank(self, recipe: Any, job: Mapping[str, Any], group: Group, lease: Lease | None) -> None:
        """Be one rank of the run of a job; rank 0 has a lease."""


@final
class RankRunner:
    """Runs one rank of a claimed job in this process.

    Args:
        jobs: The job documents.
        training_of: What trains a job.
    """

    def __init__(self, jobs: Jobs, *, training_of: Callable[[Mapping[str, Any]], RankTraining]) -> None:
        self._jobs, self._training_of = jobs, training_of

    def __call__(self, job: Mapping[str, Any], group: Group) -> None:
        """Train to the end, as one rank of a group; see `JobRunner.run_rank`."""
        same_versions(group, environment())
        training = self._training_of(job)
        recipe = training.recipe(job)
        with RankLease(self._jobs, job) if group.rank == 0 else contextlib.nullcontext() as lease:
            training.train_rank(recipe, job, group, lease)


def same_versions(group: Group, versions: Mapping[str, str]) -> None:
    """Refuse ranks with other versions of what they compute with: they would compute other bits.

    Args:
        group: All ranks.
        versions: Of this rank, by name; the platform may differ.

    Raises:
        UnsupportedError: They differ; the message says which.
    """
    first, *others = group.gather({name: versions[name] for name in versions if name != "platform"})
    for rank, other in enumerate(others, start=1):
        for name in first:
            if other.get(name) != first[name]:
                raise UnsupportedError(
                    f"rank {rank} runs with {name} {other.get(name)}, and rank 0 with {name} {first[name]}; "
                    "install the same versions on all machines",
                    setting="launcher",
                )
