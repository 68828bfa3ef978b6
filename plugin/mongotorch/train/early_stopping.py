"""Keeps the best validation of a run, with the weights it measured, and stops a run that no longer improves.

Guarantees: only a strictly better value is an improvement, and NaN never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.signature import OBJECTIVE
from mongotorch.train.metrics import Validation


@final
class EarlyStopping:
    """The best value of the metric that a trainer listens to.

    Args:
        listen: The name of the metric.
        validation: What the model's validation measures; None: the objective only.
        no_improve_then_stop: Validations in a row without an improvement after which the run stops.

    Attributes:
        value: The best value; None before the first that is a number.
        step: The optimizer step after which it was measured.
        stale: How many validations there were since.
        state: Weights, optimizer state and metrics of that step; the caller sets it.
    """

    def __init__(self, listen: str, validation: Validation | None, no_improve_then_stop: int) -> None:
        self._higher_is_better = (
            listen != OBJECTIVE and validation is not None and bool(validation.higher_is_better(listen))
        )
        self._no_improve_then_stop = no_improve_then_stop
        self.value: float | None = None
        self.step, self.stale = 0, 0
        self.state: dict[str, Any] | None = None

    @property
    def should_stop(self) -> bool:
        """Whether the run has gone too long without an improvement."""
        return self.stale >= self._no_improve_then_stop

    def update(self, value: float, step: int) -> bool:
        """Take in the value measured after a step; whether it is better than all before."""
        if self.value is None:
            improved = value == value  # not NaN
        else:
            improved = value > self.value if self._higher_is_better else value < self.value
        if improved:
            self.value, self.step, self.stale = value, step, 0
        else:
            self.stale += 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; `state` is shared, since it is never changed in place."""
        return {"value": self.value, "step": self.step, "stale": self.stale, "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.value, self.step = state["value"], state["step"]
        self.stale, self.state = state["stale"], state["state"]
