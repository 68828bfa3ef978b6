"""AnyOf and AllOf: what fires, what is remembered, what is consumed, and nesting."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Any

import bson
import pytest

from mongotorch import AllOf, AnyOf, Changed, Cron, Every, MetricAbove, MetricBelow, NewDocuments
from mongotorch.errors import ParameterError
from mongotorch.schedule import State, Trigger

START = datetime(2026, 1, 1)
HOUR = timedelta(hours=1)


class Observed:
    """A trigger, asked again and again, with what is observed in between."""

    def __init__(self, trigger: Trigger) -> None:
        self.trigger, self.state = trigger, State(since=START)

    def ask(self, hours: float, *, inserted: int = 0, changed: int = 0, **given: Any) -> bool:
        now = START + hours * HOUR
        self.state = dataclasses.replace(
            self.state,
            inserted=self.state.inserted + inserted,
            changed=self.state.changed + inserted + changed,
            arrived=self.state.arrived or (now if inserted or changed else None),
            **given,
        )
        self.decision, state = self.trigger.due(now, self.state)
        self.state = State.from_document(bson.decode(bson.encode(state.to_document())))
        return self.decision.fire


def test_any_of_fires_for_each_of_them() -> None:
    case = Observed(AnyOf(NewDocuments(10), Every(86_400)))

    assert [case.ask(1, inserted=9), case.ask(2, inserted=1), case.ask(3, inserted=9)] == [
        False,
        True,
        False,
    ]
    assert case.decision.next_at == START + 24 * HOUR
    assert case.ask(24)
    assert case.state.inserted == 0
    assert case.decision.next_at == START + 48 * HOUR


def test_several_at_once_are_one_firing_with_all_reasons() -> None:
    case = Observed(AnyOf(NewDocuments(10), Every(3600), Changed(99)))

    assert case.ask(1, inserted=10)
    assert case.decision.reason == "10 new documents, at least 10; 2026-01-01 01:00:00 UTC, of every 3600 s"
    assert not case.ask(1)


def test_any_of_keeps_the_memory_of_each() -> None:
    case = Observed(AnyOf(Every(3600), Every(7200), MetricBelow("a", 0.5)))

    case.ask(2.5, scores={"a": 0.7}, scored=START)

    assert case.state.memory == {
        "0": {"last": START + 2 * HOUR},
        "1": {"last": START + 2 * HOUR},
        "2": {"scored": START},
    }


def test_all_of_holds_what_has_fired_until_the_last_has() -> None:
    case = Observed(AllOf(Every(3600), NewDocuments(10)))

    assert [case.ask(1), case.ask(1.5, inserted=9)] == [False, False]
    assert case.decision.reason == "1 of 2 have fired; 9 new documents of 10"
    assert case.state.inserted == 9
    assert case.ask(1.7, inserted=1)
    assert case.decision.reason == "2026-01-01 01:00:00 UTC, of every 3600 s; 10 new documents, at least 10"
    assert case.state.consumed() == case.state


def test_the_counters_are_consumed_when_all_of_them_fire_and_not_before() -> None:
    case = Observed(AllOf(NewDocuments(10), Every(3600)))

    assert not case.ask(0.5, inserted=12)
    assert case.state.inserted == 12
    assert not case.ask(0.7, inserted=3)
    assert case.ask(1)
    assert case.state.inserted == 0


def test_after_a_firing_all_have_to_fire_anew() -> None:
    case = Observed(AllOf(Every(3600), NewDocuments(10)))

    # Hours that pass while documents are waited for are answered by the same firing, not kept for the next.
    assert [case.ask(hours) for hours in (1, 2, 3)] == [False, False, False]
    assert case.ask(3.5, inserted=10)
    assert not case.ask(3.6, inserted=10)
    assert case.decision.next_at == START + 4 * HOUR
    assert case.ask(4)


def test_a_measurement_is_held_too() -> None:
    case = Observed(AllOf(MetricAbove("objective", 1.0), NewDocuments(5)))

    assert not case.ask(1, scores={"objective": 2.0}, scored=START)
    assert not case.ask(2, scores={"objective": 0.5}, scored=START + HOUR)
    assert case.ask(3, inserted=5)
    assert not case.ask(4, inserted=5)


def test_documents_that_another_run_has_used_up_hold_nothing() -> None:
    case = Observed(AllOf(NewDocuments(10), Every(3600)))
    case.ask(0.5, inserted=10)

    case.state = case.state.consumed()  # somebody fired the schedule by hand

    assert not case.ask(1)
    assert case.ask(1.1, inserted=10)


def test_nested_in_another_the_same_holds() -> None:
    case = Observed(AnyOf(AllOf(NewDocuments(10), Every(36_000)), MetricBelow("a", 0.5)))

    assert not case.ask(1, inserted=10)
    assert case.ask(2, scores={"a": 0.1}, scored=START)
    assert not case.ask(10)
    assert not case.ask(11, inserted=9)
    assert case.ask(12, inserted=1)
    assert case.decision.reason.startswith("10 new documents, at least 10; ")


def test_all_of_any_of_needs_one_of_each() -> None:
    case = Observed(AllOf(AnyOf(Every(3600), NewDocuments(100)), Changed(5)))

    assert not case.ask(1)
    assert case.ask(1.5, changed=5)
    assert not case.ask(1.6, changed=5)
    assert case.ask(1.7, inserted=100)


def test_max_wait_inside_still_wakes() -> None:
    case = Observed(AllOf(NewDocuments(10, max_wait=600), Every(3600)))

    case.ask(1)
    case.ask(1, inserted=1)

    assert case.decision.next_at == START + HOUR + timedelta(minutes=10)
    assert case.ask(1 + 1 / 6)


def test_what_is_case_is_put_together() -> None:
    trigger = AnyOf(
        NewDocuments(3),
        AllOf(MetricBelow("a", 1, every_s=60, documents=10), MetricAbove("b", 1, every_s=600, documents=99)),
        Cron("0 3 * * *"),
    )

    assert trigger.watches == {"inserted", "scores"}
    assert (trigger.score_every_s, trigger.score_documents) == (60, 99)
    assert not AllOf(Every(1)).watches
    assert (AllOf(Every(1)).score_every_s, AllOf(Every(1)).score_documents) == (None, None)


@pytest.mark.parametrize("kind", [AnyOf, AllOf])
@pytest.mark.parametrize(
    "parts", [(), ("0 3 * * *",), (NewDocuments(1), None), (NewDocuments,), ([NewDocuments(1)],)]
)
def test_what_is_no_trigger_is_refused(kind: Any, parts: tuple[Any, ...]) -> None:
    with pytest.raises(ParameterError) as caught:
        kind(*parts)

    assert caught.value.field == "triggers"


def test_they_are_values() -> None:
    assert AnyOf(NewDocuments(1), Every(2)) == AnyOf(NewDocuments(1), Every(2))
    assert AnyOf(NewDocuments(1), Every(2)) != AnyOf(Every(2), NewDocuments(1))
    assert AnyOf(Every(1)) != AllOf(Every(1))  # type: ignore[comparison-overlap]
    assert len({AllOf(Every(1)), AllOf(Every(1)), AnyOf(Every(1))}) == 2
    assert repr(AnyOf(NewDocuments(1), AllOf(Every(2)))) == (
        "AnyOf(NewDocuments(n=1, max_wait=None), AllOf(Every(seconds=2, catch_up=True)))"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        AnyOf(Every(1)).triggers = ()  # type: ignore[misc]
