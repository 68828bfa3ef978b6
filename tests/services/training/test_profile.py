"""What a trainer is made of and where its time goes, known before it runs; nothing is changed by asking."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from tests.helpers import documents_in, fill, model, same, state, trainer
from torch import Tensor, nn

from mongotorch import Datalayer, TorchModel, TorchTrainer
from mongotorch.errors import ParameterError


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SlowUpdate(TorchTrainer):
    """Takes long to let the optimizer make its step."""

    def update(self, model: Any, optimizers: Any) -> None:
        time.sleep(0.02)
        super().update(model, optimizers)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Own(TorchTrainer):
    """A step that calls nothing of the trainer's."""

    def take_step(self, model: Any, batch: Any, optimizers: Any) -> Tensor:
        optimizers[0].zero_grad()
        loss = nn.functional.cross_entropy(model.object(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[0].step()
        return loss


def slow_objective(output: Tensor, target: Tensor) -> Tensor:
    time.sleep(0.02)
    return nn.functional.cross_entropy(output, target)


def slow_sample(x: Any, y: Any) -> Any:
    time.sleep(0.003)
    return x, y


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    module[0].requires_grad_(False)
    return module


def stored(db: Datalayer) -> dict[str, int]:
    """What is stored, but for the plans of ranges, which every read stores."""
    return {name: count for name, count in documents_in(db).items() if name != "mt.plans"}


def test_the_layers_of_a_model_are_listed(db: Datalayer) -> None:
    summary = db.summary(TorchModel("m", object=frozen()))
    assert [(layer.name, layer.kind, layer.parameters, layer.is_frozen) for layer in summary.layers] == [
        ("0", "Linear", 40, True),
        ("1", "BatchNorm1d", 16, False),
        ("2", "ReLU", 0, False),
        ("3", "Linear", 27, False),
    ]
    assert (summary.parameters, summary.trainable) == (83, 43)
    assert summary.layers[0].shapes == {"weight": (8, 4), "bias": (8,)}
    assert {layer.output for layer in summary.layers} == {None}
    text = repr(summary)
    assert "83 parameters, 40 of them frozen" in text
    assert "frozen" in text.splitlines()[2]


def test_a_trainer_tells_the_shapes_of_the_outputs_and_changes_nothing(db: Datalayer) -> None:
    applied = trainer(fill(db), model=TorchModel("m", object=frozen()))
    before, there = state(applied.model or model()), stored(db)
    summary = db.summary(applied)
    assert [layer.output for layer in summary.layers] == [(16, 8), (16, 8), (16, 8), (16, 3)]
    assert same(state(applied.model or model()), before)
    assert stored(db) == there


def test_shared_and_lazy_parameters_are_counted_as_they_are(db: Datalayer) -> None:
    shared = nn.Linear(4, 4)
    assert db.summary(TorchModel("m", object=nn.Sequential(shared, shared))).parameters == 20
    lazy = db.summary(TorchModel("m", object=nn.Sequential(nn.LazyLinear(3))))
    assert (lazy.parameters, lazy.layers[0].shapes) == (0, {})


@pytest.mark.parametrize("wrong", [7, None, nn.Linear(1, 1), "m"])
def test_a_summary_is_of_a_model_or_a_trainer(db: Datalayer, wrong: Any) -> None:
    with pytest.raises(ParameterError):
        db.summary(wrong)


@pytest.mark.parametrize(
    ("cls", "given", "part", "says"),
    [
        (SlowUpdate, {}, "optimizer", "the optimizer"),
        (TorchTrainer, {"objective": slow_objective}, "forward", "the forward pass"),
        (
            TorchTrainer,
            {"transform": slow_sample, "in_memory": False, "data_prefetch": False},
            "data",
            "waiting for data",
        ),
    ],
)
def test_the_slowest_part_of_a_step_is_named(
    db: Datalayer, cls: type[TorchTrainer], given: dict[str, Any], part: str, says: str
) -> None:
    applied = trainer(fill(db), cls, **given)
    before, there = state(applied.model or model()), stored(db)
    found = db.explain(applied, measure=True, steps=5)
    assert found.step is not None
    assert set(found.step) == {"data", "transfer", "forward", "backward", "optimizer"}
    assert max(found.step, key=found.step.__getitem__) == part
    assert found.bottleneck.startswith(says)
    if part != "forward":
        assert says.removeprefix("the ") in found.hints[0]
    assert same(state(applied.model or model()), before)
    assert stored(db) == there
    assert ("a step: optimizer" in dict(found.rows())) is True


def test_an_own_step_is_one_part(db: Datalayer) -> None:
    found = db.explain(trainer(fill(db), Own), measure=True, steps=3)
    assert found.step is not None
    assert set(found.step) == {"data", "transfer", "step"}


def test_without_measuring_no_step_is_made(db: Datalayer) -> None:
    assert db.explain(trainer(fill(db), objective=nn.functional.cross_entropy)).step is None


def test_what_has_no_model_cannot_be_measured(db: Datalayer) -> None:
    with pytest.raises(ParameterError):
        db.explain(trainer(fill(db), model=None), measure=True)
    with pytest.raises(ParameterError):
        db.explain(model(), measure=True)  # type: ignore[arg-type]


def test_a_run_shorter_than_the_warm_up_is_measured(db: Datalayer) -> None:
    found = db.explain(trainer(fill(db), max_iterations=1), measure=True)
    assert found.step is not None
    assert found.step["forward"] > 0
    assert torch.is_grad_enabled()
