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

    @property
    @abc.abstractmethod
    def plan(self) -> str:
        """What is planned, for people."""

    @abc.abstractmethod
    def after(self, last: datetime, since: datetime) -> datetime | None:
        """The first planned moment after another moment; None where no more come."""

    @abc.abstractmethod
    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:
        """The newest planned moment up to now; `first` is one, though not the first of all."""

    @abc.abstractmethod
    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many planned moments there are after `last` up to `newest`, counted to `MOST_COUNTED` at most."""

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether a planned moment has come that was not answered yet; see `Trigger.due`."""
        now = moment(now)
        last = state.memory.get("last", state.since)
        first = self.after(last, state.since)
        if first is None:
            return Decision(False, f"no more moments come of {self.plan}"), state
        if first > now:
            return Decision(False, f"the next moment of {self.plan} is {first} UTC", first), state
        newest, next_at = first, self.after(first, state.since)
        if next_at is not None and next_at <= now:
            newest = self.newest(now, next_at, state.since)
            next_at = self.after(newest, state.since)
        memory = {"last": newest}
        in_time = now - newest <= MISSED
        if newest == first and in_time:
            return Decision(True, f"{newest} UTC, of {self.plan}", next_at), state.consumed(memory)
        number = self.count(last, newest, state.since)
        counted = f"{number:,}{' or more' * (number == MOST_COUNTED)} moment{'s' * (number > 1)}"
        missed = f"{counted} of {self.plan} since {last} UTC, the newest {newest} UTC"
        if self.catch_up or in_time:
            said = "one run for" if self.catch_up else "only the newest counts of"
            return Decision(True, f"{said} {missed}", next_at), state.consumed(memory)
        return Decision(False, f"skipped, since nobody ran in time: {missed}", next_at), state.remembering(memory)
