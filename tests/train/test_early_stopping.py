"""When a run stops early, and which step it keeps."""

from __future__ import annotations

import math

import pytest

from mongotorch import Metric, Validation
from mongotorch.train.evaluation import EarlyStopping

VALIDATION = Validation("v", metrics=[Metric("hits", object=max), Metric("misses", object=max, mode="min")])


@pytest.mark.parametrize(
    ("listen", "values", "best"),
    [
        ("objective", [3.0, 2.0, 2.0, 2.5], 2),
        ("hits", [1.0, 3.0, 3.0, 2.0], 2),
        ("misses", [3.0, 4.0, 1.0, 1.0], 3),
        ("objective", [math.nan, 2.0, math.nan], 2),
        ("objective", [math.inf, 5.0], 2),
    ],
)
def test_only_a_strictly_better_value_is_an_improvement(listen: str, values: list[float], best: int) -> None:
    stopping = EarlyStopping(listen, VALIDATION, 10)
    improved = [step for step, value in enumerate(values, 1) if stopping.update(value, step)]
    assert (improved[-1], stopping.step, stopping.value) == (best, best, values[best - 1])
    assert stopping.stale == len(values) - best


def test_a_run_stops_after_so_many_validations_without_an_improvement_also_when_resumed() -> None:
    stopping = EarlyStopping("objective", None, 2)
    for step, value in enumerate([3.0, 4.0], 1):
        stopping.update(value, step)
    assert not stopping.should_stop
    resumed = EarlyStopping("objective", None, 2)
    resumed.load_state_dict(stopping.state_dict())
    resumed.update(3.0, 3)
    assert resumed.should_stop
    assert (resumed.step, resumed.value) == (1, 3.0)
