"""One measurement of a model: the objective and the metrics over every validation set.

Always: the model is in `eval()` mode under `inference_mode`; a value is the mean over samples, not over batches;
a set without a batch, or an objective that is not finite, is an error.

Several models measured on the very same documents, one loss a document, so that they can be compared in pairs.

Always: every batch is given to all models before the next one is read, so that a database that goes on changing
cannot give them different documents; a loss is that of one document alone, by the objective that validates. A
model whose training method gives the loss of a whole batch gives it to each of the batch's documents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from mongotorch.errors import EmptyFoldError, NonFiniteLossError, ParameterError
from mongotorch.tensors import count_rows, map_tensors, to_device
from mongotorch.train.devices import pick_device, required_device
from mongotorch.train.mapping import Passed, scalar
from mongotorch.train.metrics import OBJECTIVE, Metric
from mongotorch.train.model import TorchModel, evaluating
from mongotorch.train.trainer import TorchTrainer


class Gauge:
    """One metric over the batches of one measurement."""

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

    def update(self, args: Sequence[Any], kwargs: dict[str, Any], rows: int) -> None:
        """Take one batch in: what the objective gets, and how many samples it is of. Raises: ParameterError."""
        if self._stateful is not None:
            self._stateful.update(*args, **kwargs)
            return
        self._sum += self._number(self._function(*args, **kwargs)) * rows
        self._rows += rows

    def value(self) -> float:
        """The metric over all batches; NaN without any. Raises: ParameterError when it is no number."""
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
        count = count_rows(batch)
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
            rows = count_rows(batch)
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

    return Passed(args=map_tensors(cut, passed.args), kwargs=map_tensors(cut, passed.kwargs))
