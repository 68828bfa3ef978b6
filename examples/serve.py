"""Serves the live version of a model, which changes to a better one by itself while documents arrive.

    python examples/serve.py

The worker runs in a thread here; `mongotorch worker` in another terminal does the same.
"""

from __future__ import annotations

import threading

import torch

from mongotorch import Datalayer, NewDocuments, Schedule, TorchModel, TorchTrainer, Worker


def measured(count: int, first: int, noise: float) -> list[dict[str, object]]:
    """Points of a line, with noise."""
    generator = torch.Generator().manual_seed(first)
    xs = torch.rand(count, generator=generator)
    ys = 3 * xs + 1 + noise * torch.randn(count, generator=generator)
    return [
        {"_id": first + n, "x": [float(x)], "y": [float(y)]} for n, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]


def main() -> None:
    """Train on noisy points, serve, insert better ones, and see the model change."""
    with Datalayer.connect() as db:
        lines = db["example_lines"]
        lines.delete_many({})
        lines.insert_many(measured(200, first=0, noise=0.5))
        torch.manual_seed(0)
        trainer = TorchTrainer(
            "example-line-trainer",
            key=("x", "y"),
            select=lines.find(),
            split=0.2,
            objective=torch.nn.functional.mse_loss,
            loader_kwargs={"batch_size": 32, "shuffle": True},
            optimizer_kwargs={"lr": 0.05},
            max_iterations=40,
            validation_interval=20,
            model=TorchModel("example-line", object=torch.nn.Linear(1, 1)),
        )
        first = db.apply(trainer, force=True).result()
        db.promote("model", "example-line", first.version, why="the first of this run")
        db.apply(Schedule("example-line-again", trainer=trainer, trigger=NewDocuments(500)))

        worker = Worker(db)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            with db.live("model", "example-line") as served:
                print("version", served.version, "says", round(served.predict([0.5]).item(), 2), "of 2.5")
                lines.insert_many(measured(600, first=1000, noise=0.05))
                served.wait_for(first.version + 1, timeout_s=60)
                print("version", served.version, "says", round(served.predict([0.5]).item(), 2), "of 2.5")
        finally:
            worker.stop()
            thread.join()


if __name__ == "__main__":
    main()
