"""One step: micro-batches, clipping, precision, the mean of the weights, and steps of a trainer's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import pytest
import torch
from tests.helpers import BATCHES, SELECT, fit, net, same, seeded, state, trainer
from tests.train.test_recipe import fitting, of_recipe
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mongotorch import Metric, TorchModel, TorchTrainer, Validation
from mongotorch.errors import OptimizerError, ParameterError
from mongotorch.train import Stepped, Validated

cross_entropy = nn.functional.cross_entropy


class Kept(TorchTrainer):
    """Keeps the gradients instead of a step."""

    def update(self, model: TorchModel, optimizers: Any) -> None:
        object.__setattr__(self, "gradients", [one.grad for one in model.parameters()])


def gradients(objective: Any, batches: list[Any], accumulate: int, **given: Any) -> list[Tensor]:
    of = trainer(
        SELECT,
        Kept,
        objective=objective,
        gradient_accumulation_steps=accumulate,
        max_iterations=1,
        validation_interval=None,
        **given,
    )
    run: Any = fit(of, batches=batches)
    list(run.run())
    found: list[Tensor] = run.trainer.gradients
    return found


def targets(*counted: int) -> list[Any]:
    """Four batches of 8 rows, of which so many count."""
    made = []
    for (x, y), count in zip(BATCHES, counted, strict=False):
        y = y.clone()
        y[count:] = -100
        made.append((x, y))
    return made


def whole(batches: list[Any]) -> list[Any]:
    return [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]


MICRO = [*BATCHES[:3], (BATCHES[3][0][:2], BATCHES[3][1][:2])]


@pytest.mark.parametrize(
    ("objective", "batches"),
    [
        (cross_entropy, MICRO),
        (cross_entropy, targets(8, 1, 5, 3)),
        (cross_entropy, targets(8, 0, 0, 3)),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1])), MICRO),
        (lambda output, y: (output.logsumexp(1) - output[torch.arange(len(y)), y]).mean(), MICRO),
    ],
    ids=["short last", "ignored targets", "a batch of ignored targets", "weighed classes", "own objective"],
)
def test_the_gradient_of_micro_batches_is_that_of_one_batch(objective: Any, batches: list[Any]) -> None:
    found, expected = gradients(objective, batches, 4), gradients(objective, whole(batches), 1)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=0)


def test_the_objective_of_a_step_is_that_of_its_rows() -> None:
    of = trainer(SELECT, gradient_accumulation_steps=4, max_iterations=1, validation_interval=None)
    event = next(iter(fit(of, batches=MICRO).run()))
    assert isinstance(event, Stepped)
    x, y = whole(MICRO)[0]
    assert event.rows == 26
    assert torch.allclose(event.loss, cross_entropy(net()(x), y).detach(), atol=1e-6)


def test_max_iterations_counts_steps_of_the_optimizer() -> None:
    run = fitting(of_recipe("accumulation"))
    assert sum(isinstance(event, Stepped) for event in run.run()) == 14
    assert {int(one["step"]) for one in _adam_states(4)} == {14}


def _adam_states(accumulate: int) -> list[Any]:
    of = trainer(SELECT, gradient_accumulation_steps=accumulate, max_iterations=14, validation_interval=None)
    run = fit(of)
    list(run.run())
    return list(run.trained().optimizer_state["state"].values())


def test_the_norm_in_an_event_is_that_before_clipping() -> None:
    of = trainer(SELECT, gradient_clip_norm=1e-3, max_iterations=1, validation_interval=None)
    event = next(iter(fit(of).run()))
    assert isinstance(event, Stepped)
    assert event.gradient_norm is not None
    expected: Any = net()
    x, y = BATCHES[0]
    cross_entropy(expected(x), y).backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([parameter.grad.norm() for parameter in expected.parameters()]).norm()
    assert torch.allclose(event.gradient_norm, norm)


def test_a_mean_of_the_weights_is_validated_and_published() -> None:
    """As `torch.optim.swa_utils` makes it; the buffers are those of the last step."""

    def normed() -> Any:
        return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))

    by_hand = normed()
    mean = AveragedModel(by_hand, multi_avg_fn=get_ema_multi_avg_fn(0.8))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for step in range(7):
        x, y = BATCHES[step % 5]
        optimizer.zero_grad()
        cross_entropy(by_hand(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        mean.update_parameters(by_hand)

    given: dict[str, Any] = {
        "optimizer_cls": "SGD",
        "optimizer_kwargs": {"lr": 0.05},
        "ema_decay": 0.8,
        "max_iterations": 7,
    }
    for interval in (7, None):
        run = fit(trainer(SELECT, validation_interval=interval, **given), normed())
        events = list(run.run())
        assert same(state(run.model), state(by_hand))
        run.trained()
        assert same(state(run.model), state(mean.module))
    measured = [event.values["objective"] for event in events if isinstance(event, Validated)]
    assert not measured
    run = fit(trainer(SELECT, validation_interval=7, **given), normed())
    found = [event.values["objective"] for event in run.run() if isinstance(event, Validated)]
    averaged = mean.module.eval()
    with torch.no_grad():
        expected = sum(cross_entropy(averaged(x), y).double() for x, y in BATCHES[:2]) / 2
    assert found == [float(expected)]


def test_metrics_get_whole_floats_whatever_the_precision() -> None:
    seen = []

    def known(output: Tensor, target: Tensor) -> float:
        seen.append(output.dtype)
        return float((output.numpy().argmax(1) == target.numpy()).mean())

    validation = Validation("v", metrics=[Metric("known", object=known)])
    list(fit(trainer(SELECT, precision="bf16"), validation=validation).run())
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("options", [True, {"backend": "eager"}])
def test_a_compiled_model_is_stored_under_the_names_of_the_module(options: Any) -> None:
    if options is True:
        pytest.importorskip("torch._inductor")
    plain, made = fitting(of_recipe("plain")), net()
    run = fit(trainer(SELECT, compile={"backend": "eager"} if options is True else options), made)
    seen = []
    for _ in run.run():
        seen.append("_compiled_call_impl" in vars(made))
    assert all(seen)
    assert "_compiled_call_impl" not in vars(made)
    assert list(state(run.model)) == list(state(net()))
    list(plain.run())
    other = fit(trainer(SELECT), net())
    list(other.run())
    assert same(state(run.model), state(other.model))


class Own(TorchTrainer):
    """A step of ten lines that uses nothing of the trainer's."""

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = self.compute_objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        return loss


class OwnUnscaled(TorchTrainer):
    """Updates as the trainer does, and forgets the scale."""

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        loss = self.compute_objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.update(model, optimizers)
        return loss


def test_a_step_of_its_own_goes_on_working() -> None:
    runs = [fit(trainer(SELECT, cls)) for cls in (TorchTrainer, Own)]
    for run in runs:
        list(run.run())
    assert same(state(runs[0].model), state(runs[1].model))


@pytest.mark.parametrize(
    "given", [{"gradient_clip_norm": 1.0}, {"gradient_clip_value": 1.0}, {"precision": "fp16"}]
)
def test_a_parameter_that_a_step_of_its_own_leaves_out_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"self\.update\(model, optimizers\)") as caught:
        list(fit(trainer(SELECT, Own, **given)).run())
    assert caught.value.field == next(iter(given))


def test_gradients_without_the_scale_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"self\.scale_loss\(loss\)"):
        list(fit(trainer(SELECT, OwnUnscaled, precision="fp16")).run())


def test_a_step_of_its_own_does_not_accumulate() -> None:
    with pytest.raises(ParameterError, match="take_step is overridden"):
        trainer(SELECT, Own, gradient_accumulation_steps=2)


class Penalised(TorchTrainer):
    """Changes the gradients alone."""

    def backward(self, model: TorchModel, batch: Any, share: float = 1.0) -> Tensor:
        loss = self.compute_objective(model, batch)
        penalty = sum(parameter.abs().sum() for parameter in model.parameters())
        self.scale_loss((loss + 0.1 * penalty) * share).backward()  # type: ignore[no-untyped-call]
        return loss


def test_a_subclass_changes_the_gradients_alone() -> None:
    for given in ({}, {"gradient_accumulation_steps": 2}, {"precision": "fp16", "gradient_clip_norm": 1.0}):
        plain, own = (fit(trainer(SELECT, cls, **given)) for cls in (TorchTrainer, Penalised))
        list(plain.run())
        list(own.run())
        weights = [sum(float(value.abs().sum()) for value in state(run.model).values()) for run in (plain, own)]
        assert weights[1] < weights[0]


class Generator(nn.Module):
    """Two nets without a single forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.judge = nn.Linear(2, 4), nn.Linear(4, 1)


class Adversarial(TorchTrainer):
    """Two optimizers and two losses."""

    def get_optimizers(self, model: TorchModel) -> Any:
        parts: Any = (model.object.judge, model.object.make)
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in parts]

    def take_step(self, model: TorchModel, batch: Any, optimizers: Any) -> Tensor:
        net: Any = model.object
        make, judge = net.make, net.judge
        softplus = nn.functional.softplus
        made = make(torch.randn(len(batch[0]), 2))
        d_loss = softplus(-judge(batch[0])).mean() + softplus(judge(made.detach())).mean()
        self._learn(model, d_loss, optimizers[0])
        g_loss = softplus(-judge(made)).mean()
        self._learn(model, g_loss, optimizers[1])
        self.log("d_loss", d_loss)
        self.log("g_loss", g_loss)
        return d_loss + g_loss

    def _learn(self, model: TorchModel, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.scale_loss(loss).backward()  # type: ignore[no-untyped-call]
        self.update(model, [optimizer])

    def validate(self, model: TorchModel, batch: Any) -> Mapping[str, Any]:
        net: Any = model.object
        made = net.make(torch.ones(len(batch[0]), 2))
        return {"distance": (made - batch[0]).square().mean(), "ones": 1}


def test_two_optimizers_and_a_validation_of_its_own() -> None:
    of = trainer(
        SELECT,
        Adversarial,
        listen="distance",
        gradient_clip_norm=1.0,
        scheduler_cls="ExponentialLR",
        scheduler_kwargs={"gamma": 0.5},
        max_iterations=3,
    )
    run = fit(of, seeded(Generator))
    events = list(run.run())
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [sorted(event.values) for event in steps] == [["d_loss", "g_loss"]] * 3
    assert [event.learning_rates for event in steps] == [(0.01,) * 2, (0.005,) * 2, (0.0025,) * 2]
    measured = [event.values for event in events if isinstance(event, Validated)]
    assert [sorted(values) for values in measured] == [["distance", "ones"]]
    assert measured[0]["ones"] == 1.0
    assert len(run.trained().optimizer_state["optimizers"]) == 2


def test_validation_can_be_off_where_a_model_has_no_single_forward() -> None:
    of = trainer(SELECT, Adversarial, validation_interval=None, max_iterations=3)
    assert len(list(fit(of, seeded(Generator)).run())) == 3


def test_listen_has_to_be_what_validate_measures() -> None:
    run = fit(trainer(SELECT, Adversarial, listen="objective"), seeded(Generator))
    with pytest.raises(ParameterError, match="it gave") as caught:
        run.check()
    assert caught.value.field == "listen"


def test_parameters_that_are_left_out_stay_as_they_are() -> None:
    of = trainer(SELECT, param_groups=lambda name, _: None if name.startswith("0.") else {})
    run = fit(of)
    before = state(run.model)
    list(run.run())
    after = state(run.model)
    assert [torch.equal(before[name], after[name]) for name in before] == [True, True, False, False]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda *_: {"weight_decya": 1}, "weight_decya"),
        (lambda *_: 3, "gave 3"),
        (lambda *_: None, "leaves out every parameter"),
    ],
)
def test_groups_that_cannot_be_used_are_refused_before_the_first_step(choose: Any, message: str) -> None:
    with pytest.raises(OptimizerError, match=message) as caught:
        next(iter(fit(trainer(SELECT, param_groups=choose)).run()))
    assert caught.value.field == "param_groups"


def test_a_class_is_as_good_as_its_name() -> None:
    runs = [fit(trainer(SELECT, optimizer_cls=given)) for given in ("AdamW", torch.optim.AdamW)]
    for run in runs:
        list(run.run())
    assert same(state(runs[0].model), state(runs[1].model))
    assert same(runs[0].trained().optimizer_state, runs[1].trained().optimizer_state)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"precision": "fp8"}, "precision"),
        ({"precision": None}, "precision"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": True}, "ema_decay"),
        ({"gradient_clip_norm": 0}, "gradient_clip_norm"),
        ({"gradient_clip_norm": float("nan")}, "gradient_clip_norm"),
        ({"gradient_clip_value": -1.0}, "gradient_clip_value"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": 2.0}, "gradient_accumulation_steps"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("inf")}, "max_seconds"),
        ({"compile": {"backen": "eager"}}, "compile"),
        ({"compile": None}, "compile"),
        ({"validation_interval": "step"}, "validation_interval"),
        ({"param_groups": [{}]}, "param_groups"),
        ({"valid_transform": 3}, "valid_transform"),
        ({"optimizer_cls": nn.Linear}, "optimizer_cls"),
        ({"training_state": 3}, "training_state"),
        ({"callbacks": 3}, "callbacks"),
        ({"callbacks": [object()]}, "callbacks"),
    ],
)
def test_what_cannot_be_used_is_refused_at_construction(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=field) as caught:
        trainer(SELECT, **given)
    assert caught.value.field == field


class OwnClearing(torch.optim.SGD):
    """Keeps the memory of its gradients, and says how often it was asked to clear them."""

    cleared = 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        OwnClearing.cleared += 1
        super().zero_grad(set_to_none=set_to_none)


def test_an_optimizer_that_clears_gradients_by_itself_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnClearing, "cleared", 0)
    found = []
    for cls in (OwnClearing, torch.optim.SGD):
        of = trainer(
            SELECT, optimizer_cls=cls, optimizer_kwargs={"lr": 0.1}, max_iterations=3, validation_interval=None
        )
        run = fit(of)
        list(run.run())
        found.append(state(run.model))
    assert OwnClearing.cleared == 3
    assert same(*found)


def test_a_step_calls_few_functions_of_the_package() -> None:
    """Small models notice each of them: they are counted, since times differ from machine to machine."""
    of = trainer(SELECT, max_iterations=64, validation_interval=None)
    events, calls = fit(of, batches=BATCHES).run(), 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and f"{os.sep}mongotorch{os.sep}" in frame.f_code.co_filename

    for _ in range(20):
        next(events)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for _ in range(40):
            next(events)
    finally:
        sys.setprofile(before)
    events.close()
    assert 20 < calls / 40 < 46  # 42, of which a dozen count the rows of a batch that no stream has counted
