"""What one run trains, and what it came to: the core of a run, without a job and without a publication.

Always: a course is a value; who follows it, for a job or only to compare, trains the same; nothing here writes to
the database, except the plan of a stream.

What is known of the data of a run: which documents, as of when; found once, before its first step.

Always: the facts are plain BSON and the blobs that they name; the watermark is taken before the documents are
read, so that what comes after it may be new; a run that is resumed keeps the facts that it began with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import uuid as uuids
from collections.abc import Iterator, Mapping
from typing import Any, final

from mongotorch.component import Component
from mongotorch.data import Members, scan_members, watermark
from mongotorch.errors import DataError, ParameterError
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.services.training.streams import Streams
from mongotorch.settings import Settings
from mongotorch.train import Fit, TorchModel, TorchTrainer, Trained

_NAMESPACE = uuids.UUID("a3f4c1de-6a0f-4b0e-9d0c-2f1f5e7f8b11")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What one run trains.

    Attributes:
        trainer: How; its uuid is that of a stored version, its `optimizer_state` is what the run starts with.
        model: What, with the weights that the run starts with; its uuid is that of a stored version.
        train_query: The training documents, its fold included; None: the fold `train` of the trainer's select.
        source: What the model's document says besides of where the run came from; plain BSON.
        origin: What whoever made this course needs to make it again; plain BSON. It is kept in each checkpoint,
            and `TrainingRun.origin` gives it back.
    """

    trainer: TorchTrainer
    model: TorchModel
    train_query: Query | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> Query:
        """The training documents."""
        return self.trainer.select.fold("train") if self.train_query is None else self.train_query

    @property
    def validation(self) -> Query | None:
        """The validation documents; None where the trainer never validates."""
        return self.trainer.select.fold("valid") if self.trainer.validation_interval is not None else None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What is known of the data of a run, from before its first step.

    Attributes:
        said: What the model's document says as `data`; plain BSON.
        blobs: The blobs that it names, by name.
    """

    said: Mapping[str, Any]
    blobs: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        trained: Steps, optimizer state and what was measured; the weights are in the course's model.
        data: What is known of its data.
    """

    trained: Trained
    data: TrainingData


@contextlib.contextmanager
def opened_fit(
    course: TrainingRecipe, connection: Connection, settings: Settings, *, state: Mapping[str, Any] | None = None
) -> Iterator[Fit]:
    """The run of a course, ready for its first step; its streams are closed behind it.

    Args:
        course: What to train; its model is changed.
        connection: The database.
        settings: Of the datalayer.
        state: What an earlier run's `capture` gave; None starts.

    Raises:
        MongotorchError: The select, its folds or an option cannot be used, before any step.
    """
    trainer, model = course.trainer, course.model
    with Streams(trainer, model, connection, settings, train_query=course.train_query) as streams:
        yield Fit(trainer, model, batches=streams.batches, sets=streams.sets, state=state)


def follow_quietly(course: TrainingRecipe, connection: Connection, settings: Settings) -> Trained:
    """Train a course to its end, and keep nothing but the result. Raises: as the run raises."""
    with opened_fit(course, connection, settings) as fit:
        for _ in fit.run():
            pass
    return fit.trained()


def trained_pair(
    job: Mapping[str, Any], course: TrainingRecipe, trained: Trained
) -> tuple[TorchModel, TorchTrainer]:
    """What a run publishes: the model, and the trainer with the state of its optimizer, each naming the other."""
    new_model = course.model.replace(uuid=attempt_uuid(job, "model"), trainer=None)
    new_trainer = course.trainer.replace(
        uuid=attempt_uuid(job, "trainer"),
        optimizer_state=trained.optimizer_state,
        metric_values=trained.metric_values,
        model=new_model,
    )
    # They refer to each other, and neither can be made after the other.
    object.__setattr__(new_model, "trainer", new_trainer)
    return new_model, new_trainer


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
class DataProvenance:
    """Finds the facts of the data of runs.

    Args:
        connection: The database.
        settings: `lineage`, `read_deadline_s`.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._database: Any = connection.database
        self._settings = settings

    def of(self, course: TrainingRecipe) -> TrainingData:
        """The facts of a course's data: only its query, where the setting `lineage` is off.

        Raises:
            QueryError: The server refuses the query.
            ServerUnavailableError: The server could not be read for `read_deadline_s`.
        """
        said: dict[str, Any] = {"query": course.training.to_document()}
        if not self._settings.lineage:
            return TrainingData(said=said)
        said["watermark"] = watermark(self._database, read_deadline_s=self._settings.read_deadline_s)
        train = self.scan(course.training, course)
        said["train"] = summary(train)
        said["valid"] = None if course.validation is None else summary(self.scan(course.validation, course))
        if train.rows is None:
            return TrainingData(said={**said, "members": None})
        blob = train.to_bytes()
        name = hashlib.sha256(blob).hexdigest()
        return TrainingData(said={**said, "members": name}, blobs={name: blob})

    def scan(self, query: Query, course: TrainingRecipe) -> Members:
        """The documents of a query as they are now. Raises: as `of`."""
        deadline_s = self._settings.read_deadline_s
        return scan_members(self._database, query, course.trainer.key, read_deadline_s=deadline_s)


def summary(members: Members) -> dict[str, Any]:
    """What a document says of a set of documents."""
    return {"count": members.count, "digest": members.digest}


def members_of_facts(said: Any, get: Any) -> Members:
    """The training documents that the facts of a version name.

    Args:
        said: The `data` of a model's document; None where it has none.
        get: Gives blobs.

    Raises:
        DataError: They were not kept; the message says why.
        IntegrityError: The blob is not what was stored.
    """
    if said is None:
        raise DataError("it was stored as it was given, not trained in this database")
    if said.get("members") is not None:
        return Members.from_bytes(get(said["members"]))
    if "train" not in said:
        raise DataError("it was trained without lineage (the setting `lineage` was off)")
    raise DataError(f"its {said['train']['count']} documents are too many to be kept one by one")
