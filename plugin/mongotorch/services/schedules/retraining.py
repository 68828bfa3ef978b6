"""The run of a schedule: trains from the live version on current data, asks the gate, publishes, and promotes.

Guarantees: where a run starts, and on which documents, is decided once and kept in its checkpoints. The verdict is
part of the document that publishes the version; a version that the gate refuses is stored and not live. Both
models are measured on the same documents. A promotion replaces the version that the verdict compared with, and no
other. A job that is tried again after it published promotes by that verdict, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, final

import numpy as np

from mongotorch.component import Component
from mongotorch.data import Members, Stream, assign_folds, check_select, unseen
from mongotorch.errors import ConflictError, MongotorchError
from mongotorch.jobs import Lease
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.query import FOLD_FIELD, FOLDS, Query
from mongotorch.schedule import Gate, Schedule, Scores, State, Trigger, Verdict, gate_of
from mongotorch.services.training.recipe import TrainingRecipe, validation_spec
from mongotorch.services.training.training_run import TrainingResult, TrainingRun
from mongotorch.settings import Settings
from mongotorch.train import (
    Scored,
    TorchModel,
    TorchTrainer,
    same_structure,
    score,
    trainer_and_model,
    warm_start,
)

MOST_NEW: Final = 100_000
"""More new documents are not named one by one in a query: the run then takes all of the select."""
Document = Mapping[str, Any]
LoadModel = Callable[[str], TorchModel]
"""From a uuid to its model."""


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
        published = self._training.published(job)
        if published is None:
            schedule = self._catalog.load_uuid(job["component"])
            assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
            load = functools.cache(self._catalog.load_model)  # what is served starts the run, and is judged
            origin = self._training.origin(job) or self._begin(schedule, load)
            if origin["ids"] == []:
                return self._without_training(schedule, job)
            published = self._train(schedule, origin, job, lease, load)
        name = published["schedule"]["identifier"]
        refusal = self._promote(published, job=job["_id"], who=f"schedule {name}")
        why = refusal or published["verdict"]["why"]
        self._record_outcome(name, _outcome(job, published, promoted=refusal is None, why=why))
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
        self._record_outcome(schedule.identifier, outcome)
        return str(known["_id"])

    def _train(
        self, schedule: Schedule, origin: Document, job: Document, lease: Lease, load: LoadModel
    ) -> dict[str, Any]:
        recipe = self._recipe(schedule, origin, load)
        result = self._training.train(recipe, job, lease)
        with result.kept():
            return self._judge_and_publish(schedule, origin, job, lease, recipe, result, load)

    def _judge_and_publish(
        self,
        schedule: Schedule,
        origin: Document,
        job: Document,
        lease: Lease,
        recipe: TrainingRecipe,
        result: TrainingResult,
        load: LoadModel,
    ) -> dict[str, Any]:
        # Before the new version exists: `load` without a live alias would give the newest.
        why = f"served when schedule {schedule.identifier!r} brought its first version"
        champion = self._catalog.pin_champion(recipe.model, why)
        verdict = self._judge(gate_of(schedule.gate), recipe, champion, load)
        firing = {name: job["parameters"].get(name) for name in ("firing", "reason")}
        record = {
            "schedule": {"identifier": schedule.identifier, "uuid": schedule.uuid, **firing, **origin["data"]},
            "start": origin["start"],
            "verdict": verdict,
        }
        lease.check()
        return self._training.publish(job, recipe, result, record)

    def _begin(self, schedule: Schedule, load: LoadModel) -> dict[str, Any]:
        """Decide where a run starts, and on which documents; its checkpoints keep it."""
        trainer, model = trainer_and_model(schedule.trainer)
        self._assign_folds(trainer.select)
        if gate_of(schedule.gate).needs_scores:
            check_select(self._connection.database, trainer.select, folds=("valid",))
        ids, data = None, {"data": schedule.data}
        if schedule.data == "new":
            ids, why = self._new_documents(trainer, model)
            data = {**data, "why": why}
        start = None
        champion = self._catalog.champion(model) if schedule.warm_start else None
        # A model of another structure starts from its own weights.
        if champion is not None and same_structure(model, load(champion["_id"])):
            start = {"model": champion["_id"], "trainer": self._trainer_of(champion)}
        return {"start": start, "ids": ids, "data": data}

    def _recipe(self, schedule: Schedule, origin: Document, load: LoadModel) -> TrainingRecipe:
        trainer, model = trainer_and_model(schedule.trainer)
        query = None
        if origin["ids"] is not None:
            query = trainer.select.fold("train").filter({"_id": {"$in": origin["ids"]}})
        if origin["start"] is not None:
            trainer = warm_start(trainer, model, load(origin["start"]["model"]))
        return TrainingRecipe(trainer=trainer, model=model, train_query=query, origin=dict(origin))

    def _new_documents(self, trainer: TorchTrainer, model: TorchModel) -> tuple[list[Any] | None, str]:
        """The training documents that no published version of the model was trained on, by `_id`.

        Returns:
            The `_id`s, empty where nothing is new, None where all documents of the select are to be taken; and
            why all of them are, or how many are new.
        """
        components, seen = self._catalog.components, []
        for number in components.versions(model.type_id, model.identifier):
            data = components.find(model.type_id, model.identifier, number).get("data")
            if data is None:
                continue  # it was applied, not trained
            if data.get("members") is None:
                return None, f"version {number} does not say which documents it was trained on"
            seen.append(Members.from_bytes(self._catalog.blobs.get(data["members"])).ids)
        if not seen:
            return None, "no version was trained yet"
        known = np.unique(np.concatenate(seen))
        ids = unseen(self._connection.database, trainer.select.fold("train"), known, limit=MOST_NEW + 1)
        if len(ids) > MOST_NEW:
            return None, f"more than {MOST_NEW:,} documents are new"
        return ids, f"{len(ids):,} new documents"

    def _assign_folds(self, select: Query) -> None:
        """Give a fold to documents that other clients inserted; nothing is written where all have one."""
        documents = self._connection.database[select.collection]
        with driver_errors("giving folds to new documents"):
            if documents.find_one({FOLD_FIELD: {"$nin": list(FOLDS)}}, {"_id": 1}) is not None:
                assign_folds(documents, self._settings.valid_fraction)

    def _trainer_of(self, model: Document) -> str | None:
        """The uuid of the trainer that was published with a model."""
        users = self._catalog.components.users(model["_id"])
        return next((str(user["_id"]) for user in users if user.get("anchor") == model["_id"]), None)

    def _judge(
        self, gate: Gate, recipe: TrainingRecipe, champion: Document | None, load: LoadModel
    ) -> dict[str, Any]:
        """The verdict of a gate on the trained model, plain, with the version it was compared `against`."""
        models = [recipe.model, *([] if champion is None else [load(champion["_id"])])]
        try:
            check_select(self._connection.database, recipe.trainer.select, folds=("valid",))
            query = recipe.trainer.select.fold("valid")
            now, *before = _scored(recipe.trainer, models, query, self._connection, self._settings)
            verdict = gate.judge(_scores(before[0]) if before else None, _scores(now))
        except MongotorchError as error:
            verdict = _without_scores(gate, error)
        against = None if champion is None else {"uuid": champion["_id"], "version": champion["version"]}
        return {**verdict.to_document(), "against": against}

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
            The fields of the document that change; empty where no measurement is due.
        """
        try:
            trigger = self._trigger_of(document["component"])
        except MongotorchError:
            return {}  # asking the trigger next records the error
        state = State.from_document(document["state"])
        every_s = trigger.score_every_s
        if every_s is None or (state.scored is not None and (now - state.scored).total_seconds() < every_s):
            return {}
        try:
            values, problem = self._values(document, trigger), None
        except MongotorchError as error:
            values, problem = {}, f"the live model could not be measured: {error}"
        state = dataclasses.replace(state, scores=values, scored=now)
        return {"state": state.to_document(), "problem": problem}

    def _values(self, document: Document, trigger: Trigger) -> dict[str, float]:
        """The objective and the metrics on the newest documents of the fold `valid`, by `_id`."""
        schedule = self._load(document["component"])
        assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
        trainer, model = trainer_and_model(schedule.trainer)
        query = trainer.select.fold("valid")
        if not query.is_pipeline:
            query = query.sort("_id", -1).limit(trigger.score_documents or 1000)
        return _scored(trainer, [self._served_model(model)], query, self._connection, self._settings)[0].values


def _scored(
    trainer: TorchTrainer, models: Sequence[TorchModel], query: Query, connection: Connection, settings: Settings
) -> list[Scored]:
    """Measure models on the documents of a query, which are read once."""
    spec = validation_spec(trainer, settings, query)
    with contextlib.closing(Stream(connection.opener, spec, database=connection.database)) as batches:
        return score(trainer, models, batches)


def _scores(scored: Scored) -> Scores:
    return Scores(
        losses=scored.losses,
        values=scored.values,
        unit=scored.unit,
        weights=scored.weights,
        documents=scored.documents,
    )


def _without_scores(gate: Gate, error: MongotorchError) -> Verdict:
    if not gate.needs_scores:
        return gate.judge(None, None)
    return Verdict(
        promote=False,
        why=f"the two could not be compared: {error}",
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
