"""The database in whichever process asks for it.

Always: a client is never used in another process than the one that opened it; what was opened here is closed
here, and what was given is left open.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, final

from mongotorch.data.mockreader import open_reader
from mongotorch.data.patience import Patience
from mongotorch.data.reader import Reader
from mongotorch.data.spec import StreamSpec


@final
class Access:
    """The database, opened once in each process and closed by who opened it.

    Args:
        open_database: Opens the database; picklable where processes are spawned.
        database: An open database for this process, which is left open.
        spec: What is read.
    """

    def __init__(self, open_database: Callable[[], Any], database: Any, spec: StreamSpec) -> None:
        self._open_database = open_database
        self._query, self._projection = spec.query, spec.key.projection
        self._patience = Patience(deadline_s=spec.read_deadline_s)
        self._given = database
        self._home = os.getpid()
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "_opened": None, "_home": -1}

    def database(self) -> Any:
        """The database in this process: a client does not survive a fork."""
        if self._given is not None and self._home == os.getpid():
            return self._given
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._open_database())
        return self._opened[1]

    def reader(self) -> Reader:
        """A reader in this process."""
        return open_reader(self.database(), self._query, self._projection, self._patience)

    def close(self) -> None:
        """Close what was opened in this process."""
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].client.close()
        self._opened = None
