"""Trains a stored version again, from what it was trained from, and compares bits.

Always: nothing is published; data that has changed since is found before anything is trained, and said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

from mongotorch.errors import DataError, NotFoundError, ParameterError
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.store import Artifacts, Components, Connection
from mongotorch.train import TorchModel, TorchTrainer, differing, warmed
from mongotorch.wiring.course import Course, follow_quietly
from mongotorch.wiring.lineage import Facts, members_of_facts, summary
from mongotorch.wiring.load import Loader
from mongotorch.wiring.performing import environment


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
        artifacts: Artifacts,
        loader: Loader,
        facts: Facts,
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
        weights = list(differing(stored.object, course.model.object))
        changed += [f"weight {name!r} came out otherwise" for name in weights]
        return Reproduction(same=not weights, trained=True, changed=changed)

    def _course(self, document: Mapping[str, Any]) -> Course:
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
            trainer = warmed(trainer, model, live)
        query = Query.from_document(document["data"]["query"])
        return Course(trainer=trainer, model=model, train_query=query)

    def _data(self, document: Mapping[str, Any], course: Course) -> list[str]:
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
