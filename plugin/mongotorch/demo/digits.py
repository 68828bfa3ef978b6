"""The demo: stores handwritten digits, trains a network on them, and predicts in another process.

The other process gets nothing but the address, a name and a uuid. The data is real: scikit-learn ships it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mongotorch.datalayer import Datalayer
from mongotorch.errors import MongotorchError
from mongotorch.train import Metric, TorchModel, TorchTrainer, Validation

COLLECTION = "demo_digits"
VALID_SHARE = 0.25  # enough documents that the accuracy tells something
MODEL = "demo-digits"
STEPS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the demo measured.

    Attributes:
        documents: Documents in the database.
        steps: Optimizer steps.
        samples_per_s: Training samples a second, validations included.
        objective: The objective of the published model on the fold `valid`.
        accuracy: Its accuracy there.
        version: Its version.
        uuid: Its uuid.
        second_process: What the other process measured: accuracy by identifier and by uuid; None on mongomock.
        examples: Some images that it was not trained on, with the predicted and the true digit.
        database: The name of the database.
    """

    documents: int
    steps: int
    samples_per_s: float
    objective: float
    accuracy: float
    version: int
    uuid: str
    second_process: dict[str, Any] | None
    examples: tuple[tuple[Any, int, int], ...]
    database: str


class DigitsNet(nn.Module):
    """A small convolutional network for 8x8 images, float32 of shape (n, 8, 8), to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.head(self.features(x.unsqueeze(1)))
        return logits


def accuracy(output: Tensor, target: Tensor) -> float:
    """The share of correct predictions."""
    return (output.argmax(dim=1) == target).float().mean().item()


def insert_digits(db: Datalayer) -> int:
    """Insert the images unless they are there; returns how many there are."""
    collection = db[COLLECTION]
    digits = load_digits()
    if collection.count() != len(digits.target):
        collection.delete_many({})
        collection.insert_many(
            {"_id": n, "x": (image / 16).astype(np.float32), "y": int(label)}
            for n, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
        )
    return collection.count()


def digits_trainer(db: Datalayer, *, steps: int = STEPS) -> TorchTrainer:
    """The trainer of the demo: streamed, with prefetching."""
    torch.manual_seed(0)
    validation = Validation("demo-check", metrics=[Metric("accuracy", object=accuracy, mode="max")])
    return TorchTrainer(
        "demo-trainer",
        key=("x", "y"),
        select=db[COLLECTION].find(),
        objective=nn.functional.cross_entropy,
        loader_kwargs={"batch_size": 64, "shuffle": True},
        in_memory=False,
        data_prefetch=True,
        optimizer_kwargs={"lr": 2e-3},
        max_iterations=steps,
        validation_interval=100,
        split=VALID_SHARE,
        model=TorchModel(MODEL, object=DigitsNet(), validation=validation),
    )


def run_demo(db: Datalayer, *, steps: int = STEPS) -> Outcome:
    """The whole demo; trains again if it was run before.

    Args:
        db: An open datalayer.
        steps: Optimizer steps.

    Raises:
        MongotorchError: What a run raises, or the other process could not load the model.
    """
    documents = insert_digits(db)
    begun = time.perf_counter()
    job = db.apply(digits_trainer(db, steps=steps), force=True)
    model = job.result()
    elapsed = time.perf_counter() - begun
    values = model.trainer.metric_values
    best = min(range(len(values["objective"])), key=values["objective"].__getitem__)
    progress = job.progress
    return Outcome(
        documents=documents,
        steps=progress["step"],
        samples_per_s=progress.get("samples_per_s") or progress["samples"] / elapsed,
        objective=values["objective"][best],
        accuracy=values["accuracy"][best],
        version=-1 if model.version is None else model.version,
        uuid=model.uuid,
        second_process=None if db.uri.startswith("mongomock:") else _run_second_process(db, model.uuid),
        examples=_examples(db, model),
        database=db.uri.partition("?")[0].rpartition("/")[2] if "//" in db.uri else "the embedded server",
    )


def validation_rows(db: Datalayer) -> list[dict[str, Any]]:
    """The documents that the model was not trained on."""
    return list(db.execute(db[COLLECTION].find().fold("valid", split=VALID_SHARE)))


def _examples(db: Datalayer, model: TorchModel) -> tuple[tuple[Any, int, int], ...]:
    rows = validation_rows(db)[:4]
    predicted = [int(output.argmax()) for output in model.predict_batches([row["x"] for row in rows])]
    return tuple((row["x"], one, row["y"]) for row, one in zip(rows, predicted, strict=True))


def _measure(db: Datalayer, uuid: str) -> dict[str, Any]:
    """Load the model by identifier and by uuid, predict the fold `valid`, and measure the accuracy."""
    rows = validation_rows(db)
    found: dict[str, Any] = {"pid": os.getpid(), "documents": len(rows)}
    for how, model in (("identifier", db.load("model", MODEL)), ("uuid", db.load(uuid=uuid))):
        predicted = [int(output.argmax()) for output in model.predict_batches([row["x"] for row in rows])]
        right = sum(one == row["y"] for one, row in zip(predicted, rows, strict=True))
        found[how] = right / len(rows)
    return found


def _run_second_process(db: Datalayer, uuid: str) -> dict[str, Any]:
    # The address goes through the environment: it may hold a password, and other users can see arguments.
    command = [sys.executable, "-c", "from mongotorch.demo import digits; digits.second_process()", uuid]
    environment = {**os.environ, "MONGOTORCH_URI": db.uri}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise MongotorchError(f"the other process could not load the model:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def second_process() -> None:
    """Be the other process: measure the model of the uuid in the arguments, and print the result as JSON."""
    with Datalayer.connect() as db:
        json.dump(_measure(db, sys.argv[1]), sys.stdout)
