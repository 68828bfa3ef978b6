"""What a run says while it runs, and its memory of the best so far.

Always: events are frozen values; only a strictly better value counts as an improvement, and NaN never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Stepped:
    """An optimizer step was made.

    Attributes:
        step: Its number, from 1.
        loss: The objective of the batch, a detached scalar on the model's device.
        rows: Samples in the batch.
    """

    step: int
    loss: Tensor = field(repr=False)
    rows: int


@final
@dataclass(frozen=True, kw_only=True)
class Validated:
    """The model was measured.

    Attributes:
        step: After which step.
        values: What was measured, by name.
        improved: Whether `listen` is better than ever before.
    """

    step: int
    values: dict[str, float]
    improved: bool


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run ended with.

    Attributes:
        steps: Optimizer steps that this run made.
        optimizer_state: Of the weights that the model now has.
        metric_values: All that was measured, the trainer's earlier values included.
        best_step: The step whose weights the model has.
        metrics: What was measured of those weights, by name; empty where they were not measured.
    """

    steps: int
    optimizer_state: dict[str, Any]
    metric_values: dict[str, list[float]]
    best_step: int
    metrics: dict[str, float]


@final
@dataclass(kw_only=True)
class Best:
    """The best value of `listen`, its step and state, and how many validations came since."""

    higher_is_better: bool
    value: float | None = None
    step: int = 0
    stale: int = 0
    state: dict[str, Any] | None = None

    def offer(self, value: float, step: int) -> bool:
        """Take a new value in; whether it is better than all before."""
        first = self.value is None and value == value
        if first or (
            self.value is not None and (value > self.value if self.higher_is_better else value < self.value)
        ):
            self.value, self.step, self.stale = value, step, 0
            return True
        self.stale += 1
        return False

    def capture(self) -> dict[str, Any]:
        """For a resumed run; the state is shared, since it is never changed in place."""
        return {"value": self.value, "step": self.step, "stale": self.stale, "state": self.state}

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Go on with what was captured."""
        self.value, self.step = captured["value"], captured["step"]
        self.stale, self.state = captured["stale"], captured["state"]
