"""Triggers that fire when a metric of the live model, measured on new documents, crosses a threshold.

Guarantees: each measurement is judged once; NaN, or a measurement without the metric, fires nothing and gives
that as the reason.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from datetime import datetime, timedelta
from typing import final

from mongotorch.component import IDENTIFIER
from mongotorch.errors import ParameterError
from mongotorch.schedule.triggers.base import (
    SCORES,
    Decision,
    State,
    Trigger,
    check_count,
    check_seconds,
    is_number,
    moment,
)


@dataclasses.dataclass(frozen=True)
class Measured(Trigger):
    """Fires on one metric of the live model, measured on the newest documents."""

    metric: str
    threshold: float
    every_s: float = dataclasses.field(default=3600.0, kw_only=True)
    documents: int = dataclasses.field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        # One of a dataset is called `dataset/metric`.
        if not isinstance(self.metric, str) or not all(map(IDENTIFIER.fullmatch, self.metric.split("/"))):
            raise ParameterError(
                f"metric={self.metric!r}: give the name of a metric, or 'objective'", field="metric"
            )
        if not is_number(self.threshold):
            raise ParameterError(f"threshold={self.threshold!r}: it must be a finite number", field="threshold")
        check_seconds("every_s", self.every_s)
        check_count("documents", self.documents)

    @abc.abstractmethod
    def crosses(self, value: float) -> bool:
        """Whether a value is beyond the threshold."""

    @property
    def watches(self) -> frozenset[str]:
        """Measurements of the live model."""
        return frozenset({SCORES})

    @property
    def score_every_s(self) -> float:
        """How often the live model is measured, in seconds."""
        return self.every_s

    @property
    def score_documents(self) -> int:
        """On how many of the newest documents it is measured."""
        return self.documents

    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        """Fires if a new measurement crosses the threshold; see `Trigger.due`."""
        now = moment(now)
        every = timedelta(seconds=self.every_s)
        # An overdue measurement could not be taken; ask again an interval later.
        next_at = now + every if state.scored is None or state.scored + every <= now else state.scored + every
        judged = state.memory.get("scored")
        if state.scored is None or (judged is not None and state.scored <= judged):
            return Decision(False, f"no new measurement of {self.metric}", next_at), state
        seen = state.remembering({"scored": state.scored})
        if self.metric not in state.scores:
            there = ", ".join(sorted(state.scores)) or "nothing"
            return Decision(False, f"{self.metric} was not measured; there is {there}", next_at), seen
        value = state.scores[self.metric]
        if math.isnan(value):
            return Decision(False, f"{self.metric} was measured as NaN, which says nothing", next_at), seen
        side = "below" if value < self.threshold else "above"
        compared = "just the threshold" if value == self.threshold else f"{side} {self.threshold:.4g}"
        decision = Decision(self.crosses(value), f"{self.metric} is {value:.4g}, {compared}", next_at)
        return decision, seen.consumed() if decision.fire else seen


@final
@dataclasses.dataclass(frozen=True)
class MetricBelow(Measured):
    """Fires at each new measurement of the live model that is below a threshold.

    Args:
        metric: `objective`, or the name of a metric of the model's validation.
        threshold: The metric must not fall below it.
        every_s: How often the live model is measured, in seconds.
        documents: On how many of the newest documents it is measured.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    def crosses(self, value: float) -> bool:
        """Whether a value is below the threshold."""
        return value < self.threshold


@final
@dataclasses.dataclass(frozen=True)
class MetricAbove(Measured):
    """Fires at each new measurement of the live model that is above a threshold.

    Args:
        metric: `objective`, or the name of a metric of the model's validation.
        threshold: The metric must not exceed it.
        every_s: How often the live model is measured, in seconds.
        documents: On how many of the newest documents it is measured.

    Raises:
        ParameterError: An argument cannot be used; `field` names it.
    """

    def crosses(self, value: float) -> bool:
        """Whether a value is above the threshold."""
        return value > self.threshold
