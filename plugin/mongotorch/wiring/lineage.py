"""What is known of the data of a run, found once, before its first step.

Always: the facts are plain BSON.
"""

from __future__ import annotations

from typing import final

from mongotorch.settings import Settings
from mongotorch.store import Connection
from mongotorch.wiring.course import Course, DataFacts


@final
class Facts:
    """Finds the facts of the data of runs.

    Args:
        connection: The database.
        settings: Of the datalayer.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection, self._settings = connection, settings

    def of(self, course: Course) -> DataFacts:
        """The facts of a course's data."""
        return DataFacts(said={"query": course.training.to_document()})
