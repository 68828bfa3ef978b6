"""Trains a classifier on a CSV file: the rows become documents, the columns of numbers the input.

    python examples/from_csv.py flowers.csv --target species

The database is the one that MONGOTORCH_URI names, else the embedded server over .mongotorch/db.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from mongotorch import Datalayer, Metric, TorchModel, TorchTrainer, Validation


def number(text: str) -> float | str | None:
    """A cell as a number where it is one; None where it is empty."""
    try:
        return float(text)
    except ValueError:
        return text or None


def accuracy(output: torch.Tensor, target: torch.Tensor) -> float:
    """The share of correct predictions."""
    return (output.argmax(dim=1) == target).float().mean().item()


def main() -> None:
    """Import, look, train, predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a CSV file whose first line has the names of the columns")
    parser.add_argument("--target", required=True, help="the column to predict")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    name = arguments.file.stem

    with arguments.file.open(newline="", encoding="utf-8") as file:
        rows = [{key: number(cell) for key, cell in row.items()} for row in csv.DictReader(file)]
    classes = sorted({str(row[arguments.target]) for row in rows})
    columns = [key for key in rows[0] if key != arguments.target and isinstance(rows[0][key], float)]

    with Datalayer.connect() as db:
        documents: list[dict[str, Any]] = [
            {"_id": n, **row, "class": classes.index(str(row[arguments.target]))} for n, row in enumerate(rows)
        ]
        db[name].delete_many({})
        db[name].insert_many(documents)
        print(db.check(db[name].find()))

        torch.manual_seed(0)
        width = len(columns)
        net = torch.nn.Sequential(
            torch.nn.BatchNorm1d(width),
            torch.nn.Linear(width, 32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, len(classes)),
        )
        trainer = TorchTrainer(
            f"{name}-trainer",
            key=(*columns, "class"),
            select=db[name].find(),
            split=0.2,
            transform=lambda *values: (torch.tensor(values[:-1], dtype=torch.float32), int(values[-1])),
            objective=torch.nn.functional.cross_entropy,
            loader_kwargs={"batch_size": 32, "shuffle": True, "drop_last": True},
            optimizer_kwargs={"lr": 0.01},
            max_iterations=arguments.steps,
            validation_interval=50,
            model=TorchModel(
                name,
                object=net,
                postprocess=lambda output: classes[int(output.argmax())],
                validation=Validation(f"{name}-check", metrics=[Metric("accuracy", object=accuracy, mode="max")]),
            ),
        )
        model = db.apply(trainer).result()
        best = max(model.trainer.metric_values["accuracy"])
        print(f"model {name!r}, version {model.version}: accuracy {best:.2f} on the fifth that was set aside")

        first = next(db.execute(db[name].find().limit(1)))
        predicted = model.predict([first[key] for key in columns])
        print(f"first row: {first[arguments.target]}, predicted: {predicted}")


if __name__ == "__main__":
    main()
