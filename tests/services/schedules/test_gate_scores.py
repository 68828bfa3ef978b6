"""A schedule's gate lets better models through and refuses worse ones, whatever their output and objective are."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tests.helpers import COLLECTION, fill, net, points, trainer
from torch import Tensor, nn

from mongotorch import Always, Better, Datalayer, Every, Metric, Schedule, TorchModel, Validation, Worker

entropy = nn.functional.cross_entropy


@dataclasses.dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is a dict too, in the manner of transformers."""

    logits: Any = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class Giving(nn.Module):
    """The small net, with its output in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Any:
        return ModelOutput(logits=self.body(x))


def of_output(output: Any, target: Tensor) -> Tensor:
    assert type(output) is ModelOutput
    return entropy(output.logits, target)


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Each row against all others of its batch."""
    unit = nn.functional.normalize(output, dim=1)
    alike = (unit @ unit.T / 0.5).fill_diagonal_(-1e9).log_softmax(dim=1)
    same = (target[:, None] == target[None, :]).float().fill_diagonal_(0.0)
    return -(alike * same).sum() / same.sum().clamp(min=1.0)


def by_batch(output: Tensor, target: Tensor) -> float:
    """No mean over documents: how far the classes of a batch are apart."""
    return float(output.detach()[target == 0].std() / output.detach().std())


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, and by what two models are compared under it."""

    objective: Any
    unit: str
    module: type[nn.Module] = nn.Identity
    metrics: tuple[Metric, ...] = ()
    ignored: bool = False


CASES = {
    "an output of an own type": Case(of_output, "documents", Giving),
    "contrastive": Case(contrastive, "batches"),
    "class weights": Case(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 6.0, 0.2])), "documents"),
    "ignored documents": Case(entropy, "documents", ignored=True),
    "a metric of a batch": Case(entropy, "documents", metrics=(Metric("apart", object=by_batch),)),
}


def served(db: Datalayer, case: Case, gate: Any, **given: Any) -> dict[str, Any]:
    """The document that a schedule's run publishes after a first version is live."""
    select = fill(db)
    if case.ignored:
        db[COLLECTION].raw.update_many({"n": {"$in": list(range(0, 120, 3))}}, {"$set": {"y": -100}})
        db[COLLECTION].raw.insert_many(
            [{**row, "_id": 5000 + row["n"], "y": -100, "_fold": "valid"} for row in points(40)]
        )
    made = TorchModel(
        "m",
        object=net() if case.module is nn.Identity else case.module(),
        validation=Validation("v", metrics=list(case.metrics)) if case.metrics else None,
    )
    first = trainer(
        select, objective=case.objective, model=made, max_iterations=20, loader_kwargs={"batch_size": 10}
    )
    db.apply(first).result()
    # Ascends where it is to become worse; without validations, the last weights are published.
    again = first.replace(identifier="u", validation_interval=None, **given)
    db.apply(Schedule("s", trainer=again, trigger=Every(seconds=1e6), gate=gate))
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    published: dict[str, Any] = db.show("model", "m", job.result(timeout=5).version)
    return published


@pytest.mark.parametrize("case", CASES)
def test_a_better_model_goes_live(db: Datalayer, case: str) -> None:
    document = served(db, CASES[case], Better(confidence=0.9), optimizer_kwargs={"lr": 0.05}, max_iterations=60)
    verdict = document["verdict"]
    assert verdict["promote"], verdict["why"]
    assert verdict["unit"] == CASES[case].unit
    assert ("batches" in verdict["why"]) == (verdict["unit"] == "batches")
    assert verdict["challenger"]["objective"] < verdict["champion"]["objective"]
    assert verdict["documents"] == db[COLLECTION].count({"_fold": "valid"})
    assert db.load("model", "m").uuid == document["_id"]
    assert db.history("model", "m")[-1].why == verdict["why"]


@pytest.mark.parametrize("case", CASES)
def test_a_worse_model_does_not_go_live(db: Datalayer, case: str) -> None:
    ascending = {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 0.05, "maximize": True}, "max_iterations": 20}
    document = served(db, CASES[case], Better(), **ascending)
    verdict = document["verdict"]
    assert not verdict["promote"]
    assert "worse by" in verdict["why"]
    assert verdict["unit"] == CASES[case].unit
    assert db.load("model", "m").version != document["version"]


@pytest.mark.parametrize("case", CASES)
def test_the_live_model_scores_what_its_own_validation_measured(db: Datalayer, case: str) -> None:
    document = served(db, CASES[case], Better(), max_iterations=1)
    champion = document["verdict"]["champion"]
    live = db.show(uuid=document["verdict"]["against"]["uuid"])
    assert champion == live["metrics"]


def test_a_gate_that_needs_no_scores_gets_none(db: Datalayer) -> None:
    verdict = served(db, CASES["a metric of a batch"], Always(), max_iterations=1)["verdict"]
    assert (verdict["promote"], verdict["documents"], verdict["challenger"]) == (True, 0, {})
    assert verdict["champion"] is None
