"""Measures models: the objective and the metrics over validation sets, or several models on the same documents.

`evaluate` measures one model over sets of batches, for a training run. `score` measures several models with one
loss for each document, so that they can be compared in pairs.

Guarantees: the model is in `eval()` mode without gradients; a mean is over samples, not over batches. In
`score` every batch goes to all models before the next one is read, so that a database that goes on changing
cannot give them different documents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from mongotorch.errors import EmptyFoldError, NonFiniteLossError, ParameterError
from mongotorch.signature import OBJECTIVE
from mongotorch.tensors import count_rows, map_tensors, to_device
from mongotorch.train.mapping import Passed, scalar
from mongotorch.train.metrics import Metric
from mongotorch.train.model import TorchModel, evaluating, training_device
from mongotorch.train.trainer import TorchTrainer


def batch_rows(batches: Iterable[Any], batch: Any) -> int:
    """How many documents a batch is of.

    Args:
        batches: What just gave it; a stream has counted the documents where it read them.
        batch: The batch; its first dimension counts where nothing else is known.
    """
    rows: int | None = getattr(batches, "batch_rows", None)
    return count_rows(batch) if rows is None else rows


class RunningMetric:
    """One metric over the batches of one evaluation: a mean over rows, or what a torchmetrics object computes.

    Args:
        metric: What is measured.
        device: Where the model is.
    """

    def __init__(self, metric: Metric, device: torch.device) -> None:
        self.name = metric.identifier
        self._stateful: Any = None
        self._function: Callable[..., Any] = metric.object
        self._sum, self._rows = 0.0, 0
        if all(hasattr(metric.object, method) for method in ("update", "compute", "reset")):
            self._stateful = copy.deepcopy(metric.object)
            self._stateful.reset()
            if hasattr(self._stateful, "to"):
                self._stateful = self._stateful.to(device)

    def update(self, passed: Passed, rows: int) -> None:
        """Take in one batch of so many rows. Raises: ParameterError when the metric is no single number."""
        args, kwargs = passed.for_metrics()
        if self._stateful is not None:
            self._stateful.update(*args, **kwargs)
            return
        self._sum += self._number(self._function(*args, **kwargs)) * rows
        self._rows += rows

    def value(self) -> float:
        """The metric over all batches; NaN without any. Raises: ParameterError when it is no single number."""
        if self._stateful is not None:
            return self._number(self._stateful.compute())
        return self._sum / self._rows if self._rows else float("nan")

    def _number(self, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ParameterError(
                f"metric {self.name!r} gave a {type(value).__name__} that is no single number; let it give one",
                field=self.name,
            ) from error


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
            found = _evaluate_set(trainer, model, batches, metrics, device, name or "valid")
            values |= {f"{name}/{key}" if name else key: value for key, value in found.items()}
    return values


def _evaluate_set(
    trainer: TorchTrainer,
    model: TorchModel,
    batches: Iterable[Any],
    metrics: Sequence[Metric],
    device: torch.device,
    name: str,
) -> dict[str, float]:
    running = [RunningMetric(metric, device) for metric in metrics]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    rows, weights = 0, 0.0
    for batch in batches:
        batch = to_device(batch, device)
        count = batch_rows(batches, batch)
        passed = trainer.forward(model, batch)
        loss = scalar(trainer.compute_validation_objective(model, passed))
        weight = count * trainer.counted_share(passed)
        if weight:  # the mean of a batch of which nothing counts is NaN, and no part of any mean
            total += loss.detach().double().cpu().reshape(()) * weight
        weights += weight
        for metric in running:
            metric.update(passed, count)
        rows += count
    if not rows:
        raise EmptyFoldError(f"the validation set {name!r} has no batch; a validation needs documents")
    objective = total.item() / weights if weights else math.nan
    if not math.isfinite(objective):
        raise NonFiniteLossError(
            f"the objective on the validation set {name!r} is {objective}; nothing is published. "
            "Try a lower learning rate, or look at the data"
        )
    return {OBJECTIVE: objective, **{metric.name: metric.value() for metric in running}}


@final
@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was measured of one model.

    Attributes:
        losses: The objective of each document, in the order in which they came.
        values: `objective`, which is their mean, and the metrics by name; empty without a document.
    """

    losses: tuple[float, ...]
    values: dict[str, float]


def score(trainer: TorchTrainer, models: Sequence[TorchModel], batches: Iterable[Any]) -> list[Scored]:
    """Measure models on the same documents.

    The loss of a document is the validation objective of a batch of that document alone. A model whose training
    method gives the loss of a whole batch gives that loss to each document of the batch.

    Args:
        trainer: Maps batches and computes the objective.
        models: What is measured, each with its own metrics; they are moved to the trainer's device, and stay
            there.
        batches: The documents.

    Returns:
        What was measured of each model, in order.

    Raises:
        ParameterError: The objective or a metric gives no single number, or the device is not there.
        SignatureError: The batches do not fit a model.
        MongotorchError: What the batches raise.
    """
    scorers = [_ModelScorer(trainer, model) for model in models]
    for batch in batches:
        for scorer in scorers:
            scorer.update(batch, batch_rows(batches, batch))
    return [scorer.scored() for scorer in scorers]


class _ModelScorer:
    """Measures one model, batch after batch."""

    def __init__(self, trainer: TorchTrainer, model: TorchModel) -> None:
        self._trainer, self._model = trainer, model
        self._device = training_device(trainer.compute_kwargs, model.preferred_devices)
        model.object.to(self._device)
        metrics = model.validation.metrics if model.validation is not None else ()
        self._running = [RunningMetric(metric, self._device) for metric in metrics]
        self._losses: list[float] = []

    def update(self, batch: Any, rows: int) -> None:
        with evaluating(self._model.object):
            batch = to_device(batch, self._device)
            passed = self._trainer.forward(self._model, batch)
            for metric in self._running:
                metric.update(passed, rows)
            losses = [self._loss(_one_row(passed, at, rows)) for at in range(rows)]
            # One transfer for all: each makes an accelerator catch up.
            self._losses += torch.stack(losses).double().cpu().tolist()

    def scored(self) -> Scored:
        if not self._losses:
            return Scored(losses=(), values={})
        values = {OBJECTIVE: sum(self._losses) / len(self._losses)}
        values |= {metric.name: metric.value() for metric in self._running}
        return Scored(losses=tuple(self._losses), values=values)

    def _loss(self, passed: Passed) -> torch.Tensor:
        return scalar(self._trainer.compute_validation_objective(self._model, passed)).detach().reshape(())


def _one_row(passed: Passed, row: int, rows: int) -> Passed:
    """The objective's arguments for one document: a batch of one."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[row : row + 1] if tensor.ndim and tensor.shape[0] == rows else tensor

    return Passed(args=map_tensors(cut, passed.args), kwargs=map_tensors(cut, passed.kwargs))
