"""Uses the training stream alone, in a plain torch loop that is interrupted and goes on where it was.

python examples/own_loop.py
"""

from __future__ import annotations

import torch

from mongotorch import Datalayer

EPOCHS = 3


def main() -> None:
    """Train for half an epoch, start again from what was saved, and finish."""
    net = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    with Datalayer.connect() as db:
        points = db["example_points"]
        points.delete_many({})
        xs = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
        points.insert_many({"_id": n, "x": x, "y": float(x.sum())} for n, x in enumerate(xs))

        how = {"key": ("x", "y"), "batch_size": 64, "shuffle": True, "seed": 1}
        with db.stream(points.find(), **how) as stream:
            for n, (x, y) in enumerate(stream):
                step(net, optimizer, x, y)
                if n == 20:
                    saved = {
                        "net": net.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "data": stream.state_dict(),
                    }
                    break

        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        with db.stream(points.find(), **how) as stream:
            stream.load_state_dict(saved["data"])  # right behind the 21st batch
            for epoch in range(EPOCHS):
                losses = [step(net, optimizer, x, y) for x, y in stream]
                print(f"epoch {epoch}: {len(losses)} batches, loss {sum(losses) / len(losses):.4f}")


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """One step; returns the loss before it."""
    loss = torch.nn.functional.mse_loss(net(x).squeeze(1), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()
