"""Defines `Trigger`: a pure function from a time and what was observed to whether a run is due.

Guarantees: `due` reads no clock, no database and no random number, and changes none of its arguments; what a
trigger remembers is plain BSON in the state it returns, so that any process can ask it the next time; times are
naive UTC in whole milliseconds, as BSON keeps them.
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
"""What a trigger can watch."""
MIN_S, MAX_S = 0.001, 3.2e9  # a millisecond, as BSON keeps times; a century


def moment(value: datetime) -> datetime:
    """A datetime (aware, or naive UTC) as naive UTC, cut to whole milliseconds."""
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
        inserted: How many documents were inserted since the last firing.
        changed: How many inserts, updates and deletes there were since the last firing.
        arrived: When the first of those was noticed; None while there is none.
        scores: The newest measurement of the live model, by name.
        scored: When that was taken; None before the first one.
        memory: What the trigger remembers, as plain BSON; nobody else reads it.
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
        """The state after a firing: counts at zero, measurements as they are.

        Args:
            memory: What the trigger remembers from now on; None: the same as before.
        """
        # Not `dataclasses.replace`, which would take longer than the rest of `due`.
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
        """The state as plain BSON; `from_document` makes an equal state of it."""
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
        """The state of a document; fields that an older document lacks have their defaults.

        Raises:
            KeyError: The document has no `since`.
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
    """The answer of a trigger.

    Args:
        fire: Whether a run is due.
        reason: Why, or why not, a sentence.
        next_at: When to ask again even if nothing is observed, later than now; None: only when something is.
    """

    fire: bool
    reason: str
    next_at: datetime | None = None


class Trigger(abc.ABC):
    """Decides when a schedule's run is due. A new one is a frozen dataclass that inherits this class.

    It is stored as its class's name and its fields; `mongotorch.testing.TriggerSuite` tests what it has to do.
    """

    __mongotorch_value__: ClassVar[bool] = True

    @abc.abstractmethod
    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Whether a run is due.

        Args:
            now: The time, aware or naive UTC. It may have jumped since the last call, forwards or backwards.
            state: What was observed, with the memory that the last call returned.

        Returns:
            The decision, and the state to keep: `consumed()` when it fires, with the trigger's new memory.
        """

    @property
    def watches(self) -> frozenset[str]:
        """What has to be observed for it: of `inserted`, `changed` and `scores`; by default nothing."""
        return frozenset()

    @property
    def score_every_s(self) -> float | None:
        """How often the live model has to be measured for it, in seconds; None: never."""
        return None

    @property
    def score_documents(self) -> int | None:
        """On how many of the newest documents the live model has to be measured; None: on none."""
        return None


def check_count(field: str, value: Any) -> None:
    """Check that a value is a whole number from 1 on. Raises: ParameterError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(f"{field}={value!r}: it must be a whole number from 1 on", field=field)


def check_seconds(field: str, value: Any) -> None:
    """Check that a value is a number of seconds from a millisecond to a century. Raises: ParameterError."""
    if not is_number(value) or not MIN_S <= value <= MAX_S:
        raise ParameterError(
            f"{field}={value!r}: it must be a number of seconds from {MIN_S} to {MAX_S:.2g}", field=field
        )


def check_flag(field: str, value: Any) -> None:
    """Check that a value is a bool. Raises: ParameterError."""
    if not isinstance(value, bool):
        raise ParameterError(f"{field}={value!r}: True or False", field=field)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
