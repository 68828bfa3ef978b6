"""Ranks that score models together find the bits that one process finds, whatever is measured."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import net, points, trainer
from torch import Tensor, nn

from mongotorch import Metric, Query, TorchModel, TorchTrainer, Validation
from mongotorch.errors import MongotorchError, WorkerLostError
from mongotorch.testing.groups import run_ranks
from mongotorch.train import Group, Scored, score

SELECT = Query.find("points")
ROWS = points(205)
X = torch.tensor([row["x"] for row in ROWS])
Y = torch.tensor([row["y"] for row in ROWS])
entropy = nn.functional.cross_entropy


def batches(size: int, rows: int = len(ROWS)) -> list[tuple[Tensor, Tensor]]:
    return [(X[at : min(at + size, rows)], Y[at : min(at + size, rows)]) for at in range(0, rows, size)]


def noisy(output: Tensor, target: Tensor) -> Tensor:
    """Draws, alike for each document of a batch."""
    return entropy(output, target) * (1 + torch.rand(()))


def spread(output: Tensor, _: Tensor) -> float:
    return float(output.std())


class Hits:
    """A metric in the manner of torchmetrics, whose value depends on the order of its updates."""

    def __init__(self) -> None:
        self.total = 0.0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total = self.total * 0.9 + float((output.argmax(dim=1) == target).float().sum())

    def compute(self) -> float:
        return self.total

    __call__ = update

    def reset(self) -> None:
        self.total = 0.0


class Own(TorchTrainer):
    """Measures by a `validate` of its own, which draws."""

    def validate(self, model: TorchModel, batch: Any) -> dict[str, float]:
        x, y = batch
        return {"objective": float(entropy(model.object(x), y) + torch.rand(()).item()), "rows": len(x)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured, in batches of how many rows, and by what two models are compared then."""

    objective: Any = entropy
    unit: str = "documents"
    size: int = 10
    cls: type[TorchTrainer] = TorchTrainer
    rows: int = len(ROWS)


CASES = {
    "documents": Case(),
    "one document a batch, and more batches than are exchanged at a time": Case(size=1),
    "fewer batches than ranks": Case(size=150),
    "one batch": Case(size=500),
    "no batch": Case(rows=0),
    "a sum": Case(nn.CrossEntropyLoss(reduction="sum"), "batches", size=2),
    "class weights": Case(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.0]))),
    "draws": Case(noisy, "batches", size=3),
    "an own validation": Case(cls=Own, unit="batches", size=4),
}


def models() -> list[TorchModel]:
    metrics = [Metric("spread", object=spread), Metric("hits", object=Hits())]
    validation = Validation("v", metrics=metrics)
    return [TorchModel("m", object=net(seed), validation=validation) for seed in (0, 1)]


def by_ranks(world: int, of: TorchTrainer, given: list[TorchModel], read: list[Any]) -> list[Any]:
    """What each rank finds, or raises; each has models of its own."""
    copies = [copy.deepcopy(given) for _ in range(world)]

    def rank(group: Group) -> list[Scored]:
        return score(of, copies[group.rank], read[group.rank :: group.world], group=group)

    return run_ranks(world, rank)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_finds_the_bits_of_one_process(name: str) -> None:
    case = CASES[name]
    of = trainer(SELECT, cls=case.cls, objective=case.objective, model=None)
    given, read = models(), batches(case.size, case.rows)
    alone = score(of, given, read)
    assert [(one.documents, one.unit) for one in alone] == [(case.rows, case.unit)] * 2
    assert (len(alone[0].losses) > 0) == (case.rows > 0)
    for world in (1, 2, 3, 4):
        assert by_ranks(world, of, given, read) == [alone] * world, world


def test_a_batch_far_down_that_is_no_mean_makes_all_of_batches_on_any_number_of_ranks() -> None:
    def objective(output: Tensor, target: Tensor) -> Tensor:
        if len(output) == 1 and float(output[0, 0]) == float(last):
            raise ValueError("this one has no loss of its own")
        return entropy(output, target)

    with torch.no_grad():
        last = net()(X)[-1, 0]
    given = [TorchModel("m", object=net())]
    of = trainer(SELECT, objective=objective, model=None)
    alone = score(of, given, batches(5))
    assert (alone[0].unit, len(alone[0].losses)) == ("batches", 41)
    for world in (2, 3):
        assert by_ranks(world, of, given, batches(5)) == [alone] * world, world


class NoPickleError(Exception):
    """An error that no other process can read."""

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def _fails_on(rank: int, error: Callable[[], Exception]) -> Any:
    """An objective, or a metric, that fails where it sees one certain document, which a rank has."""
    with torch.no_grad():
        marked = float(net()(X)[10 * rank, 0])

    def failing(output: Tensor, target: Tensor) -> Tensor:
        if math.isclose(float(output.detach()[0, 0]), marked, rel_tol=1e-6) and len(output) > 1:
            raise error()
        return entropy(output, target)

    return failing


@pytest.mark.parametrize("where", ["objective", "metric"])
@pytest.mark.parametrize("error", [lambda: LookupError("no such class"), lambda: NoPickleError("mine")])
def test_what_one_rank_raises_all_raise(where: str, error: Callable[[], Exception]) -> None:
    failing = _fails_on(1, error)
    metrics = [Metric("failing", object=failing)] if where == "metric" else []
    given = TorchModel("m", object=net(), validation=Validation("v", metrics=metrics) if metrics else None)
    of = trainer(SELECT, objective=failing if where == "objective" else entropy, model=None)
    found = by_ranks(3, of, [given], batches(10))
    text = str(error())
    assert all(isinstance(one, Exception) and text in str(one) for one in found), found
    assert not any(isinstance(one, WorkerLostError) for one in found)
    assert type(found[1]) is type(error())
    assert isinstance(found[0], LookupError | MongotorchError)


def test_a_rank_that_is_gone_ends_the_others() -> None:
    of, given = trainer(SELECT, model=None), [TorchModel("m", object=net())]

    def rank(group: Group) -> Any:
        if group.rank == 1:
            raise KeyError("gone before the first batch")
        return score(of, given, batches(10), group=group)

    found = run_ranks(2, rank)
    assert isinstance(found[0], WorkerLostError)
