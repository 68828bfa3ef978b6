"""What a run learns or counts outside the weights is in its checkpoints, or is found out and named."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.helpers import COLLECTION, Blobs, fill, net, same, seeded, state, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from mongotorch import (
    Better,
    Datalayer,
    Every,
    Metric,
    Schedule,
    TorchModel,
    TorchTrainer,
    Validation,
    Worker,
)
from mongotorch.train import Fit, Stepped
from mongotorch.train.model import copied_state
from mongotorch.train.optimizers import on_device
from mongotorch.train.tensor_codec import TorchCodec

entropy = nn.functional.cross_entropy


@contextmanager
def fitting(
    db: Datalayer, of: TorchTrainer, module: nn.Module, captured: Any = None, **given: Any
) -> Iterator[Fit]:
    options: dict[str, Any] = {"key": ("x", "y"), "batch_size": 16}
    select = db[COLLECTION].find()
    with (
        db.stream(select, fold="train", shuffle=True, seed=of.seed, **options) as batches,
        db.stream(select, fold="valid", **options) as valid,
    ):
        yield Fit(of, TorchModel("m", object=module, **given), batches=batches, sets={"": valid}, state=captured)


def through_codec(captured: Any) -> Any:
    """What a resumed run reads of what was captured."""
    blobs = Blobs()
    return TorchCodec().decode(TorchCodec().encode(captured, blobs.put, where="state"), blobs.blob)


def stopped(db: Datalayer, of: Any, make: Any, step: int) -> Any:
    with fitting(db, of(), seeded(make)) as fit:
        run = fit.run()
        for event in run:
            if isinstance(event, Stepped) and event.step == step:
                break
        captured = through_codec(fit.capture())
        run.close()
    return captured


def ended(db: Datalayer, of: Any, make: Any, captured: Any = None) -> Any:
    """All that a run ends with."""
    with fitting(db, of(), seeded(make), captured) as fit:
        list(fit.run())
        trained = fit.trained()
        return [copied_state(fit._model.object), trained.optimizer_state, trained.metric_values]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WithScheduler(TorchTrainer):
    """Keeps its schedulers where people do."""

    where: str = "attribute"

    def get_optimizers(self, model: TorchModel) -> Any:
        (optimizer,) = super().get_optimizers(model)
        cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
        if self.where == "attribute":
            object.__setattr__(self, "cycle", cycle)
        elif self.where == "list":
            object.__setattr__(self, "cycles", [cycle])
        elif self.where == "optimizer":
            vars(optimizer)["cycle"] = cycle
        elif self.where == "module":
            model.object.__dict__["cycle"] = cycle
        elif self.where == "model":
            object.__setattr__(model, "cycle", cycle)
        return (optimizer,)

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        if self.where == "first step" and not hasattr(self, "late"):
            object.__setattr__(self, "late", StepLR(optimizers[0], step_size=2, gamma=0.5))
        loss = super().take_step(model, batch, optimizers)
        places: list[Any] = [self, optimizers[0], model, model.object]
        found = [getattr(place, "cycle", None) for place in places] + getattr(self, "cycles", [])
        for scheduler in [*found, getattr(self, "late", None)]:
            if scheduler is not None:
                scheduler.step()
        return loss


@pytest.mark.parametrize("where", ["attribute", "list", "optimizer", "module", "model", "first step"])
def test_a_scheduler_goes_on_where_it_was(db: Datalayer, where: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(db)

    def of() -> TorchTrainer:
        return trainer(db[COLLECTION].find(), WithScheduler, model=None, where=where)

    whole = ended(db, of, net)
    for step in (1, 6):
        assert same(ended(db, of, net, stopped(db, of, net, step)), whole)
    plain = ended(db, lambda: trainer(db[COLLECTION].find(), model=None), net)
    assert not same(plain[0], whole[0]), "it does something"
    assert "no checkpoint has it" not in caplog.text


class Counting(nn.Module):
    """Its output depends on a plain number and a buffer that its state has not."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = net(), 0
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        out: Tensor = self.body(x - self.mean) / (1 + 0.1 * self.calls)
        return out


class InTraining(nn.Module):
    """Only training depends on its counter, which is deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = net()
        self.inner: Any = nn.Identity()
        self.inner.__dict__["history"] = deque([1.0])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.inner.history.append(1.0)
            x = x * (1 + 0.01 * len(self.inner.history))
        out: Tensor = self.body(x)
        return out


class OwnNoise(nn.Module):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.noise, self.draw = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn(4, generator=self.noise) + self.draw.random()
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Counting, ["model.object.calls", "model.object.mean"]),
        (InTraining, ["model.object.inner.history"]),
        (OwnNoise, ["model.object.noise", "model.object.draw"]),
    ],
)
def test_what_a_module_changes_and_no_state_has_is_named(
    db: Datalayer, make: Any, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fill(db)

    def of() -> TorchTrainer:
        return trainer(db[COLLECTION].find(), model=None)

    whole = ended(db, of, make)
    with fitting(db, of(), seeded(make)) as fit:
        for event in fit.run():
            if isinstance(event, Stepped):
                fit.capture()
        assert same(copied_state(fit._model.object), whole[0]), "the check leaves nothing behind"
        assert same(fit.trained().metric_values, whole[2])
    (record,) = [record for record in caplog.records if "no checkpoint has it" in record.message]
    assert record.levelno == logging.WARNING
    for name in named:
        assert name in record.message
    assert "body" not in record.message


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CountingTrainer(TorchTrainer):
    """Counts its steps in an attribute, and in a dict that is one of its fields."""

    kept: dict[str, int] = dataclasses.field(default_factory=dict)

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        object.__setattr__(self, "taken", getattr(self, "taken", 0) + 1)
        self.kept["steps"] = self.kept.get("steps", 0) + 1
        return super().take_step(model, batch, optimizers) * 1.0


def test_what_a_trainer_counts_is_named(db: Datalayer, caplog: pytest.LogCaptureFixture) -> None:
    fill(db)
    stopped(db, lambda: trainer(db[COLLECTION].find(), CountingTrainer, model=None), net, 3)
    assert "trainer.taken" in caplog.text
    assert "trainer.kept" in caplog.text


class WithExtraState(Counting):
    """Says itself what else its state is."""

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "mean": self.mean}

    def set_extra_state(self, state: Any) -> None:
        self.calls, self.mean = state["calls"], state["mean"]


class Caching(nn.Module):
    """Keeps what it can compute again."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.longest = net(), None, 0
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        if len(self.table) < len(x):
            self.table, self.longest = torch.ones(len(x)), len(x)
        self.last = self.body(x) * self.table[: len(x), None]
        return self.last


class Late(nn.Module):
    """Builds a layer when it sees the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LazyLinear(3)
        self.norm = nn.LazyBatchNorm1d()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.body(x))
        return out


ORDINARY: dict[str, Any] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "caches": Caching,
    "lazy": Late,
    "extra state": WithExtraState,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_modules_go_on_to_the_same_bits_without_a_warning(
    db: Datalayer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(db)

    def of() -> TorchTrainer:
        return trainer(db[COLLECTION].find(), model=None)

    def make() -> nn.Module:
        module: nn.Module = ORDINARY[name]()
        if name == "lazy":
            module(torch.zeros(2, 4))  # an optimizer needs parameters
        return module

    assert same(ended(db, of, make, stopped(db, of, make, 6)), ended(db, of, make))
    assert "no checkpoint has it" not in caplog.text


def test_published_metrics_are_those_of_the_published_module(db: Datalayer) -> None:
    fill(db)

    class Drifting(nn.Module):
        """Best at first: what no state has makes it worse and worse."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            out: Tensor = self.body(x) * (1 + self.calls)
            return out

    module = Drifting()
    of = trainer(
        db[COLLECTION].find(), model=None, optimizer_cls="SGD", optimizer_kwargs={"lr": 0.5, "maximize": True}
    )
    with fitting(db, of, module) as fit:
        list(fit.run())
        trained = fit.trained()
        assert (trained.best_step, module.calls) == (4, 4)
        rows = list(db[COLLECTION].raw.find({"_fold": "valid"}))
        x, y = torch.tensor([row["x"] for row in rows]), torch.tensor([row["y"] for row in rows])
        with torch.no_grad():
            assert entropy(module(x), y).item() == pytest.approx(trained.metrics["objective"], rel=1e-4)


# Objectives that hold tensors


def weighing(weight: Tensor) -> Any:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return entropy(output, target, weight=weight)

    return loss


class Weighing:
    """An object that holds a tensor, with a method that is an objective."""

    def __init__(self, weight: Tensor) -> None:
        self.weights = {"classes": [weight]}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return entropy(output, target, weight=self.weights["classes"][0])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


W = torch.tensor([1.0, 2.0, 3.0])


def with_default(output: Tensor, target: Tensor, *, weight: Tensor = W) -> Tensor:
    return entropy(output, target, weight=weight)


HOLDING: dict[str, Any] = {
    "partial": functools.partial(entropy, weight=W),
    "closure": weighing(W),
    "partial of a closure": functools.partial(weighing(W)),
    "lambda": (lambda weight: lambda output, target: weighing(weight)(output, target))(W),
    "default": with_default,
    "object": Weighing(W),
    "method": Weighing(W).loss,
}


@pytest.mark.parametrize("name", HOLDING)
def test_the_tensors_of_an_objective_are_moved(name: str) -> None:
    objective = HOLDING[name]
    assert on_device(objective, torch.device("cpu")) is objective
    output, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = objective(output, target)
    moved = on_device(objective, torch.device("meta"))
    assert moved is not objective
    assert moved(output.to("meta"), target.to("meta")).device.type == "meta"
    assert torch.equal(objective(output, target), expected), "what was given stays where it was"


def test_modules_and_parameters_of_an_objective_are_moved_in_place() -> None:
    layer = nn.Linear(3, 3)
    objective = functools.partial(lambda output, target, head: entropy(head(output), target), head=layer)
    assert on_device(objective, torch.device("meta")) is objective
    assert layer.weight.device.type == "meta"


class Margin(nn.Module):
    """An objective with weights, and a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return entropy(self.head(self.norm(output)), target)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Learning(TorchTrainer):
    """Trains its objective too, wherever it holds its weights."""

    head: Any = None

    def get_optimizers(self, model: TorchModel) -> Any:
        found = list(model.parameters()) + parameters_of(self.head) + parameters_of(self.objective)
        return (torch.optim.Adam(found, lr=0.05),)

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        loss = super().compute_objective(model, batch)
        return loss if self.head is None else loss + self.head.weight.square().sum()


def parameters_of(value: Any) -> list[nn.Parameter]:
    if isinstance(value, functools.partial):
        return [part for name in value.keywords.values() for part in parameters_of(name)]
    if isinstance(value, nn.Parameter):
        return [value]
    return list(value.parameters()) if isinstance(value, nn.Module) else []


def scaled(output: Tensor, target: Tensor, *, scale: Tensor, head: nn.Module) -> Tensor:
    return entropy(head(output * scale), target)


def learning(db: Datalayer, kind: str) -> TorchTrainer:
    def make() -> dict[str, Any]:
        if kind == "module":
            return {"objective": Margin()}
        if kind == "field":
            return {"head": nn.Linear(2, 2)}
        scale = nn.Parameter(torch.ones(1))
        return {"objective": functools.partial(scaled, scale=scale, head=nn.Linear(3, 3))}

    return trainer(db[COLLECTION].find(), Learning, **seeded(make))


def weights_of(of: Any) -> list[Tensor]:
    found = parameters_of(of.objective) + parameters_of(of.head)
    return [part.detach().clone() for part in found]


@pytest.mark.parametrize("kind", ["module", "partial", "field"])
def test_what_is_trained_of_an_objective_is_resumed_and_published(db: Datalayer, kind: str) -> None:
    fill(db)
    whole = db.apply(learning(db, kind)).result()
    learned = weights_of(whole.trainer)
    assert not all(map(torch.equal, learned, weights_of(learning(db, kind))))
    again = db.load("model", "m")
    assert same(weights_of(again.trainer), learned)

    def of() -> TorchTrainer:
        return learning(db, kind)

    captured = stopped(db, of, net, 6)
    resumed = of()
    with fitting(db, resumed, net(), captured) as fit:
        list(fit.run())
        fit.trained()
    undisturbed = of()
    with fitting(db, undisturbed, net()) as fit:
        list(fit.run())
        trained = fit.trained()
    assert same(weights_of(resumed), weights_of(undisturbed))
    assert set(trained.fields) == {"head" if kind == "field" else "objective"}


def test_the_best_weights_of_an_objective_are_published_with_those_of_the_model(db: Datalayer) -> None:
    fill(db)
    of = learning(db, "module").replace(validation_interval=1, max_iterations=8, listen="step", model=None)
    seen: list[Any] = []
    validation = Validation("v", metrics=[Metric("step", object=lambda *_: abs(len(seen) - 3), mode="min")])
    with fitting(db, of, net(), validation=validation) as fit:
        for event in fit.run():
            if isinstance(event, Stepped):
                seen.append(state(cast("nn.Module", of.objective)))
        trained = fit.trained()
    assert trained.best_step == 3
    assert same(state(trained.fields["objective"]), seen[2])
    assert not same(seen[2], seen[-1])


def test_a_state_that_cannot_be_stored_leaves_a_checkpoint_without_it(
    db: Datalayer, caplog: pytest.LogCaptureFixture
) -> None:
    fill(db)
    db.apply(trainer(db[COLLECTION].find(), Unstorable)).result()
    assert "stored without the states of trainer.odd" in caplog.text


class Odd:
    """Has a state that no codec stores."""

    def state_dict(self) -> dict[str, Any]:
        return {"open": (n for n in range(3))}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Unstorable(TorchTrainer):
    """Keeps an object whose state cannot be stored."""

    def get_optimizers(self, model: TorchModel) -> Any:
        object.__setattr__(self, "odd", Odd())
        return super().get_optimizers(model)


def test_a_schedule_goes_on_with_the_objective_and_scores_each_model_with_its_own(db: Datalayer) -> None:
    fill(db)
    first = db.apply(learning(db, "module")).result()
    of = learning(db, "module").replace(max_iterations=1, optimizer_kwargs={"lr": 0.0})
    db.apply(Schedule("s", trainer=of, trigger=Every(seconds=1e6), gate=Better()))
    job = db.fire("s")
    Worker(db).run(until_idle=True)
    second = job.result(timeout=5)
    verdict = db.show("model", "m", second.version)["verdict"]
    assert verdict["champion"] == db.show("model", "m", first.version)["metrics"]
    before, after = weights_of(first.trainer), weights_of(second.trainer)
    assert all((one - other).abs().max() < 0.06 for one, other in zip(before, after, strict=True)), (
        "one step of 0.05"
    )
