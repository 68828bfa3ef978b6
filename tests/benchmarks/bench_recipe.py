"""What a step of a run costs over the same step in a loop by hand, for a small and for a larger model.

    python -m tests.benchmarks.bench_recipe [--rounds N]

Both loops take turns, some steps each, so that what else the machine does falls on both; the time is that of the
processor. Shown is the median of the ratios of the rounds, with the milliseconds of a step. What a run measures is
observed as in a job, with `log_interval` at its default, but nothing is written. The recipes: `plain` is SGD with
momentum; `schedule and clipping` is AdamW in two groups, OneCycleLR and gradients clipped by norm; the `whole
recipe` has accumulation over 4 batches, bf16 and a mean of the weights besides.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mongotorch import Query, TorchModel, TorchTrainer
from mongotorch.services.training.checkpoints import CheckpointWriter
from mongotorch.services.training.observers import (
    JobProgress,
    MetricRecorder,
    Observer,
    ProgressBar,
    ValidationLog,
)
from mongotorch.train import Fit, Stepped

STEPS = 10**9
cross_entropy = nn.functional.cross_entropy


class Repeated:
    """The same batches for ever, each of as many rows; as a stream it says how many."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.batch_rows = len(batches[0][1])

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class Encoder(nn.Module):
    """A transformer of two layers over sequences of 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 192)
        layer = nn.TransformerEncoderLayer(192, 4, 768, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(192, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (rows, 4)."""
        output: Tensor = self.head(self.layers(self.embed(tokens))[:, 0])
        return output


def small_mlp() -> tuple[nn.Module, list[Any]]:
    """A model whose step takes about 0.2 milliseconds, and its batches."""
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return made, [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(8)]


def mlp() -> tuple[nn.Module, list[Any]]:
    """A model whose step takes some tenths of a millisecond, and its batches."""
    made = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    return made, [(torch.randn(32, 64), torch.randint(4, (32,))) for _ in range(8)]


def encoder() -> tuple[nn.Module, list[Any]]:
    """A model whose step takes some tens of milliseconds, and its batches."""
    return Encoder(), [(torch.randint(1000, (16, 32)), torch.randint(4, (16,))) for _ in range(8)]


def groups(_: str, parameter: nn.Parameter) -> dict[str, Any]:
    """No decay for norms and biases."""
    return {"weight_decay": 0.0} if parameter.ndim == 1 else {}


def by_hand(module: nn.Module, batches: list[Any], recipe: str) -> Iterator[None]:
    """The loop that one writes: it stops at an objective that is not finite, and keeps its mean of 50 steps."""
    full, plain = recipe == WHOLE, recipe == PLAIN
    decayed = [one for one in module.parameters() if one.ndim > 1]
    others = [one for one in module.parameters() if one.ndim == 1]
    parts: list[Any] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer: Any = torch.optim.AdamW(parts, lr=1e-3)
    if plain:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=STEPS)
    average: Any = None
    if full:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # type: ignore[no-untyped-call]
    running, micro = iter(Repeated(batches)), 4 if full else 1
    history, since, rows, begun_s = list[dict[str, float]](), 0.0, 0, time.perf_counter()
    for step in itertools.count(1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(micro):
            x, y = next(running)
            rows += len(y)
            with torch.autocast("cpu", dtype=torch.bfloat16) if full else contextlib.nullcontext():
                loss = cross_entropy(module(x), y)
            (loss / micro if full else loss).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / micro
        if not plain:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if not plain:
            scheduler.step()
        if average is not None:
            average.update_parameters(module)
        if not math.isfinite(total):
            raise RuntimeError(f"the objective is {total} at step {step}")
        since += total
        if step % 50 == 0:
            passed_s = time.perf_counter() - begun_s
            rates = [group["lr"] for group in optimizer.param_groups]
            history.append({"step": step, "objective": since / 50, "lr": rates[0], "rows_per_s": rows / passed_s})
            since, rows, begun_s = 0.0, 0, time.perf_counter()
        yield


class Unwritten:
    """A lease and a log of metrics that keep nothing."""

    is_asked_to_end = is_stopping = False
    progress: Any = None

    def check(self) -> None:
        """It is held."""

    def write(self, *_: Any, **__: Any) -> bool:
        """Nothing."""
        return True

    def thin(self, *_: Any) -> None:
        """Nothing."""


PLAIN, CLIPPED, WHOLE = "plain", "schedule and clipping", "whole recipe"
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {"optimizer_cls": "SGD", "optimizer_kwargs": {"lr": 1e-3, "momentum": 0.9}},
    CLIPPED: {
        "optimizer_cls": "AdamW",
        "optimizer_kwargs": {"lr": 1e-3},
        "param_groups": groups,
        "scheduler_cls": "OneCycleLR",
        "scheduler_kwargs": {"max_lr": 1e-3, "total_steps": "max_iterations"},
        "gradient_clip_norm": 1.0,
    },
}
RECIPES[WHOLE] = {
    **RECIPES[CLIPPED],
    "gradient_accumulation_steps": 4,
    "precision": "bf16",
    "ema_decay": 0.999,
}


def by_run(module: nn.Module, batches: list[Any], recipe: str) -> Iterator[None]:
    """The same, as a run."""
    trainer = TorchTrainer(
        "t",
        key=("x", "y"),
        select=Query.find("c"),
        objective=cross_entropy,
        max_iterations=STEPS,
        validation_interval=None,
        compute_kwargs={"device": "cpu"},
        **RECIPES[recipe],
    )
    fit = Fit(trainer, TorchModel("m", object=module), batches=Repeated(batches), sets={})
    nothing, job = Unwritten(), {"_id": "", "component": "", "attempt": 1}
    observers: list[Observer] = [
        JobProgress(cast(Any, nothing), limit=None),
        ProgressBar("t", limit=None, show=False),
        MetricRecorder(cast(Any, nothing), job=job, interval=trainer.log_interval),
        ValidationLog(job),
        CheckpointWriter(cast(Any, nothing.write), interval_s=1e9, lease=cast(Any, nothing)),
    ]
    on_steps = [one.on_step for one in observers if type(one).on_step is not Observer.on_step]  # as `observe`
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
            observer.on_start(fit)
        for event in fit.run():
            assert isinstance(event, Stepped)
            for on_step in on_steps:
                on_step(event)
            yield


def seconds(steps: Iterator[None], count: int) -> float:
    """How long so many steps take."""
    begun = time.process_time()
    for _ in range(count):
        next(steps)
    return time.process_time() - begun


def measure(make: Callable[[], tuple[nn.Module, list[Any]]], recipe: str, *, rounds: int, count: int) -> None:
    """Print one row."""
    loops = []
    for loop in (by_hand, by_run):
        torch.manual_seed(0)
        module, batches = make()
        loops.append(loop(module.train(), batches, recipe))
    for loop_steps in loops:
        seconds(loop_steps, max(count // 4, 2))
    pairs = [(seconds(loops[0], count), seconds(loops[1], count)) for _ in range(rounds)]
    ratio = statistics.median(run / hand for hand, run in pairs)
    hand, run = (statistics.median(column) / count * 1000 for column in zip(*pairs, strict=True))
    name = f"{make.__name__}, {recipe}"
    print(f"{name:<40} by hand {hand:8.3f} ms   run {run:8.3f} ms   ratio {ratio:.3f}", flush=True)


def main() -> None:
    """Measure each model with each recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(small_mlp, PLAIN, rounds=2 * given.rounds, count=400)
    for recipe in RECIPES:
        measure(mlp, recipe, rounds=given.rounds, count=100)
    for recipe in RECIPES:
        measure(encoder, recipe, rounds=max(given.rounds // 3, 3), count=4)


if __name__ == "__main__":
    main()
