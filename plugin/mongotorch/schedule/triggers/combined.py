"""Triggers made of triggers.

Always: each part keeps a memory of its own, under its number; all parts see the same observations, and those
are consumed once, when the whole fires, never by a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, final

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import CHANGED, INSERTED, Decision, State, Trigger, moment

_HELD = "held"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Combined(Trigger):
    """A trigger of several others."""

    triggers: tuple[Trigger, ...]

    def __init__(self, *triggers: Trigger) -> None:
        object.__setattr__(self, "triggers", triggers)
        self.__post_init__()

    def __post_init__(self) -> None:
        wrong = [part for part in self.triggers if not isinstance(part, Trigger)]
        if wrong or not self.triggers:
            what = f"{wrong[0]!r} is no trigger" if wrong else "give at least one trigger"
            raise ParameterError(f"{type(self).__name__}: {what}", field="triggers")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.triggers))})"

    @property
    def watches(self) -> frozenset[str]:
        """What any of them watches."""
        return frozenset().union(*(part.watches for part in self.triggers))

    @property
    def score_every_s(self) -> float | None:
        """The shortest interval that any of them asks for, in seconds; None: none does."""
        return min((part.score_every_s for part in self.triggers if part.score_every_s is not None), default=None)

    @property
    def score_documents(self) -> int | None:
        """The most documents that any of them asks for; None: none does."""
        return max((n for part in self.triggers if (n := part.score_documents) is not None), default=None)

    def ask(self, now: datetime, state: State) -> tuple[list[Decision], dict[str, Any]]:
        """What each part decides, and the memories of all, each under its number."""
        asked = [part.due(now, state.remembering(_part(state, n))) for n, part in enumerate(self.triggers)]
        return [decision for decision, _ in asked], {
            str(n): dict(kept.memory) for n, (_, kept) in enumerate(asked)
        }


@final
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AnyOf(Combined):
    """Fires when any of its triggers does; several at once are one firing.

    Args:
        triggers: The triggers, at least one.

    Raises:
        ParameterError: None are given, or something else among them.
    """

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether any of them is due; see `Trigger.due`."""
        decisions, memory = self.ask(moment(now), state)
        fired = [decision.reason for decision in decisions if decision.fire]
        reason = "; ".join(fired or [decision.reason for decision in decisions])
        kept = state.remembering(memory)
        return Decision(bool(fired), reason, _earliest(decisions)), kept.consumed() if fired else kept


@final
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AllOf(Combined):
    """Fires when all of its triggers have fired since its last firing; one that has is held until the others have.

    Documents for which one is held, and which some other run has used up meanwhile, hold it no longer.

    Args:
        triggers: The triggers, at least one.

    Raises:
        ParameterError: None are given, or something else among them.
    """

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether the last of them is due; see `Trigger.due`."""
        now = moment(now)
        # One that is held is asked as well: else it would take moments that pass meanwhile for missed ones.
        decisions, memory = self.ask(now, state)
        held = self._still_held(state)
        for n, decision in enumerate(decisions):
            if decision.fire:
                counts = {INSERTED: state.inserted, CHANGED: state.changed}
                held[str(n)] = {"reason": decision.reason, **counts}
        waiting = [decision for n, decision in enumerate(decisions) if str(n) not in held]
        if not waiting:
            reason = "; ".join(held[str(n)]["reason"] for n in range(len(decisions)))
            return Decision(True, reason, _earliest(decisions)), state.remembering(memory).consumed()
        reason = f"{len(held)} of {len(decisions)} have fired; " + "; ".join(part.reason for part in waiting)
        return Decision(False, reason, _earliest(waiting)), state.remembering({**memory, _HELD: held})

    def _still_held(self, state: State) -> dict[str, Any]:
        found: Mapping[str, Mapping[str, Any]] = state.memory.get(_HELD) or {}
        return {
            number: dict(kept)
            for number, kept in found.items()
            if not self.triggers[int(number)].watches & {INSERTED, CHANGED}
            or (state.inserted >= kept[INSERTED] and state.changed >= kept[CHANGED])
        }


def _part(state: State, number: int) -> Mapping[str, Any]:
    memory: Mapping[str, Any] = state.memory.get(str(number)) or {}
    return memory


def _earliest(decisions: Iterable[Decision]) -> datetime | None:
    return min((at for decision in decisions if (at := decision.next_at) is not None), default=None)
