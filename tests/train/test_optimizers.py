"""The state of optimizers as one value: taken, kept, and given to others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.helpers import SELECT, model, net, same, trainer
from torch import nn

from mongotorch.errors import OptimizerError
from mongotorch.train.optimizers import (
    Contained,
    load_state,
    make_optimizer,
    optimizer_class,
    optimizer_name,
    state_of,
)


def stepped(name: str, steps: int = 3, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = net()
    optimizer = make_optimizer(name, module.parameters(), {"lr": 0.1, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return module, optimizer


class SGD(torch.optim.SGD):
    """Its name is that of one of torch's."""


def test_a_class_from_elsewhere_is_found_by_its_module() -> None:
    assert optimizer_class("torch.optim.sgd:SGD") is torch.optim.SGD
    assert optimizer_class(optimizer_name(SGD)) is SGD
    assert optimizer_name(torch.optim.SGD) == "SGD"


@pytest.mark.parametrize(("name", "options"), [("Adam", {}), ("SGD", {"momentum": 0.9}), ("SGD", {})])
def test_a_state_that_was_taken_does_not_change_with_later_steps(name: str, options: dict[str, Any]) -> None:
    module, optimizer = stepped(name, **options)
    taken = state_of([optimizer])
    before = state_of([optimizer])

    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    assert same(taken, before)
    other = make_optimizer(name, net().parameters(), {"lr": 0.5, **options})
    load_state([other], taken)
    assert same(state_of([other]), taken)


def test_the_states_of_several_are_told_apart_from_that_of_one() -> None:
    several = [stepped("Adam")[1], stepped("SGD", momentum=0.9)[1]]

    kept = state_of(several)

    assert list(kept) == ["optimizers"]
    fresh = [make_optimizer(n, net().parameters(), {"lr": 1.0}) for n in ("Adam", "SGD")]
    load_state(fresh, kept)
    assert same(state_of(fresh), kept)
    with pytest.raises(OptimizerError) as caught:
        load_state(several, kept["optimizers"][0])
    assert caught.value.field == "optimizer_state"


def test_the_state_of_a_model_with_other_parameters_is_refused() -> None:
    other = make_optimizer("Adam", [nn.Parameter(torch.zeros(3))], {})

    with pytest.raises(OptimizerError, match="start anew") as caught:
        load_state([other], state_of([stepped("Adam")[1]]))

    assert caught.value.field == "optimizer_state"
    with pytest.raises(OptimizerError):
        load_state([other], {"nonsense": 1})


def test_a_state_of_other_shapes_is_refused_before_a_step() -> None:
    smaller = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    other = make_optimizer("Adam", smaller.parameters(), {})

    with pytest.raises(OptimizerError, match="start anew"):
        load_state([other], state_of([stepped("Adam")[1]]))


def test_a_parameter_that_an_objective_holds_twice_is_one() -> None:
    first, second, third = (nn.Parameter(torch.ones(size)) for size in ((), (2,), ()))
    found = Contained(functools.partial(max, first, second, third, first)).parameters().values()
    assert [*map(id, found)] == [id(first), id(second), id(third)]


class OfMatrices(torch.optim.SGD):
    """It takes matrices only."""

    def __init__(self, params: Any, **options: Any) -> None:
        parameters = list(params)
        if any(parameter.ndim != 2 for parameter in parameters):
            raise ValueError("only matrices")
        super().__init__(parameters, **options)


def test_an_optimizer_that_does_not_take_all_parameters_says_what_to_write() -> None:
    of = trainer(SELECT, optimizer_cls=OfMatrices, optimizer_kwargs={"lr": 0.1})
    with pytest.raises(OptimizerError, match=r"only matrices.*override get_optimizers") as raised:
        of.get_optimizers(model())
    assert raised.value.field == "optimizer_cls"
