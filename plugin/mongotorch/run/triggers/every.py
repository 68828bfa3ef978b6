"""The trigger of a fixed interval.

Always: it stays on its grid, the moments `since + k * seconds`; a run that starts late does not move the next.
"""

from __future__ import annotations

import dataclasses
import functools
from datetime import datetime, timedelta
from typing import final

from mongotorch.run.triggers.base import check_flag, check_seconds
from mongotorch.run.triggers.timed import MOST_COUNTED, Timed


@final
@dataclasses.dataclass(frozen=True)
class Every(Timed):
    """Fires at each `since + k * seconds`, where `since` is when the schedule was first applied.

    Args:
        seconds: The interval in seconds, rounded to whole milliseconds, at least one.
        catch_up: Whether moments that were missed while nobody ran (by more than 60 seconds) are made up for, all
            of them by one run; else they are skipped.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    seconds: float
    catch_up: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_seconds("seconds", self.seconds)
        check_flag("catch_up", self.catch_up)

    def after(self, last: datetime, since: datetime) -> datetime:
        """The first moment of the grid after another moment."""
        return since + ((last - since) // self._step + 1) * self._step

    @functools.cached_property
    def plan(self) -> str:
        """The grid, for people."""
        return f"every {self.seconds:g} s"

    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:  # noqa: ARG002
        """The newest moment of the grid up to now."""
        return since + (now - since) // self._step * self._step

    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many moments of the grid there are after `last` up to `newest`, `MOST_COUNTED` at most."""
        return min((newest - since) // self._step - (last - since) // self._step, MOST_COUNTED)

    @functools.cached_property
    def _step(self) -> timedelta:
        return timedelta(milliseconds=round(self.seconds * 1000))
