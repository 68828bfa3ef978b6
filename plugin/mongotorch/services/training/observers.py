"""What a job's document says of how far its run is.

Always: it is made of the run's own events; a rate and a time left are said when two steps were made.

The bar that a person sees while a run trains in the calling process.

Always: it owns one tqdm bar and closes it, however the run ends; without a terminal nothing is drawn unless
the setting asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, final

from tqdm import tqdm

from mongotorch.train import Event, Stepped


@final
class JobProgress:
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


@final
class ProgressBar:
    """One bar over the steps of one run.

    Args:
        title: What is trained.
        max_steps: The most steps; None when only early stopping ends the run.
        show: True draws, False does not, None draws on a terminal only.
    """

    def __init__(self, title: str, *, max_steps: int | None, show: bool | None) -> None:
        # tqdm draws when `disable` is False, never when True, and on a terminal only when None.
        self._bar: tqdm[Any] = tqdm(
            total=max_steps, desc=title, unit="step", disable=None if show is None else not show
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, number: int) -> None:
        """So many optimizer steps have been made; a resumed run starts where it left off."""
        self._bar.update(number - self._bar.n)

    def show(self, values: Mapping[str, float]) -> None:
        """Show what was last measured beside the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
