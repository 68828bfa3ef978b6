"""The Datalayer: one open database, and everything a person does with it.

Always: it owns its connection and closes it; it holds no other state, so two of them over one database see the
same; it is never pickled: what crosses a process is an address. What it does is told apart by what a person wants:
`reading` documents, `running` work, keeping `versions`, `serving` one of them, `schedules`, their `lineage`; each
is a class, and the Datalayer is all of them.
"""

from __future__ import annotations

from typing import Any, Self, final

from mongotorch.datalayer.lineage import Lineage
from mongotorch.datalayer.reading import Reading
from mongotorch.datalayer.running import Running
from mongotorch.datalayer.schedules import Scheduling
from mongotorch.datalayer.serving import Serving
from mongotorch.datalayer.versions import Versions
from mongotorch.settings import read_settings
from mongotorch.store import open_address


@final
class Datalayer(Reading, Running, Versions, Serving, Scheduling, Lineage):
    """One open database; a context manager that closes it."""

    @classmethod
    def connect(cls, uri: str | None = None, **settings: Any) -> Self:
        """Open a database.

        Args:
            uri: `mongodb://…`, `mongodb+srv://…`, `mongomock://NAME` or `embedded:PATH`; None is the setting
                `uri` (`MONGOTORCH_URI`), else the embedded server over `embedded_path`.
            settings: See `Settings`; over the environment.

        Raises:
            SettingError: The URI or a setting cannot be used.
            ServerUnavailableError: Nothing answers there.
            EmbeddedServerError: The embedded server is missing here, or does not start.
        """
        chosen = read_settings(**settings, **({} if uri is None else {"uri": uri}))
        address = chosen.uri or f"embedded:{chosen.embedded_path}"
        connection = open_address(address, chosen)
        try:
            return cls(connection, chosen)
        except BaseException:
            connection.close()
            raise
