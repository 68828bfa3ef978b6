"""To the bit what a loop written by hand gives: the same seed and order, the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.helpers import fill, same, seeded, state
from torch import Tensor, nn

from mongotorch import Datalayer, Metric, TorchModel, TorchTrainer, Validation

STEPS = 17
BATCH = 16  # of 97 or so documents: the last batch of an epoch is short
SEED = 3


class Cnn(nn.Module):
    """Takes the four numbers of a point as an image of 2 by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 2, padding=1), nn.Linear(54, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.conv(x.reshape(-1, 1, 2, 2))).flatten(1))
        return output


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "mlp adam": (mlp, "Adam", {"lr": 0.01}),
    "cnn sgd momentum": (Cnn, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "dropout batch norm": (dropping, "AdamW", {"lr": 0.01, "amsgrad": True}),
}
WAYS: dict[str, dict[str, Any]] = {
    "memory": {},
    "streamed": {"in_memory": False, "data_prefetch": True, "prefetch_size": 20},
}
counted = itertools.count()


def later(output: Tensor, target: Tensor) -> float:
    """A metric that is better each time, so that the last weights are published."""
    return float(next(counted))


def documents(db: Datalayer) -> list[Any]:
    """The batches of an epoch, made by hand of the documents in the order of their `_id`."""
    found = list(db["points"].raw.find({"_fold": "train"}).sort("_id", 1))
    x = torch.tensor([document["x"] for document in found])
    y = torch.tensor([document["y"] for document in found])
    return list(zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True))


def by_hand(module: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any]) -> dict[str, Tensor]:
    """The loop that everybody writes."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        module.train()
        for x, y in itertools.islice(batches, STEPS):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            torch.autograd.backward(loss)
            optimizer.step()
    return state(module)


def trained(db: Datalayer, name: str, *, validates: bool = False, shuffle: bool = False, **way: Any) -> TorchModel:
    make, optimizer, options = NETS[name]
    validation = Validation("v", metrics=[Metric("later", object=later)]) if validates else None
    found: TorchModel = db.apply(
        TorchTrainer(
            "t",
            key=("x", "y"),
            select=db["points"].find(),
            objective=nn.functional.cross_entropy,
            loader_kwargs={"batch_size": BATCH, "shuffle": shuffle},
            optimizer_cls=optimizer,
            optimizer_kwargs=options,
            max_iterations=STEPS,
            validation_interval=3 if validates else None,
            listen="later" if validates else "objective",
            seed=SEED,
            model=TorchModel("m", object=seeded(make), validation=validation),
            **way,
        )
    ).result()
    return found


def expected(name: str, batches: Iterator[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    make, optimizer, options = NETS[name]
    module = seeded(make)
    own = getattr(torch.optim, optimizer)(module.parameters(), **options)
    return by_hand(module, own, batches), own.state_dict()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_weights_and_optimizer_equal_those_of_a_loop_by_hand(db: Datalayer, name: str, way: str) -> None:
    fill(db)
    batches = documents(db)
    assert len(batches[-1][1]) not in (0, 1, BATCH)
    weights, kept = expected(name, itertools.cycle(batches))

    found = trained(db, name, **WAYS[way])

    assert same(state(found), weights)
    assert same(found.trainer.optimizer_state, {**kept, "optimizer": NETS[name][1]})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dropout batch norm"])
def test_validations_in_between_change_nothing(db: Datalayer, name: str, way: str) -> None:
    fill(db)
    weights, _ = expected(name, itertools.cycle(documents(db)))

    found = trained(db, name, validates=True, **WAYS[way])

    assert same(state(found), weights)
    assert db.show("model", "m", 1)["best_step"] == STEPS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mlp adam", "dropout batch norm"])
def test_the_shuffled_order_is_that_of_the_stream(db: Datalayer, name: str, way: str) -> None:
    fill(db)
    select = db["points"].find()
    with db.stream(select, key=("x", "y"), batch_size=BATCH, shuffle=True, seed=SEED, fold="train") as stream:
        epochs = [list(stream) for _ in range(3)]
    assert not same(epochs[0], epochs[1])
    weights, _ = expected(name, iter([batch for epoch in epochs for batch in epoch]))

    way_of_it = {**WAYS[way], "prefetch_size": 1000}

    assert same(state(trained(db, name, shuffle=True, **way_of_it)), weights)
