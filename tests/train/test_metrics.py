"""What is measured: exact means over samples, whatever the sizes of the batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from tests.helpers import net
from torch import Tensor, nn

from mongotorch import Dataset, Metric, Query, TorchModel, TorchTrainer, Validation
from mongotorch.errors import EmptyFoldError, NonFiniteLossError, ParameterError
from mongotorch.train import evaluate
from mongotorch.train.evaluation import try_first_batch

SIZES = (16, 16, 16, 5)  # a last short batch
CPU = torch.device("cpu")
WRONG: Any = {"what": "no such thing"}


def accuracy(output: Tensor, target: Tensor) -> float:
    return (output.argmax(dim=1) == target).float().mean().item()


@pytest.fixture
def whole() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(sum(SIZES), 4, generator=drawn), torch.randint(3, (sum(SIZES),), generator=drawn)


def trainer_of_tensors(cls: type[TorchTrainer] = TorchTrainer, **given: Any) -> TorchTrainer:
    usual: dict[str, Any] = {
        "key": ("x", "y"),
        "select": Query.find("c"),
        "objective": nn.functional.cross_entropy,
    }
    return cls("t", **{**usual, **given})


def measured(sets: dict[str, list[Any]], *metrics: Metric, **given: Any) -> dict[str, float]:
    module = given.pop("module", None) or net()
    return evaluate(trainer_of_tensors(**given), TorchModel("m", object=module), sets, metrics, CPU)


def batches(whole: tuple[Tensor, Tensor]) -> list[Any]:
    return list(zip(*(torch.split(part, list(SIZES)) for part in whole), strict=True))


def test_a_callable_is_averaged_over_samples_and_not_over_batches(whole: tuple[Tensor, Tensor]) -> None:
    found = measured({"": batches(whole)}, Metric("accuracy", object=accuracy))

    output = net()(whole[0])
    right = int((output.argmax(dim=1) == whole[1]).sum())
    assert found["accuracy"] == pytest.approx(right / sum(SIZES), abs=1e-7)
    assert found["objective"] == pytest.approx(nn.functional.cross_entropy(output, whole[1]).item(), rel=1e-6)
    uneven = [accuracy(net()(x), y) for x, y in batches(whole)]
    assert found["accuracy"] != pytest.approx(sum(uneven) / len(uneven), abs=1e-4)


def test_a_torchmetrics_object_sees_the_whole_epoch_and_starts_anew(whole: tuple[Tensor, Tensor]) -> None:
    # F1 is no mean of batches: only all predictions together give it.
    score = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
    score.update(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))  # what it held before
    metric = Metric("f1", object=score)

    for _ in range(2):
        found = measured({"": batches(whole)}, metric)
        fresh = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
        assert found["f1"] == fresh(net()(whole[0]), whole[1]).item()


def test_each_set_is_measured_under_its_name(whole: tuple[Tensor, Tensor]) -> None:
    metric = Metric("accuracy", object=accuracy)

    found = measured({"": batches(whole), "hard": batches(whole)[:1]}, metric)

    assert list(found) == ["objective", "accuracy", "hard/objective", "hard/accuracy"]
    assert found["hard/accuracy"] == accuracy(net()(whole[0][:16]), whole[1][:16])


def test_a_metric_gets_the_target_that_goes_by_name(whole: tuple[Tensor, Tensor]) -> None:
    named = [{"input": x, "target": y} for x, y in batches(whole)]
    key = {"x": "input", "y": "target"}

    found = measured({"": named}, Metric("accuracy", object=accuracy), key=key, signature="**kwargs")

    assert found == measured({"": batches(whole)}, Metric("accuracy", object=accuracy))


class Halved(TorchTrainer):
    def compute_validation_objective(self, model: TorchModel, passed: Any) -> Tensor:
        assert not model.object.training
        return super().compute_validation_objective(model, passed) / 2


def test_a_subclass_may_measure_another_objective(whole: tuple[Tensor, Tensor]) -> None:
    halved = measured({"": batches(whole)}, cls=Halved)

    assert halved["objective"] == pytest.approx(measured({"": batches(whole)})["objective"] / 2)


def test_a_set_without_a_batch_is_an_error_that_names_it() -> None:
    with pytest.raises(EmptyFoldError, match="valid"):
        measured({"": []})
    with pytest.raises(EmptyFoldError, match="hard"):
        measured({"hard": []})


def test_a_set_whose_first_batch_was_tried_begins_with_its_first_epoch(whole: tuple[Tensor, Tensor]) -> None:
    class Shuffled(list[Any]):
        epoch = 7

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    tried = Shuffled(batches(whole))
    try_first_batch(trainer_of_tensors(), TorchModel("m", object=net()), {"": tried}, (), CPU)
    assert tried.epoch == 0


def test_an_objective_that_is_not_finite_is_an_error(whole: tuple[Tensor, Tensor]) -> None:
    x, y = whole
    x[-1] = math.nan

    with pytest.raises(NonFiniteLossError, match="valid"):
        measured({"": batches((x, y))})


@pytest.mark.parametrize(
    "function", [lambda output, target: output, lambda output, target: "good", lambda output, target: None]
)
def test_a_metric_that_gives_no_number_is_named(
    whole: tuple[Tensor, Tensor], function: Callable[..., Any]
) -> None:
    with pytest.raises(ParameterError) as caught:
        measured({"": batches(whole)}, Metric("mine", object=function))

    assert caught.value.field == "mine"


def test_better_is_more_unless_the_metric_says_otherwise() -> None:
    assert Metric("a", object=accuracy).higher_is_better
    assert not Metric("a", object=accuracy, mode="min").higher_is_better
    assert not Metric("e", object=torchmetrics.MeanSquaredError()).higher_is_better
    assert Metric("e", object=torchmetrics.MeanSquaredError(), mode="max").higher_is_better
    assert Metric("f", object=torchmetrics.Accuracy(task="binary")).higher_is_better


def test_what_a_validation_measures_is_known_by_name() -> None:
    hard = Dataset("hard", select=Query.find("c"))
    validation = Validation("v", metrics=[Metric("error", object=accuracy, mode="min")], datasets=[hard])

    known = {name: validation.higher_is_better(name) for name in ("error", "hard/error", "hard/objective")}

    assert known == dict.fromkeys(known, False)
    assert validation.higher_is_better("accuracy") is None
    assert validation.higher_is_better("easy/error") is None


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Metric("objective", object=accuracy), "identifier"),
        (lambda: Metric("a", object="accuracy"), "object"),
        (lambda: Metric("a", object=accuracy, mode="best"), "mode"),
        (lambda: Dataset("d", select=WRONG), "select"),
        (lambda: Validation("v", metrics=[WRONG]), "metrics"),
        (lambda: Validation("v", metrics=[Metric("a", object=accuracy)] * 2), "metrics"),
        (lambda: Validation("v", datasets=WRONG), "datasets"),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        make()

    assert caught.value.field == field
