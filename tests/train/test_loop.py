"""The loop without a database: exact steps, modes, the best weights, and stopping early."""

from __future__ import annotations

import math
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.helpers import BATCHES, SELECT, fit, net, same, seeded, state, trainer
from torch import Tensor, nn

from mongotorch import Metric, TorchModel, TorchTrainer, Validation
from mongotorch.train import Stepped, Validated


class Watching(nn.Module):
    """Notes the mode of each call; has dropout, and a part that its owner keeps frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool]] = []
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.dropout.training, not torch.is_grad_enabled()))
        output: Tensor = self.layer(self.dropout(x))
        self.outputs.append(output.detach().clone())
        return output


@pytest.mark.parametrize(
    ("steps", "interval", "validated"), [(5, 100, [5]), (12, 4, [4, 8, 12]), (7, 3, [3, 6, 7])]
)
def test_a_run_makes_exactly_so_many_steps_and_measures_when_it_should(
    steps: int, interval: int, validated: list[int]
) -> None:
    run = fit(trainer(SELECT, max_iterations=steps, validation_interval=interval))

    events = list(run.run())

    assert [e.step for e in events if isinstance(e, Stepped)] == list(range(1, steps + 1))
    assert [e.step for e in events if isinstance(e, Validated)] == validated
    assert all(e.rows == 8 and math.isfinite(e.loss.item()) for e in events if isinstance(e, Stepped))
    trained = run.trained()
    assert trained.steps == steps
    assert len(trained.metric_values["objective"]) == len(validated)


def test_training_and_validation_have_their_modes() -> None:
    module = seeded(Watching).eval()
    run = fit(trainer(SELECT, max_iterations=3, validation_interval=2), module)

    list(run.run())

    train, valid = (True, False), (False, True)
    assert module.seen == [train, train, valid, valid, train, valid, valid]
    run.trained()
    assert not module.dropout.training


def test_dropout_is_off_in_a_validation() -> None:
    module = seeded(Watching)
    list(fit(trainer(SELECT, max_iterations=1), module).run())

    with torch.no_grad():
        assert torch.equal(module.outputs[1], module.layer(BATCHES[0][0]))
        assert not torch.equal(module.outputs[0], seeded(Watching).layer(BATCHES[0][0]))


scripted: list[float] = []


def from_script(output: Tensor, target: Tensor) -> float:
    """A metric that says what the test wants to hear, once a validation batch."""
    return scripted.pop(0)


def script(mode: str, *values: float) -> Validation:
    scripted[:] = [value for value in values for _ in BATCHES[:2]]
    return Validation("v", metrics=[Metric("score", object=from_script, mode=mode)])


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_weights_and_the_optimizer_state_are_those_of_the_best_validation(mode: str, sign: int) -> None:
    values = [sign * value for value in (1.0, 3.0, 2.0, 3.0)]
    validation = script(mode, *values)
    module = net()
    run = fit(
        trainer(SELECT, max_iterations=4, validation_interval=1, listen="score", model=None),
        module,
        validation=validation,
    )
    states = []
    improved = []
    for event in run.run():
        if isinstance(event, Validated):
            states.append(run.capture())
            improved.append(event.improved)

    trained = run.trained()

    assert improved == [True, True, False, False]
    assert (trained.best_step, trained.steps) == (2, 4)
    assert same(state(module), states[1]["model"])
    assert same(trained.optimizer_state, states[1]["optimizer"])
    assert not same(states[1]["model"], states[3]["model"])
    assert trained.metric_values["score"] == values


def test_a_run_stops_after_so_many_validations_without_a_better_one() -> None:
    validation = script("min", 5.0, 4.0, 4.0, math.nan, 4.5, 1.0)
    run = fit(
        trainer(
            SELECT,
            max_iterations=10**100,
            validation_interval=2,
            no_improve_then_stop=3,
            listen="score",
            model=None,
        ),
        validation=validation,
    )

    list(run.run())

    assert (run.trained().steps, run.trained().best_step) == (10, 4)


def test_without_validations_the_last_weights_are_kept() -> None:
    module = net()
    run = fit(trainer(SELECT, max_iterations=6, validation_interval=None), module)
    list(run.run())
    before = state(module)

    trained = run.trained()

    assert (trained.best_step, trained.metric_values) == (6, {})
    assert same(state(module), before)


class Reversed(TorchTrainer):
    """Its own step: up the hill, and only on the first layer."""

    optimizers: ClassVar[list[int]] = []

    def get_optimizers(self, model: TorchModel) -> Any:
        first, _, last = model.object.children()
        return torch.optim.Adam(first.parameters(), lr=0.01), torch.optim.SGD(
            last.parameters(), lr=0.1, momentum=0.9
        )

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        self.optimizers.append(len(optimizers))
        loss = self.compute_objective(model, batch)
        optimizers[0].zero_grad()
        torch.autograd.backward(-loss)
        optimizers[0].step()
        return loss


def test_a_subclass_changes_the_step_and_the_optimizers() -> None:
    Reversed.optimizers.clear()
    module = net()
    run = fit(trainer(SELECT, Reversed, max_iterations=20, validation_interval=None), module)

    losses = [event.loss.item() for event in run.run() if isinstance(event, Stepped)]

    assert Reversed.optimizers == [2] * 20
    assert losses[15] > losses[0]  # the same batch
    assert same(state(module[2]), state(net()[2]))
    kept = run.trained().optimizer_state
    assert [len(one["state"]) for one in kept["optimizers"]] == [2, 0]


def test_a_second_run_goes_on_with_the_optimizer_and_adds_to_what_was_measured() -> None:
    whole = net()
    list(fit(trainer(SELECT, max_iterations=10, validation_interval=None), whole).run())
    module = net()
    first = fit(trainer(SELECT, max_iterations=5, validation_interval=None), module)
    list(first.run())
    trained = first.trained()
    again = trainer(
        SELECT,
        max_iterations=5,
        validation_interval=None,
        optimizer_state=trained.optimizer_state,
        metric_values={"objective": [3.0]},
    )
    module.train()
    second = fit(again, module)
    list(second.run())

    assert same(state(module), state(whole))
    steps = [one["step"].item() for one in second.trained().optimizer_state["state"].values()]
    assert steps == [10.0] * 4
    assert second.trained().metric_values == {"objective": [3.0]}


def test_the_generators_of_the_program_are_as_they_were() -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]

    list(fit(trainer(SELECT), seeded(Watching)).run())
    for _ in fit(trainer(SELECT), seeded(Watching)).run():
        break  # left early

    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    assert same(before, after)


def test_the_seed_is_what_a_run_draws_from() -> None:
    def weights(seed: int, before: int) -> dict[str, Tensor]:
        module = seeded(Watching)
        with torch.random.fork_rng():
            torch.manual_seed(before)
            list(fit(trainer(SELECT, seed=seed), module).run())
        return state(module)

    assert same(weights(1, before=3), weights(1, before=4))
    assert not same(weights(1, before=3), weights(2, before=3))
