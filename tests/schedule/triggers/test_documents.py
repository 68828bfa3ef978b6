"""NewDocuments, Changed, MetricBelow, MetricAbove: counts, waiting, measurements."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from mongotorch import Changed, MetricAbove, MetricBelow, NewDocuments
from mongotorch.errors import ParameterError
from mongotorch.schedule import State, Trigger
from mongotorch.schedule.triggers import Waited

START = datetime(2026, 1, 1)
MINUTE = timedelta(minutes=1)


def seen(**given: Any) -> State:
    return State(since=START, arrived=START, **given)


@pytest.mark.parametrize(
    ("trigger", "state", "fires"),
    [
        (NewDocuments(3), seen(inserted=2, changed=99), False),
        (NewDocuments(3), seen(inserted=3, changed=3), True),
        (NewDocuments(3), seen(inserted=4, changed=4), True),
        (Changed(3), seen(inserted=0, changed=2), False),
        (Changed(3), seen(inserted=0, changed=3), True),
        (Changed(3), seen(inserted=2, changed=3), True),
    ],
)
def test_enough_fire(trigger: Trigger, state: State, fires: bool) -> None:
    decision, after = trigger.due(START, state)

    assert decision.fire is fires
    assert decision.next_at is None
    assert after == (State(since=START) if fires else state)


def test_the_reason_says_how_many() -> None:
    assert NewDocuments(1000).due(START, seen(inserted=1200))[0].reason == "1,200 new documents, at least 1,000"
    assert NewDocuments(1000).due(START, seen(inserted=1))[0].reason == "1 new document of 1,000"
    assert Changed(5).due(START, seen(changed=2))[0].reason == "2 changed documents of 5"


@pytest.mark.parametrize(
    "trigger", [NewDocuments(9, max_wait=60), Changed(9, max_wait=60), Waited(60), Waited(60, "changed")]
)
def test_fewer_fire_when_the_first_has_waited(trigger: Trigger) -> None:
    state = seen(inserted=1, changed=1)

    early, kept = trigger.due(START + MINUTE - timedelta(milliseconds=1), state)
    late, after = trigger.due(START + MINUTE, kept)

    assert (early.fire, early.next_at, kept) == (False, START + MINUTE, state)
    assert late.fire
    assert late.reason.startswith("1 ")
    assert after == State(since=START)
    assert trigger.due(START + 9 * MINUTE, after)[0].fire is False


def test_nothing_never_waits() -> None:
    decision, _ = NewDocuments(9, max_wait=60).due(START + timedelta(days=99), seen(changed=5))

    assert (decision.fire, decision.next_at) == (False, None)


def test_a_clock_that_goes_back_makes_nobody_wait_less_or_crash() -> None:
    decision, _ = NewDocuments(9, max_wait=60).due(START - timedelta(hours=1), seen(inserted=1))

    assert (decision.fire, decision.next_at) == (False, START + MINUTE)


@pytest.mark.parametrize(
    ("trigger", "value", "fires"),
    [
        (MetricBelow("accuracy", 0.9), 0.89, True),
        (MetricBelow("accuracy", 0.9), 0.9, False),
        (MetricBelow("accuracy", 0.9), 0.91, False),
        (MetricBelow("accuracy", 0.9), float("-inf"), True),
        (MetricAbove("accuracy", 0.9), 0.91, True),
        (MetricAbove("accuracy", 0.9), 0.9, False),
        (MetricAbove("accuracy", 0.9), 0.89, False),
        (MetricAbove("accuracy", 0.9), float("inf"), True),
    ],
)
def test_a_measurement_beyond_the_threshold_fires(trigger: Trigger, value: float, fires: bool) -> None:
    state = seen(inserted=4, changed=4, scores={"accuracy": value}, scored=START)

    decision, after = trigger.due(START + MINUTE, state)

    assert decision.fire is fires
    assert decision.next_at == START + timedelta(hours=1)
    assert (after.inserted, after.scores) == (0 if fires else 4, {"accuracy": value})


def test_the_reason_says_what_was_measured() -> None:
    trigger = MetricBelow("accuracy", 0.9)

    reasons = [
        trigger.due(START, seen(scores=scores, scored=START))[0].reason
        for scores in ({"accuracy": 0.75}, {"accuracy": 0.9}, {"accuracy": float("nan")}, {"objective": 1.0}, {})
    ]

    assert reasons == [
        "accuracy is 0.75, below 0.9",
        "accuracy is 0.9, just the threshold",
        "accuracy was measured as NaN, which says nothing",
        "accuracy was not measured; there is objective",
        "accuracy was not measured; there is nothing",
    ]


@pytest.mark.parametrize("scores", [{"accuracy": float("nan")}, {"objective": 0.1}, {}])
@pytest.mark.parametrize("kind", [MetricBelow, MetricAbove])
def test_what_says_nothing_fires_nothing(kind: type[MetricBelow | MetricAbove], scores: dict[str, float]) -> None:
    assert not kind("accuracy", 0.9).due(START, seen(scores=scores, scored=START))[0].fire


def test_a_measurement_is_judged_once_and_a_newer_one_anew() -> None:
    trigger, state = MetricBelow("accuracy", 0.9), seen(scores={"accuracy": 0.5}, scored=START)

    fired = []
    for scored in (START, START, START + MINUTE, START - MINUTE, START + 2 * MINUTE):
        state = seen(scores=state.scores, scored=scored, memory=state.memory)
        decision, state = trigger.due(START + timedelta(hours=1), state)
        fired.append(decision.fire)

    assert fired == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("scored", "next_at"),
    [(None, 60), (START, 60 - 1), (START - 61 * MINUTE, 60), (START - 60 * MINUTE + MINUTE, 60)],
)
def test_it_is_looked_at_again_when_the_next_measurement_is_due(scored: datetime | None, next_at: int) -> None:
    now = START + MINUTE

    decision, _ = MetricBelow("accuracy", 0.9).due(now, State(since=START, scored=scored))

    assert decision.next_at == now + next_at * MINUTE


def test_what_has_to_be_observed() -> None:
    assert NewDocuments(1).watches == {"inserted"}
    assert Changed(1).watches == {"changed"}
    trigger = MetricAbove("objective", 1, every_s=9, documents=5)
    assert trigger.watches == {"scores"}
    assert (trigger.score_every_s, trigger.score_documents) == (9, 5)
    assert (NewDocuments(1).score_every_s, NewDocuments(1).score_documents) == (None, None)


@pytest.mark.parametrize("kind", [NewDocuments, Changed])
@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 1, "max_wait": 0}, "max_wait"),
        ({"n": 1, "max_wait": float("nan")}, "max_wait"),
        ({"n": 1, "max_wait": "1h"}, "max_wait"),
    ],
)
def test_counts_that_cannot_work_are_refused(kind: Any, given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        kind(**given)

    assert caught.value.field == field


@pytest.mark.parametrize("kind", [MetricBelow, MetricAbove])
@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"metric": ""}, "metric"),
        ({"metric": len}, "metric"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"every_s": 0}, "every_s"),
        ({"documents": 0}, "documents"),
    ],
)
def test_measurements_that_cannot_work_are_refused(kind: Any, given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        kind(**{"metric": "accuracy", "threshold": 0.5, **given})

    assert caught.value.field == field


@pytest.mark.parametrize(("given", "field"), [({"seconds": 0}, "seconds"), ({"counts": "scores"}, "counts")])
def test_waiting_that_cannot_work_is_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        Waited(**{"seconds": 1, **given})

    assert caught.value.field == field


def test_triggers_of_documents_are_values() -> None:
    assert NewDocuments(3, max_wait=None) == NewDocuments(n=3)
    assert NewDocuments(3) != Changed(3)  # type: ignore[comparison-overlap]
    assert len({MetricBelow("a", 0.5), MetricBelow("a", 0.5, every_s=3600), MetricAbove("a", 0.5)}) == 2
    assert repr(NewDocuments(3)) == "NewDocuments(n=3, max_wait=None)"
