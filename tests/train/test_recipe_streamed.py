"""Recipes over streams of a database: epochs end where the documents do, wherever a run was stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, same, state, trainer
from tests.train.test_recipe import Shrinking, module, through_the_codec

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.train import Fit, Stepped, Validated

WAYS: dict[str, dict[str, Any]] = {
    "memory": {"in_memory": True},
    "download": {"download": True},
    "streamed": {"prefetch_size": 20, "prefetch_factor": 2},
    "streamed across epochs": {"prefetch_size": 20, "prefetch_factor": 2, "across_epochs": True},
    "in order": {"prefetch_size": 20, "shuffle": False},
    "without the last": {"in_memory": True, "drop_last": True},
}
GIVEN: dict[str, Any] = {
    "model": None,
    "max_iterations": 10**100,
    "max_epochs": 3,
    "validation_interval": "epoch",
    "no_improve_then_stop": 100,
    "scheduler_cls": "CosineAnnealingLR",
    "scheduler_kwargs": {"T_max": "max_epochs"},
    "scheduler_interval": "epoch",
    "gradient_accumulation_steps": 3,
    "gradient_clip_norm": 0.5,
    "ema_decay": 0.8,
    "precision": "bf16",
}


@contextmanager
def fitting(db: Datalayer, of: TorchTrainer, way: str, captured: Any = None) -> Iterator[Fit]:
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 8}
    select = db[COLLECTION].find()
    training = {"shuffle": True, **options, **WAYS[way]}
    with (
        db.stream(select, fold="train", seed=of.seed, **training) as batches,
        db.stream(select, fold="valid", in_memory=True, **options) as valid,
    ):
        yield Fit(of, TorchModel("m", object=module()), batches=batches, sets={"": valid}, state=captured)


def outcome(fit: Fit) -> list[Any]:
    last = state(fit.model)
    trained = fit.trained()
    return [last, {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}]


def kinds(events: list[Any]) -> list[tuple[type, int]]:
    return [(type(event), event.step) for event in events]


@pytest.mark.parametrize(("way", "interval"), [*((way, "epoch") for way in WAYS), ("memory", 3)])
def test_epochs_end_with_the_documents_wherever_a_run_was_stopped(
    db: Datalayer, way: str, interval: int | str
) -> None:
    fill(db, 80)

    def of() -> TorchTrainer:
        given = {**GIVEN, "validation_interval": interval}
        return trainer(db[COLLECTION].find(), callbacks=[Shrinking()], **given)

    with fitting(db, of(), way) as whole:
        events = list(whole.run())
        expected = outcome(whole)
        assert whole.epoch == 3
        assert whole.most_steps == whole.step
    steps = [event for event in events if isinstance(event, Stepped)]
    assert len(steps) % 3 == 0
    each = len(steps) // 3
    assert [event.step for event in events if isinstance(event, Validated)] == [each, 2 * each, 3 * each]
    rates = [event.learning_rates[0] for event in steps]
    assert len(set(rates)) >= 3

    # At the beginning, around the end of the first epoch, and at the end.
    for stop in [0, *range(each - 2, each + 2), *range(len(events) - 3, len(events))]:
        with fitting(db, of(), way) as first:
            running = first.run()
            for _ in range(stop + 1):
                next(running)
            captured = through_the_codec(first.capture())
            running.close()
        with fitting(db, of(), way, captured) as second:
            rest = list(second.run())
            assert kinds(rest) == kinds(events[stop + 1 :]), stop
            assert same(outcome(second), expected), stop
