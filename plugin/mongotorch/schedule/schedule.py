"""Defines when a trainer runs again and what goes live (`Schedule`), and when it would have run (`preview`).

Guarantees: a schedule is a frozen component without times and counts, which `mt.schedules` holds; `preview` asks
the same `due` as the scheduler does, reads no clock and stores nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, ClassVar, final

from mongotorch.component import Component
from mongotorch.errors import ParameterError
from mongotorch.schedule.gates import Better, Gate, Scores, gate_of
from mongotorch.schedule.triggers import AnyOf, State, Trigger, Waited, moment
from mongotorch.schedule.triggers.base import CHANGED, INSERTED, SCORES, check_flag, check_seconds

DATA = ("all", "new")
BETTER = Better()
MOST_ASKED = 200_000
"""How often a preview asks a trigger at most, besides once for each time at which documents arrived."""


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Schedule(Component):
    """Runs a trainer again when a trigger fires, and promotes what it trains if a gate agrees.

    Args:
        identifier: Its name.
        db: The datalayer that `apply()` uses; never stored.
        uuid: The identity of the version it becomes; made if none is given.
        artifacts: The codecs of single fields, `{field: codec name}`, instead of the default ones.
        trainer: The trainer that runs, with its model.
        trigger: When it runs.
        gate: Whether the trained model goes live: `Better`, `Always`, `Never`, or a function
            `(champion, challenger) -> bool` of the scores of both.
        warm_start: Start from the live model and its optimizer's state; else from the trainer's model.
        data: `all` trains on the trainer's whole select, `new` on its documents that no published run has
            trained on.
        max_wait: Also runs when a new document has waited for this many seconds; None: only by the trigger.
        paused: Counts documents, but runs nothing by itself.

    Raises:
        IdentifierError: The identifier is not a valid name.
        ParameterError: Another argument cannot be used; `field` names it.
    """

    type_id: ClassVar[str] = "schedule"

    trainer: Component
    trigger: Trigger
    gate: Gate | Callable[[Scores | None, Scores | None], bool] = BETTER
    warm_start: bool = True
    data: str = "all"
    max_wait: float | None = None
    paused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        trainer: Any = self.trainer  # checked by its attributes: `schedule` does not import `train`
        if not isinstance(trainer, Component) or trainer.type_id != "trainer":
            raise ParameterError("trainer must be a trainer, such as a TorchTrainer", field="trainer")
        if getattr(trainer, "model", None) is None:
            raise ParameterError(
                "trainer has no model to train; give it one: TorchTrainer(..., model=...)", field="trainer"
            )
        if not isinstance(self.trigger, Trigger):
            raise ParameterError(
                f"trigger={self.trigger!r}: a trigger such as Every(seconds=3600)", field="trigger"
            )
        gate_of(self.gate)
        if self.data not in DATA:
            raise ParameterError(f"data={self.data!r}: 'all' or 'new'", field="data")
        if self.max_wait is not None:
            check_seconds("max_wait", self.max_wait)
        for field in ("warm_start", "paused"):
            check_flag(field, getattr(self, field))

    @property
    def effective_trigger(self) -> Trigger:
        """The trigger, combined with the one that `max_wait` adds."""
        if self.max_wait is None:
            return self.trigger
        counts = CHANGED if CHANGED in self.trigger.watches else INSERTED
        return AnyOf(self.trigger, Waited(self.max_wait, counts))


@final
@dataclasses.dataclass(frozen=True)
class Firing:
    """One time that a schedule would have fired.

    Args:
        at: When, naive UTC.
        reason: Why, a sentence.
    """

    at: datetime
    reason: str


def preview(
    schedule: Schedule, *, since: datetime, until: datetime, arrivals: Iterable[datetime] = ()
) -> list[Firing]:
    """When a schedule, applied at `since`, would have fired up to `until`, paused or not.

    Args:
        schedule: The schedule.
        since: The start, aware or naive UTC; nothing has arrived before it.
        until: The end, inclusive.
        arrivals: When each document was inserted, in any order; those before the start or after the end are
            ignored. There are only inserts here: `Changed` counts no updates and deletes.

    Returns:
        The firings, oldest first.

    Raises:
        ParameterError: The trigger needs measurements of the live model, which nobody took in the past; or the
            end is before the start; or the trigger asks for a next time that is not later, or for more than
            200,000 times.
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
    now, asked = since, 0
    while now <= until:
        asked += 1
        if asked > MOST_ASKED:
            raise ParameterError(
                f"{trigger!r} wants to be asked more than {MOST_ASKED:,} times from {since} to {until}; preview a "
                f"shorter time, such as one that ends at {now}",
                field="until",
            )
        if arrival is not None and arrival[0] <= now:
            state = _with(state, arrival[1], at=arrival[0])
            arrival, asked = next(counted, None), asked - 1
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
