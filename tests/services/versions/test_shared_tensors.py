"""A fine-tuned last layer of a large model costs the last layer: the body's blobs are shared by all versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mongotorch import Datalayer, TorchModel, TorchTrainer, Worker

WIDTH, CLASSES, BODY = 2048, 1000, 6
MB = 1_000_000


def net() -> nn.Sequential:
    """100 MB of body with a batch norm, frozen as users freeze it, and a head of 8 MB."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(16, WIDTH), nn.BatchNorm1d(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(BODY))
    )
    body.requires_grad_(False)
    return nn.Sequential(body, nn.Linear(WIDTH, CLASSES))


def nbytes(module: nn.Module) -> int:
    return sum(int(tensor.nbytes) for tensor in module.state_dict().values())


class Stored:
    """The bytes of everything that is stored of components: blobs and documents."""

    def __init__(self, db: Datalayer) -> None:
        files = db["mt.artifacts.files"].raw
        self.blobs = {str(file["filename"]): int(file["length"]) for file in files.find()}
        size = [{"$group": {"_id": None, "sum": {"$sum": {"$bsonSize": "$$ROOT"}}}}]
        self.total = sum(
            int(group["sum"])
            for name in ("mt.artifacts.files", "mt.artifacts.chunks", "mt.components")
            for group in db[name].raw.aggregate(size)
        )


def new_bytes(db: Datalayer, kind: str, name: str, before: Stored) -> int:
    """What the newest version of a component added: its document, and its blobs that were not there before."""
    version = db.show(kind, name)[-1]
    pipeline = [
        {"$match": {"_id": db.show(kind, name, version)["_id"]}},
        {"$project": {"size": {"$bsonSize": "$$ROOT"}}},
    ]
    (found,) = db["mt.components"].raw.aggregate(pipeline)
    now = Stored(db).blobs
    own = db.show(kind, name, version)["blobs"]
    return int(found["size"]) + int(sum(now[blob] for blob in own if blob not in before.blobs))


@pytest.mark.parametrize(("optimizer", "states"), [("SGD", 0), ("Adam", 2)])
def test_a_new_version_of_a_fine_tuned_head_stores_the_head(server_uri: str, optimizer: str, states: int) -> None:
    settings: dict[str, Any] = {"compute": "queue", "progress": False}
    with Datalayer.connect(server_uri, **settings) as db:
        db["rows"].insert_many({"x": torch.randn(16), "y": n % CLASSES} for n in range(80))
        module = net()
        head, body = nbytes(module[1]), nbytes(module[0])
        assert body > 100 * MB
        trainer = TorchTrainer(
            "tune",
            key=("x", "y"),
            select=db["rows"].find(),
            objective=nn.functional.cross_entropy,
            loader_kwargs={"batch_size": 16},
            optimizer_cls=optimizer,
            optimizer_kwargs={"lr": 0.01},
            max_iterations=4,
            validation_interval=2,
            model=TorchModel("large", object=module),
        )
        job = db.apply(trainer)
        before = Stored(db)
        assert before.total > body + head

        assert Worker(db).once()
        job.result(timeout=10)
        db.gc(grace_s=0)  # of the checkpoint on the way

        after = Stored(db)
        assert db.show("model", "large") == [0, 1]
        assert head < new_bytes(db, "model", "large", before) < 1.1 * head
        # The trainer that is published beside it holds the state of the optimizer: that of the head alone.
        assert after.total - before.total < (1.1 + 1.05 * states) * head
        assert db["mt.checkpoints"].count() == 0
        one, two = (db.load("model", "large", version).object.state_dict() for version in (0, 1))
        changed = {name for name in one if not torch.equal(one[name], two[name])}
        assert {"1.weight", "1.bias"} <= changed
        assert not any("weight" in name and name.startswith("0.") for name in changed)
