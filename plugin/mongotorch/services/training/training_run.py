"""One run: a trainer and a model out of the database, trained, and published by one insert.

Always: a job publishes once, however often it is tried: the index on the job decides between two attempts; a
run that knows its lease to be gone publishes nothing; a failure leaves what was there before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, final

from mongotorch.errors import ConflictError, JobCancelledError, JobReleasedError
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.redact import plain
from mongotorch.services.training.checkpoints import CheckpointWriter, RunCheckpoints
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.services.training.job_runner import environment
from mongotorch.services.training.observers import JobProgress, ProgressBar
from mongotorch.services.training.recipe import (
    DataProvenance,
    TrainingData,
    TrainingRecipe,
    TrainingResult,
    opened_fit,
    pair,
    trained_pair,
)
from mongotorch.services.versions.catalog import Loader, Publisher
from mongotorch.settings import Settings
from mongotorch.store import Components, Jobs, MetricLog
from mongotorch.train import Fit, Stepped, TorchModel, TorchTrainer, Validated

_SHOWN_MOST = 10**9  # steps; more is no total that a bar could show


@final
class TrainingRun:
    """Trains what a job names.

    Args:
        connection: The database.
        settings: Of the datalayer.
        components: The component documents.
        points: Where measurements go.
        loader: Loads the trainer and its model.
        publisher: Publishes what was trained.
        checkpointing: Where a run goes on that was ended early.
        jobs: Says whether the job is still this attempt's.
        facts: Says what a run is made of.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        components: Components,
        points: MetricLog,
        loader: Loader,
        publisher: Publisher,
        checkpointing: RunCheckpoints,
        jobs: Jobs,
        facts: DataProvenance,
    ) -> None:
        self._checkpointing, self._jobs, self._facts = checkpointing, jobs, facts
        self._connection, self._settings = connection, settings
        self._components, self._points = components, points
        self._loader, self._publisher = loader, publisher

    def run(self, job: Mapping[str, Any], heart: Heartbeat) -> str:
        """Train what a job names, and publish it.

        Args:
            job: The claimed job document.
            heart: Keeps the lease; says when it is lost.

        Returns:
            The uuid of the published model.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it now; nothing was published.
            MongotorchError: What the run raised; nothing was published.
        """
        published = self.published(job)
        if published is None:
            trainer, model = pair(self._loader.by_uuid(job["component"]))
            course = TrainingRecipe(trainer=trainer, model=model)
            published = self.publish(job, course, self.follow(course, job, heart))
        self.forget(job)
        return str(published["_id"])

    def published(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The model's document that an earlier try of a job got as far as publishing; None where none did."""
        return self._components.of_job(job["_id"])

    def origin(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `origin` of the course that a job's run goes on with; None where it starts anew."""
        run = self._checkpointing.run(job["_id"])
        return None if run is None else run.get("origin", {})

    def forget(self, job: Mapping[str, Any]) -> None:
        """Drop the checkpoints of a job that has published."""
        self._checkpointing.drop(job["_id"])

    def follow(self, course: TrainingRecipe, job: Mapping[str, Any], heart: Heartbeat) -> TrainingResult:
        """Train a course for a job, from its newest checkpoint where it has one.

        Args:
            course: What to train; its model is changed.
            job: The claimed job document.
            heart: Keeps the lease; says when it is lost.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it now.
            MongotorchError: What the run raised.
        """
        resumed = self._checkpointing.load(job["_id"])
        state = None if resumed is None else resumed.state
        with opened_fit(course, self._connection, self._settings, state=state) as fit:
            if resumed is None:
                data, origin = self._facts.of(course), course.origin
            else:
                data = TrainingData(said=resumed.run.get("data", {}), blobs=resumed.blobs)
                origin = resumed.run.get("origin", {})

            def save(state: Mapping[str, Any]) -> None:
                run = {"origin": dict(origin), "data": dict(data.said)}
                self._checkpointing.save(job["_id"], job["attempt"], state, run=run, blobs=data.blobs)

            self._follow(fit, course.trainer, job, heart, save)
        trained = fit.trained()
        heart.check()
        return TrainingResult(trained=trained, data=data)

    def _follow(
        self,
        fit: Fit,
        trainer: TorchTrainer,
        job: Mapping[str, Any],
        heart: Heartbeat,
        save: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Train; say how far it is, keep what was measured, and write checkpoints."""
        limit = trainer.max_iterations if trainer.max_iterations <= _SHOWN_MOST else None
        ledger = JobProgress(limit=limit)
        bar = ProgressBar(trainer.identifier, max_steps=limit, show=self._settings.progress)
        scribe = CheckpointWriter(save, interval_s=self._settings.checkpoint_seconds)
        with bar, scribe, contextlib.closing(fit.run()) as events:
            for event in events:
                heart.check()
                ledger.take(event)
                heart.progress = ledger.progress
                if isinstance(event, Stepped):
                    bar.step(event.step)
                else:
                    bar.show(event.values)
                    self._note(event, job)
                if heart.is_stopping:
                    scribe.write(fit.capture())
                    scribe.flush()
                    raise JobReleasedError(f"job {job['_id']} is handed back after step {event.step}")
                if (isinstance(event, Validated) or scribe.is_due()) and not fit.is_over:
                    scribe.write(fit.capture())

    def _note(self, event: Validated, job: Mapping[str, Any]) -> None:
        self._points.add(
            job=job["_id"], component=job["component"], step=event.step, kind="valid", values=event.values
        )

    def publish(
        self,
        job: Mapping[str, Any],
        course: TrainingRecipe,
        outcome: TrainingResult,
        facts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make the model of a course visible, and its trainer with it.

        Args:
            job: The claimed job document.
            course: What was trained.
            outcome: What it came to.
            facts: What the model's document says besides, over the course's `source`; plain BSON.

        Returns:
            The model's document; that of an attempt which was faster, where there was one.

        Raises:
            JobCancelledError: The job is no longer this attempt's; nothing was published.
            CodecError: A field cannot be stored; nothing was published.
        """
        if not self._jobs.holds(job["_id"], job["attempt"]):
            raise JobCancelledError(f"job {job['_id']} is no longer this attempt's; it publishes nothing")
        new_model, new_trainer = trained_pair(job, course, outcome.trained)
        said = self._said(job, course, outcome, new_model, new_trainer)
        said[new_model.uuid] |= {**course.source, **(facts or {})}
        try:
            self._publisher.publish(new_model, with_=new_trainer, facts=said, attached=outcome.data.blobs)
        except ConflictError:
            # An attempt that had lost its lease was faster; a job publishes once, and this is what it published.
            first = self.published(job)
            if first is None:
                raise
            return first
        return self._components.get(new_model.uuid)

    def _said(
        self,
        job: Mapping[str, Any],
        course: TrainingRecipe,
        outcome: TrainingResult,
        new_model: TorchModel,
        new_trainer: TorchTrainer,
    ) -> dict[str, dict[str, Any]]:
        """What both documents say of the run, and what the model's says of what it was made of."""
        trained = outcome.trained
        said: dict[str, dict[str, Any]] = {
            new: {
                "source_digest": self._components.get(old.uuid)["digest"],
                "job": job["_id"],
                "parent": old.uuid,
                "steps": trained.steps,
                "best_step": trained.best_step,
            }
            for new, old in ((new_model.uuid, course.model), (new_trainer.uuid, course.trainer))
        }
        said[new_model.uuid] |= {
            "data": dict(outcome.data.said),
            "environment": environment(),
            "seed": plain(course.trainer.seed),  # a seed may be larger than BSON integers
            "metrics": trained.metrics,
        }
        return said
