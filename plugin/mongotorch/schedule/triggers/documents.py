"""The triggers of what happens to documents.

Always: they count what somebody else has noticed, and remember nothing; what is counted is since the last firing.
"""

from __future__ import annotations

import abc
import dataclasses
from datetime import datetime, timedelta
from typing import final

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import (
    CHANGED,
    INSERTED,
    Decision,
    State,
    Trigger,
    check_count,
    check_seconds,
    moment,
)


class Counted(Trigger):
    """A trigger of a number of documents, and of how long the first of them has waited."""

    @property
    @abc.abstractmethod
    def enough(self) -> int | None:
        """How many fire; None: only waiting does."""

    @property
    @abc.abstractmethod
    def longest_s(self) -> float | None:
        """How long the first may wait, in seconds; None: for ever."""

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether there are enough, or the first has waited long enough; see `Trigger.due`."""
        now = moment(now)
        number = state.inserted if INSERTED in self.watches else state.changed
        what = f"{number:,} {'new' if INSERTED in self.watches else 'changed'} document{'s' * (number != 1)}"
        if self.enough is not None and number >= self.enough:
            return Decision(True, f"{what}, at least {self.enough:,}"), state.consumed()
        wanted = "" if self.enough is None else f" of {self.enough:,}"
        if self.longest_s is None or not number:
            return Decision(False, f"{what}{wanted}"), state
        # Noticed is what was counted: where only the count is known, the wait begins now.
        limit = (state.arrived or now) + timedelta(seconds=self.longest_s)
        if limit <= now:
            return Decision(True, f"{what}, the first since {state.arrived} UTC"), state.consumed()
        return Decision(False, f"{what}{wanted}, waiting until {limit} UTC", limit), state


@dataclasses.dataclass(frozen=True)
class _Numbered(Counted):
    n: int
    max_wait: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("n", self.n)
        if self.max_wait is not None:
            check_seconds("max_wait", self.max_wait)

    @property
    def enough(self) -> int:
        """How many fire."""
        return self.n

    @property
    def longest_s(self) -> float | None:
        """How long the first may wait, in seconds; None: for ever."""
        return self.max_wait


@final
@dataclasses.dataclass(frozen=True)
class NewDocuments(_Numbered):
    """Fires when so many documents have been inserted since the last firing, by whatever client.

    Args:
        n: How many, from 1 on.
        max_wait: Fires with fewer, though with one at least, when this many seconds have passed since the first
            was noticed; None: never.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    @property
    def watches(self) -> frozenset[str]:
        """Inserts."""
        return frozenset({INSERTED})


@final
@dataclasses.dataclass(frozen=True)
class Changed(_Numbered):
    """Fires when there have been so many inserts, updates and deletes since the last firing, by whatever client.

    Args:
        n: How many, from 1 on.
        max_wait: Fires with fewer, though with one at least, when this many seconds have passed since the first
            was noticed; None: never.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    @property
    def watches(self) -> frozenset[str]:
        """Inserts, updates and deletes."""
        return frozenset({CHANGED})


@final
@dataclasses.dataclass(frozen=True)
class Waited(Counted):
    """Fires when something has waited for so long, however little it is: what `Schedule(max_wait=...)` adds.

    Args:
        seconds: How long the first may wait.
        counts: `inserted` for new documents, `changed` for updates and deletes as well.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    seconds: float
    counts: str = INSERTED

    def __post_init__(self) -> None:
        check_seconds("seconds", self.seconds)
        if self.counts not in (INSERTED, CHANGED):
            raise ParameterError(f"counts={self.counts!r}: {INSERTED!r} or {CHANGED!r}", field="counts")

    @property
    def watches(self) -> frozenset[str]:
        """What it counts."""
        return frozenset({self.counts})

    @property
    def enough(self) -> None:
        """No number is."""
        return None

    @property
    def longest_s(self) -> float:
        """How long the first may wait, in seconds."""
        return self.seconds
