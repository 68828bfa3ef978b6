"""An error in a user's function says which part failed, where, and what it was given; it keeps its type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, fit, net, trainer
from torch import Tensor, nn

from mongotorch import Metric, TorchModel, TorchTrainer, Validation
from mongotorch.errors import SignatureError


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.layer(a + b)
        return out


class Wide(nn.Module):
    """Trains, and is too wide for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x if self.training else torch.cat([x, x], 1))
        return out


def text(error: BaseException) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def run(module: nn.Module | None = None, *, metric: Any = None, batches: Any = None, **given: Any) -> str:
    """Everything that is said of the error that a run ends in."""
    validation = None if metric is None else Validation("v", metrics=[Metric("acc", object=metric)])
    with pytest.raises(Exception) as caught:  # noqa: PT011 - it is looked at below
        list(fit(trainer(SELECT, **given), module, batches, validation=validation).run())
    return f"{caught.type.__name__}: {text(caught.value)}"


def test_arguments_that_do_not_fit_name_those_of_the_part_and_what_decides_them() -> None:
    found = run(Two())
    assert found.startswith("SignatureError: the model's forward takes (a, b) and was given (float32 (8, 4))")
    assert "signature '*args' gives it every part of a sample but the last" in found
    assert found.endswith("in training, at step 1")

    def objective(output: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, label, weight)

    found = run(objective=objective)
    assert found.startswith("SignatureError: the objective takes (output, label, weight) and was given")


def test_a_metric_is_named() -> None:
    found = run(metric=lambda output: 1.0)
    assert found.startswith(
        "SignatureError: metric 'acc' takes (output) and was given (float32 (8, 3), int64 (8,))"
    )
    found = run(metric=lambda output, target: output.nowhere)
    assert found.startswith("AttributeError: ")
    assert "in metric 'acc'(output, target), given" in found
    assert found.endswith("in the validation of the set 'valid'; after step 4")


def test_a_shape_that_only_validation_has_is_said_to_be_there() -> None:
    found = run(Wide())
    assert found.startswith("RuntimeError: mat1 and mat2 shapes")
    assert "in the model's forward(x), given (float32 (8, 4))" in found
    assert "in the validation of the set 'valid'; after step 4" in found


def test_an_error_of_training_is_said_to_be_there() -> None:
    class Failing(TorchTrainer):
        """Fails at its second step."""

        def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
            if optimizers[0].state:
                raise KeyError("here")
            return super().take_step(model, batch, optimizers)

    with pytest.raises(KeyError, match="here") as caught:
        list(fit(trainer(SELECT, Failing)).run())
    assert text(caught.value).endswith("in training, at step 2")


@pytest.mark.parametrize("objective", [nn.functional.cross_entropy, nn.functional.l1_loss])
def test_bool_targets_are_named_with_what_to_do(objective: Any) -> None:
    batches = [(x, y > 0) for x, y in BATCHES]
    found = run(nn.Sequential(net(), nn.Softmax(1)), objective=lambda o, t: objective(o, t), batches=batches)
    assert "bool (8,)" in found
    assert "convert it in `transform`" in found


def test_what_is_given_is_shown_without_its_values() -> None:
    def objective(output: Tensor, target: dict[str, Any]) -> Tensor:
        raise ValueError("no")

    batches = [(x, {"y": y, "names": ["secret"] * 9, "pair": (y, "secret")}) for x, y in BATCHES]
    found = run(objective=objective, batches=batches)
    assert "{y: int64 (8,), names: list, pair: [int64 (8,), str]}" in found
    assert "secret" not in found


def test_names_that_a_forward_does_not_have_are_answered_with_those_it_has() -> None:
    with pytest.raises(SignatureError, match=r"forward\(a, b\)"):
        list(fit(trainer(SELECT, key={"x": "c", "y": "d"}, signature="**kwargs"), Two()).run())
