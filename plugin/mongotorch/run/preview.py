"""When a schedule would have fired, without running anything.

Always: the same `due` that the scheduler asks is asked, at each arrival and whenever it wants to be asked again;
no clock is read, and nothing is stored.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import final

from mongotorch.errors import ParameterError
from mongotorch.run.schedule import Schedule
from mongotorch.run.triggers import State, Trigger, moment
from mongotorch.run.triggers.base import SCORES


@final
@dataclasses.dataclass(frozen=True)
class Firing:
    """One time that a schedule would have fired.

    Args:
        at: When, naive in UTC.
        reason: Why, for people.
    """

    at: datetime
    reason: str


def preview(
    schedule: Schedule, *, since: datetime, until: datetime, arrivals: Iterable[datetime] = ()
) -> list[Firing]:
    """When a schedule, applied at `since`, would have fired up to `until`, paused or not.

    Args:
        schedule: The schedule.
        since: The beginning, aware, or naive in UTC; nothing has arrived yet.
        until: The end, itself included.
        arrivals: When each document was inserted, in any order; those before the beginning or behind the end do
            not count. Updates and deletes are not told of, so `Changed` sees the inserts only.

    Raises:
        ParameterError: The trigger looks at measurements of the live model, which nobody took in the past; or the
            end is before the beginning; or the trigger wants to be asked again at a time that has passed.
    """
    since, until = moment(since), moment(until)
    if until < since:
        raise ParameterError(f"until={until} is before since={since}", field="until")
    trigger = schedule.effective_trigger
    if SCORES in trigger.watches:
        raise ParameterError(
            f"{trigger!r} looks at measurements of the live model; nobody took them in the past, so no preview "
            "can say when it would have fired",
            field="trigger",
        )
    return list(_firings(trigger, since, until, sorted(map(moment, arrivals))))


def _firings(trigger: Trigger, since: datetime, until: datetime, arrivals: list[datetime]) -> Iterator[Firing]:
    state = State(since=since)
    counted = ((at, sum(1 for _ in same)) for at, same in itertools.groupby(arrivals) if since <= at <= until)
    arrival = next(counted, None)
    now = since
    while now <= until:
        if arrival is not None and arrival[0] <= now:
            state = _with(state, arrival[1], at=arrival[0])
            arrival = next(counted, None)
        decision, state = trigger.due(now, state)
        if decision.fire:
            yield Firing(now, decision.reason)
        if decision.next_at is not None and decision.next_at <= now:
            raise ParameterError(
                f"{trigger!r} wants at {now} to be asked again at {decision.next_at}, which is not later",
                field="trigger",
            )
        coming = [at for at in (decision.next_at, arrival and arrival[0]) if at is not None]
        if not coming:
            return
        now = min(coming)


def _with(state: State, number: int, *, at: datetime) -> State:
    return dataclasses.replace(
        state, inserted=state.inserted + number, changed=state.changed + number, arrived=state.arrived or at
    )
