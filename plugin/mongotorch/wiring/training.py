"""One run: a trainer and a model out of the database, trained, and published by one insert.

Always: a job publishes once, however often it is tried: the index on the job decides between two attempts; a
run that knows its lease to be gone publishes nothing; a failure leaves what was there before.
"""

from __future__ import annotations

import contextlib
import time
import uuid as uuids
from collections.abc import Callable, Mapping
from typing import Any, final

from mongotorch.component import Component
from mongotorch.errors import ConflictError, JobCancelledError, JobReleasedError, ParameterError
from mongotorch.run import ProgressBar
from mongotorch.settings import Settings
from mongotorch.store import Components, Connection, Jobs, Points
from mongotorch.train import Event, Fit, Stepped, TorchModel, TorchTrainer, Trained, Validated
from mongotorch.wiring.checkpointing import Checkpointing, Scribe
from mongotorch.wiring.heart import Heart
from mongotorch.wiring.load import Loader
from mongotorch.wiring.publish import Publisher
from mongotorch.wiring.streams import Streams

_SHOWN_MOST = 10**9  # steps; more is no total that a bar could show
_NAMESPACE = uuids.UUID("a3f4c1de-6a0f-4b0e-9d0c-2f1f5e7f8b11")


@final
class Training:
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
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        components: Components,
        points: Points,
        loader: Loader,
        publisher: Publisher,
        checkpointing: Checkpointing,
        jobs: Jobs,
    ) -> None:
        self._checkpointing, self._jobs = checkpointing, jobs
        self._connection, self._settings = connection, settings
        self._components, self._points = components, points
        self._loader, self._publisher = loader, publisher

    def run(self, job: Mapping[str, Any], heart: Heart) -> str:
        """Train and publish.

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
        published = self._components.of_job(job["_id"])
        if published is None:  # else a try before this one got as far as publishing
            trainer, model = pair(self._loader.by_uuid(job["component"]))
            with Streams(trainer, model, self._connection, self._settings) as streams:
                state = self._checkpointing.load(job["_id"])
                fit = Fit(trainer, model, batches=streams.batches, sets=streams.sets, state=state)
                self._follow(fit, trainer, job, heart)
            trained = fit.trained()
            heart.check()
            if not self._jobs.holds(job["_id"], job["attempt"]):
                raise JobCancelledError(f"job {job['_id']} is no longer this attempt's; it publishes nothing")
            published = self._publish(job, trainer, model, trained)
        self._checkpointing.drop(job["_id"])
        return str(published["_id"])

    def _follow(self, fit: Fit, trainer: TorchTrainer, job: Mapping[str, Any], heart: Heart) -> None:
        """Train; say how far it is, keep what was measured, and write checkpoints."""
        limit = trainer.max_iterations if trainer.max_iterations <= _SHOWN_MOST else None
        ledger = _Ledger(limit=limit)

        def save(state: Mapping[str, Any]) -> None:
            self._checkpointing.save(job["_id"], job["attempt"], state)

        bar = ProgressBar(trainer.identifier, max_steps=limit, show=self._settings.progress)
        scribe = Scribe(save, interval_s=self._settings.checkpoint_seconds)
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

    def _publish(
        self, job: Mapping[str, Any], trainer: TorchTrainer, model: TorchModel, trained: Trained
    ) -> dict[str, Any]:
        """Make the model visible, and the trainer with it; the model's document, whoever was first."""
        new_model = model.replace(uuid=attempt_uuid(job, "model"), trainer=None)
        new_trainer = trainer.replace(
            uuid=attempt_uuid(job, "trainer"),
            optimizer_state=trained.optimizer_state,
            metric_values=trained.metric_values,
            model=new_model,
        )
        # They refer to each other, and neither can be made after the other.
        object.__setattr__(new_model, "trainer", new_trainer)
        facts = {
            new.uuid: {
                "source_digest": self._components.get(old.uuid)["digest"],
                "job": job["_id"],
                "parent": old.uuid,
                "steps": trained.steps,
                "best_step": trained.best_step,
            }
            for new, old in ((new_model, model), (new_trainer, trainer))
        }
        try:
            self._publisher.publish(new_model, with_=new_trainer, facts=facts)
        except ConflictError:
            # An attempt that had lost its lease was faster; a job publishes once, and this is what it published.
            first = self._components.of_job(job["_id"])
            if first is None:
                raise
            return first
        return self._components.get(new_model.uuid)


def attempt_uuid(job: Mapping[str, Any], what: str) -> str:
    """The uuid of what an attempt of a job publishes: the same whenever that attempt publishes it."""
    return str(uuids.uuid5(_NAMESPACE, f"{job['_id']}:{job['attempt']}:{what}"))


def pair(component: Component) -> tuple[TorchTrainer, TorchModel]:
    """The trainer and the model of a component that can be trained.

    Raises:
        ParameterError: It is a trainer without a model, or a model without a trainer.
    """
    trainer = component if isinstance(component, TorchTrainer) else getattr(component, "trainer", None)
    model = component if isinstance(component, TorchModel) else getattr(component, "model", None)
    if not isinstance(trainer, TorchTrainer) or not isinstance(model, TorchModel):
        raise ParameterError(
            f"{component!r} cannot be trained: a trainer needs a `model`, a model needs a `trainer`", field="model"
        )
    return trainer, model


@final
class _Ledger:
    """What the job's document says of the progress."""

    def __init__(self, *, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._limit = clock, limit
        self._begun: float | None = None
        self._first_step = 0
        self.progress: dict[str, Any] = {"step": 0, "samples": 0, "max_steps": limit}

    def take(self, event: Event) -> None:
        if not isinstance(event, Stepped):
            self.progress = {**self.progress, "values": event.values, "validated_step": event.step}
            return
        now = self._clock()
        if self._begun is None:
            self._begun, self._first_step = now, event.step
        samples = self.progress["samples"] + event.rows
        self.progress = {**self.progress, "step": event.step, "samples": samples}
        elapsed, steps = now - self._begun, event.step - self._first_step
        if elapsed > 0 and steps > 0:
            self.progress["samples_per_s"] = round(samples / elapsed, 1)
            if self._limit is not None:
                self.progress["left_s"] = round(elapsed / steps * (self._limit - event.step), 1)
