"""What a run says of each step, and how it is told to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import SELECT, fit, trainer
from torch import Tensor

from mongotorch import TorchModel, TorchTrainer
from mongotorch.errors import ParameterError
from mongotorch.train import Stepped, Validated


class Logging(TorchTrainer):
    """Logs in its step: a tensor once, a number twice."""

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        loss = super().take_step(model, batch, optimizers)
        self.log("doubled", 2 * loss)
        self.log("n", 1)
        self.log("n", 2.0)
        return loss


def steps(events: list[Any]) -> list[Stepped]:
    return [event for event in events if isinstance(event, Stepped)]


def test_what_a_step_logs_is_in_its_event() -> None:
    for event in steps(list(fit(trainer(SELECT, Logging)).run())):
        assert sorted(event.values) == ["doubled", "n"]
        doubled = event.values["doubled"]
        assert isinstance(doubled, Tensor)
        assert not doubled.requires_grad
        assert torch.equal(doubled, 2 * event.loss)
        assert event.values["n"] == 1.5


def test_a_step_without_logs_has_no_values_and_says_its_rates() -> None:
    for event in steps(list(fit(trainer(SELECT)).run())):
        assert (event.values, event.gradient_norm, event.learning_rates) == ({}, None, (0.01,))
        assert event.waited_s >= 0


@pytest.mark.parametrize(("name", "value"), [("", 1), (3, 1), ("d", "x"), ("d", torch.ones(2)), ("d", True)])
def test_what_is_no_number_is_not_logged(name: Any, value: Any) -> None:
    with pytest.raises(ParameterError, match="log: "):
        trainer(SELECT).log(name, value)


def test_outside_of_a_run_logging_does_nothing() -> None:
    trainer(SELECT).log("loss", 1.0)


def test_a_stopped_run_is_validated_and_keeps_the_best() -> None:
    run = fit(trainer(SELECT, max_iterations=100, validation_interval=4))
    events = []
    for event in run.run():
        events.append(event)
        if event.step == 6:
            run.stop()

    assert [event.step for event in steps(events)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if isinstance(event, Validated)] == [4, 6]
    trained = run.trained()
    assert trained.steps == 6
    assert trained.best_step in (4, 6)


def test_a_run_that_was_stopped_and_captured_does_not_go_on() -> None:
    of = trainer(SELECT, max_iterations=100, validation_interval=4)
    run = fit(of)
    events = run.run()
    for event in events:
        if event.step == 6:
            break
    run.stop()
    captured = run.capture()
    events.close()

    again = fit(of, state=captured)
    rest = list(again.run())
    assert [type(event) for event in rest] == [Validated]
    assert again.trained().steps == 6
