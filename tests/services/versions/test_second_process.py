"""What has no name, from a script's own `__main__`, trains there and predicts in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mongomock
import pymongo
import pytest
from tests.helpers import documents_in, fill, model, net, run_elsewhere, trainer
from torch import Tensor

from mongotorch import Datalayer, Metric, TorchModel, Validation
from mongotorch.errors import UnsafeClosureError

SECRET = "mongodb://me:secret@127.0.0.1:1/?connect=false"

DEFINING = """
    import torch
    from torch import nn
    from mongotorch import Datalayer, Metric, TorchModel, TorchTrainer, Validation

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.after = lambda output: output * FACTOR

        def forward(self, x):
            return self.after(self.layers(x))

    class Loss:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, output, target):
            return self.weight * nn.functional.cross_entropy(output, target)

    class Trainer(TorchTrainer):
        def take_step(self, model, batch, optimizers):
            STEPS.append(1)
            return super().take_step(model, batch, optimizers)

    FACTOR, STEPS = 0.5, []

    def closed_over(shift):
        return lambda x, y: (torch.tensor(x) + shift, y)

    def right(output, target):
        return (output.argmax(dim=1) == target).float().mean() * FACTOR

    def applied(db, n, cls, objective, transform, metric):
        checked = Validation(f"v{n}", metrics=[Metric(f"metric{n}", object=metric)])
        model = TorchModel(
            f"m{n}", object=Net(), validation=checked,
            preprocess=lambda item: torch.tensor(item) + n, postprocess=lambda output: output.tolist(),
        )
        return cls(
            f"t{n}", key=("x", "y"), select=db["points"].find(), objective=objective, transform=transform,
            loader_kwargs={"batch_size": 16}, max_iterations=6, validation_interval=3, model=model,
        )

    ITEM, ANSWER = GIVEN["item"], {}
    with Datalayer.connect() as db:
        cases = [
            (TorchTrainer, lambda output, target: nn.functional.cross_entropy(output, target),
             lambda x, y: (torch.tensor(x), y), lambda output, target: output.mean() * FACTOR),
            (TorchTrainer, nn.functional.cross_entropy, closed_over(2.0), right),
            (Trainer, Loss(0.5), closed_over(-1.0), Loss(2.0)),
        ]
        for n, case in enumerate(cases):
            trained = db.apply(applied(db, n, *case)).result()
            again = db.apply(applied(db, n, *case)).result()
            ANSWER[trained.uuid] = {
                "predicted": trained.predict(ITEM),
                "values": trained.trainer.metric_values,
                "version": trained.version,
                "recognised": again.uuid == trained.uuid,
            }
"""

LOADING = """
    import torch
    from mongotorch import Datalayer

    class Net:  # another one of the same name
        pass

    FACTOR, STEPS = 1000.0, None

    ANSWER = {}
    with Datalayer.connect() as db:
        for uuid in GIVEN["uuids"]:
            model = db.load(uuid=uuid)
            named = db.load("model", model.identifier)
            more = model.trainer.replace(max_iterations=2, metric_values=None)
            trained = db.apply(more).result()
            ANSWER[uuid] = {
                "predicted": model.predict(GIVEN["item"]),
                "named": named.predict(GIVEN["item"]),
                "values": model.trainer.metric_values,
                "steps": db.show("model", model.identifier, trained.version)["steps"],
                "class": type(model.trainer).__name__,
            }
"""


def test_what_a_script_defines_itself_loads_predicts_and_trains_in_another_process(server_uri: str) -> None:
    item = [1.0, -2.0, 0.5, 3.0]
    with Datalayer.connect(server_uri, valid_fraction=0.2) as db:
        fill(db)

    made = run_elsewhere(server_uri, DEFINING, item=item)
    repeated = run_elsewhere(server_uri, DEFINING, item=item)
    found = run_elsewhere(server_uri, LOADING, uuids=list(made), item=item)

    assert len(made) == 3
    assert repeated == made  # the same script again: recognised, neither stored nor trained again
    for uuid, there in made.items():
        assert (there["version"], there["recognised"]) == (1, True)
        assert found[uuid]["predicted"] == found[uuid]["named"] == there["predicted"]
        assert found[uuid]["values"] == there["values"]
        assert found[uuid]["steps"] == 2
    assert [found[uuid]["class"] for uuid in made] == ["TorchTrainer", "TorchTrainer", "Trainer"]
    assert len({tuple(there["predicted"]) for there in made.values()}) == 3


class Holding:
    """Keeps what it is given, as an objective or a metric might."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return output.sum()


def closing(held: Any) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        return held, args

    return function


PLACES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "objective": (lambda held: {"objective": closing(held)}, r"objective\.__closure__\['held'\]"),
    "attribute": (lambda held: {"objective": Holding(held)}, r"objective\.held"),
    "transform": (lambda held: {"transform": closing({"in": [held]})}, r"transform.*\['held'\]\['in'\]\[0\]"),
    "collate": (lambda held: {"collate_fn": closing(held)}, r"collate_fn"),
    "preprocess": (lambda held: {"model": model(preprocess=closing(held))}, r"preprocess"),
    "metric": (
        lambda held: {"model": model(validation=Validation("v", metrics=[Metric("c", object=Holding(held))]))},
        r"object\.held",
    ),
    "module": (lambda held: {"model": TorchModel("m", object=hooked(held))}, r"object"),
}


def hooked(held: Any) -> Any:
    module = net()
    module.extra = closing(held)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("place", "what"),
    [
        *((place, "client") for place in PLACES),
        *(("objective", what) for what in ("database", "mock", "datalayer", "collection")),
    ],
)
def test_a_client_in_a_component_is_refused_with_its_path_and_nothing_is_written(
    db: Datalayer, place: str, what: str
) -> None:
    select = fill(db)
    make, path = PLACES[place]
    with pymongo.MongoClient[dict[str, Any]](SECRET) as client, mongomock.MongoClient() as mock:  # type: ignore[var-annotated]
        held = {
            "client": client,
            "database": client["shop"],
            "mock": mock,
            "datalayer": db,
            "collection": db["points"].raw,
        }[what]

        with pytest.raises(UnsafeClosureError, match=path) as caught:
            db.apply(trainer(select, **make(held)))

        assert "secret" not in str(caught.value)
    assert caught.value.field
    assert documents_in(db) == {}
