"""Triggers that fire at planned moments: at a fixed interval (`Every`), or by a cron expression (`Cron`).

The library cronsim (https://github.com/cuu508/cronsim) computes the moments of a cron expression, as Debian's cron
does when clocks change. They are computed for an hour at a time and cached.

Guarantees: the memory is the newest moment that was answered, and no moment up to it is answered again, however
the clock jumps; any number of missed moments is one firing or none; a run that starts late does not move the
next.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import Decision, State, Trigger, check_flag, check_seconds, moment

MISSED = timedelta(seconds=60)
"""A moment that is answered later than this was missed: no scheduler ran when it came."""
MAX_COUNTED = 1000
"""Missed moments are counted up to this number."""


class Timed(Trigger):
    """Fires at planned moments; a subclass has the field `catch_up`."""

    catch_up: bool

    @property
    @abc.abstractmethod
    def plan(self) -> str:
        """The plan, for people."""

    @abc.abstractmethod
    def after(self, last: datetime, since: datetime) -> datetime | None:
        """The first planned moment after `last`; None if there are no more."""

    @abc.abstractmethod
    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:
        """The newest planned moment up to `now`; `first` is a planned moment up to `now`."""

    @abc.abstractmethod
    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many planned moments there are after `last` up to `newest`, counted to `MAX_COUNTED` at most."""

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if a planned moment has come that was not answered yet; see `Trigger.due`."""
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
        counted = f"{number:,}{' or more' * (number == MAX_COUNTED)} moment{'s' * (number > 1)}"
        missed = f"{counted} of {self.plan} since {last} UTC, the newest {newest} UTC"
        if self.catch_up or in_time:
            one_run = "one run for" if self.catch_up else "only the newest counts of"
            return Decision(True, f"{one_run} {missed}", next_at), state.consumed(memory)
        return Decision(False, f"skipped, since nobody ran in time: {missed}", next_at), state.remembering(memory)


@final
@dataclasses.dataclass(frozen=True)
class Every(Timed):
    """Fires at each `since + k * seconds`, where `since` is when the schedule was first applied.

    Args:
        seconds: The interval in seconds, rounded to whole milliseconds, at least one.
        catch_up: Make up for the moments that were missed by more than 60 seconds, with one run for all; else skip
            them.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    seconds: float
    catch_up: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_seconds("seconds", self.seconds)
        check_flag("catch_up", self.catch_up)

    def after(self, last: datetime, since: datetime) -> datetime | None:
        """The first moment of the grid after `last`; None beyond the year 9999, where dates end."""
        try:
            return since + ((last - since) // self._step + 1) * self._step
        except OverflowError:
            return None

    @functools.cached_property
    def plan(self) -> str:
        """The grid, for people."""
        return f"every {self.seconds:g} s"

    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:  # noqa: ARG002
        """The newest moment of the grid up to now."""
        return since + (now - since) // self._step * self._step

    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many moments of the grid there are after `last` up to `newest`, `MAX_COUNTED` at most."""
        return min((newest - since) // self._step - (last - since) // self._step, MAX_COUNTED)

    @functools.cached_property
    def _step(self) -> timedelta:
        return timedelta(milliseconds=round(self.seconds * 1000))


_HOUR, _SECOND = timedelta(hours=1), timedelta(seconds=1)


@final
@dataclasses.dataclass(frozen=True)
class Cron(Timed):
    """Fires at the moments of a cron expression.

    When the clocks of the zone go forward, a moment that does not exist that day fires at the first one that does
    (`30 2 * * *` at three o'clock); when they go back, a moment that comes twice fires the first time only. Both
    are so for expressions of five fields that name minutes and hours; any other goes by the time that passes, so
    that `*/30 * * * *` fires 46 times on the day that has 23 hours, and 50 times on the day that has 25.

    Args:
        expression: Minute, hour, day of the month, month, day of the week; a sixth field before them is seconds.
            Besides lists, ranges and steps: `L`, `LW`, `MON#1`, `5L`.
        tz: The time zone of the expression, such as `Europe/Berlin`.
        catch_up: Make up for the moments that were missed by more than 60 seconds, with one run for all; else skip
            them.

    Raises:
        ParameterError: An argument cannot be used; `field` names it, `__cause__` is the library's error.
    """

    expression: str
    tz: str = "UTC"
    catch_up: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.tz, str):
            raise ParameterError(f"tz={self.tz!r}: give the name of a zone, as 'Europe/Berlin'", field="tz")
        try:
            _zone(self.tz)
        except (LookupError, ValueError, OSError) as error:  # a path out of the zones' folder, a folder in it
            raise ParameterError(f"tz={self.tz!r}: there is no such time zone here", field="tz") from error
        if not isinstance(self.expression, str):
            raise ParameterError(f"expression={self.expression!r}: it must be a text", field="expression")
        try:
            next(CronSim(self.expression, datetime(2000, 1, 1)))
        except CronSimError as error:
            raise ParameterError(f"expression={self.expression!r}: {error}", field="expression") from error
        except StopIteration:
            raise ParameterError(
                f"expression={self.expression!r}: no such moment comes within fifty years", field="expression"
            ) from None
        check_flag("catch_up", self.catch_up)

    @functools.cached_property
    def plan(self) -> str:
        """The expression and the zone, for people."""
        return f"{self.expression!r} in {self.tz}"

    def after(self, last: datetime, since: datetime) -> datetime | None:  # noqa: ARG002
        """The first moment of the expression after `last`; None if none comes within fifty years."""
        start = last.replace(minute=0, second=0, microsecond=0)
        moments = _from_hour(self.expression, self.tz, start)
        index = bisect.bisect_right(moments, last)
        return moments[index] if index < len(moments) else None

    def newest(self, now: datetime, first: datetime, since: datetime) -> datetime:
        """The newest moment of the expression up to now."""
        found = max(_before(self.expression, self.tz, now), first)
        # Where an hour comes twice, searching backwards goes by local time and leaves moments out; find them.
        while (following := self.after(found, since)) is not None and following <= now:
            found = following
        return found

    def count(self, last: datetime, newest: datetime, since: datetime) -> int:
        """How many moments of the expression there are after `last` up to `newest`, `MAX_COUNTED` at most."""
        number, found = 0, self.after(last, since)
        while found is not None and found <= newest and number < MAX_COUNTED:
            number, found = number + 1, self.after(found, since)
        return number


def _zone(name: str) -> ZoneInfo | None:
    """The zone; None for UTC, for which cronsim is faster."""
    return None if name == "UTC" else ZoneInfo(name)


def _moments(expression: str, tz: str, start: datetime, *, reverse: bool) -> Iterator[datetime]:
    """The moments after a start, or before it in reverse, as naive UTC."""
    zone = _zone(tz)
    if zone is None:
        yield from CronSim(expression, start, reverse)
        return
    for found in CronSim(expression, start.replace(tzinfo=UTC).astimezone(zone), reverse):
        yield found.astimezone(UTC).replace(tzinfo=None)


@functools.lru_cache(maxsize=64)
def _from_hour(expression: str, tz: str, start: datetime) -> tuple[datetime, ...]:
    """The moments from a full hour on, up to and including the first one after that hour."""
    # In an hour that comes twice cronsim starts at the local time's first occurrence.
    found = itertools.dropwhile(lambda at: at < start, _moments(expression, tz, start - _SECOND, reverse=False))
    moments: list[datetime] = []
    for at in found:
        moments.append(at)
        if at >= start + _HOUR:
            break
    return tuple(moments)


def _before(expression: str, tz: str, now: datetime) -> datetime:
    """The newest moment up to now, or an earlier one in an hour that comes twice; else `datetime.min`."""
    start = now.replace(microsecond=0) + _SECOND
    return next((at for at in _moments(expression, tz, start, reverse=True) if at <= now), datetime.min)
