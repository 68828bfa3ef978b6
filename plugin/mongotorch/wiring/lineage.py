"""What is known of the data of a run: which documents, as of when; found once, before its first step.

Always: the facts are plain BSON and the blobs that they name; the watermark is taken before the documents are
read, so that what comes after it may be new; a run that is resumed keeps the facts that it began with.
"""

from __future__ import annotations

import hashlib
from typing import Any, final

from mongotorch.data import Members, scan_members, watermark
from mongotorch.errors import DataError
from mongotorch.query import Query
from mongotorch.settings import Settings
from mongotorch.store import Connection
from mongotorch.wiring.course import Course, DataFacts


@final
class Facts:
    """Finds the facts of the data of runs.

    Args:
        connection: The database.
        settings: `lineage`, `read_deadline_s`.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._database: Any = connection.database
        self._settings = settings

    def of(self, course: Course) -> DataFacts:
        """The facts of a course's data: only its query, where the setting `lineage` is off.

        Raises:
            QueryError: The server refuses the query.
            ServerUnavailableError: The server could not be read for `read_deadline_s`.
        """
        said: dict[str, Any] = {"query": course.training.to_document()}
        if not self._settings.lineage:
            return DataFacts(said=said)
        said["watermark"] = watermark(self._database, read_deadline_s=self._settings.read_deadline_s)
        train = self.scan(course.training, course)
        said["train"] = summary(train)
        said["valid"] = None if course.validation is None else summary(self.scan(course.validation, course))
        if train.rows is None:
            return DataFacts(said={**said, "members": None})
        blob = train.to_bytes()
        name = hashlib.sha256(blob).hexdigest()
        return DataFacts(said={**said, "members": name}, blobs={name: blob})

    def scan(self, query: Query, course: Course) -> Members:
        """The documents of a query as they are now. Raises: as `of`."""
        deadline_s = self._settings.read_deadline_s
        return scan_members(self._database, query, course.trainer.key, read_deadline_s=deadline_s)


def summary(members: Members) -> dict[str, Any]:
    """What a document says of a set of documents."""
    return {"count": members.count, "digest": members.digest}


def members_of_facts(said: Any, get: Any) -> Members:
    """The training documents that the facts of a version name.

    Args:
        said: The `data` of a model's document; None where it has none.
        get: Gives blobs.

    Raises:
        DataError: They were not kept; the message says why.
        IntegrityError: The blob is not what was stored.
    """
    if said is None:
        raise DataError("it was stored as it was given, not trained in this database")
    if said.get("members") is not None:
        return Members.from_bytes(get(said["members"]))
    if "train" not in said:
        raise DataError("it was trained without lineage (the setting `lineage` was off)")
    raise DataError(f"its {said['train']['count']} documents are too many to be kept one by one")
