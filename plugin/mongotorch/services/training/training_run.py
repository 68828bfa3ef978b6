"""Runs the job of a trainer: trains, and publishes trainer and model by one insert.

Guarantees: a job publishes once, however often it is tried: the index on the job decides between two attempts. An
attempt that has lost its lease publishes nothing. A failure changes no published version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, final

from mongotorch.data import StoredMembers, is_large
from mongotorch.errors import (
    CodecError,
    ConflictError,
    JobCancelledError,
    MongotorchError,
    ServerUnavailableError,
)
from mongotorch.jobs import Lease, environment, log_job
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.driver_errors import redact
from mongotorch.mongo.server_features import is_mock
from mongotorch.services.training.checkpoints import CheckpointWriter, Resumed, RunCheckpoints
from mongotorch.services.training.observers import JobProgress, MetricRecorder, Observer, ProgressBar, observe
from mongotorch.services.training.recipe import (
    DataProvenance,
    PendingProvenance,
    TrainingRecipe,
    data_provenance,
    opened_fit,
    pending_provenance,
)
from mongotorch.services.versions.catalog import Catalog, StoredFields
from mongotorch.settings import Settings
from mongotorch.store import Checkpoints, Jobs, MetricLog, plain
from mongotorch.train import Stepped, TorchModel, TorchTrainer, Trained, Validated, trainer_and_model

_log = logging.getLogger("mongotorch.jobs")
# Of the trainer, where they cannot be stored.
_LEFT_OUT: Final = ("optimizer_state", "metric_values", "training_state")
_CHECK_S: Final = 0.5  # how long a large select is checked before a run that does so in the background too
_FIRST_PAUSE_S: Final = 0.1  # before a publication is tried again; each pause is twice as long as the one before
_LONGEST_PAUSE_S: Final = 5.0
_SHOWN_MOST: Final = 10**9  # steps; a larger limit is no total that a bar could show
_NAMESPACE: Final = uuids.UUID("a3f4c1de-6a0f-4b0e-9d0c-2f1f5e7f8b11")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        trained: Steps, optimizer state and measurements; the weights are in the recipe's model.
        data: The provenance of its data.
        stored: `trainer` and `model`, with their fields as they were before the run.
        keep: Writes a checkpoint from which a later attempt can publish it.
        close: Lets go of what the run has held for its publication.
        is_stopped: Whether somebody ended the run before its last step.
    """

    trained: Trained
    data: DataProvenance
    stored: Mapping[str, StoredFields]
    keep: Callable[[], None]
    close: Callable[[], None]
    is_stopped: bool = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what was trained, as a checkpoint, where something inside raises; `close` behind it."""
        try:
            with _kept(self.keep):
                yield
        finally:
            self.close()


@final
class TrainingRun:
    """Trains and publishes the jobs of one database.

    Args:
        connection: The database.
        settings: The datalayer's.
        catalog: Loads trainers and models, and publishes them.
        jobs: The job documents.
        metric_log: Where measurements go.
        checkpoints: The checkpoint documents.

    Attributes:
        catalog: The same.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        catalog: Catalog,
        *,
        jobs: Jobs,
        metric_log: MetricLog,
        checkpoints: Checkpoints,
    ) -> None:
        self._connection, self._settings, self.catalog = connection, settings, catalog
        self._jobs, self._metric_log = jobs, metric_log
        self._checkpoints = RunCheckpoints(checkpoints, catalog.blobs, catalog.codecs)

    def run(self, job: Mapping[str, Any], lease: Lease) -> str:
        """Train the component that a job names, and publish it.

        Args:
            job: The claimed job document.
            lease: The attempt's hold on the job.

        Returns:
            The uuid of the published model.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it; nothing was published.
            MongotorchError: The run failed; nothing was published.
        """
        published = None if _is_first(job) else self.published(job)
        if published is None:
            trainer, model = trainer_and_model(self.catalog.load_uuid(job["component"]))
            recipe = TrainingRecipe(trainer=trainer, model=model)
            result = self.train(recipe, job, lease)
            with result.kept():
                published = self.publish(job, recipe, result)
        self.drop_checkpoints(job)
        return str(published["_id"])

    def published(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The model's document that an earlier attempt of a job has published; None where none has."""
        return self.catalog.components.of_job(job["_id"])

    def origin(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `origin` of the recipe that a job resumes; None where it starts from the beginning."""
        run = self._checkpoints.run(job["_id"])
        return None if run is None else run.get("origin", {})

    def drop_checkpoints(self, job: Mapping[str, Any]) -> None:
        """Drop the checkpoints of a job that has published; where that fails, garbage collection does it."""
        try:
            self._checkpoints.drop(job["_id"])
        except Exception as error:  # noqa: BLE001 - what was published is not a failure
            _log.warning("the checkpoints of job %s could not be dropped: %s", job["_id"], redact(str(error)))

    def train(self, recipe: TrainingRecipe, job: Mapping[str, Any], lease: Lease) -> TrainingResult:
        """Train a recipe for a job, from its newest checkpoint if it has one.

        Args:
            recipe: What to train; its model is changed.
            job: The claimed job document.
            lease: The attempt's hold on the job.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it.
            MongotorchError: The run failed.
        """
        trainer, resumed = recipe.trainer, None if _is_first(job) else self._checkpoints.load(job["_id"])
        self._is_stopped(job, is_begun=resumed is not None)
        # Before the run: what is not replaced in it is published as it was stored, whatever it holds by then.
        stored = {
            "trainer": self.catalog.stored_fields(trainer, without=(recipe.model,)),
            "model": self.catalog.stored_fields(recipe.model, without=(trainer,)),
        }
        with contextlib.ExitStack() as failed:
            data, origin = self._data(recipe, resumed)
            failed.callback(data.close)
            result = self._trained(recipe, job, lease, data=data, origin=origin, stored=stored, resumed=resumed)
            failed.pop_all()
        return result

    def _trained(
        self,
        recipe: TrainingRecipe,
        job: Mapping[str, Any],
        lease: Lease,
        *,
        data: DataProvenance | PendingProvenance,
        origin: Mapping[str, Any],
        stored: Mapping[str, StoredFields],
        resumed: Resumed | None,
    ) -> TrainingResult:
        trainer, state = recipe.trainer, None if resumed is None else resumed.state
        kept = functools.cache(data.kept)
        recorder = MetricRecorder(
            self._metric_log,
            job=job,
            interval=trainer.log_interval,
            begun=0 if state is None else state["step"],
            state=None if state is None else state.get("metrics"),
        )

        def save(state: Mapping[str, Any], *, over: bool = False) -> None:
            recorder.flush()  # what was measured before a checkpoint is not measured again after it
            record, blobs = kept(over=over)
            run = {"origin": dict(origin), **record}
            if self._checkpoints.save(job, state, run=run, blobs=blobs, over=over):
                log_job(job, "checkpoint", f"at step {state['step']}", step=state["step"])

        with opened_fit(recipe, self._connection, self._settings, data=data, state=state) as fit:
            limit = _shown_limit(fit.most_steps)
            # In this order: a lost lease ends the run before anything is written for it.
            progress = JobProgress(lease, limit=limit)
            observers: list[Observer] = [
                progress,
                ProgressBar(trainer.identifier, limit=limit, show=self._settings.progress),
                recorder,
                _ValidationLog(job),
                CheckpointWriter(
                    save,
                    interval_s=self._settings.checkpoint_seconds,
                    lease=lease,
                    more=lambda: {"metrics": recorder.state_dict()},
                ),
                *([_ScanObserver(data)] if isinstance(data, PendingProvenance) else []),
            ]
            if resumed is None:
                fit.check()
            if self._is_stopped(job, is_begun=resumed is not None):
                progress.stop(fit)
            observe(fit, observers)

            def keep() -> None:
                save(fit.capture(), over=True)

            with _kept(keep):
                trained = fit.trained()
                lease.check()
                provenance = data.result(lease.check)
        return TrainingResult(
            trained=trained,
            data=provenance,
            stored=stored,
            keep=keep,
            close=data.close,
            is_stopped=progress.has_stopped,
        )

    def _data(
        self, recipe: TrainingRecipe, resumed: Resumed | None
    ) -> tuple[DataProvenance | PendingProvenance, Mapping[str, Any]]:
        """The provenance of a run's data, and what its recipe was made of; refuses what cannot be trained on."""
        database, large = self._connection.database, self._is_large(recipe)
        is_checked = recipe.check(database, seconds=_CHECK_S if large else None)
        if resumed is not None:
            return DataProvenance.resumed(resumed.run, resumed.blobs), resumed.run.get("origin", {})
        before = self._members_before(recipe.model)
        if large:
            data = pending_provenance(
                recipe, self._connection, self._settings, before=before, is_checked=is_checked
            )
            if data is not None:
                return data, recipe.origin
        if not is_checked:
            recipe.check(database)
        return data_provenance(recipe, self._connection, self._settings, before=before), recipe.origin

    def _is_large(self, recipe: TrainingRecipe) -> bool:
        """Whether scanning the documents before the first step would be noticed."""
        settings, database = self._settings, self._connection.database
        if is_mock(database) or not (settings.lineage or recipe.is_scheduled):
            return False
        sets = recipe.sets.values()
        return any(is_large(database, query, read_deadline_s=settings.read_deadline_s) for query in sets)

    def _is_stopped(self, job: Mapping[str, Any], *, is_begun: bool) -> bool:
        """Whether a job was asked to end; before its first step that cancels it. Raises: JobCancelledError."""
        is_stopped = self._jobs.is_asked_to_stop(job["_id"])
        if is_stopped and not is_begun:
            self._jobs.cancel(job["_id"])
            raise JobCancelledError(
                f"job {job['_id']} was stopped before its first step; there is nothing to publish"
            )
        return is_stopped

    def _members_before(self, model: TorchModel) -> StoredMembers | None:
        """What the newest version of a model was trained on; None where that is not known, or not readable."""
        try:
            newest = self.catalog.components.newest_trained(model.type_id, model.identifier) or {}
            name = (newest.get("data") or {}).get("members")
            return None if name is None else StoredMembers.read(name, self.catalog.blobs.get_many)
        except MongotorchError as error:
            _log.warning("what model %r was trained on before is not readable: %s", model.identifier, error)
            return None

    def publish(
        self,
        job: Mapping[str, Any],
        recipe: TrainingRecipe,
        result: TrainingResult,
        record: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make the trained model visible, and its trainer with it; again where the database could not be reached.

        Args:
            job: The claimed job document.
            recipe: What was trained.
            result: What the run ended with.
            record: Further fields of the model's document; plain BSON.

        Returns:
            The model's document; if another attempt has published before, the document of that attempt.

        Raises:
            JobCancelledError: Another attempt holds the job; nothing was published.
            CodecError: A field cannot be stored; nothing was published.
            ServerUnavailableError: The database could not be reached for `read_deadline_s`.
        """
        deadline, wait_s = time.monotonic() + self._settings.read_deadline_s, _FIRST_PAUSE_S
        for number in itertools.count():
            try:
                return self._publish_once(job, recipe, result, record or {}, number)
            except ServerUnavailableError as error:
                if time.monotonic() + wait_s > deadline:
                    raise
                _log.warning("job %s could not publish, and tries again: %s", job["_id"], error)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_PAUSE_S)
        raise AssertionError  # for the type checker

    def _publish_once(
        self,
        job: Mapping[str, Any],
        recipe: TrainingRecipe,
        result: TrainingResult,
        record: Mapping[str, Any],
        number: int,
    ) -> dict[str, Any]:
        if not self._jobs.holds(job["_id"], job["attempt"]):
            raise JobCancelledError(f"job {job['_id']} is no longer this attempt's; it publishes nothing")
        model, trainer = _trained_pair(job, recipe, result.trained, number)
        records = {
            new.uuid: _record(job, old.uuid, result.stored[name].digest, result.trained)
            for name, new, old in (("model", model, recipe.model), ("trainer", trainer, recipe.trainer))
        }
        skipped = result.trained.skipped
        records[model.uuid] |= {
            "data": {**result.data.record, **({"skipped": skipped} if skipped else {})},
            "environment": environment(),
            "seed": plain(recipe.trainer.seed),  # a seed may be larger than BSON integers
            "metrics": result.trained.metrics,
            **({"stopped": True} if result.is_stopped else {}),
            **({"compute": result.trained.compute} if result.trained.compute else {}),
            **record,
        }
        try:
            untrained = {name: getattr(recipe.trainer, name) for name in result.trained.fields}
            self._publish(model, trainer, result, records, untrained=untrained, attempt=job["attempt"])
        except ConflictError:
            first = self.published(job)  # an attempt that had lost its lease was faster
            if first is None:
                raise
            return first
        published = self.catalog.components.get(model.uuid)
        given = {"step": result.trained.best_step, "version": published["version"]}
        log_job(job, "published", f"version {published['version']} of model {model.identifier!r}", **given)
        return published

    def _publish(
        self,
        model: TorchModel,
        trainer: TorchTrainer,
        result: TrainingResult,
        records: Mapping[str, Mapping[str, Any]],
        *,
        untrained: Mapping[str, Any],
        attempt: int,
    ) -> None:
        """Publish both; a field of the trainer that cannot be stored is published as it was, with a warning."""
        stored = {model.uuid: result.stored["model"], trainer.uuid: result.stored["trainer"]}
        instead = {**dict.fromkeys(_LEFT_OUT), **untrained}
        for _ in range(len(instead) + 1):
            try:
                self.catalog.publish(
                    model,
                    partner=trainer,
                    records=records,
                    blobs=result.data.blobs,
                    stored=stored,
                    attempt=attempt,
                )
            except CodecError as error:
                name = re.split(r"\W", error.field or "", maxsplit=1)[0]
                if name not in instead:
                    raise
                _log.warning(
                    "%s of trainer %r cannot be stored, and is published as it was before: %s",
                    name,
                    trainer.identifier,
                    error,
                )
                object.__setattr__(trainer, name, instead[name])
            else:
                return


def _record(job: Mapping[str, Any], parent: str, digest: str, trained: Trained) -> dict[str, Any]:
    """The fields that the documents of both the model and the trainer have."""
    return {
        "source_digest": digest,
        "job": job["_id"],
        "parent": parent,
        "steps": trained.steps,
        "best_step": trained.best_step,
    }


def _is_first(job: Mapping[str, Any]) -> bool:
    """Whether no attempt was before: then nothing is published, and there is no checkpoint."""
    return bool(job["attempt"] == 1)


class _ValidationLog(Observer):
    """Logs the validations of a job's run."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job

    def on_validation(self, event: Validated) -> None:
        shown = ", ".join(f"{name} {value:.6g}" for name, value in event.values.items())
        detail = f"at step {event.step}: {shown}"
        log_job(self._job, "validated", detail, step=event.step, values=dict(event.values))


class _ScanObserver(Observer):
    """Begins the scan of a run's documents at its first step, raises what fails in it, and ends it with a run."""

    def __init__(self, data: PendingProvenance) -> None:
        self._scan = data.scan

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._scan.end()

    def on_step(self, event: Stepped) -> None:  # noqa: ARG002 - of the interface
        self._scan.begin()


def _shown_limit(steps: int | None) -> int | None:
    return None if steps is None or steps > _SHOWN_MOST else steps


def _trained_pair(
    job: Mapping[str, Any], recipe: TrainingRecipe, trained: Trained, number: int
) -> tuple[TorchModel, TorchTrainer]:
    """What a run publishes: the model, and the trainer with the state of its optimizer, each naming the other."""
    model = recipe.model.replace(
        uuid=_attempt_uuid(job, "model", number), trainer=None, eval_modules=trained.eval_modules or None
    )
    trainer = recipe.trainer.replace(
        uuid=_attempt_uuid(job, "trainer", number),
        optimizer_state=trained.optimizer_state,
        metric_values=trained.metric_values,
        training_state=trained.training_state,
        model=model,
        **trained.fields,
    )
    # They refer to each other, and neither can be made after the other.
    object.__setattr__(model, "trainer", trainer)
    return model, trainer


def _attempt_uuid(job: Mapping[str, Any], what: str, number: int) -> str:
    """The uuid of what an attempt of a job publishes: the same whenever that attempt publishes it.

    A later try to publish, with a `number` above 0, has others: the trainer  may be stored already.
    """
    again = f":{number}" if number else ""
    return str(uuids.uuid5(_NAMESPACE, f"{job['_id']}:{job['attempt']}:{what}{again}"))


@contextlib.contextmanager
def _kept(keep: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except JobCancelledError:
        raise
    except Exception:
        try:
            keep()
        except Exception as error:  # noqa: BLE001 - the first error says why nothing was published
            _log.warning("what was trained could not be kept as a checkpoint: %s", redact(str(error)))
        raise
