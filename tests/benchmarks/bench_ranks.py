"""Two ranks against one: samples a second, and the processor time of a step in each thread of a rank.

    python -m tests.benchmarks.bench_ranks [--rounds 2] [--steps 150] [--uri URI]

The runs of one and of two ranks take turns, and their weights are compared. `mlp` has 2.8 million parameters,
of which each step exchanges the gradients; `cnn` has few. Each rank computes with one thread, one rank as well.
"plain" accumulates two batches of half the size without lanes, on one thread too; what lanes cost is against that.

"by processor time" does not depend on what else the machine does: what the training thread of one rank uses in a
step, over half of what both ranks use in all of their threads, which two cores of their own would need for it.
The server is left out, which works beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mongotorch import Datalayer, TorchModel, TorchTrainer

WARM = 20  # steps that are not counted


class Looks:
    """A callback that writes what the threads of its rank have used since the first steps.

    Args:
        folder: Where to write.
        last: The step after which to write.
    """

    def __init__(self, folder: str, last: int) -> None:
        self.folder, self.last = folder, last
        self.first: dict[str, int] = {}

    def on_step(self, fit: Any, event: Any) -> None:
        """Look at the threads after the first steps and after the last one."""
        if event.step == WARM:
            self.first = ticks()
        if event.step == self.last:
            share = 1e-6 / (self.last - WARM)
            used = {name: (count - self.first.get(name, 0)) * share for name, count in ticks().items()}
            shown = {name: round(ms, 1) for name, ms in used.items() if ms > 0.2}
            Path(self.folder, f"{fit.rank}").write_text(json.dumps(shown), encoding="utf-8")


def ticks() -> dict[str, int]:
    """What each thread of this process has used, in nanoseconds, by its name and number."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
        name = "training" if path.name == str(os.getpid()) else (path / "comm").read_text().strip()
        found[f"{name} {path.name}"] = int((path / "schedstat").read_text().split()[0])
    return found


def training(used: str) -> float:
    """Of what a rank has used, that of its training thread."""
    return float(sum(ms for name, ms in json.loads(used).items() if name.startswith("training ")))


def mlp() -> nn.Module:
    """2.8 million parameters."""
    sizes = [(256, 1536), (1536, 1536), (1536, 10)]
    layers = [layer for pair in sizes for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Some 10,000 parameters, each of which is used at many places."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10)),
    )


def run(db: Datalayer, name: str, module: Any, workers: int, steps: int) -> tuple[float, bytes, list[str]]:
    """Samples a second, the weights, and what each rank has used; 0 workers is a run without lanes."""
    torch.manual_seed(0)
    cut: dict[str, Any] = {"workers": workers, "lanes": 2} if workers else {"threads": 1}
    stamp = f"{name}-{workers}-{time.time_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        job = db.apply(
            TorchTrainer(
                f"{stamp}-trainer",
                key=("x", "y"),
                select=db["rows"].find(),
                objective=nn.functional.cross_entropy,
                loader_kwargs={"batch_size": 512 if workers else 256, "shuffle": True},
                gradient_accumulation_steps=1 if workers else 2,
                in_memory=False,
                data_prefetch=True,
                max_iterations=steps,
                validation_interval=None,
                log_interval=10,
                compute_kwargs={**cut, "device": "cpu"},
                optimizer_cls="SGD",
                optimizer_kwargs={"lr": 0.01},
                callbacks=(Looks(folder, steps),),
                model=TorchModel(stamp, object=module()),
            )
        )
        trained: Any = job.result()
        used = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())]
    rows = [row for row in db.metrics(job.uuid) if row.kind == "train" and row.step > WARM]
    key = next(name for name in rows[0].values if "samples" in name)
    weights = b"".join(one.detach().numpy().tobytes() for one in trained.object.parameters())
    return statistics.median(row.values[key] for row in rows), weights, used


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--uri")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Datalayer.connect(given.uri or f"embedded:{folder}", progress=False) as db,
    ):
        draw = np.random.default_rng(0)
        rows = ({"_id": n, "x": draw.standard_normal(256).tolist(), "y": n % 10} for n in range(20_000))
        db["rows"].insert_many(rows)
        for name, module in (("mlp", mlp), ("cnn", cnn)):
            ratios, bounds, overheads = list[float](), list[float](), list[float]()
            for _ in range(given.rounds):
                plain, one, two = (run(db, name, module, workers, given.steps) for workers in (0, 1, 2))
                assert one[1] == two[1], "the weights differ"
                ratios.append(two[0] / one[0])
                together = sum(sum(json.loads(used).values()) for used in two[2])
                bounds.append(training(one[2][0]) / (together / 2))
                overheads.append(training(one[2][0]) / training(plain[2][0]))
                for kind, (speed, _, used) in zip(("plain", "one", "two"), (plain, one, two), strict=True):
                    print(f"{name} {kind}: {speed:.0f} samples/s, step {512e3 / speed:.1f} ms; ms of")
                    print("\n".join(f"   rank {rank}: {text}" for rank, text in enumerate(used)), flush=True)
            print(name, "two ranks over one:", [round(ratio, 2) for ratio in ratios])
            print(name, "by processor time:", [round(bound, 2) for bound in bounds])
            print(name, "lanes over plain, by processor time:", [round(one, 3) for one in overheads], flush=True)


if __name__ == "__main__":
    main()
