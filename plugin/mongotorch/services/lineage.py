"""How two versions differ: parameters, data, measurements, environment; and whose training set held what.

Always: it is told from documents and membership blobs; nothing is unpickled. What is not known is said, and never
taken for no difference.

Trains a stored version again, from what it was trained from, and compares bits.

Always: nothing is published; data that has changed since is found before anything is trained, and said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, final

from mongotorch.codecs import renamed
from mongotorch.data import Difference, Members
from mongotorch.errors import DataError, NotFoundError, ParameterError
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.services.training.job_runner import environment
from mongotorch.services.training.recipe import (
    DataProvenance,
    TrainingRecipe,
    follow_quietly,
    members_of_facts,
    summary,
)
from mongotorch.services.versions.catalog import Loader
from mongotorch.settings import Settings
from mongotorch.store import BlobStore, Components
from mongotorch.train import TorchModel, TorchTrainer, differences, warm_start

CHANGED: Final = "changed"
_RUN = frozenset({"metric_values", "trainer", "model", "artifacts"})  # told otherwise, or by the other document
_MISSING: Final = object()
Change = tuple[Any, Any]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """How a later version differs from an earlier one; printing it shows all of it.

    Attributes:
        versions: Both, in words.
        parameters: By name (`trainer.seed`): the old and the new value; `"changed"` where it is no plain value.
        metrics: By name: what was measured of the published weights, old and new; None where it was not.
        documents: How many training documents; None where that is not known.
        data: Training documents added, removed and changed; None where that is not known.
        data_unknown: Why it is not known; empty where it is.
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
            "parameters": {name: _pair(change) for name, change in self.parameters.items()},
            "metrics": {name: _pair(change) for name, change in self.metrics.items()},
            "documents": _pair(self.documents),
            "data": dataclasses.asdict(self.data) if self.data is not None else None,
            "data_unknown": self.data_unknown,
            "environment": {name: _pair(change) for name, change in self.environment.items()},
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
        certain: False: its training set was not kept document by document, so it may have held this one.
    """

    type_id: str
    identifier: str
    version: int
    uuid: str
    certain: bool = True


@final
class Comparer:
    """Compares versions of one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
    """

    def __init__(self, components: Components, artifacts: BlobStore) -> None:
        self._components, self._artifacts = components, artifacts

    def diff(self, old: str, new: str) -> Diff:
        """How the version of one uuid differs from that of another. Raises: NotFoundError, IntegrityError."""
        before, after = self._components.get(old), self._components.get(new)
        parameters: dict[str, Change | str] = {}
        for ours, theirs in zip(self._both(before), self._both(after), strict=True):
            parameters |= _parameters(ours, theirs)
        facts = tuple(document.get("data") for document in (before, after))
        data, unknown = self._data(*facts)
        counts = [(said or {}).get("train", {}).get("count") for said in facts]
        return Diff(
            versions=(_name(before), _name(after)),
            parameters=parameters,
            metrics=_changes(before.get("metrics", {}), after.get("metrics", {})),
            documents=(counts[0], counts[1]),
            data=data,
            data_unknown=unknown,
            environment=_changes(before.get("environment", {}), after.get("environment", {})),
        )

    def trained_on(self, document_id: Any, collection: str | None = None) -> list[TrainedOn]:
        """The versions whose training set held the document of an `_id`, newest first.

        Raises:
            DataError: BSON cannot hold such an `_id`.
            IntegrityError: A blob is not what was stored.
        """
        held: dict[str | None, bool] = {}  # many versions share one set
        found = []
        for document in self._components.trained(collection):
            name = document["data"].get("members")
            if name is not None and name not in held:
                held[name] = Members.from_bytes(self._artifacts.get(name)).holds(document_id)
            if name is None or held[name]:
                said = {key: document[key] for key in ("type_id", "identifier", "version")}
                found.append(TrainedOn(**said, uuid=document["_id"], certain=name is not None))
        return found

    def _both(self, document: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """The documents of the trainer and of the model that a document is of."""
        other = document["fields"].get("trainer") or document["fields"].get("model")
        partner = None
        if isinstance(other, Mapping) and "_ref" in other:
            partner = self._components.peek(other["_ref"])
            if partner is None:
                raise NotFoundError(f"{_name(document)} refers to {other['_ref']}, which is gone")
        pair = {one["type_id"]: one for one in (document, partner) if one is not None}
        return pair.get("trainer"), pair.get("model", document if "trainer" not in pair else None)

    def _data(self, before: Any, after: Any) -> tuple[Difference | None, str]:
        digests = [(said or {}).get("train", {}).get("digest") for said in (before, after)]
        if digests[0] is not None and digests[0] == digests[1]:
            return Difference(added=0, removed=0, changed=0), ""
        sets = []
        for which, said in (("earlier", before), ("later", after)):
            try:
                sets.append(members_of_facts(said, self._artifacts.get))
            except DataError as error:
                return None, f"of the {which} version: {error}"
        return sets[0].difference(sets[1]), ""


def _parameters(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Change | str]:
    """The fields that differ between two documents of one kind."""
    kind = (before or after or {}).get("type_id")
    fields = [(document or {}).get("fields", {}) for document in (before, after)]
    found: dict[str, Change | str] = {}
    for name in sorted({*fields[0], *fields[1]} - _RUN):
        records = [renamed(part.get(name, _MISSING)) for part in fields]
        if records[0] is not records[1] and records[0] != records[1]:
            shown = [_shown(record) for record in records]
            found[f"{kind}.{name}"] = CHANGED if CHANGED in shown else (shown[0], shown[1])
    return found


def _shown(record: Any) -> Any:
    """A stored value for people to read; CHANGED where it is in blobs."""
    if record is _MISSING:
        return None
    if isinstance(record, list):
        parts = [_shown(part) for part in record]
        return CHANGED if CHANGED in parts else parts
    if not isinstance(record, Mapping):
        return record
    codec = record.get("_codec")
    if codec == "name":
        return record["name"]
    if codec == "int":
        return int(record["value"])
    if codec == "tuple":
        return _shown(record["items"])
    if codec in (None, "query", "value"):
        shown = {key: _shown(part) for key, part in record.items() if key != "_codec"}
        return CHANGED if CHANGED in shown.values() else shown
    return CHANGED


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Change]:
    both = {name: (before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])}
    return {name: (old, new) for name, (old, new) in both.items() if old != new}


def _name(document: Mapping[str, Any]) -> str:
    return f"{document['type_id']} {document['identifier']!r} version {document['version']}"


def _pair(change: Change | str) -> Any:
    return change if isinstance(change, str) else {"old": change[0], "new": change[1]}


def _words(change: Change | str) -> str:
    return change if isinstance(change, str) else f"{change[0]!r} -> {change[1]!r}"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What came of training a version again.

    Attributes:
        same: Whether all weights and buffers came out the same, bit for bit.
        trained: Whether it was trained; False: its data has changed.
        changed: What is not as it was, each in words: data, environment, weights.
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


@final
class Reproducer:
    """Trains versions of one database again, in this process.

    Args:
        connection: The database.
        settings: Of the datalayer.
        components: The component documents.
        artifacts: The blobs.
        loader: Loads what a version was trained from.
        facts: Says what there is now.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        components: Components,
        artifacts: BlobStore,
        loader: Loader,
        facts: DataProvenance,
    ) -> None:
        self._connection, self._settings = connection, settings
        self._components, self._artifacts = components, artifacts
        self._loader, self._facts = loader, facts

    def reproduce(self, uuid: str, *, anyway: bool = False) -> Reproduction:
        """Train a version again and compare.

        Args:
            uuid: A model's that a run has published.
            anyway: Train although its data has changed.

        Raises:
            NotFoundError: There is no such version, or what it was trained from is gone.
            ParameterError: No run has published it.
            MongotorchError: What the run raises.
        """
        document = self._components.get(uuid)
        course = self._course(document)
        data = self._data(document, course)
        changed = [*data, *_environment(document)]
        if data and not anyway:
            return Reproduction(same=False, trained=False, changed=changed)
        stored = self._loader.by_uuid(uuid)
        assert isinstance(stored, TorchModel)  # noqa: S101 - for the type checker; `_course` saw it
        follow_quietly(course, self._connection, self._settings)
        weights = list(differences(stored.object, course.model.object))
        changed += [f"weight {name!r} came out otherwise" for name in weights]
        return Reproduction(same=not weights, trained=True, changed=changed)

    def _course(self, document: Mapping[str, Any]) -> TrainingRecipe:
        """The very course that a version came from."""
        if document["type_id"] != TorchModel.type_id or "job" not in document or "data" not in document:
            raise ParameterError(
                f"{document['type_id']} {document['identifier']!r} version {document['version']} is no model that "
                "a run has published; give the uuid of one",
                field="uuid",
            )
        published = self._components.get(document["fields"]["trainer"]["_ref"])
        try:
            trainer = self._loader.by_uuid(published["parent"])
            model = self._loader.by_uuid(document["parent"])
            start = document.get("start")
            live = None if start is None else self._loader.by_uuid(start["model"])
        except NotFoundError as error:
            raise NotFoundError(f"what the version was trained from is gone: {error}") from error
        assert isinstance(trainer, TorchTrainer)  # noqa: S101 - for the type checker
        assert isinstance(model, TorchModel)  # noqa: S101
        if isinstance(live, TorchModel):
            trainer = warm_start(trainer, model, live)
        query = Query.from_document(document["data"]["query"])
        return TrainingRecipe(trainer=trainer, model=model, train_query=query)

    def _data(self, document: Mapping[str, Any], course: TrainingRecipe) -> list[str]:
        """What has changed in the data."""
        said, changed = document["data"], []
        for fold, query in (("train", course.training), ("valid", course.validation)):
            if said.get(fold) is None or query is None:
                continue  # it was not looked at then
            now = self._facts.scan(query, course)
            if summary(now) == said[fold]:
                continue
            how = f"{said[fold]['count']} documents then, {now.count} now"
            if fold == "train":
                try:
                    found = members_of_facts(said, self._artifacts.get).difference(now)
                    how = f"{found.added} added, {found.removed} removed, {found.changed} changed"
                except DataError as error:
                    how += f"; {error}"
            changed.append(f"data of fold {fold!r}: {how}")
        return changed


def _environment(document: Mapping[str, Any]) -> list[str]:
    then, now = document.get("environment", {}), environment()
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [f"environment: {name} {then.get(name)} then, {now.get(name)} now" for name in names]
