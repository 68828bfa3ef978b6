"""Predicts the documents of a query with a stored model, and writes the predictions back into the documents.

A prediction is stored as a sub-document, with the version that made it. Where a call ends in the middle, the same
call goes on: documents that have a prediction by the same version are left out. With several workers each reads,
predicts and writes its own ranges of the documents, and batches end with ranges.

Guarantees: what can be refused is refused before a document is changed; a document has the whole prediction of one
version or is as it was; memory does not grow with the number of documents; how many were written is recorded also
where a call fails; batches, and so the bits of predictions, are the same with any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol, Self, final

import bson

from mongotorch.component import Component, is_trained
from mongotorch.data import RunDtypes, Stream, StreamSpec, check_select
from mongotorch.data.collection import check_updatable, write_field
from mongotorch.errors import (
    DataError,
    EmptySelectError,
    MongotorchError,
    NotFoundError,
    ParameterError,
    QueryError,
    UnsupportedError,
)
from mongotorch.mongo.connection import Connection
from mongotorch.mongo.server_features import is_mock
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.signature import Key, weighted_key
from mongotorch.store import LIVE, Move
from mongotorch.store.predictions import PredictionLog
from mongotorch.train import Group, TorchModel, TorchTrainer, pick_device, pinned_threads

RANK_MAIN: Final = "mongotorch.worker.rank:prediction_main"
_RECORD_S: Final = 1.0  # how often the number of written documents is recorded
_PREFETCH_FACTOR: Final = 4
_RANGE_ROWS: Final = 128  # documents of a range, where batches are smaller; workers share ranges
_MOST_WORKERS: Final = 4096
_COUNTS: Final = ("written", "gone", "skipped")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a call of `predict` has written.

    Attributes:
        identifier: The name of the model.
        version: The number of the version that predicted.
        uuid: Its uuid.
        collection: The collection of the documents.
        into: The field in which the predictions are.
        written: How many documents have a prediction by this call.
        gone: How many were deleted while they were predicted.
        skipped: How many were left out because they do not fit, where the trainer says `on_bad_document="skip"`.
        why: What was wrong with the first of these.
    """

    identifier: str
    version: int | None
    uuid: str
    collection: str
    into: str
    written: int = 0
    gone: int = 0
    skipped: int = 0
    why: str = ""

    def _plus(self, *, written: int, gone: int, skipped: int, why: str) -> Self:
        """The same with more documents."""
        return dataclasses.replace(
            self,
            written=self.written + written,
            gone=self.gone + gone,
            skipped=self.skipped + skipped,
            why=self.why or why,
        )


class PredictingRanks(Protocol):
    """Starts the processes that predict together."""

    def check(self, workers: int, *, device: str) -> None:
        """Refuse a number of processes that cannot be started now."""

    def call(self, function: str, arguments: Mapping[str, Any], *, workers: int, device: str) -> None:
        """Have so many processes call a function, and return when they have ended."""


@final
class Predictor:
    """Writes predictions into the documents of one database.

    Args:
        connection: The open database; the datalayer closes it.
        settings: The datalayer's.
        ranks: Start the processes that predict together.
        find: Finds the document of a version by kind, name, number and alias.
        load: Loads the component of such a document.
        head: The newest move of the alias `live` of a kind and a name.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        ranks: PredictingRanks,
        *,
        find: Callable[..., dict[str, Any]],
        load: Callable[[Mapping[str, Any]], Component],
        head: Callable[[str, str], Move | None],
    ) -> None:
        self._connection, self._settings, self._ranks = connection, settings, ranks
        self._find, self._load, self._head = find, load, head
        self._log = PredictionLog(connection.database)

    def predict(
        self,
        type_id: str,
        identifier: str,
        version: int | None,
        alias: str | None,
        *,
        select: Query,
        into: str,
        key: Any,
        batch_size: int,
        force: bool,
        workers: int,
    ) -> Predicted:
        """Predict the documents of a query; see `Datalayer.predict`."""
        _check_select(select, into)
        _check_workers(workers, select)
        model, named = self._model(type_id, identifier, version, alias)
        trainer = model.trainer if isinstance(model.trainer, TorchTrainer) else None
        chosen = _key(model, trainer) if key is None else Key.parse(key)
        _check_overlap(into, chosen, trainer, select)
        spec = self._spec(trainer, chosen, _without_done(select, into, None if force else model.uuid), batch_size)
        check_updatable(self._connection.database, select.collection)
        if workers > 1:
            self._ranks.check(workers, device=pick_device(model.preferred_devices).type)
        known = {"type_id": type_id, "identifier": identifier, "version": model.version, "alias": named}
        record = self._log.begin(model.uuid, select.collection, into, {**known, "select": repr(select)})
        run = _Run(self._connection.database, model, spec, into, record=functools.partial(self._add, record))
        try:
            with (
                contextlib.suppress(EmptySelectError),  # nothing matches, or nothing that is left
                Stream(self._connection.opener, spec, database=self._connection.database) as stream,
            ):
                if workers > 1:
                    self._by_ranks(run, record, stream.planned_state(), workers)
                else:
                    run.write(stream)
            self._log.end(record, "succeeded")
        except BaseException as error:
            self._fail(record, run.result, error)
            raise
        return run.result

    def predict_rank(self, record: str, call: str, group: Group) -> None:
        """Predict the documents of this rank, for a call of another process that has started it.

        Args:
            record: The record of the prediction.
            call: The name of the call in it.
            group: All ranks.

        Raises:
            NotFoundError: No such call is recorded in this database.
            DataError: A document cannot be predicted.
            MongotorchError: As `predict`.
        """
        given = bson.decode(self._log.shared(record, call))
        model = self._load(self._find(uuid=given["uuid"]))
        assert isinstance(model, TorchModel)  # noqa: S101 - for the type checker
        trainer = model.trainer if isinstance(model.trainer, TorchTrainer) else None
        named = tuple((path, name) for path, name in given["named"])
        key = Key(form=given["form"], positional=tuple(given["positional"]), named=named)
        spec = self._spec(trainer, key, Query.from_document(given["select"]), given["batch_size"], decides=False)
        spec = dataclasses.replace(spec, shard=(group.rank, group.world))

        def record_more(counts: Mapping[str, int], why: str) -> None:
            self._log.add_to(record, call, counts, why)

        run = _Run(self._connection.database, model, spec, given["into"], record=record_more)
        with (
            pinned_threads(1),
            Stream(self._connection.opener, spec, database=self._connection.database) as stream,
        ):
            stream.load_state_dict(given["state"])
            run.write(stream)

    def _by_ranks(self, run: _Run, record: str, state: Mapping[str, Any], workers: int) -> None:
        """Have ranks predict what `state` names, and count what they did, also where one fails."""
        spec, model = run.spec, run.model
        given = {
            "uuid": model.uuid,
            "into": run.result.into,
            "batch_size": spec.batch_size,
            "state": dict(state),
            "select": spec.query.to_document(),
            **dataclasses.asdict(spec.key),
        }
        call = self._log.share(record, bson.encode(given))
        try:
            device = pick_device(model.preferred_devices).type
            self._ranks.call(RANK_MAIN, {"record": record, "call": call}, workers=workers, device=device)
        finally:
            run.result = run.result._plus(**self._log.taken(record, call))

    def _add(self, record: str, counts: Mapping[str, int], why: str) -> None:  # noqa: ARG002 - of ranks
        self._log.add(record, counts["written"])

    def _fail(self, record: str, result: Predicted, error: BaseException) -> None:
        """Record that not all documents were predicted, and let the error say so."""
        error.add_note(
            f"{result.written:,} document(s) of collection {result.collection!r} were predicted before that, and "
            f"have it in {result.into!r}; the same call goes on with the others"
        )
        with contextlib.suppress(MongotorchError):  # the first error is the one to raise
            self._log.end(record, "failed", f"{type(error).__name__}: {error}")

    def _model(
        self, type_id: str, identifier: str, version: int | None, alias: str | None
    ) -> tuple[TorchModel, str | None]:
        """The model, and the alias by which it was found."""
        if type_id != TorchModel.type_id:
            raise ParameterError(f"a {type_id} does not predict; give the name of a model", field="type_id")
        document = self._find(type_id, identifier, version, alias=alias)
        move = self._head(type_id, identifier) if version is None and alias is None else None
        is_live = move is not None and move.to_uuid == document["_id"]
        if version is None and alias is None and not is_live and not is_trained(document):
            raise NotFoundError(
                f"no version of model {identifier!r} was trained, and none is live; train it, promote a version, "
                f"or name one: version={document['version']}"
            )
        model = self._load(document)
        if not isinstance(model, TorchModel):
            raise ParameterError(f"{identifier!r} is no torch model", field="identifier")
        return model, alias or (LIVE if is_live else None)

    def _spec(
        self, trainer: TorchTrainer | None, key: Key, query: Query, batch_size: int, *, decides: bool = True
    ) -> StreamSpec:
        """How documents are read: the values of a field become what they were in training.

        Args:
            trainer: Of the model.
            key: The fields of an input.
            query: The documents.
            batch_size: Documents of a batch.
            decides: Whether dtypes are decided here; else a state that is loaded says them.
        """
        database, settings = self._connection.database, self._settings
        dtypes, defaults = ({}, {}) if trainer is None else (trainer.dtypes or {}, trainer.defaults or {})
        spec = StreamSpec(
            query=query,
            key=key,
            batch_size=batch_size,
            collate_fn=list,
            shard_by="ranges" if query.is_whole else "rows",
            prefetch_size=batch_size * max(_RANGE_ROWS // batch_size, 1) if batch_size > 0 else 1,
            data_prefetch=not is_mock(database),  # whose documents must not change while another thread reads
            prefetch_factor=_PREFETCH_FACTOR,
            prefetch_bytes=settings.prefetch_bytes,
            read_deadline_s=settings.read_deadline_s,
            dtypes={path: dtype for path, dtype in dtypes.items() if path in key.paths},
            defaults={path: value for path, value in defaults.items() if path in key.paths},
            on_bad_document="raise" if trainer is None else trainer.on_bad_document,
        )
        if not decides or trainer is None or not set(key.paths) <= set(Key.parse(trainer.key).paths):
            return spec
        run_dtypes = RunDtypes()
        with contextlib.suppress(EmptySelectError):  # then the documents that are predicted decide
            check_select(database, trainer.select, folds=())
            trained = dataclasses.replace(spec, query=trainer.select)
            run_dtypes.bind(trained.open_access(self._connection.opener, database))
        return dataclasses.replace(spec, run_dtypes=run_dtypes)


@final
class _Run:
    """Predicts and writes batch after batch in this process, and counts.

    Args:
        database: The driver's database.
        model: The version that predicts.
        spec: Which documents, and how they are read.
        into: The field of the predictions.
        record: Records how many documents more were written, are gone or were left out, and why.

    Attributes:
        result: The counts.
    """

    def __init__(
        self,
        database: Any,
        model: TorchModel,
        spec: StreamSpec,
        into: str,
        *,
        record: Callable[[Mapping[str, int], str], None],
    ) -> None:
        self._database, self.model, self.spec, self._record = database, model, spec, record
        self.result = Predicted(
            identifier=model.identifier,
            version=model.version,
            uuid=model.uuid,
            collection=spec.query.collection,
            into=into,
        )
        self._recorded, self._recorded_s = self.result, time.monotonic()

    def write(self, stream: Stream) -> None:
        """Predict and write all documents of a stream."""
        try:
            for ids, samples in stream.samples():
                self._write_batch(ids, samples)
                if time.monotonic() - self._recorded_s >= _RECORD_S:
                    self._record_now()
            report = stream.report
            self.result = self.result._plus(written=0, gone=0, skipped=report.skipped, why=report.why)
        except BaseException:
            with contextlib.suppress(MongotorchError):  # the first error is the one to raise
                self._record_now()
            raise
        self._record_now()

    def _write_batch(self, all_ids: list[Any], samples: list[Any]) -> None:
        model, result = self.model, self.result
        predicted = _predicted_each if self.spec.on_bad_document == "skip" else _predicted
        ids, outputs, why = predicted(model, all_ids, samples)
        by = {"model": model.identifier, "version": model.version, "uuid": model.uuid}
        values = [{"value": output, **by} for output in outputs]
        found, refused = (
            write_field(self._database, result.collection, result.into, ids, values) if ids else (0, None)
        )
        gone = len(ids) - found if refused is None else 0
        self.result = result._plus(written=found, gone=gone, skipped=len(all_ids) - len(ids), why=why)
        if refused is not None:
            raise refused

    def _record_now(self) -> None:
        now, before = self.result, self._recorded
        self._record({name: getattr(now, name) - getattr(before, name) for name in _COUNTS}, now.why)
        self._recorded, self._recorded_s = now, time.monotonic()


Outputs = tuple[list[Any], list[Any], str]  # `_id`s, as many predictions, and why others are left out


def _predicted(model: TorchModel, ids: list[Any], samples: list[Any]) -> Outputs:
    """The predictions for a batch. Raises: DataError, which names the document; the cause is what was raised."""
    try:
        return ids, model.predict_batches(samples, batch_size=len(samples)), ""
    except Exception as error:
        document_id, where = ids[0], f"the {len(ids)} documents from {ids[0]!r} to {ids[-1]!r} together"
        for one, sample in zip(ids, samples, strict=True):
            try:
                model.predict(sample)
            except Exception:  # noqa: BLE001 - the code of the model, once more
                document_id, where = one, f"document {one!r}"
                break
        kind = type(error) if isinstance(error, DataError) else DataError
        why = error.message if isinstance(error, MongotorchError) else f"{type(error).__name__}: {error}"
        raise kind(
            f"model {model.identifier!r} version {model.version} cannot predict {where}: {why}",
            document_id=document_id,
        ) from error


def _predicted_each(model: TorchModel, ids: list[Any], samples: list[Any]) -> Outputs:
    """The same without the documents that cannot be predicted; then each goes through the model alone."""
    try:
        return _predicted(model, ids, samples)
    except DataError as error:
        if len(ids) == 1:
            return [], [], error.message
    found = [_predicted_each(model, [one], [sample]) for one, sample in zip(ids, samples, strict=True)]
    return (
        [one for kept, _, _ in found for one in kept],
        [output for _, outputs, _ in found for output in outputs],
        next((why for _, _, why in found if why), ""),
    )


def _check_workers(workers: Any, select: Query) -> None:
    """Refuse a number that is none, and a query that cannot be read in parts."""
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= _MOST_WORKERS:
        raise ParameterError(
            f"workers={workers!r:.100}: it must be a whole number from 1 to {_MOST_WORKERS}", field="workers"
        )
    if workers > 1 and not select.is_whole:
        raise UnsupportedError(
            f"workers={workers}: a query with a skip, a limit or a pipeline is read as a whole, by one worker; "
            "use find() with a filter, or leave out workers",
            setting="workers",
        )


def _check_select(select: Any, into: Any) -> None:
    """Refuse a query whose documents cannot be updated, and a field that cannot be set."""
    if not isinstance(select, Query):
        raise ParameterError(
            f'select={select!r:.100}: it must be a query, such as db["digits"].find()', field="select"
        )
    if select.collection.startswith(("mt.", "system.")):
        raise ParameterError(f"{select.collection!r} is not a collection of yours", field="select")
    parts = into.split(".") if isinstance(into, str) else [""]
    if (
        "\0" in str(into)
        or any(not part or part.startswith("$") for part in parts)
        or parts[0] in ("_id", "_fold")
    ):
        raise ParameterError(f"into={into!r:.100}: it must be the name of a field of your own", field="into")
    names = set(_names([select.where, select.stages]))
    if not select.keeps_ids or "$unwind" in names:
        raise QueryError(
            "predictions are written into the documents that the query gives, and this pipeline gives other ones, "
            "or one of them several times; leave out $unwind, $group and what changes `_id`",
            field="select",
        )
    asked = {*names, *(name for name, _ in select.ordering)}
    if not select.is_whole and any(_overlaps(into, name) for name in asked):
        raise QueryError(
            f"this query has a skip, a limit or a pipeline and asks for {into!r}, which changes while it is read; "
            "use find() without a limit: what this version has predicted already is left out anyway",
            field="select",
        )


def _names(value: Any) -> Iterator[str]:
    """The operators and fields in filters and pipelines, at any depth; more text may be among them."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield name
            yield from _names(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _names(part)
    elif isinstance(value, str) and value.startswith("$"):
        yield value.lstrip("$").removeprefix("ROOT.").removeprefix("CURRENT.")


def _overlaps(one: str, other: str) -> bool:
    """Whether one of two paths is inside the other, or they are the same."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_overlap(into: str, key: Key, trainer: TorchTrainer | None, select: Query) -> None:
    """Refuse to write into what is read. Raises: ParameterError."""
    fields = list(key.paths)
    splits = [select.split]
    if trainer is not None:
        fields += weighted_key(trainer.key, trainer.sample_weight).paths
        splits.append(trainer.fold("train").split)
    for path in [*fields, *(path for split in splits if split is not None for path in split.fields)]:
        if _overlaps(into, path):
            raise ParameterError(
                f"into={into!r} would change the field {path!r}, which is read for it; name another one",
                field="into",
            )


def _key(model: TorchModel, trainer: TorchTrainer | None) -> Key:
    """The fields that a model was trained to read. Raises: ParameterError where that is not known."""
    example = 'key="x", key=("a", "b"), or key={"field": "argument"}'
    if trainer is None:
        raise ParameterError(
            f"model {model.identifier!r} has no trainer that says which fields it reads; name them: {example}",
            field="key",
        )
    functions = {name: getattr(trainer, name) for name in ("transform", "valid_transform", "collate_fn")}
    changed = next((name for name, function in functions.items() if function is not None), None)
    if changed is not None and model.preprocess is None:
        raise ParameterError(
            f"model {model.identifier!r} was trained on what {changed} makes of a sample and its target, and has "
            f"no preprocess that makes an input of a document; give it one, or name fields that it takes as they "
            f"are: {example}",
            field="key",
        )
    found = trainer.mapping.input_key(model)
    if found is None:
        raise ParameterError(
            f"the key {trainer.key!r} of the trainer does not say which fields are inputs of model "
            f"{model.identifier!r} (signature {trainer.signature!r}); name them: {example}",
            field="key",
        )
    return found


def _without_done(select: Query, into: str, uuid: str | None) -> Query:
    """The query without what a version has predicted; one with a skip, limit or pipeline stays as it is."""
    if not select.is_whole:
        return select
    select = dataclasses.replace(select, ordering=())  # in the order of `_id`s it is read in ranges
    return select if uuid is None else select.filter({f"{into}.uuid": {"$ne": uuid}})
