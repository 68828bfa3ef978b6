"""Every optimizer of torch, trained, published, loaded and continued with another rate.

The rate is the new one and the moments are the old ones. The classes are those of the torch that is installed, so
that a new one is met here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.helpers import SELECT, fill, net, same, state, trainer
from tests.wild_modules import tokens
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.errors import OptimizerError
from mongotorch.train.optimizers import continue_from, state_of

CLASSES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)
TINY = 1e-12
# Its rate is where the step of each weight starts; the steps are what it learns.
LEARNS_ITS_RATE = {"Rprop"}


class Matrices(nn.Module):
    """Muon takes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Rows(nn.Module):
    """Of sparse gradients alone, as SparseAdam needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 3, sparse=True)

    def forward(self, x: Tensor) -> Any:
        return self.embed(tokens(x, 11)).mean(1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WithClosure(TorchTrainer):
    """Steps as optimizers need it that evaluate the objective several times."""

    def take_step(self, model: TorchModel, batch: Any, optimizers: Sequence[Any]) -> Tensor:
        def closure() -> Tensor:
            optimizers[0].zero_grad()
            loss = self.compute_objective(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss: Tensor = optimizers[0].step(closure)
        return loss


MODULES: dict[str, Any] = {"Muon": Matrices, "SparseAdam": Rows}
TRAINERS: dict[str, type[TorchTrainer]] = {"LBFGS": WithClosure}


def applied(select: Any, name: str, **given: Any) -> TorchTrainer:
    torch.manual_seed(0)
    module = MODULES.get(name, net)()
    made = trainer(
        select,
        TRAINERS.get(name, TorchTrainer),
        optimizer_cls=name,
        model=TorchModel(f"m-{name}", object=module),
        max_iterations=3,
        validation_interval=None,
        **given,
    )
    return made.replace(identifier=f"t-{name}")


def rates(of: dict[str, Any]) -> set[float]:
    return {float(group["lr"]) for group in of["param_groups"]}


def test_every_optimizer_goes_on_with_another_rate_and_its_old_moments(db: Datalayer) -> None:
    select = fill(db)
    assert {"Adafactor", "LBFGS", "Muon", "SGD", "SparseAdam"} <= set(CLASSES)
    for name in CLASSES:
        options = {"momentum": 0.9} if name == "SGD" else {}
        first: Any = db.apply(applied(select, name, optimizer_kwargs={"lr": 0.01, **options})).result()
        before: Any = first.trainer
        assert before.optimizer_state["state"], name
        assert rates(before.optimizer_state) == {0.01}, name
        changed = before.replace(optimizer_kwargs={"lr": TINY, **options})

        optimizers = changed.get_optimizers(first)
        continue_from(optimizers, changed.optimizer_state)
        taken = state_of(optimizers)
        old, new = before.optimizer_state["state"], taken["state"]
        for number, kept in old.items():
            for what in set(kept) - {"eta"}:
                assert same(new[number][what], kept[what]), (name, what)
        assert rates(taken) == {TINY}, name

        second: Any = db.apply(changed).result()
        after: Any = second.trainer
        assert rates(after.optimizer_state) == {TINY}, name
        assert second.version == first.version + 1, name
        assert db.show("trainer", f"t-{name}", after.version)["fields"]["optimizer_kwargs"]["lr"] == TINY
        moved = max(
            float((a.to_dense() - b.to_dense()).abs().max())
            for a, b in zip(state(first).values(), state(second).values(), strict=True)
        )
        assert name in LEARNS_ITS_RATE or moved < 1e-6, (name, moved)


def test_the_step_of_asgd_is_that_of_the_new_rate() -> None:
    """It keeps the rate of its next step in its state."""
    parameter = nn.Parameter(torch.ones(3))
    old = torch.optim.ASGD([parameter], lr=0.5, lambd=0.1, alpha=0.75)
    for _ in range(3):
        parameter.grad = torch.ones(3)
        old.step()
    new = torch.optim.ASGD([parameter], lr=0.001, lambd=0.2, alpha=0.5)
    continue_from([new], state_of([old]))

    kept = new.state[parameter]
    assert float(kept["eta"]) == pytest.approx(0.001 / (1 + 0.2 * 0.001 * 3) ** 0.5)
    assert float(kept["step"]) == 3
    assert torch.equal(kept["ax"], old.state[parameter]["ax"])


def test_lbfgs_needs_a_step_of_its_own_and_the_error_says_which() -> None:
    with pytest.raises(OptimizerError, match=r"take_step.*optimizers\[0\]\.step\(closure\)") as error:
        trainer(SELECT, optimizer_cls="LBFGS")
    assert error.value.field == "optimizer_cls"


def test_parameters_that_an_optimizer_does_not_take_are_an_error_before_the_first_step(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), optimizer_cls="Muon"))
    with pytest.raises(OptimizerError, match=r"2D.*get_optimizers") as error:
        job.result()
    assert error.value.field == "optimizer_cls"
    assert not job.progress.get("step")
