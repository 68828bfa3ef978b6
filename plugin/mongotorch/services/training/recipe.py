"""What one run trains: trainer, model and queries; the streams it reads; the record of the data it read.

Guarantees: the select and its folds are checked before a stream is opened. The watermark of a provenance is taken
before the documents are read, so documents that arrive later count as new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, final

from mongotorch.data import Members, Stream, StreamSpec, check_select, scan_members, watermark
from mongotorch.mongo.connection import Connection
from mongotorch.query import Fold, Query
from mongotorch.settings import Settings
from mongotorch.train import Fit, TorchModel, TorchTrainer

_MODES: dict[str, Literal["memory", "download"]] = {"in_memory": "memory", "download": "download"}
_STREAM_OPTIONS = frozenset(
    {
        "drop_last",
        "transform",
        "signature",
        "collate_fn",
        "data_prefetch",
        "across_epochs",
        "prefetch_size",
        "prefetch_factor",
    }
)
_OWN_PARAMETERS = ("batch_size", "shuffle", "drop_last")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What one run trains.

    Attributes:
        trainer: A stored version's uuid; its `optimizer_state` is what the run starts with.
        model: A stored version's uuid, with the weights that the run starts with; training changes it in place.
        train_query: The training documents, its fold included; None is the fold `train` of the trainer's select.
        origin: What is needed to make this recipe again; plain BSON. Every checkpoint keeps it, and
            `TrainingRun.origin` returns it.
    """

    trainer: TorchTrainer
    model: TorchModel
    train_query: Query | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> Query:
        """The training documents."""
        return self.trainer.select.fold("train") if self.train_query is None else self.train_query

    @property
    def validation(self) -> Query | None:
        """The validation documents; None where the trainer never validates."""
        return self.trainer.select.fold("valid") if self.trainer.validation_interval is not None else None


@contextlib.contextmanager
def opened_fit(
    recipe: TrainingRecipe, connection: Connection, settings: Settings, *, state: Mapping[str, Any] | None = None
) -> Iterator[Fit]:
    """The fit of a recipe, ready for its first step; its streams are closed afterwards.

    Args:
        recipe: What to train; its model is changed.
        connection: The database.
        settings: The datalayer's.
        state: What `Fit.capture` gave in an earlier run; None starts from the beginning.

    Raises:
        MongotorchError: The select, its folds or an option cannot be used; no step was made.
    """
    trainer, model, database = recipe.trainer, recipe.model, connection.database
    _check_selects(database, recipe)
    with contextlib.ExitStack() as opened:

        def stream(spec: StreamSpec) -> Stream:
            made = Stream(connection.opener, spec, database=database)
            opened.callback(made.close)
            return made

        batches = stream(training_spec(trainer, settings, recipe.training))
        sets: dict[str, Stream] = {}
        if recipe.validation is not None:
            sets[""] = stream(validation_spec(trainer, settings, recipe.validation))
            for dataset in model.validation.datasets if model.validation is not None else ():
                check_select(database, dataset.select, folds=())
                sets[dataset.identifier] = stream(validation_spec(trainer, settings, dataset.select))
        yield Fit(trainer, model, batches=batches, sets=sets, state=state)


def _check_selects(database: Any, recipe: TrainingRecipe) -> None:
    needed: dict[Fold, bool] = {"train": recipe.train_query is None, "valid": recipe.validation is not None}
    folds = [fold for fold, is_needed in needed.items() if is_needed]
    if folds:
        check_select(database, recipe.trainer.select, folds=folds)
    if recipe.train_query is not None:
        check_select(database, recipe.train_query, folds=())


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataProvenance:
    """Which documents a run is trained on, from before its first step.

    Attributes:
        record: The field `data` of the model's document; plain BSON.
        blobs: The blobs that it names, by name.
    """

    record: Mapping[str, Any]
    blobs: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)


def data_provenance(recipe: TrainingRecipe, connection: Connection, settings: Settings) -> DataProvenance:
    """The provenance of a recipe's data; only its query, if the setting `lineage` is off.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    record: dict[str, Any] = {"query": recipe.training.to_document()}
    if not settings.lineage:
        return DataProvenance(record=record)
    record["watermark"] = watermark(connection.database, read_deadline_s=settings.read_deadline_s)
    train = scan(recipe.training, recipe, connection, settings)
    valid = None if recipe.validation is None else scan(recipe.validation, recipe, connection, settings)
    if not recipe.training.is_repeatable:
        # What the run will read are other documents: only how many there are is known.
        counts = {
            name: None if one is None else {"count": one.count}
            for name, one in (("train", train), ("valid", valid))
        }
        return DataProvenance(record={**record, **counts, "members": None, "certain": False})
    record["train"] = summary(train)
    record["valid"] = None if valid is None else summary(valid)
    if not recipe.training.keeps_ids:
        record["certain"] = False
    if train.rows is None:
        return DataProvenance(record={**record, "members": None})
    blob = train.to_bytes()
    name = hashlib.sha256(blob).hexdigest()
    return DataProvenance(record={**record, "members": name}, blobs={name: blob})


def scan(query: Query, recipe: TrainingRecipe, connection: Connection, settings: Settings) -> Members:
    """The documents of a query as they are now, hashed by the recipe's key. Raises: as `data_provenance`."""
    return scan_members(connection.database, query, recipe.trainer.key, read_deadline_s=settings.read_deadline_s)


def summary(members: Members) -> dict[str, Any]:
    """The record of a set of documents: how many, and a digest of them."""
    return {"count": members.count, "digest": members.digest}


def training_spec(trainer: TorchTrainer, settings: Settings, query: Query | None = None) -> StreamSpec:
    """How a trainer's training documents are streamed.

    Args:
        trainer: The trainer.
        settings: The datalayer's.
        query: The documents, its fold included; None is the fold `train` of the trainer's select.
    """
    options = dict(trainer.loader_kwargs or {})
    return _spec(
        trainer,
        settings,
        trainer.select.fold("train") if query is None else query,
        shuffle=bool(options.get("shuffle")),
        drop_last=bool(options.get("drop_last")),
        across_epochs=True,
    )


def validation_spec(trainer: TorchTrainer, settings: Settings, query: Query) -> StreamSpec:
    """How validation documents are streamed: all of them, in the order of the query."""
    return _spec(trainer, settings, query, shuffle=False, drop_last=False)


def stream_spec(settings: Settings, query: Query, options: Mapping[str, Any], **fields: Any) -> StreamSpec:
    """How a query is streamed by `db.stream`.

    Args:
        settings: The datalayer's.
        query: The documents.
        options: The trainer's stream options and those of a DataLoader, in one mapping.
        fields: Fields of the `StreamSpec`.

    Raises:
        ParameterError, LoaderOptionError: An option that does not exist, or a value that cannot be used.
    """
    own = {name: value for name, value in options.items() if name in _STREAM_OPTIONS}
    loader = {name: value for name, value in options.items() if name not in {*_STREAM_OPTIONS, *_MODES}}
    modes = [mode for name, mode in _MODES.items() if options.get(name)]
    return StreamSpec(
        query=query,
        mode=modes[0] if modes else "stream",
        prefetch_bytes=settings.prefetch_bytes,
        worker_niceness=settings.worker_niceness,
        loader=loader,
        cache_dir=settings.cache_dir,
        read_deadline_s=settings.read_deadline_s,
        **{"data_prefetch": True, **own},
        **fields,
    )


def _spec(trainer: TorchTrainer, settings: Settings, query: Query, **order: Any) -> StreamSpec:
    options = dict(trainer.loader_kwargs or {})
    loader = {name: value for name, value in options.items() if name not in _OWN_PARAMETERS}
    workers = (trainer.compute_kwargs or {}).get("num_workers")
    if workers is not None:
        loader.setdefault("num_workers", workers)
    return StreamSpec(
        query=query,
        key=trainer.key,
        batch_size=options.get("batch_size", 1),
        seed=trainer.seed,
        transform=trainer.transform,
        signature=trainer.signature,
        collate_fn=trainer.collate_fn,
        mode="memory" if trainer.in_memory else "download" if trainer.download else "stream",
        data_prefetch=trainer.data_prefetch,
        prefetch_size=trainer.prefetch_size,
        prefetch_factor=trainer.prefetch_factor,
        prefetch_bytes=settings.prefetch_bytes,
        worker_niceness=settings.worker_niceness,
        loader=loader,
        cache_dir=settings.cache_dir,
        read_deadline_s=settings.read_deadline_s,
        **order,
    )
