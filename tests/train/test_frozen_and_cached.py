"""Modes, caches and rows: what training and validation leave alone, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, Replayed, fit, seeded, trainer
from torch import Tensor, nn

from mongotorch.errors import MongotorchError
from mongotorch.train import Fit, TorchModel, Validated


def with_frozen_norm() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    made[1].requires_grad_(False).eval()
    return made


def statistics(module: nn.Module) -> Tensor:
    """The running mean of the frozen norm."""
    return torch.as_tensor(module[1].running_mean).clone()  # type: ignore[index]


def test_a_part_that_is_in_eval_when_the_run_starts_stays_there() -> None:
    module = seeded(with_frozen_norm)
    before = statistics(module)
    run = fit(trainer(SELECT, max_iterations=6, validation_interval=2), module)

    for event in run.run():
        assert [part.training for part in module] == [True, False, True, True, True], event

    assert torch.equal(statistics(module), before)


def test_it_stays_there_in_a_resumed_run() -> None:
    applied = trainer(SELECT, max_iterations=6, validation_interval=2)
    stopped = fit(applied, seeded(with_frozen_norm))
    events = stopped.run()
    for _ in range(3):
        next(events)
    captured = stopped.capture()
    events.close()

    module = seeded(with_frozen_norm)
    before = statistics(module)
    resumed = fit(applied, module, state=captured)
    list(resumed.run())

    assert torch.equal(statistics(module), before)


def test_it_stays_there_in_a_continued_run() -> None:
    """A published module is in `eval()` as a whole; the one part that was frozen is still known."""
    module = seeded(with_frozen_norm)
    first = fit(trainer(SELECT, max_iterations=3), module)
    list(first.run())
    published = TorchModel("m", object=module, eval_modules=first.trained().eval_modules)
    assert not any(part.training for part in published.object.modules())

    before = statistics(published.object)
    applied = trainer(SELECT, max_iterations=3)
    again = Fit(applied, published, batches=Replayed(BATCHES), sets={"": BATCHES[:2]})
    list(again.run())

    assert torch.equal(statistics(published.object), before)
    assert module[0].training


def test_a_module_that_was_loaded_in_eval_is_trained_as_a_whole() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))).eval()
    before = statistics(module)
    list(fit(trainer(SELECT, max_iterations=3), module).run())
    assert not torch.equal(statistics(module), before)


class Rotary(nn.Module):
    """Grows a table as long as the longest batch it has seen, and multiplies with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.table = torch.ones(0, 1)

    def forward(self, x: Tensor) -> Any:
        if len(self.table) < len(x):
            self.table = torch.arange(1.0, len(x) + 1)[:, None].cos()
        return self.body(x) * self.table[: len(x)]


@pytest.mark.parametrize("first", ["validated", "predicted"])
def test_a_table_that_grew_outside_of_training_can_be_trained_with(first: str) -> None:
    module = Rotary()
    chosen = TorchModel("m", object=module)
    long = (torch.randn(64, 4), torch.randint(3, (64,)))
    run = Fit(
        trainer(SELECT, max_iterations=4, validation_interval=2),
        chosen,
        batches=Replayed(BATCHES),
        sets={"": [long]},
    )
    if first == "predicted":
        chosen.predict_batches(list(torch.randn(64, 4)))

    events = list(run.run())

    assert len([event for event in events if isinstance(event, Validated)]) == 2
    assert len(module.table) == 64


class Proxies(nn.Module):
    """An objective with a weight for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, output: Tensor, target: Tensor) -> Any:
        return nn.functional.cross_entropy(output * self.scale, target)


def test_parameters_of_an_objective_that_nobody_trains_are_warned_of() -> None:
    run = fit(trainer(SELECT, objective=Proxies(), max_iterations=2))
    with pytest.warns(UserWarning, match=r"objective.*scale.*get_optimizers"):
        list(run.run())


def test_a_last_batch_of_one_row_under_a_norm_is_a_typed_error() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    batches = [BATCHES[0], (BATCHES[1][0][:1], BATCHES[1][1][:1])]

    with pytest.raises(MongotorchError, match="drop_last") as error:
        list(fit(trainer(SELECT, max_iterations=4), module, batches=batches).run())
    assert isinstance(error.value.__cause__, ValueError)


IGNORED = -100


@pytest.mark.parametrize(
    "objective",
    [
        nn.functional.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_a_mean_is_over_what_counted(objective: Any) -> None:
    """Batches of which nothing counts, or a part, weigh as much as they would in one large batch."""
    inputs = torch.randn(24, 4)
    targets = torch.randint(3, (24,))
    targets[8:16] = IGNORED
    targets[20:] = IGNORED
    module = nn.Linear(4, 3)
    chosen = TorchModel("m", object=module)
    sets = [(inputs[at : at + 8], targets[at : at + 8]) for at in range(0, 24, 8)]
    applied = trainer(SELECT, objective=objective, max_iterations=1, validation_interval=1)
    run = Fit(applied, chosen, batches=Replayed(BATCHES), sets={"": sets})

    measured = next(event for event in run.run() if isinstance(event, Validated)).values["objective"]

    with torch.no_grad():
        expected = objective(module(inputs), targets)
    assert measured == pytest.approx(float(expected), rel=1e-5)
