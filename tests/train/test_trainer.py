"""The TorchTrainer as a value: the seed's parameters, and what is refused before there is any data."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mongotorch import Metric, Query, TorchModel, TorchTrainer, Validation
from mongotorch.errors import IdentifierError, LoaderOptionError, OptimizerError, ParameterError, SignatureError

SELECT = Query.find("points")
NOTHING = inspect.Parameter.empty
SEED: list[tuple[str, Any]] = [
    ("identifier", NOTHING),
    ("db", None),
    ("uuid", None),
    ("artifacts", None),
    ("key", NOTHING),
    ("select", NOTHING),
    ("transform", None),
    ("metric_values", None),
    ("signature", "*args"),
    ("data_prefetch", False),
    ("prefetch_size", 1000),
    ("prefetch_factor", 100),
    ("in_memory", True),
    ("compute_kwargs", None),
    ("objective", NOTHING),
    ("loader_kwargs", None),
    ("max_iterations", 10**100),
    ("no_improve_then_stop", 5),
    ("download", False),
    ("validation_interval", 100),
    ("listen", "objective"),
    ("optimizer_cls", "Adam"),
    ("optimizer_kwargs", None),
    ("optimizer_state", None),
    ("collate_fn", None),
]

Make = Callable[..., TorchTrainer]


@pytest.fixture
def make() -> Make:
    usual: dict[str, Any] = {"key": ("x", "y"), "select": SELECT, "objective": nn.functional.cross_entropy}
    return lambda identifier="t", **given: TorchTrainer(identifier, **{**usual, **given})


def test_the_parameters_of_the_seed_have_their_names_order_and_defaults() -> None:
    found = list(inspect.signature(TorchTrainer).parameters.values())

    assert [(p.name, p.default) for p in found[: len(SEED)]] == SEED
    positional = [p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["identifier", "db", "uuid"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in found[3:])
    assert all(p.default is not NOTHING for p in found[len(SEED) :])


def test_only_key_select_and_objective_are_needed(make: Make) -> None:
    trainer = make()

    assert {
        name: getattr(trainer, name) for name, default in SEED if default is not NOTHING and name != "uuid"
    } == {name: default for name, default in SEED if default is not NOTHING and name != "uuid"}
    assert trainer.uuid


@pytest.mark.parametrize(
    ("given", "error", "field"),
    [
        ({"identifier": "two words"}, IdentifierError, "identifier"),
        ({"key": {}}, ParameterError, "key"),
        ({"select": [1, 2]}, ParameterError, "select"),
        ({"objective": "mse"}, ParameterError, "objective"),
        ({"transform": 3}, ParameterError, "transform"),
        ({"collate_fn": 3}, ParameterError, "collate_fn"),
        ({"signature": "args"}, SignatureError, "signature"),
        ({"key": "x"}, SignatureError, "signature"),
        ({"artifacts": {"nothing": "dill"}}, ParameterError, "artifacts"),
        ({"metric_values": [1]}, ParameterError, "metric_values"),
        ({"in_memory": 1}, ParameterError, "in_memory"),
        ({"data_prefetch": "yes"}, ParameterError, "data_prefetch"),
        ({"download": None}, ParameterError, "download"),
        ({"prefetch_size": 0}, ParameterError, "prefetch_size"),
        ({"prefetch_factor": -1}, ParameterError, "prefetch_factor"),
        ({"max_iterations": 0}, ParameterError, "max_iterations"),
        ({"max_iterations": 1e3}, ParameterError, "max_iterations"),
        ({"no_improve_then_stop": 0}, ParameterError, "no_improve_then_stop"),
        ({"validation_interval": 0}, ParameterError, "validation_interval"),
        ({"validation_interval": True}, ParameterError, "validation_interval"),
        ({"validation_interval": None}, ParameterError, "max_iterations"),
        ({"seed": "zero"}, ParameterError, "seed"),
        ({"listen": "accuracy"}, ParameterError, "listen"),
        ({"optimizer_cls": "Adem"}, OptimizerError, "optimizer_cls"),
        ({"optimizer_cls": "Optimizer:"}, OptimizerError, "optimizer_cls"),
        ({"optimizer_cls": "torch.nn:Linear"}, OptimizerError, "optimizer_cls"),
        ({"optimizer_cls": "no.such.module:Class"}, OptimizerError, "optimizer_cls"),
        ({"optimizer_cls": torch.nn.Linear}, OptimizerError, "optimizer_cls"),
        ({"optimizer_cls": "LBFGS"}, OptimizerError, "optimizer_cls"),
        ({"optimizer_kwargs": {"speed": 3}}, OptimizerError, "optimizer_kwargs"),
        ({"optimizer_kwargs": {"lr": -1}}, OptimizerError, "optimizer_kwargs"),
        ({"optimizer_state": [1]}, ParameterError, "optimizer_state"),
        ({"loader_kwargs": {"bath_size": 3}}, LoaderOptionError, "bath_size"),
        ({"loader_kwargs": {"batch_size": 0}}, LoaderOptionError, "batch_size"),
        ({"loader_kwargs": {"sampler": None}}, LoaderOptionError, "sampler"),
        ({"loader_kwargs": {"collate_fn": list}}, LoaderOptionError, "collate_fn"),
        ({"loader_kwargs": {"persistent_workers": True}}, LoaderOptionError, "loader_kwargs"),
        ({"compute_kwargs": {"gpus": 2}}, ParameterError, "compute_kwargs"),
        ({"compute_kwargs": {"num_workers": -1}}, ParameterError, "compute_kwargs"),
        ({"compute_kwargs": {"device": 0}}, ParameterError, "compute_kwargs"),
        ({"model": nn.Linear(1, 1)}, ParameterError, "model"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(
    make: Make, given: dict[str, Any], error: type[ParameterError], field: str
) -> None:
    model = TorchModel("m", object=nn.Linear(4, 3))

    with pytest.raises(error) as caught:
        make(**{"model": model, **given})

    assert caught.value.field == field
    assert type(caught.value) is error


def test_a_name_that_the_models_validation_measures_can_be_listened_to(make: Make) -> None:
    validation = Validation("v", metrics=[Metric("accuracy", object=len)])

    trainer = make(listen="accuracy", model=TorchModel("m", object=nn.Linear(4, 3), validation=validation))

    assert trainer.listen == "accuracy"


def test_workers_of_the_compute_engine_allow_the_options_that_need_workers(make: Make) -> None:
    options = {"persistent_workers": True, "prefetch_factor": 3}

    assert make(loader_kwargs=options, compute_kwargs={"num_workers": 2}).loader_kwargs == options


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    ),
)
def test_every_optimizer_of_torch_can_be_named(make: Make, name: str) -> None:
    if name == "Optimizer":
        with pytest.raises(OptimizerError):
            make(optimizer_cls=name)
    elif name != "LBFGS":
        assert make(optimizer_cls=name).optimizer_cls == name


def test_a_trainer_is_a_frozen_value_that_is_changed_by_a_copy(make: Make) -> None:
    trainer = make()

    with pytest.raises(dataclasses.FrozenInstanceError):
        trainer.seed = 3  # type: ignore[misc]
    changed = trainer.replace(seed=3)
    assert (changed.seed, trainer.seed) == (3, 0)
    assert changed.uuid != trainer.uuid
    assert changed != trainer
    assert changed.replace(seed=0) == trainer


def test_applying_itself_needs_the_db_it_was_given(make: Make) -> None:
    with pytest.raises(ParameterError, match=r"db\.apply"):
        make().apply()
