"""What a run measures, on which documents, and what a subclass of the trainer changes, out of the database."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from tests.helpers import fill, fold_ids, model, points, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Dataset, Metric, TorchModel, TorchTrainer, Validation
from mongotorch.train.mapping import Passed


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def macro_f1() -> torchmetrics.Metric:
    return torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")


def expected(of: TorchModel, documents: list[dict[str, Any]]) -> dict[str, float]:
    """What the measurement of all documents at once gives."""
    x, y = (torch.tensor([document[field] for document in documents]) for field in ("x", "y"))
    with torch.no_grad():
        output = of.object(x)
    f1 = macro_f1()
    return {
        "objective": nn.functional.cross_entropy(output, y).item(),
        "accuracy": accuracy(output, y).item(),
        "f1": f1(output, y).item(),
    }


def test_each_metric_is_exact_on_the_fold_and_on_each_dataset(db: Datalayer) -> None:
    select = fill(db)
    hard = points()[40:77]
    db["hard"].insert_many({**document, "y": (document["y"] + document["n"] % 2) % 3} for document in hard)
    validation = Validation(
        "v",
        metrics=[Metric("accuracy", object=accuracy), Metric("f1", object=macro_f1())],
        datasets=[Dataset("hard", select=db["hard"].find({"n": {"$gte": 45}}))],
    )
    assert len(fold_ids(db, "valid")) % 10 not in (0, 1)  # a short last batch

    trained = db.apply(
        trainer(
            select,
            model=model(validation=validation),
            listen="hard/f1",
            validation_interval=2,
            loader_kwargs={"batch_size": 10},
        )
    ).result()

    values = trained.trainer.metric_values
    scores = values["hard/f1"]
    best = scores.index(max(scores))
    assert db.show("model", "m", 1)["best_step"] == 2 * (best + 1)
    on = {
        "": list(db["points"].raw.find({"_fold": "valid"})),
        "hard/": list(db["hard"].raw.find({"n": {"$gte": 45}})),
    }
    for prefix, documents in on.items():
        for name, value in expected(trained, documents).items():
            assert values[prefix + name][best] == pytest.approx(value, abs=1e-6), prefix + name
    assert len(values) == 6
    point = db["mt.metrics"].raw.find_one({"step": 2, "kind": "valid"})
    assert set(point["values"]) == set(values)
    assert db.load("dataset", "hard").select == db["hard"].find({"n": {"$gte": 45}})


class Halved(TorchTrainer):
    """Measures half of the objective."""

    def compute_validation_objective(self, model: TorchModel, passed: Passed) -> Tensor:
        assert not model.object.training
        return super().compute_validation_objective(model, passed) / 2


def test_a_subclass_measures_another_objective(db: Datalayer) -> None:
    select = fill(db)

    plain, halved = (db.apply(trainer(select, cls)).result().trainer for cls in (TorchTrainer, Halved))

    assert type(db.load("trainer", "t")) is Halved
    found = [value * 2 for value in halved.metric_values["objective"]]
    assert found == pytest.approx(plain.metric_values["objective"])


class Two(TorchTrainer):
    """Trains each layer with an optimizer of its own, the last one every second step."""

    def get_optimizers(self, model: TorchModel) -> Any:
        first, _, last = model.object.children()
        momentum = torch.optim.SGD(last.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.Adam(first.parameters(), lr=0.01), momentum

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        model.object.zero_grad()
        loss = self.compute_objective(model, batch)
        torch.autograd.backward(loss)
        optimizers[0].step()
        if int(optimizers[0].state[next(model.parameters())]["step"]) % 2 == 0:
            optimizers[1].step()
        return loss


def test_the_states_of_several_optimizers_are_stored_and_gone_on_with(db: Datalayer) -> None:
    select = fill(db)
    epoch = -(-len(fold_ids(db, "train")) // 16)
    usual: dict[str, Any] = {"validation_interval": None}
    whole = db.apply(trainer(select, Two, max_iterations=2 * epoch, **usual)).result()

    first = db.apply(trainer(select, Two, max_iterations=epoch, **usual)).result()
    second = db.apply(first.trainer, force=True).result()

    kept = second.trainer.optimizer_state
    assert list(kept) == ["optimizers"]
    assert [float(one["step"]) for one in kept["optimizers"][0]["state"].values()] == [2.0 * epoch] * 2
    assert same(kept, whole.trainer.optimizer_state)
    assert same(state(second), state(whole))
    assert not same(state(first), state(whole))
