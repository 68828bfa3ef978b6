"""A continued run: options are the trainer's, state is that of the run before."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, fit, net, same, trainer
from torch import nn

from mongotorch.errors import OptimizerError

CLASSES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)
# One parameter kind each: Muon takes matrices only, SparseAdam sparse gradients, LBFGS a closure.
SPECIAL = {"LBFGS", "Muon", "SparseAdam"}
RATES = {"Rprop": {"etas": (0.5, 1.1)}}


def trained_state(name: str, **options: Any) -> dict[str, Any]:
    """The state that three steps leave."""
    run = fit(trainer(SELECT, optimizer_cls=name, optimizer_kwargs=options, max_iterations=3))
    list(run.run())
    return run.trained().optimizer_state


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in SPECIAL])
def test_every_optimizer_goes_on_with_the_new_options_and_the_old_state(name: str) -> None:
    before = trained_state(name, lr=0.01)
    assert before["state"] or name == "SGD"
    changed = {"lr": 1e-6, "weight_decay": 0.125} if "weight_decay" in before["param_groups"][0] else {"lr": 1e-6}

    run = fit(
        trainer(SELECT, optimizer_cls=name, optimizer_kwargs=changed, optimizer_state=before, max_iterations=1)
    )
    events = run.run()
    first = next(events)
    after = run.capture()["optimizer"]
    events.close()

    assert first.step == 1
    for group in after["param_groups"]:
        assert {option: group[option] for option in changed} == changed
    for number, kept in before["state"].items():
        if "step" in kept:
            assert float(after["state"][number]["step"]) == float(kept["step"]) + 1


def test_the_moments_are_those_of_the_run_before() -> None:
    before = trained_state("Adam", lr=0.01)
    applied = trainer(SELECT, optimizer_kwargs={"lr": 0.0}, optimizer_state=before, max_iterations=1)
    module = net()

    run = fit(applied, module, batches=[(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))])
    list(run.run())

    # With gradients of zero for the first layer's weights the first moment only decays.
    first = run.trained().optimizer_state["state"][0]
    assert torch.equal(first["exp_avg"], before["state"][0]["exp_avg"].lerp(torch.zeros(8, 4), 0.1))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_the_state_of_another_optimizer_is_refused(name: str) -> None:
    before = trained_state("Adam", lr=0.01)

    with pytest.raises(OptimizerError, match=r"optimizer_state.*Adam.*optimizer_state=None") as error:
        trainer(SELECT, optimizer_cls=name, optimizer_kwargs={"lr": 0.01}, optimizer_state=before)
    assert error.value.field == "optimizer_state"


def test_a_state_without_the_name_of_its_class_is_judged_by_its_options() -> None:
    module = net()
    plain = torch.optim.Adam(module.parameters(), lr=0.5)
    loss: Any = nn.functional.cross_entropy(module(BATCHES[0][0]), BATCHES[0][1])
    loss.backward()
    plain.step()

    assert trainer(SELECT, optimizer_state=plain.state_dict()).optimizer_state is not None
    with pytest.raises(OptimizerError, match="optimizer_state=None"):
        trainer(SELECT, optimizer_cls="SGD", optimizer_kwargs={"lr": 0.1}, optimizer_state=plain.state_dict())


def test_the_state_of_another_model_is_refused_before_the_first_step() -> None:
    before = trained_state("Adam", lr=0.01)
    run = fit(trainer(SELECT, optimizer_state=before), nn.Linear(4, 3))

    with pytest.raises(OptimizerError, match="optimizer_state"):
        next(run.run())


class Wrapped(torch.optim.Adam):
    """An optimizer of one's own that hands its options on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def test_an_optimizer_that_hands_its_options_on_takes_the_new_ones() -> None:
    name = f"{__name__}:Wrapped"
    before = trained_state(name, lr=0.01)
    changed = {"lr": 1e-6, "weight_decay": 0.125}
    given: dict[str, Any] = {"optimizer_cls": name, "optimizer_kwargs": changed, "max_iterations": 1}

    run = fit(trainer(SELECT, optimizer_state=before, **given))
    list(run.run())

    (group,) = run.trained().optimizer_state["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-6, 0.125)


def test_none_starts_anew() -> None:
    once = fit(trainer(SELECT, max_iterations=3))
    again = fit(trainer(SELECT, max_iterations=3, optimizer_state=None))
    list(once.run())
    list(again.run())
    assert same(once.trained().optimizer_state, again.trained().optimizer_state)


def test_a_resumed_run_keeps_the_options_that_it_had() -> None:
    """A checkpoint is not a continued run: a rate that changed while it ran goes on from where it was."""
    applied = trainer(SELECT, max_iterations=4)
    stopped = fit(applied)
    events = stopped.run()
    next(events)
    for group in stopped._optimizers[0].param_groups:
        group["lr"] = 0.25
    captured = stopped.capture()
    events.close()

    resumed = fit(applied, state=captured)
    events = resumed.run()
    next(events)
    assert {group["lr"] for group in resumed.capture()["optimizer"]["param_groups"]} == {0.25}
    events.close()
