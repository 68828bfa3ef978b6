"""The mirror `mlflow:URI`: an MLflow run for each run, in an experiment of the component's name.

A run is found again by its tag `mongotorch.job`, and what it has by MLflow's metric histories.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Self, final

from mongotorch.datalayer import Datalayer
from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.jobs import MetricRow
from mongotorch.mirrors.base import Entry, MetricMirror, MirroredRun
from mongotorch.mongo.driver_errors import redact

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise UnsupportedError("a mirror to mlflow needs a package: pip install 'mongotorch[mlflow]'") from error

_JOB: Final = "mongotorch.job"
_COMPLETE: Final = "mongotorch.complete"
_MOST_METRICS: Final = 1000  # of one request, by MLflow's limits
_MOST_PARAMS: Final = 100
_LONGEST_VALUE: Final = 500
_REFUSED: Final = re.compile(r"[^\w\-. /]")
_ENDS: Final = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


@final
class MlflowMirror(MetricMirror):
    """Writes MLflow runs.

    Args:
        client: MLflow's client.
    """

    name: ClassVar[str] = "mlflow"

    def __init__(self, client: MlflowClient) -> None:
        super().__init__()
        self._client = client
        self._ids: dict[str, str] = {}  # job: MLflow's id of its run

    @classmethod
    def open(cls, target: str, db: Datalayer) -> Self:  # noqa: ARG003
        """Open the tracking server, or the store, of a URI. Raises: SettingError."""
        try:
            client = MlflowClient(tracking_uri=target)
            client.search_experiments(max_results=1)
        except Exception as error:
            shown = redact(str(error))
            raise SettingError(f"mlflow:{redact(target)} cannot be used: {shown}", setting="to") from error
        return cls(client)

    def close(self) -> None:
        """Do nothing: the client holds nothing open."""

    def tag(self, kind: str, name: str) -> str:
        """The tag, with `_` for what MLflow does not take in a name."""
        return _REFUSED.sub("_", f"{kind}/{name}")

    def written(self, run: MirroredRun) -> set[Entry]:
        """What the metric histories of the run have."""
        self._ids.pop(run.job, None)
        found = self._found(run)
        if found is None:
            return set()
        run_id, names = found.info.run_id, list(found.data.metrics)
        return {(name, one.step) for name in names for one in self._client.get_metric_history(run_id, name)}

    def write(self, run: MirroredRun, rows: Sequence[MetricRow]) -> None:
        """Log the values, a thousand at a time."""
        metrics = [
            Metric(tag, value, _milliseconds(row.time), row.step)
            for row in rows
            for tag, value in row.values.items()
        ]
        run_id = self._id(run)
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(run_id, metrics=metrics[first : first + _MOST_METRICS])

    def is_complete(self, run: MirroredRun) -> bool:
        """Whether the run's tag says so."""
        found = self._found(run)
        return found is not None and found.data.tags.get(_COMPLETE) == str(run.attempt)

    def complete(self, run: MirroredRun) -> None:
        """End the run, and tag it."""
        run_id = self._id(run)
        ended = None if run.finished is None else _milliseconds(run.finished)
        self._client.set_terminated(run_id, status=_ENDS[run.status], end_time=ended)
        self._client.set_tag(run_id, _COMPLETE, str(run.attempt))

    def _id(self, run: MirroredRun) -> str:
        if run.job not in self._ids:
            found = self._found(run) or self._created(run)
            self._ids[run.job] = found.info.run_id
            self._log_parameters(found.info.run_id, run)
        return self._ids[run.job]

    def _experiment(self, run: MirroredRun) -> str:
        found = self._client.get_experiment_by_name(run.identifier)
        if found is None:
            try:
                return str(self._client.create_experiment(run.identifier))
            except MlflowException:  # another process was faster
                found = self._client.get_experiment_by_name(run.identifier)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _found(self, run: MirroredRun) -> Any:
        tagged = f"tags.`{_JOB}` = '{run.job}'"
        found = self._client.search_runs([self._experiment(run)], filter_string=tagged, max_results=1)
        return found[0] if found else None

    def _created(self, run: MirroredRun) -> Any:
        return self._client.create_run(
            self._experiment(run),
            start_time=_milliseconds(run.created),
            tags={_JOB: run.job},
            run_name=f"{run.identifier} {run.job[:8]}",
        )

    def _log_parameters(self, run_id: str, run: MirroredRun) -> None:
        given = [
            Param(_REFUSED.sub("_", name), str(value)[:_LONGEST_VALUE]) for name, value in run.parameters.items()
        ]
        for first in range(0, len(given), _MOST_PARAMS):
            # A store of files keeps an empty value where a process was killed as it wrote, and takes no other.
            with contextlib.suppress(MlflowException):
                self._client.log_batch(run_id, params=given[first : first + _MOST_PARAMS])


def _milliseconds(moment: datetime) -> int:
    return round(moment.replace(tzinfo=UTC).timestamp() * 1000)
