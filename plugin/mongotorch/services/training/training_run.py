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
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, final

from mongotorch.data import StoredMembers
from mongotorch.errors import (
    CodecError,
    ConflictError,
    JobCancelledError,
    JobProcessError,
    MongotorchError,
    ServerUnavailableError,
)
from mongotorch.jobs import Lease, environment, log_job
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.driver_errors import redact
from mongotorch.services.training.checkpoints import CheckpointWriter, Resumed, RunCheckpoints, kept_where_failing
from mongotorch.services.training.observers import (
    JobProgress,
    MetricRecorder,
    Observer,
    ProgressBar,
    ScanObserver,
    ValidationLog,
    observe,
    shown_limit,
)
from mongotorch.services.training.recipe import (
    DataProvenance,
    PendingProvenance,
    RunData,
    TrainingRecipe,
    data_provenance,
    is_large_run,
    opened_fit,
    pending_provenance,
)
from mongotorch.services.versions.catalog import Catalog, StoredFields
from mongotorch.settings import Settings
from mongotorch.store import Checkpoints, Jobs, MetricLog, plain
from mongotorch.train import (
    Fit,
    Group,
    Lanes,
    ProcessGroup,
    TorchModel,
    TorchTrainer,
    Trained,
    trainer_and_model,
)

Document = Mapping[str, Any]
_log = logging.getLogger("mongotorch.jobs")
_LEFT_OUT: Final = ("optimizer_state", "metric_values", "training_state")  # of a trainer, if they cannot be stored
_CHECK_S: Final = 0.5  # how long a large select is checked before a run that does so in the background too
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before a publication is tried again; each is twice the one before
_STOPPED: Final = "stopped"  # in the record of a checkpoint: whether the run was ended before its last step
_SCORES, _WORKERS = "scores", "workers"  # in the state of a checkpoint that ranks have written at the end
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
        scores: What the ranks have measured of it for a verdict; None where they have not.
    """

    trained: Trained
    data: DataProvenance
    stored: Mapping[str, StoredFields]
    keep: Callable[[], None]
    close: Callable[[], None]
    is_stopped: bool = False
    scores: Document | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what was trained, as a checkpoint, where something inside raises; `close` behind it."""
        try:
            with kept_where_failing(self.keep):
                yield
        finally:
            self.close()


class RankStarter(Protocol):
    """Starts the processes that train one model together."""

    def needed(self, lanes: Lanes, *, device: Callable[[], str]) -> int | None:
        """How many a run gets; None where it runs in the calling process."""

    def run(self, job: Document, lanes: Lanes, lease: Lease, *, workers: int, device: str) -> None:
        """Run the ranks of a claimed job, and return when they have ended: the last checkpoint has the result."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What is known of a run before its first step."""

    job: Document
    recipe: TrainingRecipe
    data: DataProvenance | PendingProvenance
    origin: Document
    stored: Mapping[str, StoredFields]

    def kept(self, *, over: bool = False) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """The record that all checkpoints keep, and the blobs that it names."""
        record, blobs = self._data_kept(over=over)
        return {"origin": dict(self.origin), **record}, blobs

    @functools.cached_property
    def _data_kept(self) -> Callable[..., tuple[dict[str, Any], Mapping[str, Any]]]:
        return functools.cache(self.data.kept)


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
        ranks: Start the processes that train one model together.

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
        ranks: RankStarter,
    ) -> None:
        self._connection, self._settings, self.catalog = connection, settings, catalog
        self._jobs, self._metric_log, self._ranks = jobs, metric_log, ranks
        self._checkpoints = RunCheckpoints(checkpoints, catalog.blobs, catalog.codecs)

    def run(self, job: Document, lease: Lease) -> str:
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
            result = self.train(recipe := self.recipe(job), job, lease)
            with result.kept():
                published = self.publish(job, recipe, result)
        self.drop_checkpoints(job)
        return str(published["_id"])

    def recipe(self, job: Document) -> TrainingRecipe:
        """What the job of a trainer trains."""
        component, documents = self.catalog.load_with_documents(job["component"])
        trainer, model = trainer_and_model(component)
        return TrainingRecipe(trainer=trainer, model=model, documents=documents)

    def published(self, job: Document) -> dict[str, Any] | None:
        """The model's document that an earlier attempt of a job has published; None where none has."""
        return self.catalog.components.of_job(job["_id"])

    def origin(self, job: Document) -> dict[str, Any] | None:
        """The `origin` of the recipe that a job resumes; None where it starts from the beginning."""
        run = self._checkpoints.run(job["_id"])
        return None if run is None else run.get("origin", {})

    def drop_checkpoints(self, job: Document) -> None:
        """Drop the checkpoints of a job that has published; where that fails, garbage collection does it."""
        try:
            self._checkpoints.drop(job)
        except Exception as error:  # noqa: BLE001 - what was published is not a failure
            _log.warning("the checkpoints of job %s could not be dropped: %s", job["_id"], redact(str(error)))

    def train(self, recipe: TrainingRecipe, job: Document, lease: Lease) -> TrainingResult:
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
        # As the job was claimed; it is asked again before the first step.
        is_begun = resumed is not None and resumed.state is not None
        self._end_if_stopped(job, is_stopped=job.get("stop") is not None, is_begun=is_begun)
        # Before the run: what is not replaced in it is published as it was stored, whatever it holds by then.
        stored = {
            "trainer": self.catalog.stored_fields(trainer, without=(recipe.model,), known=recipe.documents),
            "model": self.catalog.stored_fields(recipe.model, without=(trainer,), known=recipe.documents),
        }
        by_ranks = trainer.lanes.workers != (1, 1) and resumed is not None and resumed.is_over
        workers = None if by_ranks else self._workers(recipe)
        with contextlib.ExitStack() as failed:
            data, origin = self._data(recipe, resumed, waits=workers is not None)
            failed.callback(data.close)
            run = _Run(job=job, recipe=recipe, data=data, origin=origin, stored=stored)
            if workers is not None:
                resumed = self._run_ranks(run, resumed, lease, workers)
            if resumed is not None and (workers is not None or by_ranks):
                result = self._finished(run, resumed, lease)
            else:
                result = self._trained(run, None if resumed is None else resumed.state, lease)
            failed.pop_all()
        return result

    def train_rank(
        self,
        recipe: TrainingRecipe,
        job: Document,
        group: Group,
        lease: Lease | None,
        *,
        score: Callable[[RunData], Document | None] | None = None,
    ) -> None:
        """Be one rank of the run of a claimed job: it ends with a checkpoint, which its claimant publishes.

        Args:
            recipe: What to train; its model is changed.
            job: The claimed job document.
            group: All ranks.
            lease: What rank 0 holds; None on the others.
            score: Measures what is published, which is in the recipe's model then, on all ranks together; its
                claimant gets that as `scores`. None measures nothing.

        Raises:
            JobReleasedError: The worker of the job has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it.
            MongotorchError: The run failed, here or on another rank.
        """
        resumed = self._checkpoints.load(job["_id"])
        steps = group.gather(0 if resumed is None or resumed.state is None else int(resumed.state["step"]))
        if len(set(steps)) > 1:
            raise JobProcessError(
                f"the ranks of job {job['_id']} have read the checkpoints of the steps {steps}: an attempt that "
                "had ended was still writing"
            )
        if resumed is None or resumed.is_over:
            return  # a rank that runs a second time
        if isinstance(group, ProcessGroup):
            group = ProcessGroup(recipe.trainer.lanes.reduce)
        data, state = DataProvenance.resumed(resumed.run, resumed.blobs), resumed.state
        run = _Run(job=job, recipe=recipe, data=data, origin=resumed.run.get("origin", {}), stored={})
        with self._opened(run, state, group=group) as fit:
            if lease is not None:
                progress, recorder = self._observe(run, fit, state, lease)
                keep = functools.partial(self._save, run, recorder, over=True, is_stopped=progress.has_stopped)
                keep(last := {**fit.capture(), _WORKERS: group.world})  # a rank may be killed while it scores
            else:
                if state is None:
                    fit.check()
                observe(fit, [])
            if score is None:
                return
            fit.trained()
        scores = score(data)  # behind the streams of the run, which may hold all documents
        if lease is not None and scores is not None:
            keep({**last, _SCORES: scores})

    def _workers(self, recipe: TrainingRecipe) -> int | None:
        """How many ranks a run gets; None where it runs in this process."""
        lanes, settings = recipe.trainer.lanes, self._settings
        if lanes.workers == (1, 1) and settings.launcher is None and settings.compute in ("local", "queue"):
            return None
        return self._ranks.needed(lanes, device=lambda: recipe.device_type)

    def _opened(self, run: _Run, state: Document | None, **group: Group) -> AbstractContextManager[Fit]:
        return opened_fit(run.recipe, self._connection, self._settings, data=run.data, state=state, **group)

    def _trained(self, run: _Run, state: Document | None, lease: Lease) -> TrainingResult:
        """Train in this process."""
        with self._opened(run, state) as fit:
            progress, recorder = self._observe(run, fit, state, lease)

            def keep() -> None:
                self._save(run, recorder, fit.capture(), over=True)

            with kept_where_failing(keep):
                trained = fit.trained()
                lease.check()
                provenance = run.data.result(lease.check)
        return TrainingResult(
            trained=trained,
            data=provenance,
            stored=run.stored,
            keep=keep,
            close=run.data.close,
            is_stopped=progress.has_stopped,
        )

    def _observe(
        self, run: _Run, fit: Fit, state: Document | None, lease: Lease
    ) -> tuple[JobProgress, MetricRecorder]:
        """Train to the end, with all that observes a run."""
        job, trainer, limit = run.job, run.recipe.trainer, shown_limit(fit.most_steps)
        recorder = MetricRecorder(
            self._metric_log,
            job=job,
            interval=trainer.log_interval,
            begun=0 if state is None else state["step"],
            state=None if state is None else state.get("metrics"),
        )
        # In this order: a lost lease ends the run before anything is written for it.
        progress = JobProgress(lease, limit=limit)
        observers: list[Observer] = [
            progress,
            ProgressBar(trainer.identifier, limit=limit, show=self._settings.progress),
            recorder,
            ValidationLog(job),
            CheckpointWriter(
                functools.partial(self._save, run, recorder),
                interval_s=self._settings.checkpoint_seconds,
                lease=lease,
                more=lambda: {"metrics": recorder.state_dict()},
            ),
            *([ScanObserver(run.data.scan)] if isinstance(run.data, PendingProvenance) else []),
        ]
        if state is None:
            fit.check()
        if self._jobs.is_asked_to_stop(job["_id"]):
            self._end_if_stopped(job, is_stopped=True, is_begun=state is not None)
            progress.stop(fit)
        observe(fit, observers)
        return progress, recorder

    def _save(
        self, run: _Run, recorder: MetricRecorder, state: Document, *, over: bool = False, is_stopped: bool = False
    ) -> None:
        recorder.flush()  # what was measured before a checkpoint is not measured again after it
        record, blobs = run.kept(over=over)
        stopped = {_STOPPED: True} if is_stopped else {}
        if self._checkpoints.save(run.job, state, run=record | stopped, blobs=blobs, over=over):
            log_job(run.job, "checkpoint", f"at step {state['step']}", step=state["step"])

    def _run_ranks(self, run: _Run, resumed: Resumed | None, lease: Lease, workers: int) -> Resumed:
        """Have ranks train to the end, and return their last checkpoint."""
        job, recipe = run.job, run.recipe
        if resumed is None:
            record, blobs = run.kept()
            self._checkpoints.save(job, None, run=record, blobs=blobs)  # what all ranks begin with
        self._ranks.run(job, recipe.trainer.lanes, lease, workers=workers, device=recipe.device_type)
        lease.check()
        found = self._checkpoints.load(job["_id"])
        if found is None or not found.is_over:
            raise JobProcessError(f"the ranks of job {job['_id']} have ended, and left no result")
        return found

    def _finished(self, run: _Run, resumed: Resumed, lease: Lease) -> TrainingResult:
        """What ranks have trained: their last checkpoint, read on the CPU, whatever they computed on."""
        with self._opened(dataclasses.replace(run, recipe=run.recipe.on_cpu()), resumed.state) as fit:
            for _ in fit.run():  # nothing is left to do but to restore it
                raise AssertionError
            trained = fit.trained()
            lease.check()
        state = resumed.state or {}
        compute = trained.compute and {**trained.compute, _WORKERS: state.get(_WORKERS, 1)}
        return TrainingResult(
            trained=dataclasses.replace(trained, compute=compute),
            data=run.data.result(lease.check),
            stored=run.stored,
            keep=lambda: None,  # the checkpoint is there
            close=run.data.close,
            is_stopped=bool(resumed.run.get(_STOPPED)),
            scores=state.get(_SCORES),
        )

    def _data(
        self, recipe: TrainingRecipe, resumed: Resumed | None, *, waits: bool
    ) -> tuple[DataProvenance | PendingProvenance, Document]:
        """The provenance of a run's data, and what its recipe was made of; refuses what cannot be trained on.

        Args:
            recipe: What is trained.
            resumed: What it goes on from.
            waits: Whether the documents are scanned before the first step, however many they are.
        """
        database = self._connection.database
        large = not waits and is_large_run(recipe, self._connection, self._settings)
        is_checked = recipe.check(database, seconds=_CHECK_S if large else None)
        if resumed is not None:
            return DataProvenance.resumed(resumed.run, resumed.blobs), resumed.run.get("origin", {})
        before = functools.partial(self._members_before, recipe.model)
        if large:
            data = pending_provenance(
                recipe, self._connection, self._settings, before=before, is_checked=is_checked
            )
            if data is not None:
                return data, recipe.origin
        if not is_checked:
            recipe.check(database)
        return data_provenance(recipe, self._connection, self._settings, before=before()), recipe.origin

    def _end_if_stopped(self, job: Document, *, is_stopped: bool, is_begun: bool) -> None:
        """Cancel a job that was asked to end before its first step. Raises: JobCancelledError if it was."""
        if is_stopped and not is_begun:
            self._jobs.cancel(job["_id"])
            raise JobCancelledError(
                f"job {job['_id']} was stopped before its first step; there is nothing to publish"
            )

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
        self, job: Document, recipe: TrainingRecipe, result: TrainingResult, record: Document | None = None
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
        self, job: Document, recipe: TrainingRecipe, result: TrainingResult, record: Document, number: int
    ) -> dict[str, Any]:
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
            published = self._publish(model, trainer, result, records, untrained=untrained, attempt=job["attempt"])
        except ConflictError:
            first = self.published(job)  # an attempt that had lost its lease was faster
            if first is None:
                raise
            return first
        shown = {"step": result.trained.best_step, "version": published["version"]}
        log_job(job, "published", f"version {published['version']} of model {model.identifier!r}", **shown)
        return published

    def _publish(
        self,
        model: TorchModel,
        trainer: TorchTrainer,
        result: TrainingResult,
        records: Mapping[str, Document],
        *,
        untrained: Mapping[str, Any],
        attempt: int,
    ) -> dict[str, Any]:
        """Publish both; a field of the trainer that cannot be stored is published as it was, with a warning."""
        stored = {model.uuid: result.stored["model"], trainer.uuid: result.stored["trainer"]}
        instead = {**dict.fromkeys(_LEFT_OUT), **untrained}
        for _ in range(len(instead) + 1):
            try:
                return self.catalog.publish(
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
        raise AssertionError  # for the type checker


def _record(job: Document, parent: str, digest: str, trained: Trained) -> dict[str, Any]:
    """The fields that the documents of both the model and the trainer have."""
    return {
        "source_digest": digest,
        "job": job["_id"],
        "parent": parent,
        "steps": trained.steps,
        "best_step": trained.best_step,
    }


def _is_first(job: Document) -> bool:
    """Whether no attempt was before: then nothing is published, and there is no checkpoint."""
    return bool(job["attempt"] == 1)


def _trained_pair(
    job: Document, recipe: TrainingRecipe, trained: Trained, number: int
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


def _attempt_uuid(job: Document, what: str, number: int) -> str:
    """The uuid of what an attempt of a job publishes: the same whenever that attempt publishes it.

    A later try to publish, with a `number` above 0, has others: the trainer may be stored already.
    """
    again = f":{number}" if number else ""
    return str(uuids.uuid5(_NAMESPACE, f"{job['_id']}:{job['attempt']}:{what}{again}"))
