"""The bar that a person sees while a run trains in the calling process.

Always: it owns one tqdm bar and closes it, however the run ends; without a terminal nothing is drawn unless
the setting asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, final

from tqdm import tqdm


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
