"""A schedule's run: from what is live, on what is there now, through the gate, and live only if it is better.

Always: where a run starts from, and on which documents, is decided once and kept with its checkpoints; the verdict
is in the document that publishes the version; a version that the gate did not let through is stored and not
live; a run that is tried again after it published promotes what it then decided, once.

Which documents are new to a model: those that no stored version of it was trained on.

Always: a document counts as known only through a version that was published, so that a run which fails leaves it
new; late documents with old `_id`s are new as others are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import numpy as np

from mongotorch.data import Members, assign_folds, check_select, unseen
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.error_translation import driver_errors
from mongotorch.query import FOLD_FIELD, FOLDS, Query
from mongotorch.schedule import Schedule, gate_of
from mongotorch.services.schedules.judging import Judge
from mongotorch.services.training.heartbeat import Heartbeat
from mongotorch.services.training.recipe import TrainingRecipe, pair
from mongotorch.services.training.training_run import TrainingRun
from mongotorch.services.versions.catalog import Loader
from mongotorch.settings import Settings
from mongotorch.store import BlobStore, Components
from mongotorch.train import TorchModel, TorchTrainer, same_structure, warm_start

MOST: Final = 100_000
"""More new documents are not named one by one in a query: the run then takes all of the select."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class NewDocumentSet:
    """What is new.

    Attributes:
        ids: The `_id`s; None: all documents of the select are taken; empty: nothing is new.
        why: Why all are taken; else how many are new.
    """

    ids: list[Any] | None
    why: str


@final
class NewDocumentFinder:
    """Finds new documents.

    Args:
        database: The driver's database.
        components: The component documents.
        artifacts: The blobs.
    """

    def __init__(self, database: Any, components: Components, artifacts: BlobStore) -> None:
        self._database, self._components, self._artifacts = database, components, artifacts

    def of(self, trainer: TorchTrainer, model: TorchModel) -> NewDocumentSet:
        """The training documents of a trainer's select that are new to a model's name.

        Raises:
            IntegrityError: A blob is not what was stored.
        """
        seen: list[Any] = []
        for number in self._components.versions(model.type_id, model.identifier):
            data = self._components.find(model.type_id, model.identifier, number).get("data")
            if data is None:
                continue  # it was applied, not trained
            if data.get("members") is None:
                why = f"version {number} does not say which documents it was trained on"
                return NewDocumentSet(ids=None, why=why)
            seen.append(Members.from_bytes(self._artifacts.get(data["members"])).ids)
        if not seen:
            return NewDocumentSet(ids=None, why="no version was trained yet")
        ids = unseen(self._database, trainer.select.fold("train"), np.unique(np.concatenate(seen)), limit=MOST + 1)
        if len(ids) > MOST:
            return NewDocumentSet(ids=None, why=f"more than {MOST:,} documents are new")
        return NewDocumentSet(ids=ids, why=f"{len(ids):,} new documents")


Document = Mapping[str, Any]


@final
class Retraining:
    """Runs what schedules fire.

    Args:
        connection: The database.
        settings: `valid_fraction`.
        components: The component documents.
        loader: Loads the schedule, and what is live.
        training: Trains and publishes.
        judge: Says what is served, compares, promotes.
        news: Finds the documents that no version was trained on.
        told: Hears what became of a firing: the schedule's name, and what to keep of it.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        components: Components,
        loader: Loader,
        training: TrainingRun,
        judge: Judge,
        news: NewDocumentFinder,
        told: Callable[[str, Document], Any],
    ) -> None:
        self._connection, self._settings = connection, settings
        self._components, self._loader, self._training = components, loader, training
        self._judge, self._news, self._told = judge, news, told

    def run(self, job: Document, heart: Heartbeat) -> str:
        """Train what a schedule says, judge it, publish it, and promote it if the gate lets it through.

        Args:
            job: The claimed job document, of a firing.
            heart: Keeps the lease; says when it is lost.

        Returns:
            The uuid of the published model, whether it is live or not.

        Raises:
            JobReleasedError: The worker has to stop; a checkpoint was written.
            JobCancelledError: The job was cancelled, or another worker has it now; nothing was published.
            MongotorchError: What the run raised; nothing was published.
        """
        published = self._training.published(job)
        if published is None:  # else a try before this one got as far as publishing
            schedule = self._loader.by_uuid(job["component"])
            assert isinstance(schedule, Schedule)  # noqa: S101 - for the type checker
            origin = self._training.origin(job) or self._begin(schedule)
            if origin["ids"] == []:
                return self._nothing(schedule, job)
            published = self._train(schedule, origin, job, heart)
        name = published["schedule"]["identifier"]
        refused = self._judge.promote(published, job=job["_id"], who=f"schedule {name}")
        said = refused or published["verdict"]["why"]
        self._told(name, _outcome(job, published, promoted=refused is None, why=said))
        self._training.forget(job)
        return str(published["_id"])

    def _nothing(self, schedule: Schedule, job: Document) -> str:
        """No document is new: nothing is trained, and what is served is the result."""
        served = self._judge.served(pair(schedule.trainer)[1])
        assert served is not None  # noqa: S101 - applying the schedule stored its model
        self._told(schedule.identifier, _outcome(job, served, promoted=False, why="no document is new"))
        return str(served["_id"])

    def _train(self, schedule: Schedule, origin: Document, job: Document, heart: Heartbeat) -> dict[str, Any]:
        course = self._course(schedule, origin)
        outcome = self._training.follow(course, job, heart)
        why = f"served when schedule {schedule.identifier!r} brought its first version"
        verdict = self._judge.judge(gate_of(schedule.gate), course.trainer, course.model, why)
        fired = {name: job["parameters"].get(name) for name in ("firing", "reason")}
        facts = {
            "schedule": {"identifier": schedule.identifier, "uuid": schedule.uuid, **fired, **origin["data"]},
            "start": origin["start"],
            "verdict": verdict,
        }
        heart.check()
        return self._training.publish(job, course, outcome, facts)

    def _begin(self, schedule: Schedule) -> dict[str, Any]:
        """Decide where a run starts from, and on which documents; it is kept for whoever resumes it."""
        trainer, model = pair(schedule.trainer)
        self._give_folds(trainer.select)
        if gate_of(schedule.gate).needs_scores:
            check_select(self._connection.database, trainer.select, folds=("valid",))
        ids, data = None, {"data": schedule.data}
        if schedule.data == "new":
            found = self._news.of(trainer, model)
            ids, data = found.ids, {**data, "why": found.why}
        served = self._judge.served(model) if schedule.warm_start else None
        start = None
        if served is not None and same_structure(
            model, self._model(served["_id"])
        ):  # else it begins from its own weights
            start = {"model": served["_id"], "trainer": self._trainer_of(served)}
        return {"start": start, "ids": ids, "data": data}

    def _course(self, schedule: Schedule, origin: Document) -> TrainingRecipe:
        trainer, model = pair(schedule.trainer)
        query = None
        if origin["ids"] is not None:
            query = trainer.select.fold("train").filter({"_id": {"$in": origin["ids"]}})
        if origin["start"] is not None:
            trainer = warm_start(trainer, model, self._model(origin["start"]["model"]))
        return TrainingRecipe(trainer=trainer, model=model, train_query=query, origin=dict(origin))

    def _model(self, uuid: str) -> TorchModel:
        model = self._loader.by_uuid(uuid)
        assert isinstance(model, TorchModel)  # noqa: S101 - for the type checker
        return model

    def _give_folds(self, select: Query) -> None:
        """Give a fold to what other clients inserted; nothing is written where all documents have one."""
        documents = self._connection.database[select.collection]
        with driver_errors("giving folds to new documents"):
            if documents.find_one({FOLD_FIELD: {"$nin": list(FOLDS)}}, {"_id": 1}) is not None:
                assign_folds(documents, self._settings.valid_fraction)

    def _trainer_of(self, model: Document) -> str | None:
        """The trainer that was published with a model."""
        users = self._components.users(model["_id"])
        return next((str(user["_id"]) for user in users if user.get("anchor") == model["_id"]), None)


def _outcome(job: Document, model: Document, *, promoted: bool, why: str) -> dict[str, Any]:
    return {
        "job": job["_id"],
        "model": model["identifier"],
        "version": model["version"],
        "uuid": model["_id"],
        "promoted": promoted,
        "why": why,
    }
