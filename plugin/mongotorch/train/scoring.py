"""Several models measured on the very same documents, one loss a document, so that they can be compared in pairs.

Always: every batch is given to all models before the next one is read, so that a database that goes on changing
cannot give them different documents; a loss is that of one document alone, by the objective that validates. A
model whose training method gives the loss of a whole batch gives it to each of the batch's documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from mongotorch.train.devices import on_tensors, pick_device, required_device, to_device
from mongotorch.train.mapping import Passed, scalar
from mongotorch.train.metrics import OBJECTIVE, Gauge
from mongotorch.train.model import TorchModel, evaluating
from mongotorch.train.stacking import rows_of
from mongotorch.train.trainer import TorchTrainer


@final
@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one model made of the documents.

    Attributes:
        losses: The objective of each document, in the order in which they came.
        values: `objective`, which is their mean, and the metrics by name; empty without a document.
    """

    losses: tuple[float, ...]
    values: dict[str, float]


def score(trainer: TorchTrainer, models: Sequence[TorchModel], batches: Iterable[Any]) -> list[Scored]:
    """Measure models on the same documents.

    Args:
        trainer: Maps batches and computes the objective.
        models: What is measured, each with its own metrics; they are put on the trainer's device, and stay there.
        batches: The documents.

    Returns:
        What each made of them, in order.

    Raises:
        ParameterError: The objective or a metric gives no single number, or the device is not there.
        SignatureError: The batches do not fit a model.
        MongotorchError: What the batches raise.
    """
    benches = [_Bench(trainer, model) for model in models]
    for batch in batches:
        for bench in benches:
            bench.take(batch)
    return [bench.scored() for bench in benches]


class _Bench:
    """One model under measurement."""

    def __init__(self, trainer: TorchTrainer, model: TorchModel) -> None:
        self._trainer, self._model = trainer, model
        wanted = (trainer.compute_kwargs or {}).get("device")
        self._device = required_device(wanted) if wanted else pick_device(model.preferred_devices)
        model.object.to(self._device)
        metrics = model.validation.metrics if model.validation is not None else ()
        self._gauges = [Gauge(metric, self._device) for metric in metrics]
        self._losses: list[float] = []

    def take(self, batch: Any) -> None:
        with evaluating(self._model.object):
            batch = to_device(batch, self._device)
            rows = rows_of(batch)
            passed = self._trainer.forward(self._model, batch)
            args, kwargs = passed.for_metrics()
            for gauge in self._gauges:
                gauge.update(args, kwargs, rows)
            losses = [self._loss(_row(passed, at, rows)) for at in range(rows)]
            # One look for all: each look makes an accelerator catch up.
            self._losses += torch.stack(losses).double().cpu().tolist()

    def scored(self) -> Scored:
        if not self._losses:
            return Scored(losses=(), values={})
        values = {OBJECTIVE: sum(self._losses) / len(self._losses)}
        return Scored(
            losses=tuple(self._losses), values=values | {gauge.name: gauge.value() for gauge in self._gauges}
        )

    def _loss(self, passed: Passed) -> torch.Tensor:
        return scalar(self._trainer.compute_validation_objective(self._model, passed)).detach().reshape(())


def _row(passed: Passed, at: int, rows: int) -> Passed:
    """What the objective gets of one document: a batch of one."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[at : at + 1] if tensor.ndim and tensor.shape[0] == rows else tensor

    return Passed(args=on_tensors(cut, passed.args), kwargs=on_tensors(cut, passed.kwargs))
