"""Each part of a recipe ends with the weights of a loop by hand, and of a run that was stopped anywhere."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, Replayed, same, seeded, state, trainer
from torch import nn
from torch.optim import lr_scheduler as lr

from mongotorch import TorchModel, TorchTrainer
from mongotorch.train import Fit, Stepped
from mongotorch.train.tensor_codec import TorchCodec

SHORT = [*BATCHES, (BATCHES[0][0][:3], BATCHES[0][1][:3])]  # five batches of 8 rows, one of 3
SETS = {"": BATCHES[:2]}
cross_entropy = nn.functional.cross_entropy
Loop = Callable[["Hand"], None]


def module() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)))


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, **options)


@dataclasses.dataclass(kw_only=True)
class Hand:
    """A loop as one writes it with torch alone; each test says what is special in it."""

    steps: int = 14
    interval: int | None = 4
    accumulate: int = 1
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    each_step: Callable[..., None] = lambda **_: None
    each_epoch: Callable[..., None] = lambda **_: None
    each_validation: Callable[..., None] = lambda **_: None
    begin: Callable[..., Any] = lambda **_: None
    clip: Callable[[nn.Module], None] = lambda _: None
    dtype: torch.dtype | None = None
    scaler: Any = None
    weigh: bool = True
    loss: Callable[..., Any] = cross_entropy

    def take_turn(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer was not left out, as torch's page on mixed precision finds out."""
        if self.scaler is None:
            optimizer.step()
            return True
        self.scaler.step(optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        return bool(scale <= self.scaler.get_scale())

    def run(self) -> Any:
        net = module()
        optimizer = self.optimizer(net)
        made = self.begin(optimizer=optimizer, net=net)
        step = 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net.train()
            while step < self.steps:
                for first in range(0, len(SHORT), self.accumulate):
                    micro = SHORT[first : first + self.accumulate]
                    rows = sum(len(y) for _, y in micro)
                    optimizer.zero_grad()
                    for x, y in micro:
                        if self.dtype is None:
                            loss = self.loss(net(x), y)
                        else:
                            with torch.autocast("cpu", dtype=self.dtype):
                                loss = self.loss(net(x), y)
                        if self.accumulate > 1:
                            loss = loss * (len(y) / rows)
                        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                    if self.scaler is not None:
                        self.scaler.unscale_(optimizer)
                    self.clip(net)
                    if self.take_turn(optimizer):
                        self.each_step(made=made, net=net, optimizer=optimizer)
                    step += 1
                    if self.interval and (step % self.interval == 0 or step == self.steps):
                        self.each_validation(made=made, value=validated(net))
                    if step == self.steps:
                        return net
                self.each_epoch(made=made, net=net)
        return net


def validated(net: nn.Module) -> float:
    net.eval()
    with torch.no_grad():
        total = sum(cross_entropy(net(x), y).double() * len(y) for x, y in SETS[""])
    net.train()
    return float(total / sum(len(y) for _, y in SETS[""]))


class Shrinking:
    """A callback that makes rates smaller at every third step that it ever saw."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, fit: Fit, event: Stepped) -> None:
        self.steps += 1
        if self.steps % 3 == 0:
            shrink(fit.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def shrink(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.8


class Counted:
    """The same, written by hand."""

    def __init__(self, **_: Any) -> None:
        self.steps = 0

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.steps % 3 == 0:
            shrink(optimizer)


def one_cycle(optimizer: Any, **_: Any) -> Any:
    return lr.OneCycleLR(optimizer, max_lr=0.1, total_steps=14)


def cosine(optimizer: Any, **_: Any) -> Any:
    return lr.CosineAnnealingLR(optimizer, T_max=3)


def plateau(optimizer: Any, **_: Any) -> Any:
    return lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)


def warm_up(optimizer: Any, **_: Any) -> Any:
    parts: list[Any] = [
        lr.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=10),
    ]
    return lr.SequentialLR(optimizer, parts, milestones=[4])


def chained(optimizer: Any, **_: Any) -> Any:
    parts = [lr.ConstantLR(optimizer, factor=0.1, total_iters=3), lr.ExponentialLR(optimizer, gamma=0.9)]
    return lr.ChainedScheduler(parts, optimizer)


def linear(optimizer: Any, **_: Any) -> Any:
    return lr.LinearLR(optimizer, start_factor=0.1, total_iters=6)


def large(output: Any, target: Any) -> Any:
    """An objective whose scaled gradients overflow in the first steps."""
    return 50 * cross_entropy(output, target)


def next_rate(made: Any, **_: Any) -> None:
    made.step()


def no_decay(name: str, parameter: nn.Parameter) -> dict[str, Any] | None:
    if name == "0.bias":
        return None
    return {"weight_decay": 0.0} if parameter.ndim == 1 else {}


def in_groups(net: nn.Module) -> torch.optim.Optimizer:
    named = dict(net.named_parameters())
    groups: list[Any] = [
        {"params": [named["0.weight"], named["3.weight"]]},
        {"params": [named["3.bias"]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)


def clipped(net: nn.Module) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)


def clipped_values(net: nn.Module) -> None:
    nn.utils.clip_grad_value_(net.parameters(), 0.01)


# By name: the parameters of the trainer, and the same loop by hand.
RECIPES: dict[str, tuple[dict[str, Any], Callable[[], Hand]]] = {
    "plain": ({}, Hand),
    "one cycle a step": (
        {"scheduler_cls": "OneCycleLR", "scheduler_kwargs": {"max_lr": 0.1, "total_steps": "max_iterations"}},
        lambda: Hand(begin=one_cycle, each_step=next_rate),
    ),
    "cosine an epoch": (
        {
            "scheduler_cls": lr.CosineAnnealingLR,
            "scheduler_kwargs": {"T_max": "max_epochs"},
            "scheduler_interval": "epoch",
        },
        lambda: Hand(begin=cosine, each_epoch=next_rate),
    ),
    "plateau": (
        {
            "scheduler_cls": "ReduceLROnPlateau",
            "scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.9},
        },
        lambda: Hand(begin=plateau, each_validation=lambda made, value: made.step(value)),
    ),
    "warm-up and decay": (
        {
            "scheduler_cls": "SequentialLR",
            "scheduler_kwargs": {
                "schedulers": [
                    {"cls": "LinearLR", "start_factor": 0.1, "total_iters": 4},
                    {
                        "cls": lr.LinearLR,
                        "start_factor": 1.0,
                        "end_factor": 0.0,
                        "total_iters": "max_iterations - 4",
                    },
                ],
                "milestones": [4],
            },
        },
        lambda: Hand(begin=warm_up, each_step=next_rate),
    ),
    "chained": (
        {
            "scheduler_cls": "torch.optim.lr_scheduler:ChainedScheduler",
            "scheduler_kwargs": {
                "schedulers": [
                    {"cls": "ConstantLR", "factor": 0.1, "total_iters": 3},
                    {"cls": "ExponentialLR", "gamma": 0.9},
                ]
            },
        },
        lambda: Hand(begin=chained, each_step=next_rate),
    ),
    "accumulation": ({"gradient_accumulation_steps": 4}, lambda: Hand(accumulate=4)),
    "clip by norm": ({"gradient_clip_norm": 0.1}, lambda: Hand(clip=clipped)),
    "clip by value": ({"gradient_clip_value": 0.01}, lambda: Hand(clip=clipped_values)),
    "bf16": ({"precision": "bf16"}, lambda: Hand(dtype=torch.bfloat16)),
    "fp16": (
        {"precision": "fp16", "gradient_clip_norm": 0.1},
        lambda: Hand(dtype=torch.float16, scaler=torch.amp.GradScaler("cpu"), clip=clipped),
    ),
    "fp16 alone": (
        {"precision": "fp16"},
        lambda: Hand(dtype=torch.float16, scaler=torch.amp.GradScaler("cpu")),
    ),
    "fp16 with steps that overflow": (
        {
            "precision": "fp16",
            "objective": large,
            "scheduler_cls": "LinearLR",
            "scheduler_kwargs": {"start_factor": 0.1, "total_iters": 6},
        },
        lambda: Hand(
            dtype=torch.float16, scaler=torch.amp.GradScaler("cpu"), loss=large, begin=linear, each_step=next_rate
        ),
    ),
    "parameter groups": (
        {
            "param_groups": no_decay,
            "optimizer_cls": torch.optim.AdamW,
            "optimizer_kwargs": {"lr": 0.05, "weight_decay": 0.3},
        },
        lambda: Hand(optimizer=in_groups),
    ),
    "callback": (
        {"callbacks": [Shrinking()]},
        lambda: Hand(begin=Counted, each_step=lambda made, optimizer, **_: made(optimizer)),
    ),
    "average": ({"ema_decay": 0.7}, Hand),
    "epochs": ({"max_epochs": 2, "max_iterations": 1000, "validation_interval": "epoch"}, lambda: Hand(steps=12)),
    "all": (
        {
            "scheduler_cls": "OneCycleLR",
            "scheduler_kwargs": {"max_lr": 0.1, "total_steps": "max_iterations"},
            "gradient_accumulation_steps": 2,
            "gradient_clip_norm": 0.1,
            "precision": "bf16",
            "ema_decay": 0.7,
        },
        lambda: Hand(accumulate=2, clip=clipped, dtype=torch.bfloat16, begin=one_cycle, each_step=next_rate),
    ),
}
Shown = pytest.mark.parametrize("name", RECIPES)


def of_recipe(name: str) -> TorchTrainer:
    usual = {
        "max_iterations": 14,
        "optimizer_cls": "SGD",
        "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9},
        "no_improve_then_stop": 100,
        "model": None,
    }
    return trainer(SELECT, **{**usual, **copy.deepcopy(RECIPES[name][0])})


def fitting(of: TorchTrainer, state: Any = None) -> Fit:
    return Fit(of, TorchModel("m", object=module()), batches=Replayed(SHORT), sets=SETS, state=state)


def outcome(fit: Fit) -> list[Any]:
    """All that a run ends with, the weights of the last step first."""
    last = state(fit.model)
    trained = fit.trained()
    fields = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    return [last, state(fit.model), fields]


def through_the_codec(captured: Any) -> Any:
    blobs: dict[str, bytes] = {}

    def put(data: Any) -> str:
        blobs[name := str(len(blobs))] = bytes(data)
        return name

    return TorchCodec().decode(TorchCodec().encode(captured, put, where="state"), blobs.__getitem__)


@Shown
def test_the_weights_are_those_of_a_loop_by_hand(name: str) -> None:
    fit = fitting(of_recipe(name))
    events = list(fit.run())

    expected = RECIPES[name][1]()
    assert same(state(fit.model), state(expected.run()))
    assert len([event for event in events if isinstance(event, Stepped)]) == expected.steps


def test_a_schedule_waits_while_steps_overflow() -> None:
    name = "fp16 with steps that overflow"
    fit = fitting(of_recipe(name))
    before = state(fit.model)
    rates, weights = [], []
    for event in fit.run():
        if isinstance(event, Stepped):
            rates.append(event.learning_rates[0])
            weights.append(state(fit.model))
    changed = [not same(one, two) for one, two in itertools.pairwise([before, *weights])]
    made = [sum(changed[:step]) for step in range(len(changed))]  # before each step
    assert 2 < made[-1] < len(made) - 2
    assert rates == pytest.approx([0.05 * (0.1 + 0.9 * min(count, 6) / 6) for count in made])


@Shown
def test_a_run_goes_on_to_the_same_bits_wherever_it_was_stopped(name: str) -> None:
    whole = fitting(of_recipe(name))
    events = list(whole.run())
    expected = outcome(whole)

    for stop in range(len(events)):
        first = fitting(of_recipe(name))
        running = first.run()
        for _ in range(stop + 1):
            next(running)
        captured = through_the_codec(first.capture())
        running.close()

        second = fitting(of_recipe(name), captured)
        rest = list(second.run())
        assert [(type(one), one.step) for one in rest] == [(type(one), one.step) for one in events[stop + 1 :]]
        assert same(outcome(second), expected), stop
