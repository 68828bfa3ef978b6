"""How a batch goes through a model by signature, for every structure that a batch can have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import same
from torch import Tensor, nn

from mongotorch import TorchModel
from mongotorch.errors import ParameterError, SignatureError
from mongotorch.signature import Key
from mongotorch.train.mapping import BatchMapping, scalar

A, B, C = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0, 11.0])
KEYS: dict[str, Any] = {
    "single": "a",
    "tuple": ("a", "b", "c"),
    "dict": {"p.a": "a", "b": "b", "c": "c"},
    "both": (["a"], {"b": "b", "c": "c"}),
}
BATCHES: dict[str, Any] = {
    "single": A,
    "tuple": (A, B, C),
    "dict": {"a": A, "b": B, "c": C},
    "both": ([A], {"b": B, "c": C}),
}


class Forward(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 10 * b


class Anything(nn.Module):
    def forward(self, a: Tensor, **more: Tensor) -> Tensor:
        return a + sum(more.values())


class Whole(nn.Module):
    """A forward that gets the batch as it is, and training methods of its own."""

    def forward(self, batch: Any) -> Any:
        return batch

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        return (args, kwargs)

    def named(self, *args: Any, **kwargs: Any) -> Any:
        return {"output": args, "target": kwargs}

    def alone(self, *args: Any) -> Tensor:
        return torch.stack([arg.sum() for arg in args])


class Objective(nn.Module):
    def forward(self, output: Tensor, c: Tensor) -> Tensor:
        return (output - c).sum()


def objective(output: Tensor, c: Tensor) -> Tensor:
    return (output - c).sum()


def passed(signature: str, form: str, module: nn.Module, method: str = "__call__", **given: Any) -> Any:
    mapping = BatchMapping(
        key=Key.parse(KEYS[form]), signature=signature, objective=given.get("objective", objective)
    )
    return mapping(TorchModel("m", object=module, train_forward_method=method), given.get("batch", BATCHES[form]))


@pytest.mark.parametrize("form", ["tuple", "dict", "both"])
def test_positional_gives_all_but_the_last_to_forward_and_the_last_to_the_objective(form: str) -> None:
    found = passed("*args", form, Forward())

    assert same(found.args, (A + 10 * B, C))
    assert found.kwargs == {}
    assert same(found.for_metrics(), ((A + 10 * B, C), {}))


@pytest.mark.parametrize("form", ["tuple", "dict", "both"])
def test_names_of_forward_go_to_it_and_the_rest_to_the_objective_by_name(form: str) -> None:
    found = passed("**kwargs", form, Forward())

    assert same(found.args, (A + 10 * B,))
    assert same(found.kwargs, {"c": C})
    assert found.into(objective) == (A + 10 * B - C).sum()
    assert same(found.for_metrics(), ((A + 10 * B, C), {}))


def test_both_at_once_go_as_the_key_says() -> None:
    found = passed("*args,**kwargs", "both", Forward())

    assert same((found.args, found.kwargs), ((A + 10 * B,), {"c": C}))
    assert same(passed("*args,**kwargs", "tuple", Forward()).args, (A + 10 * B, C))
    assert same(passed("*args,**kwargs", "dict", Forward()).kwargs, {"c": C})


@pytest.mark.parametrize("form", BATCHES)
def test_singleton_gives_the_whole_batch_to_forward_and_the_output_to_the_objective(form: str) -> None:
    found = passed("singleton", form, Whole())

    assert same(found.args, (BATCHES[form],))
    assert found.kwargs == {}


@pytest.mark.parametrize("named", [objective, Objective()])
def test_a_forward_that_takes_any_name_leaves_what_the_objective_asks_for(named: Any) -> None:
    found = passed("**kwargs", "dict", Anything(), objective=named)

    assert same((found.args, found.kwargs), ((A + B,), {"c": C}))


def test_a_training_method_of_its_own_receives_everything_and_returns_what_the_objective_gets() -> None:
    assert same(passed("*args", "tuple", Whole(), "loss").args, ((A, B, C), {}))
    assert same(passed("**kwargs", "tuple", Whole(), "loss").args, ((), {"a": A, "b": B, "c": C}))
    assert same(passed("*args,**kwargs", "both", Whole(), "loss").args, ((A,), {"b": B, "c": C}))
    assert same(passed("singleton", "dict", Whole(), "loss").args, ((BATCHES["dict"],), {}))
    assert same(passed("*args", "single", Whole(), "alone").args, (torch.tensor([3.0]),))
    found = passed("*args,**kwargs", "both", Whole(), "named")
    assert same((found.args, found.kwargs), ((), {"output": (A,), "target": {"b": B, "c": C}}))


@pytest.mark.parametrize(
    ("signature", "form", "batch"),
    [
        ("*args", "single", A),
        ("*args", "tuple", (A,)),
        ("*args,**kwargs", "single", A),
        ("**kwargs", "tuple", (A, B)),
        ("**kwargs", "dict", {"z": A, "target": B}),
    ],
)
def test_a_batch_that_does_not_fit_its_signature_is_an_error_that_says_so(
    signature: str, form: str, batch: Any
) -> None:
    with pytest.raises(SignatureError) as caught:
        passed(signature, form, Forward(), batch=batch)

    assert caught.value.field == "signature"


def test_a_transform_may_give_another_structure_than_the_key() -> None:
    assert same(passed("*args", "single", Forward(), batch=(A, B, C)).args, (A + 10 * B, C))
    assert same(passed("*args", "tuple", Forward(), batch={"u": A, "v": B, "w": C}).args, (A + 10 * B, C))
    assert same(passed("**kwargs", "single", Forward(), batch={"b": B, "a": A, "c": C}).kwargs, {"c": C})


def test_an_objective_is_one_number() -> None:
    assert scalar(A.sum()) == 3
    assert scalar(2) == 2
    for wrong in (A, "3", None, (A.sum(),)):
        with pytest.raises(ParameterError, match="scalar") as caught:
            scalar(wrong)
        assert caught.value.field == "objective"
