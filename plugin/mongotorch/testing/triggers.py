"""The tests of a trigger, for a class to inherit.

Time, documents and measurements come from a random walk with a seed: no clock is read, and every run is the same.
"""

# ruff: noqa: S101, S311 - these are tests; their random numbers are no secret

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NoReturn

import bson
import pytest

from mongotorch.codecs import Codecs
from mongotorch.schedule import Decision, State, Trigger

BEGIN = datetime(2026, 3, 1)
SEEDS = range(3)
STEPS = 200
SOON = timedelta(days=2)
Asked = tuple[datetime, State, Decision, State]
"""The time and state that the trigger was asked with, its decision, and the state after."""


class TriggerSuite:
    """The tests of a trigger.

    A class that inherits it, called `Test…`, defines the fixture `trigger`: one that fires at least once in a
    month in which documents arrive by the dozen and every metric in `metrics` is measured between 0 and 1.
    """

    metrics = ("objective", "accuracy")

    @pytest.fixture
    def trigger(self) -> Trigger:
        """The trigger."""
        raise NotImplementedError("define the fixture `trigger`")

    @pytest.fixture(params=SEEDS)
    def walk(self, trigger: Trigger, request: pytest.FixtureRequest) -> list[Asked]:
        """A walk through a month or so, in which the clock stands still or goes back now and then."""
        return list(_walk(trigger, random.Random(request.param), self.metrics))

    def test_it_fires_and_does_not_fire(self, walk: list[Asked]) -> None:
        """Else the tests below show nothing."""
        assert {decision.fire for _, _, decision, _ in walk} == {True, False}

    def test_the_same_question_has_the_same_answer(self, trigger: Trigger, walk: list[Asked]) -> None:
        """A trigger reads no clock and keeps no state of its own."""
        for now, state, decision, after in walk:
            assert copy.deepcopy(trigger).due(now, state) == (decision, after)

    def test_what_it_is_given_stays_as_it_is(self, trigger: Trigger, walk: list[Asked]) -> None:
        """A state is written to the database after it was asked, and may be asked again."""
        for now, state, _, _ in walk:
            before = copy.deepcopy(state)
            trigger.due(now, state)
            assert state == before

    def test_what_it_remembers_is_plain_and_comes_back_through_bson(
        self, trigger: Trigger, walk: list[Asked]
    ) -> None:
        """Another process asks it the next time."""
        for now, state, decision, after in walk:
            again = State.from_document(bson.decode(bson.encode(after.to_document())))
            assert again == after
            asked = State.from_document(bson.decode(bson.encode(state.to_document())))
            assert trigger.due(now, asked) == (decision, after)

    def test_a_firing_consumes_what_was_counted_and_nothing_else_does(self, walk: list[Asked]) -> None:
        """Measurements, and when it all began, are not its to change."""
        for _, state, decision, after in walk:
            expected = state.consumed() if decision.fire else state
            assert dataclasses.replace(after, memory=expected.memory) == expected

    def test_it_wants_to_be_asked_again_later_than_now_or_not_at_all(self, walk: list[Asked]) -> None:
        """Else a scheduler would spin."""
        for now, _, decision, _ in walk:
            assert decision.next_at is None or decision.next_at > now

    def test_it_says_why(self, walk: list[Asked]) -> None:
        """Why, and why not."""
        assert all(decision.reason for _, _, decision, _ in walk)

    def test_it_fires_once_for_one_thing(self, trigger: Trigger, walk: list[Asked]) -> None:
        """Asked again at the same time, with nothing new, it does not fire again; nor when the clock goes back."""
        for now, _, decision, after in walk:
            if decision.fire:
                for back in (0, 1, 60, 90_000):
                    assert not trigger.due(now - timedelta(seconds=back), after)[0].fire

    def test_it_says_what_has_to_be_observed(self, trigger: Trigger) -> None:
        """Nothing but what there is; and measurements come with how often, and on how many documents."""
        assert trigger.watches <= {"inserted", "changed", "scores"}
        measured = "scores" in trigger.watches
        assert (trigger.score_every_s is not None) == (trigger.score_documents is not None) == measured

    def test_it_is_a_value_that_is_stored_as_such(self, trigger: Trigger) -> None:
        """Equal, hashable, and the same after it was stored."""
        codecs = Codecs.default()
        record = codecs.encode(trigger, _refuse)
        again = codecs.decode(bson.decode(bson.encode(record)), _refuse)
        assert record["_codec"] == "value"
        assert again == trigger
        assert hash(again) == hash(trigger)
        assert repr(again) == repr(trigger)


def _walk(trigger: Trigger, chance: random.Random, metrics: tuple[str, ...]) -> Iterator[Asked]:
    now, state, next_at = BEGIN, State(since=BEGIN), None
    for _ in range(STEPS):
        if next_at is not None and next_at - now < SOON and chance.random() < 0.5:
            now = next_at
        else:
            seconds = chance.choice((0, 0.001, 1, 60, 3600, 30_000, -5, -4000)) * chance.random()
            now += timedelta(milliseconds=round(1000 * seconds))
        observed = _observed(state, now, chance, metrics)
        decision, after = trigger.due(now, observed)
        yield now, observed, decision, after
        state, next_at = after, decision.next_at


def _observed(state: State, now: datetime, chance: random.Random, metrics: tuple[str, ...]) -> State:
    inserted, changed = chance.choice((0, 0, 1, 20)), chance.choice((0, 0, 3))
    if inserted or changed:
        state = dataclasses.replace(
            state,
            inserted=state.inserted + inserted,
            changed=state.changed + inserted + changed,
            arrived=state.arrived or now,
        )
    if chance.random() < 0.2:
        state = dataclasses.replace(state, scores={name: chance.random() for name in metrics}, scored=now)
    return state


def _refuse(data: object) -> NoReturn:
    raise AssertionError(f"a trigger is plain: nothing goes beside it, but {data!r} would")
