"""Keeps the exponential mean of the weights over the steps, which is validated and published for `ema_decay`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@final
class WeightAverage:
    """The exponential mean of the trained parameters over the steps; buffers are those of the last step.

    Args:
        decay: What part of the mean a step keeps.
        parameters: Gives the parameters.
    """

    def __init__(self, decay: float, parameters: Callable[[], list[nn.Parameter]]) -> None:
        self._blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._current = parameters
        self._means: list[Tensor] = []

    def update(self) -> None:
        """Take in the parameters as they are; the first time they are the mean."""
        current = [parameter.detach() for parameter in self._current()]
        if self._means:
            self._blend(self._means, current, 0)
        else:
            self._means = [parameter.clone() for parameter in current]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean in place of the parameters inside; without a step so far there is nothing to put."""
        before = [parameter.detach().clone() for parameter in self._current()] if self._means else []
        self.apply()
        try:
            yield
        finally:
            self._put(before)

    def apply(self) -> None:
        """Put the mean in place of the parameters."""
        self._put(self._means)

    def state_dict(self) -> list[Tensor]:
        """Copies of the means, in the order of the parameters."""
        return [mean.clone() for mean in self._means]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._means = [mean.to(one.device).clone() for mean, one in zip(state, self._current(), strict=False)]

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._current(), values, strict=False):
                parameter.copy_(value)
