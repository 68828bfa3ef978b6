"""All signatures, in training and in validation: the same documents, the same weights, the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import fill, net, points, same, seeded, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, Metric, TorchModel, Validation


class Two(nn.Module):
    """Takes two inputs, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        output: Tensor = self.net(x) + n[:, None] / 1000
        return output

    def both(self, x: Tensor, n: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, n), target

    def both_named(self, x: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        return {"target": rest["target"], "input": self(x, rest["n"])}

    def both_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, n, target = batch.values() if isinstance(batch, dict) else batch
        return self(x, n), target


class Loss(Two):
    """Gives the loss itself, of the batch as a whole."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        x, n, target = batch.values() if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(super().forward(x, n), target)


def accuracy(output: Tensor, target: Tensor) -> float:
    return (output.argmax(dim=1) == target).float().mean().item()


def itself(output: Tensor) -> Tensor:
    return output


TUPLE, DICT = ("x", "n", "y"), {"x": "x", "n": "n", "y": "target"}
BOTH = (["x"], {"n": "n", "y": "target"})
LOSS: dict[str, Any] = {"module": Loss, "objective": itself, "validation": None}
CASES: dict[str, dict[str, Any]] = {
    "args of a tuple": {"key": TUPLE, "signature": "*args"},
    "args of a dict": {"key": DICT, "signature": "*args"},
    "args of both": {"key": BOTH, "signature": "*args"},
    "kwargs of a dict": {"key": DICT, "signature": "**kwargs"},
    "kwargs of both": {"key": BOTH, "signature": "**kwargs"},
    "both of both": {"key": BOTH, "signature": "*args,**kwargs"},
    "both of a tuple": {"key": TUPLE, "signature": "*args,**kwargs"},
    "both of a dict": {"key": DICT, "signature": "*args,**kwargs"},
    "singleton of a tuple": {"key": TUPLE, "signature": "singleton", **LOSS},
    "singleton of a dict": {"key": DICT, "signature": "singleton", **LOSS},
    "own method, args": {"key": TUPLE, "signature": "*args", "method": "both"},
    "own method, kwargs": {"key": DICT, "signature": "**kwargs", "method": "both_named"},
    "own method, both": {"key": BOTH, "signature": "*args,**kwargs", "method": "both"},
    "own method, singleton": {"key": TUPLE, "signature": "singleton", "method": "both_of"},
}


def run(db: Datalayer, **case: Any) -> TorchModel:
    metrics = [Metric("accuracy", object=accuracy)] if case.get("method") != "both_named" else []
    validation = case.pop("validation", Validation("v", metrics=metrics))
    model = TorchModel(
        "m",
        object=seeded(case.pop("module", Two)),
        validation=validation,
        train_forward_method=case.pop("method", "__call__"),
    )
    select = case.pop("select", db["points"].find())
    options = {"max_iterations": 8, "loader_kwargs": {"batch_size": 16, "shuffle": True}, **case}
    found: TorchModel = db.apply(trainer(select, model=model, **options), force=True).result()
    return found


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_signature_trains_and_validates_the_same(db: Datalayer, in_memory: bool) -> None:
    fill(db)
    expected = run(db, **CASES["args of a tuple"])
    values: Any = expected.trainer.metric_values
    assert list(values) == ["objective", "accuracy"]

    for name, case in CASES.items():
        found = run(db, in_memory=in_memory, **case)
        assert same(state(found), state(expected)), name
        for metric, kept in found.trainer.metric_values.items():
            assert kept == values[metric], (name, metric)


def by_position(x: list[float], n: int, y: int) -> tuple[Tensor, int, int]:
    return torch.tensor(x) * 2, n, y


def by_name(*, x: list[float], n: int, target: int) -> dict[str, Any]:
    return {"target": target, "n": n, "x": torch.tensor(x) * 2}


def by_both(x: list[float], *, n: int, target: int) -> tuple[list[Any], dict[str, Any]]:
    return [torch.tensor(x) * 2], {"n": n, "target": target}


def whole(sample: Any) -> Any:
    x, n, y = sample
    return torch.tensor(x) * 2, n, y


def test_a_transform_is_called_by_the_signature_and_what_it_returns_is_the_sample(db: Datalayer) -> None:
    fill(db)
    plain = run(db, key=TUPLE)
    found = [
        run(db, key=TUPLE, signature="*args", transform=by_position),
        run(db, key=DICT, signature="**kwargs", transform=by_name),
        run(db, key=BOTH, signature="*args,**kwargs", transform=by_both),
        run(db, key=TUPLE, signature="singleton", transform=whole, **LOSS),
        run(db, key=TUPLE, signature="singleton", transform=whole, method="both_of"),
    ]

    assert all(same(state(one), state(found[0])) for one in found)
    assert not same(state(plain), state(found[0]))


def collated(samples: list[Any]) -> Any:
    xs, ns, ys = zip(*samples, strict=True)
    return torch.tensor(xs) * 2, torch.tensor(ns), torch.tensor(ys)


def test_a_collate_fn_makes_the_batch_of_the_samples(db: Datalayer) -> None:
    fill(db)

    found = run(db, key=TUPLE, collate_fn=collated)

    assert same(state(found), state(run(db, key=TUPLE, transform=by_position)))


def halves(x: list[float], again: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(x), torch.tensor(again[:3])


def parts(x: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(x), torch.tensor(x[:3])


def test_a_single_field_can_be_input_and_target(db: Datalayer) -> None:
    fill(db)
    usual: dict[str, Any] = {"objective": nn.functional.mse_loss, "validation": None, "module": net}

    found = run(db, key="x", transform=parts, **usual)

    assert same(state(found), state(run(db, key=("x", "x"), transform=halves, **usual)))


def test_dotted_paths_reach_into_documents(db: Datalayer) -> None:
    fill(db)
    nested = [{"_id": d["_id"], "data": {"x": d["x"], "in": {"n": d["n"]}}, "y": d["y"]} for d in points()]
    db["nested"].insert_many(nested)
    select = db["nested"].find()

    found = [
        run(db, select=select, key=("data.x", "data.in.n", "y")),
        run(db, select=select, key=["data.x", "data.in.n", "y"], signature="**kwargs", objective=by_y),
        run(db, select=select, key={"data.x": "x", "data.in.n": "n", "y": "target"}, signature="**kwargs"),
    ]

    assert all(same(state(one), state(run(db, key=TUPLE))) for one in found)


def by_y(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y)
