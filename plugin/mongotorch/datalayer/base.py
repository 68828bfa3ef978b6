"""What every part of a datalayer rests on: one open connection and the parts wired over it.

Always: it owns its connection and closes it; it holds no other state.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mongotorch.errors import ParameterError
from mongotorch.owner import Owner
from mongotorch.settings import Settings
from mongotorch.store import Connection
from mongotorch.wiring.parts import Parts


class Opened(Owner):
    """An open database."""

    __mongotorch_unpicklable__: ClassVar[bool] = True

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.settings = settings
        self._connection = connection
        self._parts = Parts(connection, settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise ParameterError(
            "a Datalayer holds a connection and cannot be pickled; pass `db.uri` and connect there"
        )

    def close(self) -> None:
        """Close the connection. Again: nothing."""
        self._connection.close()

    @property
    def uri(self) -> str:
        """The address with the database in it; it may hold a password."""
        return self._connection.uri
