"""Models are scored as they are validated, whatever a module gives and an objective is."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.helpers import net, points, trainer
from torch import Tensor, nn

from mongotorch import Metric, Query, TorchModel, Validation
from mongotorch.tensors import map_tensors, unstack
from mongotorch.train import evaluate, score

SELECT = Query.find("points")
ROWS = points(24)
X = torch.tensor([row["x"] for row in ROWS])
Y = torch.tensor([row["y"] for row in ROWS])
BATCHES = [(X[at : at + 10], Y[at : at + 10]) for at in range(0, 24, 10)]
entropy = nn.functional.cross_entropy


class Named(NamedTuple):
    logits: Tensor
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    count: int = 1


class Attributed(dict[str, Any]):
    """A dict whose items are attributes too, by `__getattr__`."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Itself(dict[str, Any]):
    """A dict whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Twice(OrderedDict[str, Any]):
    """A dict that keeps its items as attributes too, and one more."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__.update(items, pooled=[items["logits"]])


@dataclasses.dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is a dict of its fields that are set, in the manner of transformers."""

    loss: Any = None
    logits: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        made: Any = super().__reduce__()
        call, _, *rest = made
        return call, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest

    def __getitem__(self, name: Any) -> Any:
        return dict(self.items())[name] if isinstance(name, str) else tuple(self.values())[name]


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda out: out, lambda out: out),
    "list": (lambda out: [out, out * 2], lambda out: out[0]),
    "tuple": (lambda out: (out, None), lambda out: out[0]),
    "namedtuple": (lambda out: Named(out, [out]), lambda out: out.logits + 0 * out.hidden[0]),
    "dict": (lambda out: {"logits": out}, lambda out: out["logits"]),
    "dataclass": (Frozen, lambda out: out.logits),
    "attributes": (lambda out: Attributed(logits=out), lambda out: out.logits),
    "itself": (lambda out: Itself(logits=out), lambda out: out.logits),
    "twice": (lambda out: Twice(logits=out), lambda out: out.logits + 0 * out.pooled[0]),
    "model output": (lambda out: ModelOutput(logits=out), lambda out: out.logits),
}


class Giving(nn.Module):
    """The small net, with its output in some form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


def scored(objective: Any, module: nn.Module | None = None, batches: Any = BATCHES, **given: Any) -> Any:
    """What one model scores, and what its validation gives."""
    measured = TorchModel("m", object=net() if module is None else module, **given)
    of = trainer(SELECT, objective=objective, model=None)
    (found,) = score(of, [measured], batches)
    metrics = measured.validation.metrics if measured.validation else ()
    assert found.values == evaluate(of, measured, {"": batches}, metrics, torch.device("cpu"))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_an_output_of_any_type_is_scored_document_by_document(form: str) -> None:
    make, logits = FORMS[form]
    seen: set[type] = set()

    def objective(output: Any, target: Tensor) -> Tensor:
        seen.add(type(output))
        return entropy(logits(output), target)

    found = scored(objective, Giving(make))
    assert (found.unit, found.documents, len(found.losses)) == ("documents", 24, 24)
    assert found.losses == pytest.approx(entropy(net()(X), Y, reduction="none").tolist(), rel=1e-5)
    assert seen == {type(make(torch.zeros(1, 1)))}


@pytest.mark.parametrize("form", FORMS)
def test_a_walk_leaves_the_type_and_what_it_walked(form: str) -> None:
    make, logits = FORMS[form]
    whole = make(X)
    cut = map_tensors(lambda tensor: tensor[3:5], whole)
    assert type(cut) is type(whole)
    assert torch.equal(logits(cut), X[3:5])
    assert torch.equal(logits(whole), X)
    parts = unstack(whole, 24)
    assert {type(part) for part in parts} == {type(whole)}
    assert torch.equal(logits(parts[7]), X[7])


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Each row against all others of its batch."""
    unit = nn.functional.normalize(output, dim=1)
    alike = (unit @ unit.T / 0.5).fill_diagonal_(-1e9).log_softmax(dim=1)
    same = (target[:, None] == target[None, :]).float().fill_diagonal_(0.0)
    return -(alike * same).sum() / same.sum().clamp(min=1.0)


def refusing_one(output: Tensor, target: Tensor) -> Tensor:
    if len(output) == 1:
        raise ValueError("two rows at least")
    return entropy(output, target)


def by_spread(output: Tensor, target: Tensor) -> Tensor:
    return entropy((output - output.mean(dim=0)) / (output.std(dim=0) + 1e-3), target)


@pytest.mark.parametrize("objective", [contrastive, refusing_one, by_spread, nn.CrossEntropyLoss(reduction="sum")])
def test_an_objective_that_is_no_mean_over_documents_is_scored_by_batches(objective: Any) -> None:
    found = scored(objective)
    assert (found.unit, found.documents, found.weights) == ("batches", 24, (10, 10, 4))
    model = net().eval()
    assert list(found.losses) == [objective(model(x), y).item() for x, y in BATCHES]


class WithLoss(nn.Module):
    """The small net that computes the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Any:
        return ModelOutput(loss=self.body(x).square().mean(), logits=self.body(x))

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        return entropy(self.body(x), y)


@pytest.mark.parametrize("method", ["__call__", "fit"])
def test_a_loss_that_the_model_gives_for_a_batch_is_no_loss_of_its_documents(method: str) -> None:
    def given(output: Any, *_: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.loss

    found = scored(given, WithLoss(), train_forward_method=method)
    assert (found.unit, len(found.losses)) == ("batches", 3)


@pytest.mark.parametrize(
    "objective",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5])),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 0.5]), ignore_index=2),
    ],
)
def test_documents_count_as_the_objective_weighs_them(objective: Any) -> None:
    found = scored(objective)
    weights = torch.tensor(found.weights)
    assert found.unit == "documents"
    assert (weights > 0).all()
    losses = torch.tensor(found.losses)
    whole = objective(net()(X), Y).item()
    assert float((losses * weights).sum() / weights.sum()) == pytest.approx(whole, rel=1e-5)
    assert found.values["objective"] == pytest.approx(whole, rel=1e-5)


def test_documents_with_a_probability_for_each_class_all_count() -> None:
    likely = torch.softmax(torch.randn(24, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    found = scored(
        nn.CrossEntropyLoss(), batches=[(X[at : at + 10], likely[at : at + 10]) for at in range(0, 24, 10)]
    )
    assert (found.unit, found.weights) == ("documents", (1.0,) * 24)
    assert found.values["objective"] == pytest.approx(entropy(net()(X), likely).item(), rel=1e-5)


def test_batches_and_documents_of_which_nothing_counts_are_no_part() -> None:
    ignored = [(X[:4], torch.full((4,), -100)), *BATCHES]
    assert len(scored(entropy, batches=ignored).losses) == 24
    assert len(scored(refusing_one, batches=ignored[1:]).losses) == 3
    (nothing,) = score(trainer(SELECT, model=None), [TorchModel("m", object=net())], ignored[:1])
    assert (nothing.losses, nothing.documents) == ((), 4)


def test_sequences_count_by_their_tokens() -> None:
    body = nn.Linear(4, 3)
    target = torch.stack([Y, Y.roll(1), torch.full_like(Y, -100)], dim=1)
    target[::3, 1] = -100
    target[5] = -100

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.body(x)] * 3, dim=2)

    found = scored(entropy, Tokens(), batches=[(X[:10], target[:10]), (X[10:], target[10:])])
    assert (found.unit, len(found.losses)) == ("documents", 23)
    assert found.values["objective"] == pytest.approx(entropy(Tokens()(X), target).item(), rel=1e-5)


def test_a_metric_of_a_whole_batch_gets_whole_batches() -> None:
    sizes: list[int] = []

    def spread(output: Tensor, _: Tensor) -> float:
        sizes.append(len(output))
        return float(output.std())

    found = scored(entropy, validation=Validation("v", metrics=[Metric("spread", object=spread)]))
    assert sizes == [10, 10, 4] * 2
    assert found.unit == "documents"


def test_losses_of_half_precision_are_means_within_their_precision() -> None:
    def half(output: Tensor, target: Tensor) -> Tensor:
        return entropy(output, target).bfloat16()

    assert scored(half).unit == "documents"


def test_constant_losses_are_those_of_documents() -> None:
    found = scored(lambda output, target: (output.argmax(dim=1) == target).float().mean() * 0.0)
    assert (found.unit, set(found.losses)) == ("documents", {0.0})


def test_all_models_get_the_same_batches_and_draws() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            x.add_(torch.rand(()))  # in place, on what another model gets too
            self.seen.append(x.clone())
            made: Tensor = self.body(x)
            return made

    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return entropy(output + torch.rand(()), target) * torch.rand(())

    modules = [Changing(), Changing()]
    before, kept = torch.get_rng_state(), X.clone()
    models = [TorchModel("m", object=module) for module in modules]
    first, second = score(trainer(SELECT, objective=noisy, model=None), models, BATCHES)
    assert torch.equal(torch.cat(modules[0].seen), torch.cat(modules[1].seen))
    assert first == second
    assert first.unit == "batches"
    assert torch.equal(X, kept)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_model_of_batches_makes_all_of_batches() -> None:
    def objective(output: Any, target: Tensor) -> Tensor:
        return output if output.ndim == 0 else entropy(output, target)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.body(x)
            return made.square().mean()

    models = [TorchModel("m", object=module) for module in (net(), Whole())]
    found = score(trainer(SELECT, objective=objective, model=None), models, BATCHES)
    assert [(one.unit, len(one.losses)) for one in found] == [("batches", 3)] * 2
