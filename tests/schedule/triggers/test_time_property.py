"""Triggers of time for any expression, zone, beginning and sequence of questions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mongotorch import Cron, Every
from mongotorch.schedule import State
from mongotorch.schedule.triggers.time import Timed

pytestmark = pytest.mark.property

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]
EXPRESSIONS = [
    "30 2 * * *",
    "0,30 1-3 * * *",
    "*/20 * * * *",
    "5 */2 * * *",
    "0 3 * * SUN",
    "59 23 L * *",
    "0 * 1 * *",
]
begins = st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 1)).map(lambda at: at.replace(microsecond=0))
# Around the nights in which clocks change, and elsewhere.
nights = st.sampled_from(
    [datetime(2026, 3, 8), datetime(2026, 3, 29), datetime(2026, 10, 25), datetime(2026, 11, 1)]
)
near = st.builds(lambda at, minutes: at + timedelta(minutes=minutes), nights, st.integers(-720, 1440))


def moments(trigger: Timed, since: datetime, until: datetime) -> list[datetime]:
    found, at = [], trigger.after(since, since)
    while at is not None and at <= until:
        found.append(at)
        at = trigger.after(at, since)
    return found


@settings(max_examples=150)
@given(
    expression=st.sampled_from(EXPRESSIONS),
    zone=st.sampled_from(ZONES),
    since=st.one_of(begins, near),
    hours=st.integers(1, 100),
)
def test_one_long_sleep_answers_what_being_awake_would_have(
    expression: str, zone: str, since: datetime, hours: int
) -> None:
    trigger, now = Cron(expression, zone), since + timedelta(hours=hours)
    awake = moments(trigger, since, now)

    decision, state = trigger.due(now, State(since=since))

    assert awake == sorted(set(awake))
    assert decision.fire is bool(awake)
    assert decision.next_at == trigger.after(now, since)
    if awake:
        assert state.memory == {"last": awake[-1]}
        assert trigger.count(since, awake[-1], since) == len(awake)


@settings(max_examples=100)
@given(
    zone=st.sampled_from(ZONES), since=st.one_of(begins, near), minute=st.integers(0, 59), hour=st.integers(0, 23)
)
def test_a_moment_a_day_is_one_a_day_at_its_time_unless_that_does_not_exist(
    zone: str, since: datetime, minute: int, hour: int
) -> None:
    found = moments(Cron(f"{minute} {hour} * * *", zone), since, since + timedelta(days=5))

    days = [at.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)) for at in found]
    assert len({day.date() for day in days}) == len(days)
    assert len(days) in (4, 5, 6)
    for day in days:
        wanted = day.replace(hour=hour, minute=minute, second=0, fold=0)
        exists = wanted.astimezone(UTC).astimezone(ZoneInfo(zone)).replace(tzinfo=None) == wanted.replace(
            tzinfo=None
        )
        assert not exists or day == wanted


@given(
    milliseconds=st.integers(1, 10**9),
    since=begins,
    asked=st.lists(st.integers(-(10**10), 10**11), min_size=1, max_size=20),
)
def test_every_fires_once_for_what_is_new_whatever_the_clock_does(
    milliseconds: int, since: datetime, asked: list[int]
) -> None:
    trigger, state, answered = Every(milliseconds / 1000), State(since=since), 0
    for now in asked:
        decision, state = trigger.due(since + timedelta(milliseconds=now), state)
        assert decision.fire is (now // milliseconds > answered)
        answered = max(answered, now // milliseconds)
        assert decision.next_at is not None
        wanted = (max(answered, now // milliseconds) + 1) * milliseconds
        assert decision.next_at - since == timedelta(milliseconds=wanted)


@given(since=begins, back=st.lists(st.integers(-5000, 5000), min_size=2, max_size=30))
def test_no_moment_fires_twice_however_the_clock_jumps(since: datetime, back: list[int]) -> None:
    assume(len(set(back)) > 1)
    # The offsets of Berlin are whole hours, so these are its minutes too.
    trigger, state, answered = Cron("*/7 * * * *", "Europe/Berlin"), State(since=since), since
    for minutes in back:
        now = since + timedelta(minutes=minutes)
        coming = [at for at in _minutes(answered, now) if at.minute % 7 == 0]
        decision, state = trigger.due(now, state)
        assert decision.fire is bool(coming)
        answered = max(coming, default=answered)
        assert state.memory.get("last", since) == answered


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_in_a_zone_without_changes_the_moments_are_those_that_the_expression_says(expression: str) -> None:
    since = datetime(2026, 1, 30, 12, 34, 56)
    until = since + timedelta(days=70)
    expected = [at for at in _minutes(since, until) if _is_of(expression, at)]
    assert moments(Cron(expression, "UTC"), since, until) == expected
    assert len(expected) >= 2


def _minutes(after: datetime, until: datetime) -> list[datetime]:
    """The full minutes after a time, up to another one."""
    first = after.replace(second=0, microsecond=0) + timedelta(minutes=1)
    count = int((until - first).total_seconds() // 60) + 1
    return [first + timedelta(minutes=n) for n in range(max(count, 0))]


def _is_of(expression: str, at: datetime) -> bool:
    """Whether a minute is one of `EXPRESSIONS`, read by hand."""
    last_day = (at + timedelta(days=1)).month != at.month
    return {
        "30 2 * * *": (at.hour, at.minute) == (2, 30),
        "0,30 1-3 * * *": at.minute in (0, 30) and 1 <= at.hour <= 3,
        "*/20 * * * *": at.minute % 20 == 0,
        "5 */2 * * *": at.minute == 5 and at.hour % 2 == 0,
        "0 3 * * SUN": at.weekday() == 6 and (at.hour, at.minute) == (3, 0),
        "59 23 L * *": last_day and (at.hour, at.minute) == (23, 59),
        "0 * 1 * *": at.day == 1 and at.minute == 0,
    }[expression]
