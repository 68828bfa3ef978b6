"""Schedulers: by name and by class, numbers of the run in their options, state, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import SELECT, Replayed, fit, same, state, trainer
from tests.train.test_recipe import SETS, SHORT, through_the_codec
from torch import Tensor
from torch.optim import lr_scheduler as lr

from mongotorch import Metric, TorchModel, TorchTrainer, Validation
from mongotorch.errors import ParameterError
from mongotorch.train import Fit, Stepped, Trained
from mongotorch.train.schedulers import filled, named_numbers

RUN = {"max_iterations": 100, "max_epochs": 7, "steps_per_epoch": 15}
# Options for every scheduler of torch.
OPTIONS: dict[str, dict[str, Any]] = {
    "ChainedScheduler": {"schedulers": [{"cls": "ConstantLR"}, {"cls": "ExponentialLR", "gamma": 0.9}]},
    "ConstantLR": {"total_iters": 1},
    "CosineAnnealingLR": {"T_max": "max_iterations"},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "LinearLR": {"total_iters": "max_iterations"},
    "MultiStepLR": {"milestones": [2, "max_iterations // 2"]},
    "MultiplicativeLR": {"lr_lambda": lambda _: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": "max_iterations"},
    "PolynomialLR": {"total_iters": 5, "power": 2.0},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 0.9},
    "SequentialLR": {
        "schedulers": [{"cls": "LinearLR", "total_iters": 3}, {"cls": "CosineAnnealingLR", "T_max": 10}],
        "milestones": [3],
    },
    "StepLR": {"step_size": 1, "gamma": 0.5},
}


def test_every_scheduler_of_torch_is_tried() -> None:
    own = {name for name, cls in vars(lr).items() if isinstance(cls, type) and issubclass(cls, lr.LRScheduler)}
    assert own - {"LRScheduler", "_LRScheduler"} == set(OPTIONS)


def rates(run: Fit) -> list[tuple[float, ...]]:
    return [event.learning_rates for event in run.run() if isinstance(event, Stepped)]


@pytest.mark.parametrize("interval", ["step", "epoch", "validation"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_any_scheduler_goes_on_to_the_same_bits(name: str, interval: str) -> None:
    of = trainer(
        SELECT,
        scheduler_cls=name,
        scheduler_kwargs=OPTIONS[name],
        scheduler_interval=None if name == "ReduceLROnPlateau" else interval,
        no_improve_then_stop=100,
    )
    whole = fit(of)
    expected = rates(whole)
    assert len(set(expected)) > 1

    first = fit(of)
    events = first.run()
    for event in events:
        if isinstance(event, Stepped) and event.step == 7:
            break
    captured = through_the_codec(first.capture())
    events.close()
    second = fit(of, state=captured)
    assert rates(second) == expected[7:]
    assert same(state(second.model), state(whole.model))
    assert same(second.trained().training_state, whole.trained().training_state)


def test_numbers_of_the_run_become_numbers() -> None:
    options = {
        "a": "max_iterations",
        "b": ["max_epochs * 2", {"c": "(max_iterations - steps_per_epoch) // 2"}],
        "d": "0.1 * max_iterations",
        "e": "-max_epochs / 2",
        "mode": "min",
        "f": 0.5,
        "g": (1, "steps_per_epoch + 1"),
    }
    expected = {"a": 100, "b": [14, {"c": 42}], "d": 10, "e": -4, "mode": "min", "f": 0.5, "g": [1, 16]}
    assert filled(options, RUN) == expected
    assert named_numbers(options) == set(RUN)


@pytest.mark.parametrize(
    "text",
    [
        "max_iterations ** 2",
        "f(max_iterations)",
        "max_iterations +",
        "max_iterations / 0",
        "max_iterations + other",
        "max_iterations + True",
        "max_iterations.real",
        "max_iterations if 1 else 2",
    ],
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="no formula") as caught:
        trainer(SELECT, scheduler_cls="StepLR", scheduler_kwargs={"step_size": text})
    assert caught.value.field == "scheduler_kwargs"


class Seen(TorchTrainer):
    """Shows with which options it makes schedulers."""

    def get_schedulers(self, optimizers: Any) -> Any:
        object.__setattr__(self, "seen", self.scheduler_kwargs)
        return super().get_schedulers(optimizers)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_epochs": 3, "max_iterations": 10**100}, [18, 3, 6]),
        ({"max_epochs": 3, "max_iterations": 10}, [10, 3, 6]),
        ({"max_iterations": 20}, [20, 4, 6]),
        ({"max_epochs": 3, "max_iterations": 10**100, "gradient_accumulation_steps": 4}, [6, 3, 2]),
    ],
)
def test_numbers_are_those_of_the_run(given: dict[str, Any], expected: list[int]) -> None:
    names = ["max_iterations", "max_epochs", "steps_per_epoch"]
    of = trainer(
        SELECT,
        Seen,
        scheduler_cls="MultiStepLR",
        scheduler_kwargs={"milestones": names},
        no_improve_then_stop=100,
        **given,
    )
    run = fit(of, batches=SHORT)
    steps = [event for event in run.run() if isinstance(event, Stepped)]
    assert run.trainer.seen == {"milestones": expected}  # type: ignore[attr-defined]
    assert len(steps) == expected[0] == run.most_steps


def test_a_resumed_run_has_the_numbers_of_the_first_attempt() -> None:
    of = trainer(
        SELECT,
        Seen,
        scheduler_cls="OneCycleLR",
        max_iterations=10**100,
        max_epochs=2,
        scheduler_kwargs={"max_lr": 0.1, "total_steps": "max_iterations"},
    )
    first = fit(of, batches=SHORT)
    events = first.run()
    next(events)
    captured = first.capture()
    events.close()
    second = fit(of, batches=SHORT[:5], state=captured)  # documents were deleted meanwhile
    list(second.run())
    assert second.trainer.seen["total_steps"] == 12  # type: ignore[attr-defined]


def test_a_plateau_follows_what_the_run_listens_to() -> None:
    def better(output: Tensor, _: Tensor) -> float:
        return float(output.square().mean())

    validation = Validation("v", metrics=[Metric("better", object=better, mode="max")])
    found: dict[str, None] = {}
    for mode in ({}, {"mode": "min"}):
        of = trainer(
            SELECT,
            listen="better",
            scheduler_cls="ReduceLROnPlateau",
            model=None,
            scheduler_kwargs={"patience": 0, **mode},
        )
        run = fit(of, validation=validation)
        list(run.run())
        (scheduler,) = run.schedulers
        assert isinstance(scheduler, lr.ReduceLROnPlateau)
        found[scheduler.mode] = None
    assert list(found) == ["max", "min"]


def function(optimizer: torch.optim.Optimizer, steps: int) -> lr.LRScheduler:
    """Makes a scheduler, as those of other libraries do."""
    return lr.LambdaLR(optimizer, lambda step: 1 - step / steps)


def test_a_function_makes_a_scheduler() -> None:
    of = trainer(SELECT, scheduler_cls=function, scheduler_kwargs={"steps": "max_iterations"}, max_iterations=4)
    assert rates(fit(of)) == [(0.01,), (0.0075,), (0.005,), (0.0025,)]


class Several(TorchTrainer):
    """Schedulers of its own, of which one waits for validations."""

    def get_schedulers(self, optimizers: Any) -> Any:
        return [
            lr.ExponentialLR(optimizers[0], 0.5),
            lr.ReduceLROnPlateau(optimizers[0], patience=0, threshold=0.9),
        ]


def test_a_subclass_makes_schedulers() -> None:
    run = fit(trainer(SELECT, Several, max_iterations=9, validation_interval=3, no_improve_then_stop=9))
    found = [rate for (rate,) in rates(run)]
    assert found[:3] == [0.01, 0.005, 0.0025]
    assert found[6] == pytest.approx(0.01 * 0.5**6 * 0.1)  # the second validation was no better


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"scheduler_cls": "OneCycle"}, "scheduler_cls"),
        ({"scheduler_cls": "nowhere:Scheduler"}, "scheduler_cls"),
        ({"scheduler_cls": "LRScheduler"}, "scheduler_cls"),
        ({"scheduler_cls": torch.optim.SGD}, "scheduler_cls"),
        ({"scheduler_cls": 3}, "scheduler_cls"),
        ({"scheduler_cls": lambda optimizer: optimizer}, "scheduler_cls"),
        ({"scheduler_cls": "StepLR"}, "scheduler_kwargs"),
        ({"scheduler_cls": "StepLR", "scheduler_kwargs": {"step_size": 3, "gama": 1}}, "scheduler_kwargs"),
        ({"scheduler_cls": "StepLR", "scheduler_kwargs": [3]}, "scheduler_kwargs"),
        ({"scheduler_cls": "SequentialLR", "scheduler_kwargs": {"schedulers": ["LinearLR"]}}, "scheduler_kwargs"),
        (
            {"scheduler_cls": "SequentialLR", "scheduler_kwargs": {"schedulers": [{"cls": "LinearLR"}]}},
            "scheduler_kwargs",
        ),
        ({"scheduler_kwargs": {"step_size": 3}}, "scheduler_kwargs"),
        ({"scheduler_interval": "step"}, "scheduler_interval"),
        (
            {"scheduler_cls": "ExponentialLR", "scheduler_kwargs": {"gamma": 0.9}, "scheduler_interval": "day"},
            "scheduler_interval",
        ),
        ({"scheduler_cls": "ReduceLROnPlateau", "scheduler_interval": "step"}, "scheduler_interval"),
        ({"scheduler_cls": "ReduceLROnPlateau", "validation_interval": None}, "scheduler_interval"),
        (
            {
                "scheduler_cls": "StepLR",
                "scheduler_kwargs": {"step_size": "max_iterations"},
                "max_iterations": 10**100,
            },
            "scheduler_kwargs",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_at_construction(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        trainer(SELECT, **given)
    assert caught.value.field == field


def test_a_schedule_that_is_too_short_says_so() -> None:
    of = trainer(SELECT, scheduler_cls="OneCycleLR", scheduler_kwargs={"max_lr": 0.1, "total_steps": 5})
    with pytest.raises(ParameterError, match="makes no further step") as caught:
        list(fit(of).run())
    assert caught.value.field == "scheduler_kwargs"


def continued(trained: Trained, **given: Any) -> Fit:
    state = {"optimizer_state": trained.optimizer_state, "training_state": trained.training_state}
    return fit(trainer(SELECT, **{**given, **state}))


def test_a_continued_run_goes_on_with_the_schedule() -> None:
    given: dict[str, Any] = {
        "scheduler_cls": "StepLR",
        "scheduler_kwargs": {"step_size": 8, "gamma": 0.5},
        "validation_interval": None,
        "max_iterations": 12,
    }
    first = fit(trainer(SELECT, **given))
    assert [rate for (rate,) in rates(first)] == [0.01] * 8 + [0.005] * 4
    found = rates(continued(first.trained(), **given))
    assert [rate for (rate,) in found] == [0.005] * 4 + [0.0025] * 8


def test_a_continued_run_has_its_own_options() -> None:
    given: dict[str, Any] = {
        "scheduler_cls": "StepLR",
        "scheduler_kwargs": {"step_size": 8, "gamma": 0.5},
        "validation_interval": None,
        "max_iterations": 12,
    }
    first = fit(trainer(SELECT, **given))
    list(first.run())
    changed = {**given, "optimizer_kwargs": {"lr": 1.0}, "scheduler_kwargs": {"step_size": 4, "gamma": 0.1}}
    found = [rate for (rate,) in rates(continued(first.trained(), **changed))]
    assert found == pytest.approx([0.5] * 4 + [0.05] * 4 + [0.005] * 4)


def test_a_schedule_over_the_whole_run_begins_anew() -> None:
    given: dict[str, Any] = {
        "scheduler_cls": "OneCycleLR",
        "scheduler_kwargs": {"max_lr": 0.1, "total_steps": "max_iterations"},
        "validation_interval": None,
    }
    first = fit(trainer(SELECT, **given))
    expected = rates(first)
    assert rates(continued(first.trained(), **given)) == expected


def test_another_scheduler_begins_anew() -> None:
    first = fit(trainer(SELECT, scheduler_cls="ExponentialLR", scheduler_kwargs={"gamma": 0.5}))
    list(first.run())
    found = rates(continued(first.trained(), scheduler_cls="StepLR", scheduler_kwargs={"step_size": 100}))
    assert set(found) == {(0.01,)}


def test_a_reduced_rate_stays_reduced() -> None:
    given: dict[str, Any] = {
        "scheduler_cls": "ReduceLROnPlateau",
        "scheduler_kwargs": {"patience": 0, "threshold": 0.9},
        "no_improve_then_stop": 100,
    }
    first = fit(trainer(SELECT, **given))
    last = rates(first)[-1][0]
    assert last < 0.01
    assert rates(continued(first.trained(), **given))[0][0] <= last


def test_a_plain_run_keeps_nothing_besides() -> None:
    run = Fit(trainer(SELECT), TorchModel("m", object=torch.nn.Linear(4, 3)), batches=Replayed(SHORT), sets=SETS)
    list(run.run())
    assert run.capture()["recipe"] == {}
    assert run.trained().training_state is None
