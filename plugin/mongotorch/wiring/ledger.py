"""What a job's document says of how far its run is.

Always: it is made of the run's own events; a rate and a time left are said when two steps were made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from mongotorch.train import Event, Stepped


@final
class Ledger:
    """The progress of one run.

    Args:
        limit: The most steps it makes; None where that is no number to show.
        clock: Seconds that only grow.

    Attributes:
        progress: Plain BSON.
    """

    def __init__(self, *, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._limit = clock, limit
        self._begun: float | None = None
        self._first_step = 0
        self.progress: dict[str, Any] = {"step": 0, "samples": 0, "max_steps": limit}

    def take(self, event: Event) -> None:
        """Take in what happened."""
        if not isinstance(event, Stepped):
            self.progress = {**self.progress, "values": event.values, "validated_step": event.step}
            return
        now = self._clock()
        if self._begun is None:
            self._begun, self._first_step = now, event.step
        samples = self.progress["samples"] + event.rows
        self.progress = {**self.progress, "step": event.step, "samples": samples}
        elapsed, steps = now - self._begun, event.step - self._first_step
        if elapsed > 0 and steps > 0:
            self.progress["samples_per_s"] = round(samples / elapsed, 1)
            if self._limit is not None:
                self.progress["left_s"] = round(elapsed / steps * (self._limit - event.step), 1)
