"""Makes whatever opens something a context manager that closes it.

Guarantees: leaving the block closes, however it is left.
"""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Owner(abc.ABC):
    """Owns resources that have to be closed: a connection, a process, a thread."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
