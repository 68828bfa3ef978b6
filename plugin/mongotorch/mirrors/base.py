"""A mirror passes on what runs measure to a program outside: `Mirror` is any, `MetricMirror` one of metrics.

A mirror is a class with a `name` and an entry point in the group `mongotorch.mirrors`; `mongotorch mirror --to
NAME:TARGET` opens it with the target and calls `update` again and again, which is `Mirroring`, in a process of its
own: no target can slow or end a run.

Guarantees: a metric mirror asks its target what it has before it writes the first time, and after every error, so
that a mirror that was killed at any moment goes on without gaps, and writes nothing twice.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Self, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import MongotorchError, NotFoundError, ServerUnavailableError, SettingError
from mongotorch.jobs import MetricRow
from mongotorch.mongo.driver_errors import redact
from mongotorch.resources import Owner, on_signal
from mongotorch.store.jobs import FINAL_STATUSES

GROUP: Final = "mongotorch.mirrors"
_LONGEST_PAUSE_S: Final = 60.0
_BUILT_IN: Final = {
    "tensorboard": "mongotorch.mirrors.tensorboard:TensorBoardMirror",
    "mlflow": "mongotorch.mirrors.mlflow:MlflowMirror",
    "wandb": "mongotorch.mirrors.wandb:WandbMirror",
    "webhook": "mongotorch.mirrors.webhook:WebhookMirror",
}
_BEFORE: Final = timedelta(seconds=60)  # jobs are looked at again for so long: two clocks may differ
_log = logging.getLogger("mongotorch.mirrors")
Entry = tuple[str, int]
"""A tag and a step: what a target has once."""


class Mirror(Owner, abc.ABC):
    """Passes on what happens in a database; a context manager that closes it.

    Attributes:
        name: What stands before the `:` in `--to`.
    """

    name: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def open(cls, target: str, db: Datalayer) -> Self:
        """Open a target.

        Args:
            target: What stands behind the `:` in `--to`.
            db: The database that is mirrored, for its settings.

        Raises:
            SettingError: The target cannot be used.
            UnsupportedError: A package is missing.
        """

    @abc.abstractmethod
    def update(self, db: Datalayer) -> int:
        """Pass on what has happened since the last call; how many things that were.

        Raises:
            ServerUnavailableError: The database cannot be reached; the next call goes on.
        """


@final
@dataclass(frozen=True, kw_only=True)
class MirroredRun:
    """A run, for a target.

    Attributes:
        job: The job's uuid.
        attempt: Its newest attempt.
        type_id: The kind of the component that runs.
        identifier: Its name.
        status: `queued`, `running`, `succeeded`, `failed` or `cancelled`.
        parameters: The plain parameters of the component.
        created: When the job was made, naive UTC.
        finished: When it ended; None while it is open.
    """

    job: str
    attempt: int
    type_id: str
    identifier: str
    status: str
    parameters: Mapping[str, Any]
    created: datetime
    finished: datetime | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The run of a job document."""
        names = ("attempt", "type_id", "identifier", "status", "created")
        plain = {name: record[name] for name in names} | {"finished": record.get("finished")}
        return cls(job=record["_id"], parameters=dict(record.get("parameters") or {}), **plain)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.status in FINAL_STATUSES


class MetricMirror(Mirror):
    """Passes on the rows of `db.metrics` of every run, as values under a tag and a step.

    Subclasses say how a target is read and written.
    """

    def __init__(self) -> None:
        self._written: dict[str, set[Entry]] = {}  # of the runs that are open
        self._completed: dict[str, int] = {}  # job: attempt
        self._failing: set[str] = set()
        self._since: datetime | None = None

    @abc.abstractmethod
    def written(self, run: MirroredRun) -> set[Entry]:
        """The tags and steps that the target has of a run."""

    @abc.abstractmethod
    def write(self, run: MirroredRun, rows: Sequence[MetricRow]) -> None:
        """Write rows, whose names are tags already, so that they are there when this returns."""

    @abc.abstractmethod
    def is_complete(self, run: MirroredRun) -> bool:
        """Whether the target has all of this attempt of a run, as `complete` has said."""

    @abc.abstractmethod
    def complete(self, run: MirroredRun) -> None:
        """Tell the target that the run has ended and that it has all of it."""

    def tag(self, kind: str, name: str) -> str:
        """The tag of a value, `train/objective` and the like."""
        return f"{kind}/{name}"

    def update(self, db: Datalayer) -> int:
        """Pass on the rows that the target does not have; see `Mirror.update`."""
        begun, count = db.run_log.positions.now(), 0
        all_done = True
        for record in db.run_log.changed_jobs(self._since):
            job = record["_id"]
            try:
                count += self._update(MirroredRun.of(record), db)
            except NotFoundError:
                self._written.pop(job, None)  # it was removed meanwhile
            except MongotorchError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a target's library raises
                self._written.pop(job, None)  # what it has is asked again
                all_done = False
                if job not in self._failing:
                    _log.warning("%s: job %s could not be mirrored: %s", self.name, job, redact(str(error)))
                self._failing.add(job)
            else:
                self._failing.discard(job)
        self._since = begun - _BEFORE if all_done else self._since
        return count

    def _update(self, run: MirroredRun, db: Datalayer) -> int:
        if self._completed.get(run.job) == run.attempt and run.is_over:
            return 0
        if run.job not in self._written:
            if run.is_over and self.is_complete(run):
                self._completed[run.job] = run.attempt
                return 0
            self._written[run.job] = self.written(run)
        has = self._written[run.job]
        # The status was read before the rows: those of a run that is over are all of them.
        rows = [self._missing(row, has) for row in db.metrics(run.job)]
        rows = [row for row in rows if row.values]
        if rows:
            self.write(run, rows)
            has.update((tag, row.step) for row in rows for tag in row.values)
        if run.is_over:
            self.complete(run)
            self._completed[run.job] = run.attempt
            del self._written[run.job]
        return len(rows)

    def _missing(self, row: MetricRow, has: set[Entry]) -> MetricRow:
        tagged = {self.tag(row.kind, name): value for name, value in row.values.items()}
        return row._replace(values={tag: value for tag, value in tagged.items() if (tag, row.step) not in has})


def open_mirror(to: str, db: Datalayer) -> Mirror:
    """Open the mirror of `NAME:TARGET`.

    Raises:
        SettingError: There is no such mirror, or the target cannot be used.
        UnsupportedError: A package is missing.
    """
    name, _, target = to.partition(":")
    offered: dict[str, Callable[[], Any]] = {
        entry.name: entry.load for entry in importlib.metadata.entry_points(group=GROUP)
    }
    if name in _BUILT_IN:
        module, _, cls = _BUILT_IN[name].partition(":")
        offered[name] = lambda: getattr(importlib.import_module(module), cls)
    if name not in offered or not target:
        known = ", ".join(f"{one}:…" for one in sorted({*_BUILT_IN, *offered}))
        raise SettingError(f"mirror to {redact(to)!r}: give one of {known}", setting="to")
    made: Mirror = offered[name]().open(target, db)
    return made


@final
class Mirroring:
    """Keeps one mirror up to date.

    Args:
        db: The database; the caller closes it.
        mirror: The mirror; the caller closes it.
        every_s: Seconds between two looks.
    """

    def __init__(self, db: Datalayer, mirror: Mirror, *, every_s: float = 1.0) -> None:
        self._db, self._mirror, self._every_s = db, mirror, every_s
        self._stop = threading.Event()

    def run(self) -> None:
        """Mirror until `stop` is called, or SIGTERM or SIGINT comes (in the main thread).

        While the database is away it waits, longer each time, up to a minute.
        """
        pause_s = self._every_s
        with on_signal(self._stop.set):
            while not self._stop.is_set():
                try:
                    self._mirror.update(self._db)
                    pause_s = self._every_s
                except ServerUnavailableError as error:
                    pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
                    _log.warning("%s waits for the database: %s", self._mirror.name, error)
                self._stop.wait(pause_s)

    def stop(self) -> None:
        """Make `run` return, after what it is writing."""
        self._stop.set()
