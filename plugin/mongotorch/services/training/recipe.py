"""What one run trains: trainer, model and queries; the streams it reads; the record of the data it read.

Guarantees: the select and its folds are checked before a stream is opened. The watermark of a provenance is taken
before the documents are read, so documents that arrive later count as new. Which documents a run sees is fixed by
its provenance: what others insert, or move to another fold, after that is not seen, by no validation either.
Documents that are deleted are not read any more, and change nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, Self, final

from bson import Timestamp

from mongotorch.codecs import NamedBlob
from mongotorch.data import (
    BackgroundScan,
    Hashes,
    Members,
    RunDtypes,
    ScannedMembers,
    StoredMembers,
    Stream,
    StreamSpec,
    can_scan_at,
    check_select,
    is_large,
    scan_members,
    working_folder,
)
from mongotorch.errors import EmptySelectError, MongotorchError
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.server_features import is_mock, watermark
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.signature import weighted_key
from mongotorch.split import Fold
from mongotorch.train import ALONE, Fit, Group, TorchModel, TorchTrainer, training_device

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
        documents: By uuid, the stored documents of trainer and model, as far as they were read before.
    """

    trainer: TorchTrainer
    model: TorchModel
    train_query: Query | None = None
    only: Hashes | None = dataclasses.field(default=None, repr=False)
    without: Hashes | None = dataclasses.field(default=None, repr=False)
    is_scheduled: bool = False
    is_judged: bool = False
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, repr=False)

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

    @property
    def device_type(self) -> str:
        """The type of device that it is trained on here, such as `cpu`.

        Raises:
            ParameterError: The device is not there, or several workers cannot each have one of their own.
        """
        device = training_device(self.trainer.compute_kwargs, self.model.preferred_devices)
        self.trainer.lanes.check_device(device)
        return device.type

    def on_cpu(self) -> Self:
        """The same for the CPU."""
        options = {**(self.trainer.compute_kwargs or {}), "device": "cpu"}
        trainer = self.trainer.replace(uuid=self.trainer.uuid, compute_kwargs=options)
        return dataclasses.replace(self, trainer=trainer)

    def hashed_key(self, settings: Settings, name: str) -> Any:
        """The fields of a set that its digest covers besides `_id`; None without lineage: no other field."""
        trainer = self.trainer
        key = weighted_key(trainer.key, trainer.sample_weight if name == "train" else None)
        return key if settings.lineage else None

    def check(self, database: Any, *, seconds: float | None = None) -> bool:
        """Refuse selects that cannot be trained on; whether all was looked at.

        Args:
            database: The driver's database.
            seconds: How long a document that is in no fold is looked for; None is to the end.

        Raises:
            MongotorchError: See `check_select`.
        """
        is_whole = True
        needed: dict[Fold, bool] = {
            "train": self.train_query is None,
            "valid": self.validation is not None or self.is_judged,
        }
        folds = [fold for fold, is_needed in needed.items() if is_needed]
        if folds:
            options: dict[str, Any] = {"unassigned": self.is_scheduled, "seconds": seconds}
            is_whole = check_select(database, self.trainer.fold("train"), folds=folds, **options)
        for name, query in self.sets.items():
            if name not in ("train", "valid") or (name == "train" and self.train_query is not None):
                check_select(database, query, folds=())
        return is_whole


class RunData(Protocol):
    """Says which documents the streams of a run give."""

    def fixed(self, spec: StreamSpec, name: str) -> StreamSpec:
        """A stream of the documents of one set, and of no other ones."""
        ...


@contextlib.contextmanager
def opened_fit(
    recipe: TrainingRecipe,
    connection: Connection,
    settings: Settings,
    *,
    data: RunData,
    state: Mapping[str, Any] | None = None,
    group: Group = ALONE,
) -> Iterator[Fit]:
    """The fit of a recipe, ready for its first step; its streams are closed afterwards.

    Args:
        recipe: What to train, checked; its model is changed.
        connection: The database.
        settings: The datalayer's.
        data: Which documents it is trained and validated on.
        state: What `Fit.capture` gave in an earlier run; None starts from the beginning.
        group: The ranks that train it together; each opens a fit of its own.

    Raises:
        MongotorchError: An option cannot be used; no step was made.
    """
    trainer, lanes = recipe.trainer, recipe.trainer.lanes
    if state is None and recipe.model.preprocess == "trainer":
        _check_served(recipe, connection, settings)
    run_dtypes = RunDtypes()  # one dtype a field, in all folds
    with contextlib.ExitStack() as opened:

        def stream(name: str, query: Query) -> Stream:
            spec = (training_spec if name == "train" else validation_spec)(trainer, settings, query)
            spec = dataclasses.replace(data.fixed(spec, name), run_dtypes=run_dtypes)
            if lanes.lanes > 1:
                own = lanes.training_stream if name == "train" else lanes.validation_stream
                spec = dataclasses.replace(spec, **own(group.rank, group.world))
            made = Stream(connection.opener, spec, database=connection.database)
            opened.callback(made.close)
            return made

        streams = {name: stream(name, query) for name, query in recipe.sets.items()}
        batches, valid = streams.pop("train"), streams.pop("valid", None)
        sets = {} if valid is None or recipe.validation is None else {"": valid}
        sets |= {name.removeprefix("dataset "): one for name, one in streams.items()}
        yield Fit(trainer, recipe.model, batches=batches, sets=sets, state=state, group=group)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataProvenance:
    """Which documents a run is trained on, from before its first step.

    Attributes:
        record: The field `data` of the model's document; plain BSON.
        blobs: The blobs that it names, by name.
        members: The documents of each set, see `TrainingRecipe.sets`; without those that are not fixed: where the
            setting `lineage` is off, and of sets too large to be kept.
        whole: The blobs of those sets that are in files, by the name of the set.
    """

    record: Mapping[str, Any]
    blobs: Mapping[str, bytes | NamedBlob] = dataclasses.field(default_factory=dict, repr=False)
    members: Mapping[str, Members] = dataclasses.field(default_factory=dict, repr=False)
    whole: Mapping[str, NamedBlob] = dataclasses.field(default_factory=dict, repr=False)

    def fixed(self, spec: StreamSpec, name: str) -> StreamSpec:
        """A stream of the documents of one set, and of no other ones."""
        members = self.members.get(name)
        if members is None:
            return spec
        # Without lineage the fields were not read.
        content = members.digest if "train" in self.record else None
        return dataclasses.replace(spec, members=members.ids, content=content)

    def result(self, check: Callable[[], None]) -> Self:  # noqa: ARG002 - that of a scan in the background waits
        """It is complete."""
        return self

    def close(self) -> None:
        """Let go of files: there are none."""

    def kept(self, *, over: bool = False) -> tuple[dict[str, Any], dict[str, bytes | NamedBlob]]:  # noqa: ARG002
        """What checkpoints keep, from which `resumed` makes it again: a record, and the blobs that it names."""
        blobs = dict(self.blobs)
        sets = {"train": self.record["members"]} if self.record.get("members") else {}
        for name, members in self.members.items():
            if name not in sets and name in self.whole:
                sets[name] = self.whole[name].name
                blobs[sets[name]] = self.whole[name]
            elif name not in sets:
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


@final
class PendingProvenance:
    """The provenance of a run that begins before its documents are scanned; see `BackgroundScan`.

    Args:
        recipe: What is trained.
        connection: The database.
        settings: The datalayer's.
        at: The watermark, and the cluster time of the scan.
        before: Reads what an earlier version was trained on: only what differs from that is stored.
        is_checked: Whether the whole select was checked; else the scan begins with that.

    Raises:
        OSError: There is no folder for the files of the scan.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        connection: Connection,
        settings: Settings,
        *,
        at: Timestamp,
        before: Callable[[], StoredMembers | None],
        is_checked: bool,
    ) -> None:
        self._recipe, self._settings, self._at, self._before = recipe, settings, at, before
        self._result: DataProvenance | None = None
        self._making = threading.Lock()
        self._opened = contextlib.ExitStack()
        folder = self._opened.enter_context(working_folder(settings.cache_dir or Path(".mongotorch/cache")))
        self.scan = BackgroundScan(
            connection.database,
            recipe.sets,
            {name: recipe.hashed_key(settings, name) for name in recipe.sets},
            at=at,
            folder=folder,
            read_deadline_s=settings.read_deadline_s,
            before=(lambda: None) if is_checked else functools.partial(recipe.check, connection.database),
        )
        self._opened.callback(self.scan.close)

    def fixed(self, spec: StreamSpec, name: str) -> StreamSpec:
        """See `DataProvenance.fixed`."""
        return dataclasses.replace(spec, pending=self.scan.pending(name))

    def result(self, check: Callable[[], None]) -> DataProvenance:
        """The provenance, when the scan has ended.

        Args:
            check: Called while it is waited for; what it raises ends that.

        Raises:
            MongotorchError: The scan has failed.
        """
        found = self.scan.result(check)
        with self._making:
            if self._result is None:
                self._result = self._made(found)
            return self._result

    def kept(self, *, over: bool = False) -> tuple[dict[str, Any], dict[str, bytes | NamedBlob]]:
        """See `DataProvenance.kept`; waits for the scan.

        Args:
            over: The run has made its last step: what was trained is kept also where the scan has failed.

        Raises:
            MongotorchError: The scan has failed.
        """
        try:
            return self.result(lambda: None).kept()
        except MongotorchError:
            if not over:
                raise
        record = {"query": self._recipe.training.to_document(), "watermark": self._at}
        return DataProvenance(record={**record, "members": None, "certain": False}).kept()

    def close(self) -> None:
        """End the scan, and remove its files."""
        self._opened.close()

    def _made(self, found: Mapping[str, ScannedMembers]) -> DataProvenance:
        members = {name: one.members for name, one in found.items()}
        whole = {name: NamedBlob.of(one.blob) for name, one in found.items() if one.blob is not None}
        given: dict[str, Any] = {"before": self._before(), "whole": whole}
        made = provenance_of(self._recipe, self._settings, self._at, members, **given)
        if not self.scan.uncertain:
            return made
        return dataclasses.replace(made, record={**made.record, "certain": False})


def is_large_run(recipe: TrainingRecipe, connection: Connection, settings: Settings) -> bool:
    """Whether scanning the documents of a run before its first step would be noticed."""
    database, sets = connection.database, recipe.sets.values()
    if is_mock(database) or not (settings.lineage or recipe.is_scheduled):
        return False
    return any(is_large(database, query, read_deadline_s=settings.read_deadline_s) for query in sets)


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
    if not settings.lineage and not recipe.is_scheduled:
        return DataProvenance(record={"query": recipe.training.to_document()})
    begun = watermark(connection.database, read_deadline_s=settings.read_deadline_s)
    found = {name: scan(query, recipe, connection, settings, name=name) for name, query in recipe.sets.items()}
    return provenance_of(recipe, settings, begun, found, before=before)


def pending_provenance(
    recipe: TrainingRecipe,
    connection: Connection,
    settings: Settings,
    *,
    before: Callable[[], StoredMembers | None],
    is_checked: bool,
) -> PendingProvenance | None:
    """The provenance of a run that can begin before its documents are scanned; None where it cannot.

    Args:
        recipe: What is trained.
        connection: The database.
        settings: The datalayer's.
        before: See `PendingProvenance`.
        is_checked: See `PendingProvenance`.

    Raises:
        ServerUnavailableError: The server could not be read for `read_deadline_s`.
    """
    if recipe.trainer.download or recipe.only is not None or recipe.without is not None:
        return None
    database, deadline_s = connection.database, settings.read_deadline_s
    at = watermark(database, read_deadline_s=deadline_s)
    if not isinstance(at, Timestamp):
        return None
    keys = {name: recipe.hashed_key(settings, name) for name in recipe.sets}
    if not can_scan_at(database, recipe.sets, keys, at=at, read_deadline_s=deadline_s):
        return None
    with contextlib.suppress(OSError):  # there is no folder that could be written to
        return PendingProvenance(recipe, connection, settings, at=at, before=before, is_checked=is_checked)
    return None


def provenance_of(
    recipe: TrainingRecipe,
    settings: Settings,
    begun: Timestamp | datetime,
    found: Mapping[str, Members],
    *,
    before: StoredMembers | None = None,
    whole: Mapping[str, NamedBlob] | None = None,
) -> DataProvenance:
    """The provenance of a recipe's data, of sets that were scanned.

    Args:
        recipe: What is trained.
        settings: The datalayer's.
        begun: The watermark.
        found: The sets, by name.
        before: See `data_provenance`.
        whole: The blobs of those that are in files.
    """
    whole = whole or {}
    record: dict[str, Any] = {"query": recipe.training.to_document(), "watermark": begun}
    # What a random query gives again are other documents, and computed `_id`s may be other ones.
    are_fixed = {name: query.is_repeatable and query.keeps_ids for name, query in recipe.sets.items()}
    members = {name: one for name, one in found.items() if one.rows is not None and are_fixed[name]}
    if not settings.lineage:
        return DataProvenance(record={"query": record["query"]}, members=members, whole=whole)
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
        return DataProvenance(record={**record, "members": None}, members=members, whole=whole)
    name, blobs = _stored(train, before, whole.get("train"))
    return DataProvenance(record={**record, "members": name}, blobs=blobs, members=members, whole=whole)


def _stored(
    train: Members, before: StoredMembers | None, whole: NamedBlob | None
) -> tuple[str, Mapping[str, bytes | NamedBlob]]:
    """The name of the blob of a set, and all blobs that it is made of."""
    stored = None if before is None else StoredMembers.after(train, before)
    if stored is None and whole is not None:
        return whole.name, {whole.name: whole}
    stored = stored or StoredMembers.made(train)
    return stored.name, stored.blobs


def scan(
    query: Query, recipe: TrainingRecipe, connection: Connection, settings: Settings, *, name: str = "train"
) -> Members:
    """The documents of a query as they are now, hashed by the recipe's key: by `_id` alone without lineage.

    Raises: as `data_provenance`.
    """
    return scan_members(
        connection.database,
        query,
        recipe.hashed_key(settings, name),
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


def _check_served(recipe: TrainingRecipe, connection: Connection, settings: Settings) -> None:
    """Make the input of one document as the published model will, to know before the first step if it cannot."""
    trainer, key = recipe.trainer, recipe.trainer.mapping.input_key(recipe.model)
    if key is None:
        return  # nothing says which fields are inputs
    spec = dataclasses.replace(
        validation_spec(trainer, settings, recipe.training),
        key=key,
        transform=None,
        collate_fn=list,
        batch_size=1,
        mode="stream",
        data_prefetch=False,
        loader={},
        dtypes={path: dtype for path, dtype in (trainer.dtypes or {}).items() if path in key.paths},
        defaults={path: value for path, value in (trainer.defaults or {}).items() if path in key.paths},
    )
    with (
        Stream(connection.opener, spec, database=connection.database) as stream,
        contextlib.suppress(EmptySelectError),
    ):
        for ids, items in stream.samples():
            try:
                trainer.served_input(recipe.model, items[0])
            except MongotorchError as error:
                error.add_note(f"with document {ids[0]!r}, before the first step")
                raise
            return


def validation_spec(trainer: TorchTrainer, settings: Settings, query: Query) -> StreamSpec:
    """How validation documents are streamed: all of them, in the order of the query, by `valid_transform`."""
    spec = _spec(trainer, settings, query, shuffle=False, drop_last=False)
    if trainer.valid_transform is None:
        return spec
    return dataclasses.replace(spec, transform=trainer.valid_transform)


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
