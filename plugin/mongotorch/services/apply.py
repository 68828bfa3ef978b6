"""What `db.apply` does: stores a component, finds or creates its job, and submits it to the engine.

Guarantees: nothing is written for a component that cannot be stored or run. Content that was trained before is
neither stored nor trained again, unless that is forced. A job that is running is joined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, final

from mongotorch.codecs import codec_of, describe
from mongotorch.component import Component
from mongotorch.errors import NotFoundError, ParameterError
from mongotorch.jobs import Engine, Job, MetricRow, RunMetrics
from mongotorch.schedule import Schedule
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import Checkpoints, Jobs, MetricLog
from mongotorch.train import TorchTrainer, trainer_and_model

METHOD = "fit"

_WHOLE: Final = 32  # characters of a uuid


@final
class Applier:
    """Applies components to one database.

    Args:
        catalog: Stores and loads components.
        jobs: The job documents.
        checkpoints: The checkpoint documents.
        metric_log: What runs measured.
        engine: Runs jobs.
        run: Runs the job of an id in this process.
        apply_schedule: Stores a schedule and starts it; returns the uuid it is stored under.
        max_runtime_s: The longest time that one attempt of a run may take, in seconds; None: no limit.
    """

    def __init__(
        self,
        catalog: Catalog,
        jobs: Jobs,
        checkpoints: Checkpoints,
        metric_log: MetricLog,
        *,
        engine: Engine,
        run: Callable[[str], None],
        apply_schedule: Callable[[Schedule], str],
        max_runtime_s: float | None = None,
    ) -> None:
        self._catalog, self._jobs, self._checkpoints, self._metric_log = catalog, jobs, checkpoints, metric_log
        self._engine, self._run, self._apply_schedule = engine, run, apply_schedule
        self._max_runtime_s = max_runtime_s

    def apply(self, component: Component, *, force: bool = False, priority: int = 0) -> Job[Any]:
        """Store a component, and start its run if it has one.

        Args:
            component: Any component.
            force: Run although nothing changed.
            priority: Jobs with a higher number run first, where jobs queue.

        Raises:
            ParameterError: A trainer without a model.
            CodecError: A field cannot be stored; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        if isinstance(component, Schedule):
            return self._done(self._apply_schedule(component))
        runs = isinstance(component, TorchTrainer) or getattr(component, "trainer", None) is not None
        if runs:
            trainer, model = trainer_and_model(component)
            trainer.check_model(model)
        elif getattr(component, "preprocess", None) == "trainer":
            raise ParameterError(
                'preprocess="trainer": no trainer is there to publish this model; apply its trainer, or give it a '
                "function of the inputs",
                field="preprocess",
            )
        uuid = self._catalog.store(component, exact=force)
        if not runs:
            return self._done(uuid)
        stored = self._catalog.components.get(uuid)
        if not force and "job" in stored:
            self._settle(stored["job"])
            return self._done(uuid)
        return self._start(stored, force=force, priority=priority)

    def job(self, job_id: str) -> Job[Any]:
        """A job from any process, by its uuid or the first characters of it. Raises: NotFoundError."""
        if len(job_id) < _WHOLE:
            job_id = self._jobs.complete(job_id)
        return self._job(job_id, self._jobs.get(job_id)["component"])

    def metrics(self, what: Job[Any] | Component | str | tuple[Any, ...]) -> RunMetrics:
        """What a run measured; see `Datalayer.metrics`."""
        job = self._job_of(what)
        entries = self._metric_log.of(job)

        def follow(known: set[tuple[int, str]]) -> Iterator[MetricRow]:
            return map(_row, self._metric_log.follow(job, known, lambda: self._has_ended(job)))

        interval = max((entry.get("steps", 0) for entry in entries), default=0)
        return RunMetrics(job=job, rows=tuple(map(_row, entries)), interval=interval, further=follow)

    def _job_of(self, what: Job[Any] | Component | str | tuple[Any, ...]) -> str:
        """The job of a run: of a job, its uuid, or a version that it published."""
        if isinstance(what, tuple):
            if not 2 <= len(what) <= 3:
                raise ParameterError("give a version as (type_id, identifier) or with its number", field="what")
            document = self._catalog.find(*what)
        elif isinstance(what, Job | Component | str):
            uuid = what if isinstance(what, str) else what.uuid
            with contextlib.suppress(NotFoundError):
                return self.job(uuid).uuid
            document = self._catalog.components.get(uuid)
        else:
            kind = type(what).__name__
            raise ParameterError(f"metrics are of a job, a uuid or a version, not of a {kind}", field="what")
        if "job" not in document:
            name = f"{document['type_id']} {document['identifier']!r} version {document['version']}"
            raise NotFoundError(f"no run has published {name}, so nothing was measured for it")
        return str(document["job"])

    def _has_ended(self, job_id: str) -> bool:
        """Whether a job has ended, or is gone."""
        try:
            return self._jobs.has_ended(job_id)
        except NotFoundError:
            return True

    def _start(self, stored: Mapping[str, Any], *, force: bool, priority: int) -> Job[Any]:
        uuid = stored["_id"]
        before = self._jobs.find(component=uuid)
        status = before[0]["status"] if before else None
        if status == "succeeded" and not force and self._catalog.components.peek(before[0]["result"]) is not None:
            return self.job(before[0]["_id"])  # the version that it published is still there
        if status is None or status == "succeeded":
            # A second run of one version is a method of its own: (component, method) is unique.
            job_id = self._add_job(stored, again=status == "succeeded", priority=priority)
        else:
            job_id = before[0]["_id"]  # it is running, or ended without a result and is tried again
            transient = (before[0].get("error") or {}).get("transient")
            if status == "failed" and not transient and not self._checkpoints.is_over(job_id):
                self._checkpoints.drop(job_id)  # what failed by itself starts from the beginning
            self._jobs.requeue(job_id)

        def submit() -> BaseException | None:
            return self._engine.submit(job_id, self._run)

        return self._job(job_id, uuid, submit(), submit)

    def _add_job(self, stored: Mapping[str, Any], *, again: bool, priority: int) -> str:
        """The job of a first run, which another process may have added; with `again` one more of its own."""
        uuid = stored["_id"]
        number = self._jobs.count(component=uuid) if again else 0
        while True:
            job_id, is_new = self._jobs.add(
                component=uuid,
                type_id=stored["type_id"],
                identifier=stored["identifier"],
                method=METHOD if not number else f"{METHOD}-{number}",
                priority=priority,
                parameters=_parameters(stored["fields"]),
                max_runtime_s=self._max_runtime_s,
            )
            if is_new or not again:
                return job_id
            number += 1

    def _settle(self, job_id: str) -> None:
        """Record the end of a job whose process died between publishing and recording it."""
        with contextlib.suppress(NotFoundError):
            if not self._jobs.has_ended(job_id):
                self._engine.submit(job_id, self._run)

    def _job(
        self,
        job_id: str,
        uuid: str,
        error: BaseException | None = None,
        resume: Callable[[], BaseException | None] | None = None,
    ) -> Job[Any]:
        return Job(
            job_id,
            component=lambda: self._catalog.load_uuid(uuid),
            load=self._catalog.load_model,
            records=self._jobs,
            error=error,
            resume=resume,
            metrics=self.metrics,
        )

    def _done(self, uuid: str) -> Job[Any]:
        component = self._catalog.load_uuid(uuid)
        result = component.model if isinstance(component, TorchTrainer) else component
        return Job(uuid, component=lambda: component, load=self._catalog.load_model, result=result)


def _row(entry: Mapping[str, Any]) -> MetricRow:
    return MetricRow(step=entry["step"], kind=entry["kind"], values=entry["values"], time=entry["at"])


def _parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The plain parameters of a component, and the names of functions and classes, for the job's document."""
    described = {name: describe(record) for name, record in fields.items() if codec_of(record) in (None, "name")}
    return {name: value for name, value in described.items() if isinstance(value, str | bool | int | float)}
