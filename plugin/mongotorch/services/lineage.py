"""Where versions come from: how two of them differ, which were trained on a document, and whether one reproduces.

Guarantees: nothing is published. Comparing unpickles nothing: it reads documents and membership blobs. What is
unknown is reported as unknown. Data that has changed is reported before anything is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from mongotorch.codecs import Opaque, describe, referenced, renamed
from mongotorch.data import Delta, Difference, Members, StoredMembers, id_key
from mongotorch.errors import DataError, NotFoundError, ParameterError
from mongotorch.jobs import environment
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.services.training.recipe import DataProvenance, TrainingRecipe, data_provenance, opened_fit
from mongotorch.services.versions.catalog import Catalog
from mongotorch.settings import Settings
from mongotorch.tensors import differences
from mongotorch.train import TorchModel, TorchTrainer, warm_start

CHANGED: Final = "changed"
_SHOWN_ELSEWHERE: Final = frozenset({"metric_values", "trainer", "model", "artifacts"})
_MISSING: Final = object()
_SETS_AT_ONCE: Final = 500  # that are asked about one document by one thread
Change = tuple[Any, Any]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """How a later version differs from an earlier one; `print` shows all of it.

    Attributes:
        versions: The titles of both.
        parameters: By name (`trainer.seed`): the old and the new value; `"changed"` if it is not a plain value.
        metrics: By name: the measurements of the published weights, old and new; None if not measured.
        documents: The number of training documents; None if unknown.
        data: Training documents added, removed and changed; None if unknown.
        data_unknown: Why `data` is unknown; empty if it is known.
        environment: By name: the old and the new version or platform.
    """

    versions: tuple[str, str]
    parameters: Mapping[str, Change | str]
    metrics: Mapping[str, Change]
    documents: Change
    data: Difference | None
    data_unknown: str
    environment: Mapping[str, Change]

    def to_document(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "versions": list(self.versions),
            "parameters": {name: _plain(change) for name, change in self.parameters.items()},
            "metrics": {name: _plain(change) for name, change in self.metrics.items()},
            "documents": _plain(self.documents),
            "data": dataclasses.asdict(self.data) if self.data is not None else None,
            "data_unknown": self.data_unknown,
            "environment": {name: _plain(change) for name, change in self.environment.items()},
        }

    def __str__(self) -> str:
        counted = " -> ".join("?" if count is None else str(count) for count in self.documents)
        data = self.data_unknown
        if self.data is not None:
            data = f"{self.data.added} added, {self.data.removed} removed, {self.data.changed} changed"
        lines = [" -> ".join(self.versions), f"training documents: {counted} ({data})"]
        for title in ("parameters", "metrics", "environment"):
            changes: Mapping[str, Change | str] = getattr(self, title)
            lines.append(f"{title}:" + ("" if changes else " the same"))
            lines += [f"  {name}: {_words(change)}" for name, change in changes.items()]
        return "\n".join(lines)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """A version that was trained on a document.

    Attributes:
        type_id: `model`.
        identifier: Its name.
        version: Its version.
        uuid: Its identity.
        certain: False if its training set was not recorded by document, or its query gives other documents each
            time (`$sample`) or results with an `_id` of their own: it may contain this one.
    """

    type_id: str
    identifier: str
    version: int
    uuid: str
    certain: bool = True


def diff(catalog: Catalog, old: str, new: str) -> Diff:
    """How the version of one uuid differs from that of another. Raises: NotFoundError, IntegrityError."""
    before, after = catalog.components.get(old), catalog.components.get(new)
    parameters: dict[str, Change | str] = {}
    for first, second in zip(_pair(catalog, before), _pair(catalog, after), strict=True):
        parameters |= _changed_parameters(first, second)
    records = (before.get("data"), after.get("data"))
    difference, unknown = _data_difference(catalog, *records)
    counts = [(record or {}).get("train", {}).get("count") for record in records]
    return Diff(
        versions=(_title(before), _title(after)),
        parameters=parameters,
        metrics=_changes(before.get("metrics", {}), after.get("metrics", {})),
        documents=(counts[0], counts[1]),
        data=difference,
        data_unknown=unknown,
        environment=_changes(before.get("environment", {}), after.get("environment", {})),
    )


def trained_on(catalog: Catalog, document_id: Any, collection: str | None = None) -> list[TrainedOn]:
    """The versions whose training set contained the document of an `_id`, newest first.

    Args:
        catalog: The versions.
        document_id: The `_id`.
        collection: The collection of the document; None is any.

    Raises:
        DataError: BSON cannot hold such an `_id`.
        IntegrityError: A blob is not what was stored.
    """
    key = id_key(document_id)
    documents = [one for one in catalog.components.trained(collection) if _may_be_of(catalog, one, collection)]
    records = [document.get("data") or {} for document in documents]
    contained = _holding(catalog, {name for record in records if (name := record.get("members")) is not None}, key)
    found = []
    for document, record in zip(documents, records, strict=True):
        name, certain = record.get("members"), record.get("certain", True)
        if name is None or not certain or contained[name]:
            version = {key: document[key] for key in ("type_id", "identifier", "version")}
            found.append(TrainedOn(**version, uuid=document["_id"], certain=certain and name is not None))
    return found


def _holding(catalog: Catalog, names: Iterable[str], key: int) -> dict[str, bool]:
    """Whether each of these stored sets holds the document of an `_id`'s hash."""
    answers: dict[str, tuple[bool | None, str | None]] = {}

    def answered(names: Sequence[str]) -> dict[str, tuple[bool | None, str | None]]:
        return {name: Delta.look_up(blob, key) for name, blob in catalog.blobs.get_many(names)}

    missing = set(names)
    while missing:
        ordered = sorted(missing)  # the server reads the next ones while these are looked at
        parts = [ordered[at : at + _SETS_AT_ONCE] for at in range(0, len(ordered), _SETS_AT_ONCE)]
        with ThreadPoolExecutor(2, thread_name_prefix="mongotorch-lineage") as pool:
            for found in pool.map(answered, parts):
                answers |= found
        missing = {before for answer, before in answers.values() if answer is None and before is not None}
        missing -= answers.keys()

    def holds(name: str) -> bool:
        answer, before = answers[name]
        while answer is None and before is not None:
            answer, before = answers[before]
        return bool(answer)

    return {name: holds(name) for name in answers}


def _may_be_of(catalog: Catalog, document: Mapping[str, Any], collection: str | None) -> bool:
    """Whether a version may have been trained on documents of a collection: 0.1.0 recorded no query of its own."""
    if collection is None or document.get("data") is not None:
        return True
    trainer = catalog.components.peek(str(referenced(document["fields"].get("trainer"))))
    select = {} if trainer is None else trainer["fields"].get("select") or {}
    return bool(select.get("collection", collection) == collection)


def _pair(catalog: Catalog, document: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Any]:
    """The documents of the trainer and of the model, of which one is given."""
    other = referenced(document["fields"].get("trainer") or document["fields"].get("model"))
    partner = None if other is None else catalog.components.peek(other)
    if other is not None and partner is None:
        raise NotFoundError(f"{_title(document)} refers to {other}, which is gone")
    pair = {one["type_id"]: one for one in (document, partner) if one is not None}
    return pair.get("trainer"), pair.get("model", document if "trainer" not in pair else None)


def _data_difference(catalog: Catalog, before: Any, after: Any) -> tuple[Difference | None, str]:
    """How the training documents differ; None and why that is unknown."""
    digests = [(record or {}).get("train", {}).get("digest") for record in (before, after)]
    if digests[0] is not None and digests[0] == digests[1]:
        return Difference(added=0, removed=0, changed=0), ""
    sets = []
    for which, record in (("earlier", before), ("later", after)):
        try:
            sets.append(_members(catalog, record))
        except DataError as error:
            return None, f"of the {which} version: {error}"
    return sets[0].difference(sets[1]), ""


def _members(catalog: Catalog, record: Mapping[str, Any] | None) -> Members:
    """The training documents that a version's record of its data names.

    Raises:
        DataError: They were not recorded one by one; the message says why.
        IntegrityError: The blob is not what was stored.
    """
    if record is None:
        raise DataError("it was stored as it was given, not trained in this database")
    if record.get("members") is not None:
        return StoredMembers.read(record["members"], catalog.blobs.get_many).members
    if "train" not in record:
        raise DataError("it was trained without lineage (the setting `lineage` was off)")
    if not record.get("certain", True):
        raise DataError("its query gives other documents each time")
    raise DataError(f"its {record['train']['count']} documents are too many to be kept one by one")


def _changed_parameters(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> dict[str, Change | str]:
    """The fields that differ between two documents of one kind."""
    kind = (before or after or {}).get("type_id")
    fields = [(document or {}).get("fields", {}) for document in (before, after)]
    found: dict[str, Change | str] = {}
    for name in sorted({*fields[0], *fields[1]} - _SHOWN_ELSEWHERE):
        records = [renamed(record.get(name, _MISSING)) for record in fields]
        if records[0] is not records[1] and records[0] != records[1]:
            shown = [None if record is _MISSING else _shown(describe(record)) for record in records]
            found[f"{kind}.{name}"] = CHANGED if CHANGED in shown else (shown[0], shown[1])
    return found


def _shown(value: Any) -> Any:
    """A described value with lists for tuples; CHANGED if any part of it is kept in blobs."""
    if isinstance(value, Opaque):
        return CHANGED
    if isinstance(value, list | tuple):
        parts = [_shown(part) for part in value]
        return CHANGED if CHANGED in parts else parts
    if isinstance(value, Mapping):
        fields = {key: _shown(part) for key, part in value.items()}
        return CHANGED if CHANGED in fields.values() else fields
    return value


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Change]:
    both = {name: (before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])}
    return {name: (old, new) for name, (old, new) in both.items() if old != new}


def _title(document: Mapping[str, Any]) -> str:
    return f"{document['type_id']} {document['identifier']!r} version {document['version']}"


def _plain(change: Change | str) -> Any:
    return change if isinstance(change, str) else {"old": change[0], "new": change[1]}


def _words(change: Change | str) -> str:
    return change if isinstance(change, str) else f"{change[0]!r} -> {change[1]!r}"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The result of training a version again.

    Attributes:
        same: Whether all weights and buffers are the same, bit for bit.
        trained: Whether it was trained; False: its data has changed.
        changed: What differs from the first run, each in words: data, environment, weights.
    """

    same: bool
    trained: bool
    changed: list[str]

    def __str__(self) -> str:
        result = "the same bits" if self.same else "other weights" if self.trained else "not trained again"
        return "\n".join([result, *(f"  {line}" for line in self.changed)])

    def to_document(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self)


def reproduce(
    catalog: Catalog, connection: Connection, settings: Settings, uuid: str, *, anyway: bool = False
) -> Reproduction:
    """Train a version again in this process, and compare the weights.

    Args:
        catalog: The versions.
        connection: The database.
        settings: The datalayer's.
        uuid: The uuid of a model that a run has published.
        anyway: Train although its data has changed.

    Raises:
        NotFoundError: There is no such version, or what it was trained from is gone.
        ParameterError: No run has published it.
        MongotorchError: The run failed.
    """
    document = catalog.components.get(uuid)
    recipe = _recipe(catalog, document)
    now = data_provenance(recipe, connection, settings.model_copy(update={"lineage": True}))
    data = _changed_data(catalog, document["data"], now)
    changed = [*data, *_changed_environment(document)]
    if data and not anyway:
        return Reproduction(same=False, trained=False, changed=changed)
    stored = catalog.load_model(uuid)
    with opened_fit(recipe, connection, settings, data=now) as fit:
        for event in fit.run():
            if document.get("stopped") and event.step >= document["steps"]:
                fit.stop()
    fit.trained()  # puts the best weights into the model
    weights = list(differences(stored.object, recipe.model.object))
    changed += [f"weight {name!r} came out otherwise" for name in weights]
    return Reproduction(same=not weights, trained=True, changed=changed)


def _recipe(catalog: Catalog, document: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe that a version was trained by."""
    if document["type_id"] != TorchModel.type_id or "job" not in document or "data" not in document:
        raise ParameterError(
            f"{_title(document)} is no model that a run has published; give the uuid of one", field="uuid"
        )
    published = catalog.components.get(str(referenced(document["fields"]["trainer"])))
    try:
        trainer = catalog.load_uuid(published["parent"])
        model = catalog.load_model(document["parent"])
        start = document.get("start")
        live = None if start is None else catalog.load_model(start["model"])
    except NotFoundError as error:
        raise NotFoundError(f"what the version was trained from is gone: {error}") from error
    assert isinstance(trainer, TorchTrainer)  # noqa: S101 - for the type checker
    if live is not None:
        trainer = warm_start(trainer, model, live)
    record = document["data"]
    query, only = Query.from_document(record["query"]), None
    if record.get("of_query") == "members":
        only = _members(catalog, record).ids
    return TrainingRecipe(trainer=trainer, model=model, train_query=query, only=only)


def _changed_data(catalog: Catalog, record: Mapping[str, Any], now: DataProvenance) -> list[str]:
    """How the documents differ from a version's record of its data, in words."""
    changed = []
    for fold in ("train", "valid"):
        summary = now.record[fold]
        if record.get(fold) is None or summary is None or (summary == record[fold] and "digest" in summary):
            continue  # it was not recorded then, or is the same
        how = f"{record[fold]['count']} documents then, {summary['count']} now"
        if fold == "train":
            try:
                members = _members(catalog, record)
                if fold in now.members:
                    found = members.difference(now.members[fold])
                    how = f"{found.added} added, {found.removed} removed, {found.changed} changed"
            except DataError as error:
                how += f"; {error}"
        changed.append(f"data of fold {fold!r}: {how}")
    return changed


def _changed_environment(document: Mapping[str, Any]) -> list[str]:
    then, now = document.get("environment", {}), environment()
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [f"environment: {name} {then.get(name)} then, {now.get(name)} now" for name in names]
