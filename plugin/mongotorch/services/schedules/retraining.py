"""The run of a schedule: trains from the live version on current data, asks the gate, publishes, and promotes.

Guarantees: where a run starts, and on which documents, is decided once and kept in its checkpoints. The verdict is
part of the document that publishes the version; a version that the gate refuses, or cannot judge, is stored and
not live. Both models are measured on the same documents: those that the fold `valid` had when the run began,
without those that were deleted since. What others insert meanwhile is for the next run. A promotion replaces the
version that the verdict compared with, and no other. A job that is tried again after it published promotes by that
verdict, once. Models have the same scores with any number of ranks, and where ranks have left none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

import bson
import numpy as np

from mongotorch.component import Component
from mongotorch.data import Delta, Hashes, Stream, unseen
from mongotorch.errors import (
    ConflictError,
    JobCancelledError,
    JobReleasedError,
    MongotorchError,
    ServerUnavailableError,
    WorkerLostError,
)
from mongotorch.jobs import Lease, log_job
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.driver_errors import redact
from mongotorch.query import Query
from mongotorch.schedule import Gate, Schedule, Scores, State, Trigger, Verdict, gate_of
from mongotorch.services.schedules.register import failure
from mongotorch.services.training.recipe import RunData, TrainingRecipe, validation_spec
from mongotorch.services.training.training_run import TrainingResult, TrainingRun
from mongotorch.settings import Settings
from mongotorch.train import (
    ALONE,
    Group,
    Scored,
    TorchModel,
    TorchTrainer,
    first_rank,
    same_structure,
    score,
    trainer_and_model,
    warm_start,
)

MOST_NEW: Final = 100_000
"""If more documents are new, the run takes all of the select."""
_NAMED_BYTES: Final = 2**20
"""The most bytes of `_id`s that a query names one by one; more are a range, and the run keeps their hashes."""
Document = Mapping[str, Any]
LoadModel = Callable[[str], TorchModel]
"""From a uuid to its model."""
_log = logging.getLogger("mongotorch.schedules")


@final
class Retraining:
    """Runs the jobs of schedules.

    Args:
        connection: The database.
        settings: The datalayer's.
        training: Trains and publishes.
        record_outcome: Keeps the outcome of a firing, by the schedule's name.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        training: TrainingRun,
        *,
        record_outcome: Callable[[str, Document], None],
    ) -> None:
        self._connection, self._settings = connection, settings
        self._training, self._catalog = training, training.catalog
        self._record_outcome = record_outcome

    def run(self, job: Document, lease: Lease) -> str:
        """Train what a schedule says, judge it, publish it, and promote it if the gate lets it through.

        Args:
            job: The claimed job document of a firing.
            lease: The attempt's hold on the job.

        Returns:
            The uuid of the published model, whether it is live or not.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it; nothing was published.
            MongotorchError: The run failed; nothing was published.
        """
        try:
            return self._run(job, lease)
        except (JobCancelledError, JobReleasedError):
            raise
        except Exception as error:
            message = redact(" ".join(str(error).split()))
            with contextlib.suppress(MongotorchError):  # what the run raised is what matters
                self._record_outcome(job["identifier"], failure(job, f"{type(error).__name__}: {message}"))
            raise

    def recipe(self, job: Document) -> TrainingRecipe:
        """What the job of a firing trains, as the process that has claimed it has decided.

        Raises:
            JobCancelledError: Nothing is decided, or the job has published.
        """
        origin = self._training.origin(job)
        if not origin:
            raise JobCancelledError(f"job {job['_id']} has no checkpoint to begin with; it may have published")
        schedule = self._catalog.load_uuid(job["component"])
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        return self._recipe(schedule, origin, None, self._catalog.load_model)

    def train_rank(self, recipe: TrainingRecipe, job: Document, group: Group, lease: Lease | None) -> None:
        """Be one rank of the run of a firing: train, and score what was trained beside the champion.

        Args, Raises: as `TrainingRun.train_rank`.
        """
        score_all = functools.partial(self._scores_of_ranks, recipe, group) if recipe.is_judged else None
        self._training.train_rank(recipe, job, group, lease, score=score_all)

    def _run(self, job: Document, lease: Lease) -> str:
        published = self._training.published(job)
        if published is None:
            schedule = self._catalog.load_uuid(job["component"])
            assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
            load = functools.cache(self._catalog.load_model)  # what is served starts the run, and is judged
            origin, seen = self._training.origin(job), None
            if not origin:
                origin, seen = self._begin(schedule, load)
            if origin["ids"] == []:
                return self._without_training(schedule, job)
            published = self._train(schedule, self._recipe(schedule, origin, seen, load), job, lease, load)
        name = published["schedule"]["identifier"]
        refusal = self._promote(published, job=job["_id"], who=f"schedule {name}")
        why = refusal or published["verdict"]["why"]
        self._record_outcome(name, {"outcome": _outcome(job, published, promoted=refusal is None, why=why)})
        event, version = "promoted" if refusal is None else "refused", published["version"]
        detail = f"version {version} of model {published['identifier']!r}: {why}"
        log_job(job, event, detail, version=version, why=why, step=published["best_step"])
        self._training.drop_checkpoints(job)
        return str(published["_id"])

    def _without_training(self, schedule: Schedule, job: Document) -> str:
        """No document is new: nothing is trained, and the live version, or the newest, is the result."""
        model = trainer_and_model(schedule.trainer)[1]
        known = self._catalog.champion(model)
        if known is None:  # the gate refused them all
            known = self._catalog.components.newest_trained(model.type_id, model.identifier)
        assert known is not None  # noqa: S101 - the documents are those of a trained version
        outcome = _outcome(job, known, promoted=False, why="no document is new")
        self._record_outcome(schedule.identifier, {"outcome": outcome})
        return str(known["_id"])

    def _train(
        self, schedule: Schedule, recipe: TrainingRecipe, job: Document, lease: Lease, load: LoadModel
    ) -> dict[str, Any]:
        result = self._training.train(recipe, job, lease)
        with result.kept():
            return self._judge_and_publish(schedule, job, lease, recipe, result, load)

    def _judge_and_publish(
        self,
        schedule: Schedule,
        job: Document,
        lease: Lease,
        recipe: TrainingRecipe,
        result: TrainingResult,
        load: LoadModel,
    ) -> dict[str, Any]:
        origin = recipe.origin
        # Before the new version exists: `load` without a live alias would give the newest.
        why = f"served when schedule {schedule.identifier!r} brought its first version"
        champion = self._catalog.pin_champion(recipe.model, why)
        verdict = self._verdict(gate_of(schedule.gate), recipe, result, champion, load)
        firing = {name: job["parameters"].get(name) for name in ("firing", "reason")}
        record = {
            "schedule": {"identifier": schedule.identifier, "uuid": schedule.uuid, **firing, **origin["data"]},
            "start": origin["start"],
            "verdict": verdict,
        }
        lease.check()
        return self._training.publish(job, recipe, result, record)

    def _begin(self, schedule: Schedule, load: LoadModel) -> tuple[dict[str, Any], Hashes | None]:
        """Decide where a run starts, and on which documents.

        Returns:
            What its checkpoints keep; and the hashes of the `_id`s that it is not trained on, None where its query
            says which.
        """
        trainer, model = trainer_and_model(schedule.trainer)
        ids: list[Any] | None = None
        seen, bounds, data = None, None, {"data": schedule.data}
        if schedule.data == "new":
            ids, seen, why = self._new_documents(trainer, model)
            data = {**data, "why": why}
            if ids and len(bson.encode({"ids": ids})) > _NAMED_BYTES:
                bounds, ids = _bounds(trainer.select, ids), None
            else:
                seen = None
        start = None
        champion = self._catalog.champion(model) if schedule.warm_start else None
        # A model of another structure starts from its own weights.
        if champion is not None and same_structure(model, load(champion["_id"])):
            start = {"model": champion["_id"], "trainer": self._trainer_of(champion)}
        return {"start": start, "ids": ids, "bounds": bounds, "data": data}, seen

    def _recipe(
        self, schedule: Schedule, origin: Document, seen: Hashes | None, load: LoadModel
    ) -> TrainingRecipe:
        trainer, model = trainer_and_model(schedule.trainer)
        query = None
        if origin["ids"] is not None:
            query = trainer.fold("train").filter({"_id": {"$in": origin["ids"]}})
        elif origin.get("bounds") is not None:
            lower, upper = origin["bounds"]
            query = trainer.fold("train").filter({"_id": {"$gte": lower, "$lte": upper}})
        if origin["start"] is not None:
            trainer = warm_start(trainer, model, load(origin["start"]["model"]))
        return TrainingRecipe(
            trainer=trainer,
            model=model,
            train_query=query,
            without=seen,
            is_scheduled=True,
            is_judged=gate_of(schedule.gate).needs_scores,
            origin=dict(origin),
        )

    def _new_documents(
        self, trainer: TorchTrainer, model: TorchModel
    ) -> tuple[list[Any] | None, Hashes | None, str]:
        """The training documents that no published version of the model was trained on.

        Returns:
            Their `_id`s in the order in which they are read, empty where nothing is new, None where all documents
            of the select are to be taken; the hashes of those that are not new; and why all of them are taken, or
            how many are new.
        """
        names: set[str] = set()
        for version in self._catalog.components.trained(identifier=model.identifier):
            name = (version.get("data") or {}).get("members")
            if name is None:
                number = version["version"]
                return None, None, f"version {number} does not say which documents it was trained on"
            names.add(name)
        if not names:
            return None, None, "no version was trained yet"
        seen = self._ids_of(names)
        known = np.unique(np.concatenate(seen))
        ids = unseen(self._connection.database, trainer.fold("train"), known, limit=MOST_NEW + 1)
        if len(ids) > MOST_NEW:
            return None, None, f"more than {MOST_NEW:,} documents are new"
        return ids, known, f"{len(ids):,} new documents"

    def _ids_of(self, names: Iterable[str]) -> list[Hashes]:
        """The hashes of all `_id`s of some stored sets, and of those that they build on."""
        found: dict[str, Hashes] = {}
        missing = set(names)
        while missing:
            ancestors: set[str] = set()
            for name, blob in self._catalog.blobs.get_many(missing):
                delta = Delta.from_bytes(blob)
                found[name] = delta.added[:, 0]
                ancestors |= set(delta.ancestors)
            missing = ancestors - found.keys()
        return list(found.values())

    def _trainer_of(self, model: Document) -> str | None:
        """The uuid of the trainer that was published with a model."""
        users = self._catalog.components.users(model["_id"])
        return next((str(user["_id"]) for user in users if user.get("anchor") == model["_id"]), None)

    def _verdict(
        self,
        gate: Gate,
        recipe: TrainingRecipe,
        result: TrainingResult,
        champion: Document | None,
        load: LoadModel,
    ) -> dict[str, Any]:
        """The verdict of a gate on the trained model, plain, with the version it was compared `against`."""
        try:
            verdict = self._judge(gate, recipe, result, champion, load)
        except Exception as error:  # noqa: BLE001 - see below
            # It may be a person's own function. What was trained is worth more than its answer.
            _log.exception("gate %r raised; the trained model is stored, and does not go live", gate)
            verdict = _refused(gate, f"the gate raised {type(error).__name__}: {redact(str(error))}")
        against = None if champion is None else {"uuid": champion["_id"], "version": champion["version"]}
        return {**verdict.to_document(), "against": against}

    def _judge(
        self,
        gate: Gate,
        recipe: TrainingRecipe,
        result: TrainingResult,
        champion: Document | None,
        load: LoadModel,
    ) -> Verdict:
        if not gate.needs_scores:
            return gate.judge(None, None)
        against = None if champion is None else champion["_id"]
        scores = _scores_of(result, against)
        models = [] if scores else [recipe.model, *([] if against is None else [load(against)])]
        try:
            now, *before = scores or self._scores(recipe, models, result.data)
            return gate.judge(before[0] if before else None, now)
        except MongotorchError as error:
            return _refused(gate, f"the two could not be compared: {error}")

    def _scores_of_ranks(self, recipe: TrainingRecipe, group: Group, data: RunData) -> dict[str, Any] | None:
        """The scores of the trained model and of the champion, measured by all ranks; the same on each.

        Returns:
            The `scores`, and the uuid of the champion that the model was compared `against`; None where they could
            not be measured: the process that publishes tries it again, and its error is in the verdict.

        Raises:
            WorkerLostError: Another rank is gone.
        """
        try:
            with first_rank(group) as is_first:
                champion = self._catalog.champion(recipe.model) if is_first else None
            against = group.share(None if champion is None else champion["_id"])
            with first_rank(group):  # each loads it, and all raise where one cannot
                models = [recipe.model, *([] if against is None else [self._catalog.load_model(against)])]
            scores = self._scores(recipe, models, data, group)
        except WorkerLostError:
            raise
        except Exception as error:  # noqa: BLE001 - it may be a person's own function
            why = f"{type(error).__name__}: {redact(str(error))}"
            _log.warning("the ranks could not score the trained model, which is scored again: %s", why)
            return None
        return {"against": against, "scores": [_plain(one) for one in scores]}

    def _scores(
        self, recipe: TrainingRecipe, models: Sequence[TorchModel], data: RunData, group: Group = ALONE
    ) -> list[Scores]:
        """Measure models on the validation documents of a run."""
        query = recipe.trainer.fold("valid")
        given = (recipe.trainer, models, query, self._connection, self._settings)
        return [
            Scores(
                losses=one.losses,
                values=one.values,
                unit=one.unit,
                weights=one.weights,
                documents=one.documents,
            )
            for one in _scored(*given, data, group)
        ]

    def _promote(self, published: Document, *, job: str, who: str) -> str | None:
        """Promote a published version if its verdict says so, once a job; None if it is live now, else why not."""
        verdict = published["verdict"]
        if not verdict["promote"]:
            return str(verdict["why"])
        type_id, identifier = published["type_id"], published["identifier"]
        against = verdict["against"]["uuid"] if verdict["against"] else None
        head = self._catalog.aliases.head(type_id, identifier)
        if head is not None and head.job != job and head.to_uuid != against:
            before = "while nothing was live" if against is None else f"against {against}"
            return f"it was judged {before}, and {head.to_uuid} is live by now"
        try:
            self._catalog.promoter.promote(
                type_id, identifier, uuid=published["_id"], why=verdict["why"], who=who, expected=head, job=job
            )
        except ConflictError as error:
            return str(error)
        return None


@final
class LiveMetrics:
    """Measures live models, for the triggers that look at their metrics.

    Args:
        connection: The database.
        settings: The datalayer's.
        load: Loads the component of a uuid.
        served_model: From a model to the version of its name that is served.
        trigger_of: From the uuid of a schedule to its trigger.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        *,
        load: Callable[[str], Component],
        served_model: Callable[[TorchModel], TorchModel],
        trigger_of: Callable[[str], Trigger],
    ) -> None:
        self._connection, self._settings = connection, settings
        self._load, self._served_model, self._trigger_of = load, served_model, trigger_of

    def measure(self, document: Document, now: datetime) -> dict[str, Any]:
        """Measure a schedule's live model if that is due.

        A measurement that fails has no values; it is tried again when the next one is due.

        Args:
            document: The schedule's runtime document.
            now: The time.

        Returns:
            `scores` by name, when they were `scored`, and the `problem` if it failed; empty where none is due.

        Raises:
            ServerUnavailableError: The database cannot be reached.
        """
        try:
            trigger = self._trigger_of(document["component"])
        except Exception:  # noqa: BLE001 - asking the trigger next records the error
            return {}
        state = State.from_document(document["state"])
        every_s = trigger.score_every_s
        if every_s is None or (state.scored is not None and (now - state.scored).total_seconds() < every_s):
            return {}
        try:
            values, problem = self._values(document, trigger), None
        except ServerUnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 - objectives and metrics are people's own functions
            values, problem = {}, f"the live model could not be measured: {type(error).__name__}: {error}"
        return {"scores": values, "scored": now, "problem": problem}

    def _values(self, document: Document, trigger: Trigger) -> dict[str, float]:
        """The objective and the metrics on the newest documents of the fold `valid`, by `_id`."""
        schedule = self._load(document["component"])
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        trainer, model = trainer_and_model(schedule.trainer)
        query = trainer.fold("valid")
        if query.is_whole:
            query = query.sort("_id", -1).limit(trigger.score_documents or 1000)
        return _scored(trainer, [self._served_model(model)], query, self._connection, self._settings)[0].values


def _bounds(select: Query, ids: Sequence[Any]) -> list[Any] | None:
    """The first and the last of some `_id`s, as they were read; None where no range contains them all."""
    in_order = not select.is_pipeline and select.limited is None and not select.skipped
    return [ids[0], ids[-1]] if in_order and len(set(map(type, ids))) == 1 else None


def _scored(
    trainer: TorchTrainer,
    models: Sequence[TorchModel],
    query: Query,
    connection: Connection,
    settings: Settings,
    data: RunData | None = None,
    group: Group = ALONE,
) -> list[Scored]:
    """Measure models on the documents of a query, which are read once; of a run's `data` on its own alone."""
    spec = validation_spec(trainer, settings, query)
    spec = spec if data is None else data.fixed(spec, "valid")
    spec = dataclasses.replace(spec, **trainer.lanes.validation_stream(group.rank, group.world))
    with contextlib.closing(Stream(connection.opener, spec, database=connection.database)) as batches:
        return score(trainer, models, batches, group=group)


def _scores_of(result: TrainingResult, against: str | None) -> list[Scores] | None:
    """What ranks have measured, where it is against this champion; else None."""
    found = result.scores
    if found is None or found["against"] != against:
        return None
    losses = [{name: tuple(one[name].tolist()) for name in ("losses", "weights")} for one in found["scores"]]
    return [Scores(**{**one, **more}) for one, more in zip(found["scores"], losses, strict=True)]


def _plain(scores: Scores) -> dict[str, Any]:
    """Scores as a checkpoint keeps them."""
    arrays = {name: np.asarray(getattr(scores, name), dtype=np.float64) for name in ("losses", "weights")}
    return {"values": dict(scores.values), "unit": scores.unit, "documents": scores.documents, **arrays}


def _refused(gate: Gate, why: str) -> Verdict:
    return Verdict(
        promote=False,
        why=why,
        gate=repr(gate),
        documents=0,
        champion=None,
        challenger={},
        interval=None,
    )


def _outcome(job: Document, model: Document, *, promoted: bool, why: str) -> dict[str, Any]:
    return {
        "job": job["_id"],
        "model": model["identifier"],
        "version": model["version"],
        "uuid": model["_id"],
        "promoted": promoted,
        "why": why,
    }
