"""Which documents are new to a model: those that no stored version of it was trained on.

Always: a document counts as known only through a version that was published, so that a run which fails leaves it
new; late documents with old `_id`s are new as others are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, final

import numpy as np

from mongotorch.data import Members, unseen
from mongotorch.store import Artifacts, Components
from mongotorch.train import TorchModel, TorchTrainer

MOST: Final = 100_000
"""More new documents are not named one by one in a query: the run then takes all of the select."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
    """What is new.

    Attributes:
        ids: The `_id`s; None: all documents of the select are taken; empty: nothing is new.
        why: Why all are taken; else how many are new.
    """

    ids: list[Any] | None
    why: str


@final
class News:
    """Finds new documents.

    Args:
        database: The driver's database.
        components: The component documents.
        artifacts: The blobs.
    """

    def __init__(self, database: Any, components: Components, artifacts: Artifacts) -> None:
        self._database, self._components, self._artifacts = database, components, artifacts

    def of(self, trainer: TorchTrainer, model: TorchModel) -> New:
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
                return New(ids=None, why=f"version {number} does not say which documents it was trained on")
            seen.append(Members.from_bytes(self._artifacts.get(data["members"])).ids)
        if not seen:
            return New(ids=None, why="no version was trained yet")
        ids = unseen(self._database, trainer.select.fold("train"), np.unique(np.concatenate(seen)), limit=MOST + 1)
        if len(ids) > MOST:
            return New(ids=None, why=f"more than {MOST:,} documents are new")
        return New(ids=ids, why=f"{len(ids):,} new documents")
