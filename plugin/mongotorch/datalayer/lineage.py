"""Where versions come from: how two differ, which ones a document went into, whether one comes out again.

Always: nothing here changes what is stored.
"""

from __future__ import annotations

from typing import Any

from mongotorch.datalayer.base import Opened
from mongotorch.wiring.comparing import Diff, TrainedOn
from mongotorch.wiring.reproducing import Reproduction


class Lineage(Opened):
    """The part of a datalayer that knows where versions come from."""

    def diff(self, uuid1: str, uuid2: str) -> Diff:
        """How the version `uuid2` differs from `uuid1`: parameters, measurements, data, environment.

        Raises:
            NotFoundError: There is no such version.
            IntegrityError: A blob is not what was stored.
        """
        return self._parts.comparer.diff(uuid1, uuid2)

    def trained_on(self, document_id: Any, collection: str | None = None) -> list[TrainedOn]:
        """The versions whose training set held a document, the newest first.

        Args:
            document_id: Its `_id`.
            collection: Where it is; None asks of every collection.

        Returns:
            The versions; one whose training set was not kept document by document is there, but not `certain`.

        Raises:
            DataError: BSON cannot hold such an `_id`.
            IntegrityError: A blob is not what was stored.
        """
        return self._parts.comparer.trained_on(document_id, collection)

    def reproduce(self, uuid: str, *, anyway: bool = False) -> Reproduction:
        """Train a version again, here and now, and compare bits; nothing is published.

        Args:
            uuid: A model's that a run has published.
            anyway: Train although its data has changed since; else that is said, and nothing is trained.

        Raises:
            NotFoundError: There is no such version, or what it was trained from is gone.
            ParameterError: No run has published it.
            MongotorchError: What the run raises.
        """
        return self._parts.reproducer.reproduce(uuid, anyway=anyway)
