"""Cron and Every: summer time, clocks that jump, moments that were missed; a year of it without waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest
import time_machine
from cronsim import CronSimError

from mongotorch import Cron, Every
from mongotorch.errors import ParameterError
from mongotorch.schedule import State, Trigger

START = datetime(2026, 1, 1)
SECOND = timedelta(seconds=1)
TWICE = ["25 00:30+0200", "25 01:30+0200", "25 02:30+0200", "25 02:30+0100"]


def firings(trigger: Trigger, since: datetime, until: datetime) -> list[datetime]:
    """When it fires, asked just when it wants to be asked."""
    state, now, found = State(since=since), since, []
    while now <= until:
        decision, state = trigger.due(now, state)
        if decision.fire:
            found.append(now)
        if decision.next_at is None:
            break
        now = decision.next_at
    return found


def local(zone: str, found: list[datetime]) -> list[str]:
    return [at.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)).strftime("%d %H:%M%z") for at in found]


@pytest.mark.parametrize(
    ("trigger", "number"),
    [
        (Cron("0 * * * *", "Europe/Berlin"), 8760),
        (Cron("0 3 * * *", "Europe/Berlin"), 365),
        (Cron("30 2 * * *", "Europe/Berlin"), 365),
        (Cron("30 1 * * *", "America/New_York"), 365),
        (Cron("0 9 * * MON-FRI", "America/New_York"), 261),
        (Cron("0 0 L * *"), 12),
        (Cron("0 0 29 2 *"), 0),
        (Every(3600), 8760),
        (Every(86_400.0), 365),
    ],
    ids=repr,
)
def test_a_year_has_exactly_its_moments(trigger: Trigger, number: int) -> None:
    # From one second past to the next year's first second: of midnights just one.
    found = firings(trigger, START + SECOND, datetime(2027, 1, 1, 0, 0, 1))

    assert len(found) == number
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("zone", "expression", "since", "expected"),
    [
        # Clocks go from 02:00 to 03:00 on the 29th of March.
        ("Europe/Berlin", "30 2 * * *", (3, 28), ["28 02:30+0100", "29 03:00+0200", "30 02:30+0200"]),
        ("Europe/Berlin", "0 3 * * *", (3, 28), ["28 03:00+0100", "29 03:00+0200", "30 03:00+0200"]),
        ("Europe/Berlin", "15,45 2 * * *", (3, 29), ["29 03:00+0200", "30 02:15+0200", "30 02:45+0200"]),
        # And from 03:00 back to 02:00 on the 25th of October.
        ("Europe/Berlin", "30 2 * * *", (10, 24), ["24 02:30+0200", "25 02:30+0200", "26 02:30+0100"]),
        ("Europe/Berlin", "30 1,2 25 * *", (10, 25), ["25 01:30+0200", "25 02:30+0200"]),
        (
            "Europe/Berlin",
            "30 * 25 * *",
            (10, 25),
            TWICE,
        ),
        # From 02:00 to 03:00 on the 8th of March, from 02:00 back to 01:00 on the 1st of November.
        ("America/New_York", "30 2 * * *", (3, 7), ["07 02:30-0500", "08 03:00-0400", "09 02:30-0400"]),
        ("America/New_York", "30 1 * * *", (10, 31), ["31 01:30-0400", "01 01:30-0400", "02 01:30-0500"]),
        ("America/New_York", "0 */2 8 3 *", (3, 8), ["08 00:00-0500", "08 04:00-0400", "08 06:00-0400"]),
    ],
)
def test_clocks_that_change_are_treated_as_by_cron(
    zone: str, expression: str, since: tuple[int, int], expected: list[str]
) -> None:
    begin = datetime(2026, *since, tzinfo=ZoneInfo(zone)).astimezone(UTC).replace(tzinfo=None) - SECOND

    found = firings(Cron(expression, zone), begin, begin + timedelta(days=4))

    assert local(zone, found)[: len(expected)] == expected


@pytest.mark.parametrize(("day", "number"), [((3, 29), 46), ((10, 25), 50), ((6, 1), 48)])
def test_half_hours_go_by_the_time_that_passes(day: tuple[int, int], number: int) -> None:
    zone = ZoneInfo("Europe/Berlin")
    begin, end = (
        datetime(2026, day[0], day[1] + more, tzinfo=zone).astimezone(UTC).replace(tzinfo=None) for more in (0, 1)
    )

    assert len(firings(Cron("*/30 * * * *", "Europe/Berlin"), begin - SECOND, end - SECOND)) == number


def test_in_the_hour_that_comes_twice_the_newest_moment_is_the_first_one() -> None:
    trigger, begin = Cron("30 2 * * *", "Europe/Berlin"), datetime(2026, 10, 20)
    in_the_second_pass = datetime(2026, 10, 25, 1, 10)  # 02:10 for the second time; 02:30 was at 00:30 UTC

    decision, state = trigger.due(in_the_second_pass, State(since=begin))

    assert decision.fire
    assert state.memory == {"last": datetime(2026, 10, 25, 0, 30)}
    assert decision.next_at == datetime(2026, 10, 26, 1, 30)


@pytest.mark.parametrize("trigger", [Cron("0 * * * *"), Every(3600), Cron("0 * * * *", catch_up=False)], ids=repr)
def test_a_clock_that_goes_back_repeats_no_moment(trigger: Trigger) -> None:
    state, found = State(since=START), []
    for minutes in (61, 60, 30, 59, 60, 90, -600, 61, 119, 120, 119, 120, 121, 60, 180):
        now = START + timedelta(minutes=minutes)
        decision, state = trigger.due(now, state)
        assert decision.next_at is not None
        assert decision.next_at > now
        if decision.fire:
            found.append(minutes)

    assert found == [61, 120, 180]


@pytest.mark.parametrize("trigger", [Cron("* * * * *", "Europe/Berlin"), Every(60), Cron("* * * * * *")], ids=repr)
def test_a_clock_that_jumps_ten_years_ahead_fires_once_and_at_once(trigger: Trigger) -> None:
    now = datetime(2036, 2, 3, 4, 5, 6)
    began = time.perf_counter()

    decision, state = trigger.due(now, State(since=START))

    assert time.perf_counter() - began < 5  # five million moments are not walked over
    assert decision.fire
    assert "1,000 or more moments" in decision.reason
    assert decision.next_at is not None
    assert timedelta(0) < decision.next_at - now <= timedelta(seconds=60)
    assert not trigger.due(now, state)[0].fire


@pytest.mark.parametrize("trigger", [Cron("0 3 * * *"), Every(86_400)], ids=repr)
def test_moments_that_were_missed_are_one_firing_that_says_how_many(trigger: Trigger) -> None:
    state = State(since=START, inserted=7, changed=9, arrived=START)

    decision, after = trigger.due(START + timedelta(days=5, hours=2), state)

    assert decision.fire
    assert decision.reason.startswith("one run for 5 moments of ")
    assert (after.inserted, after.changed, after.arrived) == (0, 0, None)


@pytest.mark.parametrize("trigger", [Cron("0 3 * * *", catch_up=False), Every(86_400, catch_up=False)], ids=repr)
def test_without_catch_up_the_next_one_counts(trigger: Trigger) -> None:
    state = State(since=START, inserted=7, changed=9, arrived=START)

    decision, after = trigger.due(START + timedelta(days=5, hours=2), state)

    assert not decision.fire
    assert "5 moments" in decision.reason
    assert (after.inserted, after.changed, after.arrived) == (7, 9, START)
    assert decision.next_at is not None
    assert trigger.due(decision.next_at, after)[0].fire


@pytest.mark.parametrize("catch_up", [True, False])
@pytest.mark.parametrize(("late_s", "fires"), [(0, True), (60, True), (60.001, False)])
def test_a_minute_late_is_not_missed(catch_up: bool, late_s: float, fires: bool) -> None:
    for trigger in (Cron("0 3 * * *", catch_up=catch_up), Every(3 * 3600, catch_up=catch_up)):
        decision, _ = trigger.due(START + timedelta(hours=3, seconds=late_s), State(since=START))
        assert decision.fire is (fires or catch_up)


def test_without_catch_up_a_newest_moment_in_time_fires_though_older_ones_were_missed() -> None:
    decision, state = Cron("0 * * * *", catch_up=False).due(
        START + timedelta(hours=9, seconds=5), State(since=START)
    )

    assert decision.fire
    assert decision.reason.startswith("only the newest counts of 9 moments")
    assert state.memory == {"last": START + timedelta(hours=9)}


def test_every_stays_on_its_grid_however_late_it_is_asked() -> None:
    trigger, state, found = Every(10), State(since=START), []
    for seconds in (10.4, 20.9, 37.2, 40.0, 40.001, 49.999, 50):
        decision, state = trigger.due(START + timedelta(seconds=seconds), state)
        if decision.fire:
            found.append((seconds, state.memory["last"] - START))
        assert decision.next_at is not None
        assert (decision.next_at - START) % timedelta(seconds=10) == timedelta(0)

    assert found == [
        (late, timedelta(seconds=at)) for late, at in [(10.4, 10), (20.9, 20), (37.2, 30), (40, 40), (50, 50)]
    ]


def test_moments_of_seconds_are_a_sixth_field() -> None:
    found = firings(Cron("*/20 0 0 * * *"), START - SECOND, START + timedelta(minutes=5))

    assert found == [START, START + 20 * SECOND, START + 40 * SECOND]


def test_an_aware_time_is_the_same_time() -> None:
    trigger, state = Cron("0 3 * * *"), State(since=START.replace(tzinfo=UTC))
    now = datetime(2026, 1, 1, 4, tzinfo=ZoneInfo("Europe/Berlin"))

    assert state == State(since=START)
    assert trigger.due(now, state) == trigger.due(datetime(2026, 1, 1, 3), state)


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(datetime(2026, 3, 29, 0, 59, 59, tzinfo=UTC), tick=False) as traveller:
        yield traveller


def test_by_the_real_clock_of_a_machine_that_travels(clock: time_machine.Traveller) -> None:
    """What a scheduler does, which asks about the time it is."""
    trigger, state, found = Cron("30 2 * * *", "Europe/Berlin"), State(since=datetime.now(UTC)), []
    for shift in (0, 1, 3600, -7200, 5400, 86_400, -86_400, 86_400 * 2):
        clock.shift(shift)
        decision, state = trigger.due(datetime.now(UTC), state)
        if decision.fire:
            found.append(datetime.now(UTC).strftime("%d %H:%M"))

    assert found == ["29 01:00", "30 01:30", "31 01:30"]


@pytest.mark.parametrize(
    ("given", "field", "cause"),
    [
        ({"expression": "0 3 * *"}, "expression", CronSimError),
        ({"expression": "61 * * * *"}, "expression", CronSimError),
        ({"expression": "0 0 31 2 *"}, "expression", CronSimError),
        ({"expression": "* * */20 * 1L"}, "expression", type(None)),
        ({"expression": ""}, "expression", CronSimError),
        ({"expression": None}, "expression", type(None)),
        ({"expression": "0 3 * * *", "tz": "Europe/Nowhere"}, "tz", ZoneInfoNotFoundError),
        ({"expression": "0 3 * * *", "tz": "../../etc/passwd"}, "tz", ValueError),
        ({"expression": "0 3 * * *", "tz": "Europe"}, "tz", Exception),
        ({"expression": "0 3 * * *", "tz": ""}, "tz", Exception),
        ({"expression": "0 3 * * *", "tz": UTC}, "tz", type(None)),
        ({"expression": "0 3 * * *", "catch_up": 1}, "catch_up", type(None)),
    ],
)
def test_a_cron_that_cannot_work_is_refused(given: dict[str, Any], field: str, cause: type[BaseException]) -> None:
    with pytest.raises(ParameterError) as caught:
        Cron(**given)

    assert caught.value.field == field
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e11, "60", None, True])
def test_an_interval_that_cannot_work_is_refused(seconds: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        Every(seconds)

    assert caught.value.field == "seconds"


def test_triggers_of_time_are_values() -> None:
    assert Cron("0 3 * * *", "UTC") == Cron(expression="0 3 * * *")
    assert Cron("0 3 * * *") != Cron("0 3 * * *", catch_up=False)
    assert len({Every(60), Every(seconds=60), Every(61)}) == 2
    assert (
        repr(Cron("0 3 * * *", tz="Europe/Berlin"))
        == "Cron(expression='0 3 * * *', tz='Europe/Berlin', catch_up=True)"
    )
    assert Every(60).watches == Cron("0 3 * * *").watches == frozenset()


def test_a_plan_of_which_no_moment_comes_any_more_does_not_fire() -> None:
    last = datetime(9999, 12, 31, 12)
    decision, state = Every(seconds=86_400).due(datetime(9999, 12, 31, 23), State(since=last))

    assert not decision.fire
    assert decision.next_at is None
    assert "no more moments" in decision.reason
    assert state == State(since=last)
