"""Combines triggers: `AnyOf` fires with the first, `AllOf` with the last of them.

Guarantees: each part has a memory of its own, under its number; all parts see the same observations, which are
consumed when the combination fires, never by a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, final

from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import CHANGED, INSERTED, Decision, State, Trigger, moment

_FIRED: Final = "held"  # the key in stored states is older than the name


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Combined(Trigger):
    """A trigger made of several others."""

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
        """What any part watches."""
        return frozenset().union(*(part.watches for part in self.triggers))

    @property
    def score_every_s(self) -> float | None:
        """The shortest interval of any part, in seconds; None: no part measures."""
        return min((part.score_every_s for part in self.triggers if part.score_every_s is not None), default=None)

    @property
    def score_documents(self) -> int | None:
        """The largest number of documents of any part; None: no part measures."""
        return max((n for part in self.triggers if (n := part.score_documents) is not None), default=None)

    def ask(self, now: datetime, state: State) -> tuple[list[Decision], dict[str, Any]]:
        """The decision of each part, and the memory of each under its number."""
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
        ParameterError: There is none, or something that is not a trigger.
    """

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if any part does; see `Trigger.due`."""
        decisions, memory = self.ask(moment(now), state)
        fired = [decision.reason for decision in decisions if decision.fire]
        reason = "; ".join(fired or [decision.reason for decision in decisions])
        kept = state.remembering(memory)
        return Decision(bool(fired), reason, _earliest(decisions)), kept.consumed() if fired else kept


@final
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AllOf(Combined):
    """Fires when all of its triggers have fired since its last firing; the first ones are remembered until then.

    A trigger that fired because of documents is forgotten when another run has consumed these documents meanwhile.

    Args:
        triggers: The triggers, at least one.

    Raises:
        ParameterError: There is none, or something that is not a trigger.
    """

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if the last part does; see `Trigger.due`."""
        now = moment(now)
        # Those that have fired are asked too: else they would take the times that pass meanwhile for missed ones.
        decisions, memory = self.ask(now, state)
        fired = self._fired(state)
        for n, decision in enumerate(decisions):
            if decision.fire:
                counts = {INSERTED: state.inserted, CHANGED: state.changed}
                fired[str(n)] = {"reason": decision.reason, **counts}
        waiting = [decision for n, decision in enumerate(decisions) if str(n) not in fired]
        if not waiting:
            reason = "; ".join(fired[str(n)]["reason"] for n in range(len(decisions)))
            return Decision(True, reason, _earliest(decisions)), state.remembering(memory).consumed()
        reason = f"{len(fired)} of {len(decisions)} have fired; " + "; ".join(part.reason for part in waiting)
        return Decision(False, reason, _earliest(waiting)), state.remembering({**memory, _FIRED: fired})

    def _fired(self, state: State) -> dict[str, Any]:
        """The parts that have fired, without those whose documents were consumed: the counts went down."""
        found: Mapping[str, Mapping[str, Any]] = state.memory.get(_FIRED) or {}
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
