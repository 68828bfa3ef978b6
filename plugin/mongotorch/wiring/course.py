"""What one run trains, and what it came to: the core of a run, without a job and without a publication.

Always: a course is a value; who follows it, for a job or only to compare, trains the same; nothing here writes to
the database, except the plan of a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid as uuids
from collections.abc import Iterator, Mapping
from typing import Any, final

from mongotorch.component import Component
from mongotorch.errors import ParameterError
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.store import Connection
from mongotorch.train import Fit, TorchModel, TorchTrainer, Trained
from mongotorch.wiring.streams import Streams

_NAMESPACE = uuids.UUID("a3f4c1de-6a0f-4b0e-9d0c-2f1f5e7f8b11")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What one run trains.

    Attributes:
        trainer: How; its uuid is that of a stored version, its `optimizer_state` is what the run starts with.
        model: What, with the weights that the run starts with; its uuid is that of a stored version.
        train_query: The training documents, its fold included; None: the fold `train` of the trainer's select.
        source: What the model's document says besides of where the run came from; plain BSON.
        origin: What whoever made this course needs to make it again; plain BSON. It is kept in each checkpoint,
            and `Training.origin` gives it back.
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
class DataFacts:
    """What is known of the data of a run, from before its first step.

    Attributes:
        said: What the model's document says as `data`; plain BSON.
        blobs: The blobs that it names, by name.
    """

    said: Mapping[str, Any]
    blobs: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        trained: Steps, optimizer state and what was measured; the weights are in the course's model.
        data: What is known of its data.
    """

    trained: Trained
    data: DataFacts


@contextlib.contextmanager
def opened_fit(
    course: Course, connection: Connection, settings: Settings, *, state: Mapping[str, Any] | None = None
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


def follow_quietly(course: Course, connection: Connection, settings: Settings) -> Trained:
    """Train a course to its end, and keep nothing but the result. Raises: as the run raises."""
    with opened_fit(course, connection, settings) as fit:
        for _ in fit.run():
            pass
    return fit.trained()


def trained_pair(job: Mapping[str, Any], course: Course, trained: Trained) -> tuple[TorchModel, TorchTrainer]:
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
