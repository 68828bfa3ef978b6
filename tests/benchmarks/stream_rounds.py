"""Interleaved rounds: every contender once a round, so that what the machine does meanwhile hits them all alike.

Always: the first round warms up and does not count; a ratio is the median of the ratios inside each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.benchmarks.stream_data import CLASSES, FEATURES
from torch import nn

Contender = Callable[[], object]


@dataclass
class Rounds:
    """What was measured of a group of contenders, seconds by name, one each round.

    `larger` says how many times as much an epoch is, where one serves a part of it, or several.
    """

    contenders: dict[str, Contender]
    larger: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, say: Callable[[str], object]) -> Rounds:
        """Measure; the order inside a round is reversed every other time."""
        names = list(self.contenders)
        for number in range(rounds + 1):
            for name in names if number % 2 else reversed(names):
                start = time.perf_counter()
                self.contenders[name]()
                spent = time.perf_counter() - start
                if number:
                    self.seconds.setdefault(name, []).append(spent * self.larger.get(name, 1))
            say(f"round {number} of {rounds}" if number else "warm")
        return self

    def speed(self, name: str, over: str) -> float | None:
        """How many times as fast as another, the median of the rounds; None where one of them is missing."""
        if name not in self.seconds or over not in self.seconds:
            return None
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(other / own for own, other in pairs)

    def rates(self, count: int) -> dict[str, float]:
        """Samples a second, the medians."""
        return {name: count / statistics.median(times) for name, times in self.seconds.items()}


def drained(batches: Callable[[], Any]) -> Contender:
    """Take every batch and do nothing with it."""

    def run() -> int:
        return sum(1 for _ in batches())

    return run


def trained(
    batches: Callable[[], Any], width: int, *, epochs: int = 1, end: Callable[[], object] | None = None
) -> Contender:
    """Epochs in a row of a perceptron with one hidden layer of `width`, by SGD, and then what ends them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def run() -> int:
        steps = 0
        for _ in range(epochs):
            for batch in batches():
                x, y = batch.values() if isinstance(batch, dict) else batch
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
        if end is not None:
            end()
        return steps

    return run


def step_seconds(width: int, rows: int) -> float:
    """How long one step of such a net takes, the median of 50."""
    return statistics.median(_steps(width, rows))


def _steps(width: int, rows: int) -> list[float]:
    batch = torch.randn(rows, FEATURES), torch.randint(0, CLASSES, (rows,))
    run = trained(lambda: [batch], width)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def slow_width(rows: int, least: float = 0.001) -> int:
    """A width whose step takes at least so many seconds on this machine, at its fastest: also in a better hour."""
    width = 128
    while min(_steps(width, rows)) < least and width < 8192:
        width *= 2
    return width
