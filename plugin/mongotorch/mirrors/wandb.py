"""The mirror `wandb:PROJECT`, or `wandb:ENTITY/PROJECT`: a run of Weights & Biases for each run, by its uuid.

What a run has is read from its history by the public API. The steps are a value of their own, `step`, since rows
may come later than others of a higher step.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any, ClassVar, Final, Self, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.jobs import MetricRow
from mongotorch.mirrors.base import Entry, MetricMirror, MirroredRun

try:
    import wandb
except ImportError as error:
    raise UnsupportedError("a mirror to wandb needs a package: pip install wandb") from error

_STEP: Final = "step"
_COMPLETE: Final = "mongotorch_complete"


@final
class WandbMirror(MetricMirror):
    """Writes runs of Weights & Biases.

    Args:
        entity: Whose project it is; None is the default of the account.
        project: The project.
    """

    name: ClassVar[str] = "wandb"

    def __init__(self, entity: str | None, project: str) -> None:
        super().__init__()
        self._entity, self._project = entity, project
        self._runs: dict[str, Any] = {}

    @classmethod
    def open(cls, target: str, db: Datalayer) -> Self:  # noqa: ARG003
        """Take the name of a project. Raises: SettingError."""
        entity, _, project = target.rpartition("/")
        if not project or "/" in entity:
            raise SettingError(f"wandb:{target}: give PROJECT or ENTITY/PROJECT", setting="to")
        return cls(entity or None, project)

    def close(self) -> None:
        """Send what waits, and end the connections."""
        for job in list(self._runs):
            self._finish(job)

    def written(self, run: MirroredRun) -> set[Entry]:
        """What the history of the run has, once everything that waited was sent."""
        self._finish(run.job)
        found = self._found(run)
        rows = [] if found is None else found.scan_history()
        return {(tag, int(row[_STEP])) for row in rows if row.get(_STEP) is not None for tag in row if "/" in tag}

    def write(self, run: MirroredRun, rows: Sequence[MetricRow]) -> None:
        """Log a row of the history for each row."""
        if run.job not in self._runs:
            self._runs[run.job] = self._opened(run)
        for row in rows:
            moment = row.time.replace(tzinfo=UTC).timestamp()
            self._runs[run.job].log({**row.values, _STEP: row.step, "measured_at": moment})

    def is_complete(self, run: MirroredRun) -> bool:
        """Whether the run's summary says so."""
        found = self._found(run)
        return found is not None and found.summary.get(_COMPLETE) == run.attempt

    def complete(self, run: MirroredRun) -> None:
        """Say so in the summary, and finish the run."""
        if run.job not in self._runs:
            self._runs[run.job] = self._opened(run)
        self._runs[run.job].summary[_COMPLETE] = run.attempt
        self._finish(run.job, failed=run.status != "succeeded")

    def _opened(self, run: MirroredRun) -> Any:
        opened = wandb.init(
            entity=self._entity,
            project=self._project,
            id=run.job,
            name=f"{run.identifier} {run.job[:8]}",
            group=run.identifier,
            config=dict(run.parameters),
            resume="allow",
            reinit="create_new",
        )
        opened.define_metric(_STEP, hidden=True)
        opened.define_metric("*", step_metric=_STEP)
        return opened

    def _found(self, run: MirroredRun) -> Any:
        path = "/".join(part for part in (self._entity, self._project, run.job) if part)
        try:
            return wandb.Api().run(path)
        except wandb.errors.CommError as error:
            if "could not find" in str(error).lower():
                return None
            raise  # the network: whether there is one is not known

    def _finish(self, job: str, *, failed: bool = False) -> None:
        run = self._runs.pop(job, None)
        if run is not None:
            run.finish(exit_code=1 if failed else 0)
