"""What `apply` does: stores what it is given, finds or makes the job, and hands it to the engine.

Always: nothing is written for a component that cannot be stored or run; content that was trained already is
recognised, and neither stored nor trained again unless that is forced; a job that is under way is joined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, final

from mongotorch.codecs import current_name
from mongotorch.component import Component
from mongotorch.errors import NotFoundError
from mongotorch.jobs import Engine, Job
from mongotorch.schedule import Schedule
from mongotorch.services.schedules.register import Register
from mongotorch.services.training.recipe import pair
from mongotorch.services.versions.catalog import Loader, Publisher
from mongotorch.store import Components, Jobs
from mongotorch.train import TorchModel, TorchTrainer

METHOD = "fit"


@final
class Applier:
    """Applies components to one database.

    Args:
        components: The component documents.
        jobs: The job documents.
        publisher: Stores what is applied.
        loader: Loads what a run published.
        engine: Executes jobs.
        perform: Executes one job in this process.
        forget: Forgets the checkpoints of a job.
        register: Begins schedules.
    """

    def __init__(
        self,
        *,
        components: Components,
        jobs: Jobs,
        publisher: Publisher,
        loader: Loader,
        engine: Engine,
        perform: Callable[[str], None],
        forget: Callable[[str], None],
        register: Register,
    ) -> None:
        self._forget, self._register = forget, register
        self._components, self._jobs = components, jobs
        self._publisher, self._loader = publisher, loader
        self._engine, self._perform = engine, perform

    def apply(self, component: Component, *, force: bool = False, priority: int = 0) -> Job[Any]:
        """Store a component, and start what it has to run.

        Args:
            component: Any component.
            force: Run although nothing changed.
            priority: Higher is run first, where jobs queue.

        Raises:
            ParameterError: A trainer without a model.
            CodecError: A field cannot be stored; nothing was written.
            ConflictError: Its uuid belongs to a different component.
        """
        if isinstance(component, Schedule):
            self._register.prepare(component)
            stored_as = self._publisher.store(component).uuid
            self._register.put(component, stored_as)
            return self._done(stored_as)
        runs = isinstance(component, TorchTrainer) or getattr(component, "trainer", None) is not None
        if runs:
            trainer, model = pair(component)
            trainer.check_model(model)
        uuid = self._publisher.store(component, exact=force).uuid
        if not runs:
            return self._done(uuid)
        stored = self._components.get(uuid)
        if not force and "job" in stored:
            self._settle(stored["job"])
            return self._done(uuid)
        return self._start(stored, force=force, priority=priority)

    def job(self, job_id: str) -> Job[Any]:
        """A job from anywhere. Raises: NotFoundError."""
        return self._future(job_id, self._jobs.get(job_id)["component"])

    def _start(self, stored: Mapping[str, Any], *, force: bool, priority: int) -> Job[Any]:
        uuid = stored["_id"]
        before = self._jobs.find(component=uuid)
        status = before[0]["status"] if before else None
        if status == "succeeded" and not force and self._components.peek(before[0]["result"]) is not None:
            return self.job(before[0]["_id"])  # what it published is still there
        if status is None or status == "succeeded":
            # A second run of one version is a method of its own: (component, method) is unique.
            job_id, _ = self._jobs.add(
                component=uuid,
                type_id=stored["type_id"],
                identifier=stored["identifier"],
                method=METHOD if not before else f"{METHOD}-{len(before)}",
                priority=priority,
                parameters=_scalars(stored["fields"]),
            )
        else:
            job_id = before[0]["_id"]  # it is under way, or ended without a result and is tried again
            if status == "failed":
                self._forget(job_id)  # what led to the failure is not gone on with
            self._jobs.requeue(job_id)
        error = self._engine.submit(job_id, self._perform)
        return self._future(job_id, uuid, error, lambda: self._engine.submit(job_id, self._perform))

    def _settle(self, job_id: str) -> None:
        """Record the end of a run whose process died between publishing and saying so."""
        with contextlib.suppress(NotFoundError):
            if not self._jobs.has_ended(job_id):
                self._engine.submit(job_id, self._perform)

    def _future(
        self,
        job_id: str,
        uuid: str,
        error: BaseException | None = None,
        resume: Callable[[], BaseException | None] | None = None,
    ) -> Job[Any]:
        return Job(
            job_id,
            component=lambda: self._loader.by_uuid(uuid),
            load=self._model,
            records=self._jobs,
            error=error,
            resume=resume,
        )

    def _done(self, uuid: str) -> Job[Any]:
        found = self._loader.by_uuid(uuid)
        result = found.model if isinstance(found, TorchTrainer) else found
        return Job(uuid, component=lambda: found, load=self._model, result=result)

    def _model(self, uuid: str) -> TorchModel:
        model = self._loader.by_uuid(uuid)
        assert isinstance(model, TorchModel)  # noqa: S101 - for the type checker: jobs publish models
        return model


def _scalars(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a person looks for in a job: the plain parameters."""
    plain = {name: value for name, value in fields.items() if isinstance(value, str | bool | int | float)}
    for name, record in fields.items():
        if isinstance(record, Mapping) and record.get("_codec") == "name":
            plain[name] = current_name(record["name"])
    return plain
