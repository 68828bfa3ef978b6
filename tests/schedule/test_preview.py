"""When a schedule would have fired: the year, arrivals, waiting, and what it cannot show."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from torch import nn

from mongotorch import (
    AllOf,
    AnyOf,
    Changed,
    Cron,
    Every,
    MetricBelow,
    NewDocuments,
    Query,
    Schedule,
    TorchModel,
    TorchTrainer,
)
from mongotorch.errors import ParameterError
from mongotorch.schedule import Decision, Firing, State, Trigger, preview
from mongotorch.schedule.schedule import MOST_ASKED

START = datetime(2026, 1, 1)
DAY = timedelta(days=1)
Make = Callable[..., Schedule]


@dataclasses.dataclass(frozen=True)
class Stuck(Trigger):
    def due(self, now: datetime, state: State) -> tuple[Decision, State]:
        return Decision(False, "again, at once", now), state


@pytest.fixture(scope="module")
def make() -> Make:
    trainer = TorchTrainer(
        "t",
        key=("x", "y"),
        select=Query.find("points"),
        objective=nn.functional.cross_entropy,
        model=TorchModel("m", object=nn.Linear(4, 3)),
    )
    return lambda trigger, **given: Schedule("s", trainer=trainer, trigger=trigger, **given)


def times(schedule: Schedule, days: float, arrivals: list[datetime] | None = None) -> list[datetime]:
    found = preview(schedule, since=START, until=START + days * DAY, arrivals=arrivals or [])
    return [firing.at for firing in found]


def test_a_year_of_nights_with_its_reasons(make: Make) -> None:
    found = preview(make(Cron("0 3 * * *", "Europe/Berlin")), since=START, until=START + 365 * DAY, arrivals=[])

    assert len(found) == 365
    assert found[0] == Firing(datetime(2026, 1, 1, 2), "2026-01-01 02:00:00 UTC, of '0 3 * * *' in Europe/Berlin")
    assert {at.hour for at in (firing.at for firing in found)} == {1, 2}


def test_a_year_of_minutes_is_quick(make: Make) -> None:
    began = time.perf_counter()

    number = len(times(make(Cron("* * * * *")), 36.5))

    assert number == 52_560
    assert time.perf_counter() - began < 10  # a tenth of a year in about a second; a shared machine may be slow


def test_arrivals_are_counted_in_whatever_order_and_the_end_counts(make: Make) -> None:
    arrivals = [START + n * DAY for n in (5, 1, 3, 2, 4, 6, 7)]

    assert times(make(NewDocuments(3)), 6, arrivals) == [START + 3 * DAY, START + 6 * DAY]
    assert times(make(Changed(3)), 5.9, arrivals) == [START + 3 * DAY]


def test_several_at_one_time_are_several(make: Make) -> None:
    assert times(make(NewDocuments(3)), 9, [START + DAY] * 7) == [START + DAY]
    assert times(make(NewDocuments(3)), 9, [START] * 3) == [START]


def test_what_arrived_outside_does_not_count(make: Make) -> None:
    arrivals = [START - DAY, START + DAY, START + 9 * DAY]

    assert times(make(NewDocuments(2)), 5, arrivals) == []
    assert times(make(NewDocuments(1)), 5, arrivals) == [START + DAY]


def test_what_has_waited_fires_between_arrivals(make: Make) -> None:
    arrivals = [START + DAY, START + 1.5 * DAY, START + 5 * DAY]

    assert times(make(NewDocuments(100), max_wait=86_400.0), 9, arrivals) == [START + 2 * DAY, START + 6 * DAY]


def test_combined_triggers_are_asked_as_by_the_scheduler(make: Make) -> None:
    arrivals = [START + n * DAY / 2 for n in range(1, 7)]

    assert times(make(AllOf(Every(86_400), NewDocuments(3))), 9, arrivals) == [START + 1.5 * DAY, START + 3 * DAY]
    both = times(make(AnyOf(Every(3 * 86_400), NewDocuments(4))), 9, arrivals)
    assert both == [START + 2 * DAY, START + 3 * DAY, START + 6 * DAY, START + 9 * DAY]


def test_aware_times_are_the_same_times(make: Make) -> None:
    berlin = ZoneInfo("Europe/Berlin")

    found = preview(
        make(NewDocuments(1)),
        since=START.replace(tzinfo=UTC),
        until=(START + DAY).replace(tzinfo=UTC),
        arrivals=(at for at in [datetime(2026, 1, 1, 12, tzinfo=berlin)]),
    )

    assert found == [Firing(datetime(2026, 1, 1, 11), "1 new document, at least 1")]


def test_a_schedule_that_is_paused_says_when_it_would(make: Make) -> None:
    assert len(times(make(Every(86_400), paused=True), 3)) == 3


@pytest.mark.parametrize("trigger", [MetricBelow("accuracy", 0.9), AnyOf(Every(60), MetricBelow("accuracy", 0.9))])
def test_nobody_measured_in_the_past(make: Make, trigger: Any) -> None:
    with pytest.raises(ParameterError, match="nobody took them in the past") as caught:
        times(make(trigger), 1)

    assert caught.value.field == "trigger"


def test_an_end_before_the_beginning_is_refused(make: Make) -> None:
    with pytest.raises(ParameterError) as caught:
        times(make(Every(60)), -1)

    assert caught.value.field == "until"


def test_a_trigger_that_would_never_let_time_pass_is_refused(make: Make) -> None:
    with pytest.raises(ParameterError, match="which is not later") as caught:
        times(make(Stuck()), 1)

    assert caught.value.field == "trigger"


def test_a_preview_of_too_many_firings_ends_with_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ASKED == 200_000
    monkeypatch.setattr("mongotorch.schedule.schedule.MOST_ASKED", 20_000)  # the same, sooner
    began = time.monotonic()
    for trigger in (Every(seconds=0.001), AnyOf(Every(seconds=0.001), NewDocuments(5)), Cron("* * * * * *")):
        with pytest.raises(ParameterError, match="more than 20,000 times") as caught:
            preview(make(trigger), since=datetime(2026, 1, 1), until=datetime(2027, 1, 1))
        assert caught.value.field == "until"
    assert time.monotonic() - began < 60


def test_a_preview_asks_once_for_each_arrival_however_many_there_are(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongotorch.schedule.schedule.MOST_ASKED", 10)  # fewer than the arrivals
    since = datetime(2026, 1, 1)
    arrivals = [since + timedelta(seconds=n) for n in range(100)]
    fired = preview(make(NewDocuments(10)), since=since, until=since + timedelta(days=1), arrivals=arrivals)
    assert len(fired) == 10
