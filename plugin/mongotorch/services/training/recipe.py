"""What one run trains: trainer, model and queries; the streams it reads; the record of the data it read.

Guarantees: the select and its folds are checked before a stream is opened. The watermark of a provenance is taken
before the documents are read, so documents that arrive later count as new. Which documents a run sees is fixed by
its provenance: what others insert, or move to another fold, after that is not seen, by no validation either.
Documents that are deleted are not read any more, and change nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self, final

from mongotorch.data import (
    DataCheck,
    Hashes,
    Members,
    RunDtypes,
    StoredMembers,
    Stream,
    StreamSpec,
    check_documents,
    check_select,
    scan_members,
    watermark,
)
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.signature import weighted_key
from mongotorch.split import Fold
from mongotorch.train import Fit, TorchModel, TorchTrainer, trainer_and_model

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
        "dtypes",
        "defaults",
        "on_bad_document",
        "sample_weight",
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
        only: Hashes of the `_id`s of the training documents, ascending; None is all of the query.
        without: Hashes of the `_id`s of documents that are no training documents, ascending; None leaves out none.
        is_scheduled: Whether documents without a fold are left out instead of refused, and the documents are fixed
            without the setting `lineage` too.
        is_judged: Whether its model is compared with another one after it: the validation documents are needed
            then even if the trainer never validates.
        origin: What is needed to make this recipe again; plain BSON. Every checkpoint keeps it, and
            `TrainingRun.origin` returns it.
    """

    trainer: TorchTrainer
    model: TorchModel
    train_query: Query | None = None
    only: Hashes | None = dataclasses.field(default=None, repr=False)
    without: Hashes | None = dataclasses.field(default=None, repr=False)
    is_scheduled: bool = False
    is_judged: bool = False
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> Query:
        """The training documents."""
        return self.trainer.fold("train") if self.train_query is None else self.train_query

    @property
    def validation(self) -> Query | None:
        """The validation documents; None where the trainer never validates."""
        return self.trainer.fold("valid") if self.trainer.validation_interval is not None else None

    @property
    def sets(self) -> dict[str, Query]:
        """What the run reads, by name: `train`, `valid`, and the validation's further datasets."""
        found = {"train": self.training}
        if self.validation is not None or self.is_judged:
            found["valid"] = self.trainer.fold("valid")
        if self.validation is not None and self.model.validation is not None:
            found |= {f"dataset {one.identifier}": one.select for one in self.model.validation.datasets}
        return found

    def check(self, database: Any) -> None:
        """Refuse selects that cannot be trained on. Raises: MongotorchError, see `check_select`."""
        needed: dict[Fold, bool] = {
            "train": self.train_query is None,
            "valid": self.validation is not None or self.is_judged,
        }
        folds = [fold for fold, is_needed in needed.items() if is_needed]
        if folds:
            check_select(database, self.trainer.fold("train"), folds=folds, unassigned=self.is_scheduled)
        for name, query in self.sets.items():
            if name not in ("train", "valid") or (name == "train" and self.train_query is not None):
                check_select(database, query, folds=())


@contextlib.contextmanager
def opened_fit(
    recipe: TrainingRecipe,
    connection: Connection,
    settings: Settings,
    *,
    data: DataProvenance,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Fit]:
    """The fit of a recipe, ready for its first step; its streams are closed afterwards.

    Args:
        recipe: What to train, checked; its model is changed.
        connection: The database.
        settings: The datalayer's.
        data: Which documents it is trained and validated on.
        state: What `Fit.capture` gave in an earlier run; None starts from the beginning.

    Raises:
        MongotorchError: An option cannot be used; no step was made.
    """
    trainer = recipe.trainer
    run_dtypes = RunDtypes()  # one dtype a field, in all folds
    with contextlib.ExitStack() as opened:

        def stream(name: str, query: Query) -> Stream:
            spec = (training_spec if name == "train" else validation_spec)(trainer, settings, query)
            spec = dataclasses.replace(data.fixed(spec, name), run_dtypes=run_dtypes)
            made = Stream(connection.opener, spec, database=connection.database)
            opened.callback(made.close)
            return made

        streams = {name: stream(name, query) for name, query in recipe.sets.items()}
        batches, valid = streams.pop("train"), streams.pop("valid", None)
        sets = {} if valid is None or recipe.validation is None else {"": valid}
        sets |= {name.removeprefix("dataset "): one for name, one in streams.items()}
        yield Fit(trainer, recipe.model, batches=batches, sets=sets, state=state)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataProvenance:
    """Which documents a run is trained on, from before its first step.

    Attributes:
        record: The field `data` of the model's document; plain BSON.
        blobs: The blobs that it names, by name.
        members: The documents of each set, see `TrainingRecipe.sets`; without those that are not fixed: where the
            setting `lineage` is off, and of sets too large to be kept.
    """

    record: Mapping[str, Any]
    blobs: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
    members: Mapping[str, Members] = dataclasses.field(default_factory=dict, repr=False)

    def fixed(self, spec: StreamSpec, name: str) -> StreamSpec:
        """A stream of the documents of one set, and of no other ones."""
        members = self.members.get(name)
        if members is None:
            return spec
        # Without lineage the fields were not read.
        content = members.digest if "train" in self.record else None
        return dataclasses.replace(spec, members=members.ids, content=content)

    def kept(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What checkpoints keep, from which `resumed` makes it again: a record, and the blobs that it names."""
        blobs = dict(self.blobs)
        sets = {"train": self.record["members"]} if self.record.get("members") else {}
        for name, members in self.members.items():
            if name not in sets:
                stored = StoredMembers.made(members)
                sets[name] = stored.name
                blobs |= stored.blobs
        return {"data": dict(self.record), "sets": sets}, blobs

    @classmethod
    def resumed(cls, record: Mapping[str, Any], blobs: Mapping[str, bytes]) -> Self:
        """The provenance that a checkpoint kept."""

        def get(names: Iterable[str]) -> Iterable[tuple[str, bytes]]:
            return [(name, blobs[name]) for name in names]

        data = record.get("data", {})
        # Checkpoints of 0.1.0 have the training documents only.
        sets = record.get("sets") or ({"train": data["members"]} if data.get("members") else {})
        stored = {name: StoredMembers.read(blob, get) for name, blob in sets.items()}
        own = stored["train"].blobs if data.get("members") else {}
        return cls(record=data, blobs=own, members={name: one.members for name, one in stored.items()})


def check_trainer(trainer: TorchTrainer, connection: Connection, settings: Settings) -> DataCheck:
    """Look at a sample of a trainer's documents, and try one batch of each fold and validation set.

    A batch goes through transform, model, objective and metrics; nothing is trained.

    Raises:
        MongotorchError: What a run would end in; other errors of the trainer's own functions have a note of where.
    """
    trainer, model = trainer_and_model(trainer)
    found = check_documents(
        connection.database,
        trainer.select,
        paths=weighted_key(trainer.key, trainer.sample_weight).paths,
        split=trainer.fold("train").split,
    )
    before = next((parameter.device for parameter in model.object.parameters()), None)
    recipe = TrainingRecipe(trainer=trainer, model=model)
    recipe.check(connection.database)
    try:
        with opened_fit(recipe, connection, settings, data=DataProvenance(record={})) as fit:
            fit.check(training=True)
    finally:
        if before is not None:
            model.object.to(before)
    return found


def data_provenance(
    recipe: TrainingRecipe, connection: Connection, settings: Settings, *, before: StoredMembers | None = None
) -> DataProvenance:
    """The provenance of a recipe's data; only its query, if the setting `lineage` is off.

    Args:
        recipe: What is trained.
        connection: The database.
        settings: The datalayer's.
        before: What an earlier version was trained on: only what differs from that is stored.

    Raises:
        QueryError: The server refuses the query.
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    record: dict[str, Any] = {"query": recipe.training.to_document()}
    if not settings.lineage and not recipe.is_scheduled:
        return DataProvenance(record=record)
    record["watermark"] = watermark(connection.database, read_deadline_s=settings.read_deadline_s)
    found = {name: scan(query, recipe, connection, settings, name=name) for name, query in recipe.sets.items()}
    # What a random query gives again are other documents, and computed `_id`s may be other ones.
    are_fixed = {name: query.is_repeatable and query.keeps_ids for name, query in recipe.sets.items()}
    members = {name: one for name, one in found.items() if one.rows is not None and are_fixed[name]}
    if not settings.lineage:
        return DataProvenance(record={"query": record["query"]}, members=members)
    train, valid = found["train"], None if recipe.validation is None else found["valid"]
    if not recipe.training.is_repeatable:
        # What the run will read are other documents: only how many there are is known.
        counts = {
            name: None if one is None else {"count": one.count}
            for name, one in (("train", train), ("valid", valid))
        }
        return DataProvenance(record={**record, **counts, "members": None, "certain": False}, members=members)
    record["train"] = summary(train)
    record["valid"] = None if valid is None else summary(valid)
    if not recipe.training.keeps_ids:
        record["certain"] = False
    if recipe.without is not None or recipe.only is not None:
        record["of_query"] = "members"  # and not all of it
    if train.rows is None:
        return DataProvenance(record={**record, "members": None}, members=members)
    stored = StoredMembers.made(train, before)
    return DataProvenance(record={**record, "members": stored.name}, blobs=stored.blobs, members=members)


def scan(
    query: Query, recipe: TrainingRecipe, connection: Connection, settings: Settings, *, name: str = "train"
) -> Members:
    """The documents of a query as they are now, hashed by the recipe's key: by `_id` alone without lineage.

    Raises: as `data_provenance`.
    """
    trainer = recipe.trainer
    key = weighted_key(trainer.key, trainer.sample_weight if name == "train" else None)
    return scan_members(
        connection.database,
        query,
        key if settings.lineage else None,
        read_deadline_s=settings.read_deadline_s,
        members=recipe.only if name == "train" else None,
        without=recipe.without if name == "train" else None,
    )


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
        trainer.fold("train") if query is None else query,
        shuffle=bool(options.get("shuffle")),
        drop_last=bool(options.get("drop_last")),
        across_epochs=True,
        sample_weight=trainer.sample_weight,
    )


def validation_spec(trainer: TorchTrainer, settings: Settings, query: Query) -> StreamSpec:
    """How validation documents are streamed: all of them, in the order of the query, by `valid_transform`."""
    spec = _spec(trainer, settings, query, shuffle=False, drop_last=False)
    if trainer.valid_transform is None:
        return spec
    return dataclasses.replace(spec, transform=trainer.valid_transform)


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
        dtypes=trainer.dtypes,
        defaults=trainer.defaults,
        on_bad_document=trainer.on_bad_document,
        **order,
    )
