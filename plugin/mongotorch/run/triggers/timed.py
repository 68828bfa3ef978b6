"""What triggers of time have in common: moments that are planned, answered once, and missed while nobody ran.

Always: the memory is the newest moment that was answered, and no moment up to it is answered again, however the
clock jumps; any number of missed moments is answered by one firing or by none, without a walk over them.
"""

from __future__ import annotations

import abc
from datetime import datetime, timedelta

from mongotorch.run.triggers.base import Decision, State, Trigger, moment

MISSED = timedelta(seconds=60)
"""A moment that is older is missed: nobody ran when it came."""

MOST_COUNTED = 1000


class Timed(Trigger):
    """A trigger of planned moments; what inherits it has a field `catch_up`."""

    catch_up: bool

    @abc.abstractmethod
    def after(self, last: datetime, since: datetime) -> datetime | None:
        """The first planned moment after another moment; None where no more come."""

    @abc.abstractmethod
    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:
        """The newest planned moment up to now; `first` is one that is not after now."""

    @abc.abstractmethod
    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many planned moments there are after `last` up to `newest`, counted to `MOST_COUNTED` at most."""

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether a planned moment has come that was not answered yet; see `Trigger.due`."""
        now = moment(now)
        last = state.memory.get("last", state.since)
        first = self.after(last, state.since)
        if first is None:
            return Decision(False, f"{self} plans no more moments"), state
        if first > now:
            return Decision(False, f"the next moment is {first} UTC", first), state
        newest = self.newest(now, first, state.since)
        next_at = self.after(newest, state.since)
        answered = state.remembering({"last": newest})
        if newest == first and now - newest <= MISSED:
            return Decision(True, f"the moment {newest} UTC of {self}", next_at), answered.consumed()
        number = self.count(last, newest, state.since)
        counted = (
            f"{number:,} moment{'s' * (number > 1)}" if number < MOST_COUNTED else f"{number:,} moments or more"
        )
        missed = f"{counted} of {self} since {last} UTC, the newest {newest} UTC"
        if self.catch_up:
            return Decision(True, f"one run for {missed}", next_at), answered.consumed()
        if now - newest <= MISSED:
            return Decision(
                True, f"the moment {newest} UTC, the older ones skipped: {missed}", next_at
            ), answered.consumed()
        return Decision(False, f"skipped, since nobody ran in time: {missed}", next_at), answered
