"""The Schedule as a component: what it refuses, and what is stored of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import bson
import pytest
from torch import nn

from mongotorch import (
    AnyOf,
    Better,
    Changed,
    Cron,
    Every,
    Never,
    NewDocuments,
    Query,
    Schedule,
    TorchModel,
    TorchTrainer,
)
from mongotorch.codecs import Codecs
from mongotorch.component import Encoder, begin_component, content_digest, encode_component, fill_component
from mongotorch.errors import IdentifierError, ParameterError
from mongotorch.schedule import Scores, State, gate_of
from mongotorch.schedule.triggers import Waited

START = datetime(2026, 3, 1)
Make = Callable[..., Schedule]


def lower(champion: Scores | None, challenger: Scores | None) -> bool:
    return champion is None or challenger is None or sum(challenger.losses) < sum(champion.losses)


@pytest.fixture(scope="module")
def trainer() -> TorchTrainer:
    return TorchTrainer(
        "t",
        key=("x", "y"),
        select=Query.find("points"),
        objective=nn.functional.cross_entropy,
        model=TorchModel("m", object=nn.Linear(4, 3)),
    )


@pytest.fixture
def make(trainer: TorchTrainer) -> Make:
    usual: dict[str, Any] = {"trainer": trainer, "trigger": NewDocuments(100)}
    return lambda identifier="nightly", **given: Schedule(identifier, **{**usual, **given})


def test_only_trainer_and_trigger_are_needed(make: Make) -> None:
    schedule = make()

    assert schedule.type_id == "schedule"
    assert schedule.gate == Better(margin=0.0, confidence=None)
    assert (schedule.warm_start, schedule.data, schedule.max_wait, schedule.paused) == (True, "all", None, False)


@pytest.mark.parametrize(
    ("given", "error", "field"),
    [
        ({"identifier": "two words"}, IdentifierError, "identifier"),
        ({"trainer": None}, ParameterError, "trainer"),
        ({"trainer": TorchModel("m", object=nn.Linear(4, 3))}, ParameterError, "trainer"),
        ({"trigger": None}, ParameterError, "trigger"),
        ({"trigger": "0 3 * * *"}, ParameterError, "trigger"),
        ({"trigger": Every}, ParameterError, "trigger"),
        ({"gate": None}, ParameterError, "gate"),
        ({"gate": Never}, ParameterError, "gate"),
        ({"data": "old"}, ParameterError, "data"),
        ({"max_wait": 0}, ParameterError, "max_wait"),
        ({"max_wait": -1.0}, ParameterError, "max_wait"),
        ({"max_wait": float("inf")}, ParameterError, "max_wait"),
        ({"max_wait": "1h"}, ParameterError, "max_wait"),
        ({"warm_start": 1}, ParameterError, "warm_start"),
        ({"paused": None}, ParameterError, "paused"),
        ({"artifacts": {"nothing": "dill"}}, ParameterError, "artifacts"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(
    make: Make, given: dict[str, Any], error: type[ParameterError], field: str
) -> None:
    with pytest.raises(error) as caught:
        make(**given)

    assert caught.value.field == field
    assert type(caught.value) is error


def test_a_trainer_without_a_model_is_refused(make: Make, trainer: TorchTrainer) -> None:
    with pytest.raises(ParameterError, match="model=") as caught:
        make(trainer=trainer.replace(model=None))

    assert caught.value.field == "trainer"


def test_without_max_wait_only_the_trigger_counts(make: Make) -> None:
    assert make().effective_trigger == NewDocuments(100)


@pytest.mark.parametrize(
    ("trigger", "counts"),
    [(NewDocuments(100), "inserted"), (Cron("0 3 * * *"), "inserted"), (Changed(9), "changed")],
)
def test_max_wait_fires_for_what_has_waited(make: Make, trigger: Any, counts: str) -> None:
    effective = make(trigger=trigger, max_wait=60).effective_trigger

    assert effective == AnyOf(trigger, Waited(60, counts))
    now = START + timedelta(seconds=60)
    waited = State(since=START, inserted=1, changed=1, arrived=START)
    assert effective.due(now, waited)[0].fire
    assert not effective.due(now - timedelta(milliseconds=1), waited)[0].fire
    assert not effective.due(now, State(since=START))[0].fire


def test_updates_alone_do_not_wait_where_only_inserts_are_counted(make: Make) -> None:
    updated = State(since=START, changed=3, arrived=START)

    assert not make(max_wait=60).effective_trigger.due(START + timedelta(days=9), updated)[0].fire
    assert make(trigger=Changed(9), max_wait=60).effective_trigger.due(START + timedelta(days=9), updated)[0].fire


@pytest.mark.parametrize("gate", [Never(), lower, lambda champion, challenger: True])
def test_what_is_stored_comes_back(make: Make, trainer: TorchTrainer, gate: Any) -> None:
    codecs = Codecs.default()
    encoder = Encoder(codecs)
    schedule = make(trigger=AnyOf(Cron("0 3 * * *", "Europe/Berlin"), NewDocuments(9)), gate=gate, max_wait=9.5)

    body = bson.decode(bson.encode(encode_component(schedule, encoder, lambda child: child.uuid)))
    blobs = {name: bytes(blob.data[:]) for name, blob in encoder.blobs.items()}
    document = {"_id": schedule.uuid, "identifier": "nightly", "version": 0, **body}
    again = begin_component(document, codecs, blobs.__getitem__)
    fill_component(again, document, codecs, blobs.__getitem__, lambda uuid: trainer)

    assert isinstance(again, Schedule)
    assert (again.trigger, again.max_wait, again.data) == (schedule.trigger, 9.5, "all")
    assert body["fields"]["trainer"]["_ref"] == trainer.uuid
    assert body["fields"]["gate"]["_codec"] == {"Never": "value", "lower": "name"}.get(
        gate_of(gate).__repr__().strip("()"), "dill"
    )
    assert gate_of(again.gate).judge(None, Scores([1.0])).promote is not isinstance(gate, Never)
    assert again == schedule


def test_the_content_follows_from_what_was_given(make: Make) -> None:
    codecs = Codecs.default()
    digests = [
        content_digest(make(**given), Encoder(codecs)) for given in ({}, {}, {"paused": True}, {"gate": Never()})
    ]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
