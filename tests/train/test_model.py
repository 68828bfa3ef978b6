"""The TorchModel as a value, and what it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import net, same
from torch import Tensor, nn

from mongotorch import TorchModel
from mongotorch.errors import ParameterError, ShapeError


class Sum(nn.Module):
    """Two arguments, by position or by name."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 10 * b

    def several(self, a: Tensor) -> dict[str, Any]:
        return {"double": 2 * a, "pair": (a, a + 1)}

    def mean(self, a: Tensor) -> Tensor:
        return a.mean()


class Watching(nn.Module):
    """Notes in which mode it is called, and with how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, not torch.is_grad_enabled(), len(x)))
        found: Tensor = self.dropout(self.frozen(x))
        return found


def test_one_item_is_a_batch_of_one() -> None:
    module = net()
    item = [1.0, 2.0, 3.0, 4.0]

    predicted = TorchModel("m", object=module).predict(item)

    assert torch.equal(predicted, module(torch.tensor([item]))[0])
    assert not predicted.requires_grad


@pytest.mark.parametrize(
    "item",
    [
        [1.0, 2.0, 3.0, 4.0],
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        np.array([1, 2, 3, 4], dtype=np.float32),
        np.arange(8, dtype=np.float32)[::2],
    ],
)
def test_lists_arrays_and_tensors_can_be_predicted(item: Any) -> None:
    expected = net()(torch.as_tensor(np.asarray(item), dtype=torch.float32)[None])[0]

    assert torch.equal(TorchModel("m", object=net()).predict(item), expected)


def test_tuples_go_by_position_and_dicts_by_name() -> None:
    model = TorchModel("m", object=Sum())

    assert model.predict((1.0, 2.0)) == 21
    assert model.predict({"b": 1.0, "a": 2.0}) == 12
    assert [float(found) for found in model.predict_batches([(1.0, 2.0), (3.0, 4.0)])] == [21, 43]


def test_outputs_of_any_structure_are_taken_apart_by_item() -> None:
    model = TorchModel("m", object=Sum(), forward_method="several")

    found = model.predict_batches([torch.tensor([1.0]), torch.tensor([5.0])])

    assert same(found[1], {"double": torch.tensor([10.0]), "pair": (torch.tensor([5.0]), torch.tensor([6.0]))})


def test_preprocess_and_postprocess_go_around_the_module() -> None:
    model = TorchModel(
        "m",
        object=Sum(),
        preprocess=lambda text: tuple(torch.tensor(float(part)) for part in text.split("+")),
        postprocess=lambda output: f"{output.item():.0f}",
    )

    assert model.predict("1+2") == "21"
    assert model.predict_batches(["1+2", "3+4"]) == ["21", "43"]


def test_items_go_through_in_batches_and_come_back_in_order() -> None:
    watching = Watching()
    items = [torch.tensor([float(n), 0.0]) for n in range(10)]

    found = TorchModel("m", object=watching).predict_batches(items, batch_size=4)

    assert [rows for _, _, rows in watching.seen] == [4, 4, 2]
    assert [round(float(one[0])) for one in found] == list(range(10))
    assert TorchModel("m", object=watching).predict_batches([]) == []


def test_predicting_is_done_in_eval_mode_and_leaves_each_part_in_its_own() -> None:
    watching = Watching().train()
    watching.frozen.eval()
    before = watching.frozen.num_batches_tracked

    TorchModel("m", object=watching).predict([1.0, 2.0])

    assert watching.seen == [(False, True, 1)]
    assert (watching.training, watching.frozen.training, watching.dropout.training) == (True, False, True)
    assert watching.frozen.num_batches_tracked == before


def test_the_mode_comes_back_when_the_module_raises() -> None:
    watching = Watching().train()

    with pytest.raises(ValueError, match="expected 2D"):
        TorchModel("m", object=watching).predict(torch.zeros(2, 2, 2))

    assert watching.dropout.training


def test_items_that_make_no_batch_are_refused() -> None:
    model = TorchModel("m", object=net())

    for items in ([[1.0], [1.0, 2.0]], ["text", "text"]):
        with pytest.raises(ShapeError, match="preprocess"):
            model.predict_batches(items)
    with pytest.raises(ShapeError, match="first dimension"):
        TorchModel("m", object=Sum(), forward_method="mean").predict([1.0, 2.0])
    with pytest.raises(ParameterError) as caught:
        model.predict_batches([[1.0] * 4], batch_size=0)
    assert caught.value.field == "batch_size"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"object": len}, "object"),
        ({"preprocess": 3}, "preprocess"),
        ({"postprocess": "int"}, "postprocess"),
        ({"forward_method": "predict"}, "forward_method"),
        ({"train_forward_method": "loss"}, "train_forward_method"),
        ({"trainer": len}, "trainer"),
        ({"validation": []}, "validation"),
        ({"preferred_devices": ("quantum",)}, "preferred_devices"),
        ({"preferred_devices": ("meta",)}, "preferred_devices"),  # which torch knows, and which computes nothing
        ({"preferred_devices": ()}, "preferred_devices"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        TorchModel("m", **{"object": net(), **given})

    assert caught.value.field == field


def test_a_device_that_is_not_there_is_passed_over() -> None:
    assert (
        TorchModel("m", object=net(), preferred_devices=("cuda:99", "cpu")).predict([0.0] * 4).device.type == "cpu"
    )
