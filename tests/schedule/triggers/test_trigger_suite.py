"""The built-in triggers pass the suite that triggers inherit."""

from __future__ import annotations

import pytest

from mongotorch import AllOf, AnyOf, Changed, Cron, Every, MetricAbove, MetricBelow, NewDocuments
from mongotorch.schedule.triggers import Waited
from mongotorch.testing.triggers import TriggerSuite

TRIGGERS = [
    Cron("0 */6 * * *"),
    Cron("30 2 * * *", "Europe/Berlin", catch_up=False),
    Every(4000),
    Every(0.5, catch_up=False),
    NewDocuments(50),
    NewDocuments(10**6, max_wait=9000),
    Changed(70, max_wait=9000.5),
    Waited(7200.0),
    Waited(7200.0, "changed"),
    MetricBelow("accuracy", 0.3),
    MetricAbove("objective", 0.3, every_s=60, documents=10),
    AnyOf(Cron("0 3 * * *"), NewDocuments(100), MetricBelow("accuracy", 0.1)),
    AllOf(Every(20_000), NewDocuments(30, max_wait=5000), MetricAbove("objective", 0.5)),
    AnyOf(AllOf(Every(9000), Changed(60)), AllOf(AnyOf(Cron("0 4 * * *"), Every(70_000)), NewDocuments(5))),
]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
class TestTriggers(TriggerSuite):
    pass
