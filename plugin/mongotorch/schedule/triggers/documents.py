"""Triggers that fire when enough documents were inserted or changed, or the first has waited long enough.

The counts are those of the state, since the last firing; these triggers remember nothing themselves.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import ClassVar, final

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


def _due(
    now: datetime, state: State, counts: str, enough: int | None, longest_s: float | None
) -> tuple[Decision, State]:
    """Fires if there are enough documents, or the first has waited long enough; None: no number, no time does."""
    now = moment(now)
    number = state.inserted if counts == INSERTED else state.changed
    what = f"{number:,} {'new' if counts == INSERTED else 'changed'} document{'s' * (number != 1)}"
    if enough is not None and number >= enough:
        return Decision(True, f"{what}, at least {enough:,}"), state.consumed()
    goal = "" if enough is None else f" of {enough:,}"
    if longest_s is None or not number:
        return Decision(False, f"{what}{goal}"), state
    # Where only the count is known, and not when the first arrived, the wait begins now.
    limit = (state.arrived or now) + timedelta(seconds=longest_s)
    if limit <= now:
        return Decision(True, f"{what}, the first since {state.arrived} UTC"), state.consumed()
    return Decision(False, f"{what}{goal}, waiting until {limit} UTC", limit), state


@dataclasses.dataclass(frozen=True)
class _Counted(Trigger):
    """Fires on a number of documents, or on how long the first of them has waited."""

    counts: ClassVar[str]

    n: int
    max_wait: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("n", self.n)
        if self.max_wait is not None:
            check_seconds("max_wait", self.max_wait)

    @property
    def watches(self) -> frozenset[str]:
        """Inserts, or all changes."""
        return frozenset({self.counts})

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if there are enough documents, or the first has waited long enough; see `Trigger.due`."""
        return _due(now, state, self.counts, self.n, self.max_wait)


@final
@dataclasses.dataclass(frozen=True)
class NewDocuments(_Counted):
    """Fires when `n` documents were inserted since the last firing, by any client.

    Args:
        n: How many, from 1 on.
        max_wait: Also fires, with one document at least, this many seconds after the first was noticed; None:
            never.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    counts: ClassVar[str] = INSERTED


@final
@dataclasses.dataclass(frozen=True)
class Changed(_Counted):
    """Fires on `n` inserts, updates and deletes since the last firing, by any client.

    Args:
        n: How many, from 1 on.
        max_wait: Also fires, with one change at least, this many seconds after the first was noticed; None: never.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    counts: ClassVar[str] = CHANGED


@final
@dataclasses.dataclass(frozen=True)
class Waited(Trigger):
    """Fires when the first document has waited for some seconds; `Schedule(max_wait=...)` adds it.

    Args:
        seconds: How long the first document may wait.
        counts: `inserted`: new documents wait; `changed`: updates and deletes do as well.

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
        """What it counts: `inserted` or `changed`."""
        return frozenset({self.counts})

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if the first document has waited long enough; see `Trigger.due`."""
        return _due(now, state, self.counts, None, self.seconds)
