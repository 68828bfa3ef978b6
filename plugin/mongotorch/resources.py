"""Who owns something open closes it: the one way in which owners here are context managers.

Always: leaving the block closes, however it is left; `close` can be called again and then does nothing.
"""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Owner(abc.ABC):
    """Owns what has to be closed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything. Again: nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
