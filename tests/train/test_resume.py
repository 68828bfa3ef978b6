"""A run that is stopped at any step and goes on from what was captured ends with the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.helpers import COLLECTION, fill, same, seeded, state, trainer
from torch import nn

from mongotorch import Datalayer, Metric, TorchModel, TorchTrainer, Validation
from mongotorch.train import Fit, Stepped, Validated
from mongotorch.train.tensor_codec import TorchCodec

WAYS: dict[str, dict[str, Any]] = {
    "memory": {"in_memory": True},
    "streamed": {"prefetch_size": 20, "prefetch_factor": 2},
}


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(dim=1) == target).float().mean()


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """All that a run ends with."""

    weights: Any
    optimizer: Any
    values: Any
    best_step: int
    validated: list[int]


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """The names of what differs."""
    names = [field.name for field in dataclasses.fields(Outcome)]
    return [name for name in names if not same(getattr(found, name), getattr(expected, name))]


@contextmanager
def fitting(db: Datalayer, of: TorchTrainer, way: str, state: Any = None) -> Iterator[Fit]:
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 16, **WAYS[way]}
    select = db[COLLECTION].find()
    with (
        db.stream(select, fold="train", shuffle=True, seed=of.seed, **options) as batches,
        db.stream(select, fold="valid", **options) as valid,
    ):
        validation = Validation("v", metrics=[Metric("accuracy", object=accuracy)])
        model = TorchModel("m", object=seeded(dropping), validation=validation)
        yield Fit(of, model, batches=batches, sets={"": valid}, state=state)


def ended(fit: Fit, validated: list[int]) -> Outcome:
    trained = fit.trained()
    return Outcome(
        weights=state(fit._model),
        optimizer=trained.optimizer_state,
        values=trained.metric_values,
        best_step=trained.best_step,
        validated=validated,
    )


def whole(db: Datalayer, of: TorchTrainer, way: str) -> Outcome:
    with fitting(db, of, way) as fit:
        validated = [event.step for event in fit.run() if isinstance(event, Validated)]
        return ended(fit, validated)


def stopped(db: Datalayer, of: TorchTrainer, way: str, kind: type, step: int) -> tuple[Any, list[int]]:
    """What was captured after an event, sent through the codec as a checkpoint is, and the validations so far."""
    validated = []
    with fitting(db, of, way) as fit:
        run = fit.run()
        for event in run:
            if isinstance(event, Validated):
                validated.append(event.step)
            if isinstance(event, kind) and event.step == step:
                break
        captured = fit.capture()
        run.close()
    blobs: dict[str, bytes] = {}

    def put(data: Any) -> str:
        blobs[name := str(len(blobs))] = bytes(data)
        return name

    record = TorchCodec().encode(captured, put, where="state")
    return TorchCodec().decode(record, blobs.__getitem__), validated


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_to_the_same_bits_wherever_it_was_stopped(db: Datalayer, way: str) -> None:
    fill(db)
    of = trainer(
        db[COLLECTION].find(),
        model=None,
        max_iterations=15,
        validation_interval=4,
        seed=11,
        no_improve_then_stop=3,
    )
    expected = whole(db, of, way)
    assert expected.validated == [4, 8, 12, 15]
    # Before, in the middle and at the end of an epoch of 6 or 7 batches; on both sides of a validation.
    points: list[tuple[type, int]] = [(Stepped, step) for step in (1, 4, 6, 7, 15)]
    points += [(Validated, step) for step in (4, 12)]

    for kind, step in points:
        captured, before = stopped(db, of, way, kind, step)
        with fitting(db, of, way, captured) as fit:
            after = [event.step for event in fit.run() if isinstance(event, Validated)]
            found = ended(fit, before + after)
        assert differences(found, expected) == [], (kind, step)


def test_a_run_that_ended_goes_on_to_nothing(db: Datalayer) -> None:
    fill(db)
    of = trainer(db[COLLECTION].find(), model=None, max_iterations=5)
    captured, before = stopped(db, of, "memory", Validated, 5)

    with fitting(db, of, "memory", captured) as fit:
        assert list(fit.run()) == []
        assert differences(ended(fit, before), whole(db, of, "memory")) == []


def test_patience_is_kept_over_a_stop(db: Datalayer) -> None:
    fill(db)
    of = trainer(
        db[COLLECTION].find(),
        model=None,
        max_iterations=10**100,
        validation_interval=2,
        no_improve_then_stop=2,
        optimizer_cls="SGD",
        optimizer_kwargs={"lr": 5.0},
    )
    expected = whole(db, of, "memory")
    last = expected.validated[-1]
    assert expected.best_step == last - 4

    captured, before = stopped(db, of, "memory", Validated, last - 2)

    with fitting(db, of, "memory", captured) as fit:
        after = [event.step for event in fit.run() if isinstance(event, Validated)]
        assert differences(ended(fit, before + after), expected) == []
