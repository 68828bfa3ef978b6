"""What ends a run: each time one typed error that names the cause."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, fit, trainer
from torch import nn

from mongotorch.errors import EmptySelectError, NonFiniteLossError, OptimizerError, ParameterError


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda output, target: output.sum(dim=1), r"shape \(8,\)"),
        (lambda output, target: "low", "a str"),
        (lambda output, target: output.sum().detach(), "no weight"),
        (lambda output, target: 3.0, "no weight"),
    ],
)
def test_an_objective_that_gives_no_scalar_to_learn_from_is_an_error(objective: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        list(fit(trainer(SELECT, objective=objective)).run())

    assert caught.value.field == "objective"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(value: float) -> None:
    x, y = BATCHES[2]
    batches = [*BATCHES[:2], (torch.full_like(x, value), y)]

    with pytest.raises(NonFiniteLossError, match="step 3"):
        list(fit(trainer(SELECT), batches=batches).run())


def test_weights_that_break_in_the_last_step_are_an_error() -> None:
    last = trainer(
        SELECT, max_iterations=1, validation_interval=None, optimizer_cls="SGD", optimizer_kwargs={"lr": math.inf}
    )

    with pytest.raises(NonFiniteLossError, match="weight") as caught:
        list(fit(last).run())

    assert caught.value.field == "0.weight"


def test_batches_without_end_or_content_are_an_error_and_not_a_loop() -> None:
    with pytest.raises(EmptySelectError):
        list(fit(trainer(SELECT), batches=[]).run())


def test_the_state_of_another_model_is_refused() -> None:
    other = fit(trainer(SELECT, max_iterations=1), nn.Linear(4, 3))
    list(other.run())

    with pytest.raises(OptimizerError, match="start anew"):
        list(fit(trainer(SELECT, optimizer_state=other.trained().optimizer_state)).run())


def test_a_device_that_was_asked_for_and_is_not_there_is_an_error() -> None:
    with pytest.raises(ParameterError, match="cuda:99"):
        fit(trainer(SELECT, compute_kwargs={"device": "cuda:99"}))
