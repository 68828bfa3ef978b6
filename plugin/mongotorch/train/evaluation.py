"""One measurement of a model: the objective and the metrics over every validation set.

Always: the model is in `eval()` mode under `inference_mode`; a value is the mean over samples, not over batches;
a set without a batch, or an objective that is not finite, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mongotorch.errors import EmptyFoldError, NonFiniteLossError
from mongotorch.train.devices import to_device
from mongotorch.train.mapping import scalar
from mongotorch.train.metrics import OBJECTIVE, Gauge, Metric
from mongotorch.train.model import TorchModel, evaluating
from mongotorch.train.stacking import rows_of
from mongotorch.train.trainer import TorchTrainer


def evaluate(
    trainer: TorchTrainer,
    model: TorchModel,
    sets: Mapping[str, Iterable[Any]],
    metrics: Sequence[Metric],
    device: torch.device,
) -> dict[str, float]:
    """Measure a model.

    Args:
        trainer: Maps batches and computes the objective.
        model: What is measured.
        sets: Batches by the name of their set; the empty name is the fold `valid`.
        metrics: What is measured besides the objective.
        device: Where the model is.

    Returns:
        The values by name: `objective`, `accuracy`, `dataset/objective`, ...

    Raises:
        EmptyFoldError: A set has no batch.
        NonFiniteLossError: The objective on a set is NaN or infinite.
    """
    values: dict[str, float] = {}
    with evaluating(model.object):
        for name, batches in sets.items():
            found = _one_set(trainer, model, batches, metrics, device, name or "valid")
            values |= {f"{name}/{key}" if name else key: value for key, value in found.items()}
    return values


def _one_set(
    trainer: TorchTrainer,
    model: TorchModel,
    batches: Iterable[Any],
    metrics: Sequence[Metric],
    device: torch.device,
    name: str,
) -> dict[str, float]:
    gauges = [Gauge(metric, device) for metric in metrics]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    rows = 0
    for batch in batches:
        batch = to_device(batch, device)
        count = rows_of(batch)
        passed = trainer.forward(model, batch)
        loss = scalar(trainer.compute_validation_objective(model, passed))
        total += loss.detach().double().cpu().reshape(()) * count
        args, kwargs = passed.for_metrics()
        for gauge in gauges:
            gauge.update(args, kwargs, count)
        rows += count
    if not rows:
        raise EmptyFoldError(f"the validation set {name!r} has no batch; a validation needs documents")
    objective = total.item() / rows
    if not math.isfinite(objective):
        raise NonFiniteLossError(
            f"the objective on the validation set {name!r} is {objective}; nothing is published. "
            "Try a lower learning rate, or look at the data"
        )
    return {OBJECTIVE: objective, **{gauge.name: gauge.value() for gauge in gauges}}
