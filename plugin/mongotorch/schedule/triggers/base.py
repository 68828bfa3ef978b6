"""What a trigger is: a pure function from the time and what has been observed to whether a run is due.

Always: `due` reads no clock, no database and no random number, and changes nothing that it was given; what a
trigger has to remember it returns as plain BSON, so that any process can ask it the next time; every moment is
a naive datetime in UTC, in whole milliseconds, as BSON keeps it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Self, final

from mongotorch.errors import ParameterError

INSERTED, CHANGED, SCORES = "inserted", "changed", "scores"
"""What a trigger may watch."""
LEAST_S, MOST_S = 0.001, 3.2e9  # a millisecond is what BSON keeps, a century is what nobody waits for


def moment(value: datetime) -> datetime:
    """A datetime as a naive one in UTC, cut to whole milliseconds; a naive one is taken to be in UTC already."""
    if value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    rest = value.microsecond % 1000
    return value - timedelta(microseconds=rest) if rest else value


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What has been observed since a schedule last fired, and what its trigger remembers.

    Args:
        since: When the schedule was first applied.
        inserted: How many documents have arrived since the last firing.
        changed: How many inserts, updates and deletes there have been since the last firing.
        arrived: When the first of those was noticed; None while there is none.
        scores: The newest measurement of the live model, `{name: value}`.
        scored: When that was taken; None before the first.
        memory: The trigger's own, plain BSON; whoever keeps it does not look inside.
    """

    since: datetime
    inserted: int = 0
    changed: int = 0
    arrived: datetime | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scored: datetime | None = None
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("since", "arrived", "scored"):
            given = getattr(self, name)
            if given is not None and (at := moment(given)) is not given:
                object.__setattr__(self, name, at)

    def consumed(self, memory: Mapping[str, Any] | None = None) -> State:
        """The state behind a firing: nothing has arrived yet; measurements stay.

        Args:
            memory: What the trigger remembers from now on; None: what it did.
        """
        # Not `dataclasses.replace`, which takes longer than all the rest of asking a trigger.
        kept = self.memory if memory is None else memory
        return State(since=self.since, scores=self.scores, scored=self.scored, memory=kept)

    def remembering(self, memory: Mapping[str, Any]) -> State:
        """The same observations with another memory."""
        return State(
            since=self.since,
            inserted=self.inserted,
            changed=self.changed,
            arrived=self.arrived,
            scores=self.scores,
            scored=self.scored,
            memory=memory,
        )

    def to_document(self) -> dict[str, Any]:
        """Plain BSON, from which `from_document` makes an equal state."""
        return {
            "since": self.since,
            "inserted": self.inserted,
            "changed": self.changed,
            "arrived": self.arrived,
            "scores": dict(self.scores),
            "scored": self.scored,
            "memory": dict(self.memory),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The state of what `to_document` gave; what an older document lacks takes its default.

        Raises:
            KeyError: It has no `since`.
        """
        return cls(
            since=document["since"],
            inserted=int(document.get("inserted", 0)),
            changed=int(document.get("changed", 0)),
            arrived=document.get("arrived"),
            scores={name: float(value) for name, value in (document.get("scores") or {}).items()},
            scored=document.get("scored"),
            memory=dict(document.get("memory") or {}),
        )


@final
@dataclasses.dataclass(frozen=True)
class Decision:
    """What a trigger says when it is asked.

    Args:
        fire: Whether a run is due.
        reason: Why, or why not, for people.
        next_at: When to ask again though nothing is observed, later than now; None: only when something is.
    """

    fire: bool
    reason: str
    next_at: datetime | None = None


class Trigger(abc.ABC):
    """When a schedule's run is due. A new one is a frozen dataclass that inherits this, in a module of its own.

    It is stored as its class's name and its fields; `mongotorch.testing.TriggerSuite` is what it has to do.
    """

    __mongotorch_value__: ClassVar[bool] = True

    @abc.abstractmethod
    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether a run is due.

        Args:
            now: The time, aware, or naive in UTC. It may have jumped since the last call, either way.
            state: What has been observed, and the memory that the last call returned.

        Returns:
            The decision, and the state to keep: `consumed()` when it fires, with the trigger's new memory.
        """

    @property
    def watches(self) -> frozenset[str]:
        """What has to be observed for it, of `inserted`, `changed` and `scores`; nothing for one of time alone."""
        return frozenset()

    @property
    def score_every_s(self) -> float | None:
        """How often the live model is to be measured for it, in seconds; None: never."""
        return None

    @property
    def score_documents(self) -> int | None:
        """On how many documents, the newest, it is to be measured; None where it never is."""
        return None


def check_count(field: str, value: Any) -> None:
    """Refuse what is no whole number from 1 on. Raises: ParameterError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(f"{field}={value!r}: it must be a whole number from 1 on", field=field)


def check_seconds(field: str, value: Any) -> None:
    """Refuse what is no number of seconds from a millisecond to a century. Raises: ParameterError."""
    if not is_number(value) or not LEAST_S <= value <= MOST_S:
        raise ParameterError(
            f"{field}={value!r}: it must be a number of seconds from {LEAST_S} to {MOST_S:.2g}", field=field
        )


def check_flag(field: str, value: Any) -> None:
    """Refuse what is neither True nor False. Raises: ParameterError."""
    if not isinstance(value, bool):
        raise ParameterError(f"{field}={value!r}: True or False", field=field)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
