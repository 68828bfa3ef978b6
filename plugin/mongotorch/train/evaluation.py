"""Measures models: the objective and the metrics over validation sets, or several models on the same documents.

`evaluate` measures one model over sets of batches, for a training run. `score` measures several models in the same
way, on any number of ranks, and keeps the loss of each document or batch, so that they can be compared in pairs.
`EarlyStopping` keeps the best validation of a run, and says when the run no longer improves.

Guarantees: the model is in `eval()` mode without gradients; a mean is over samples, not over batches. In `score`
every batch goes to all models before the next one is read, so that a database that goes on changing cannot give
them different documents; each draws the same random numbers for it, which belong to (seed, batch). Only a strictly
better value is an improvement, and NaN never is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch

from mongotorch.errors import EmptyFoldError, NonFiniteLossError, ParameterError
from mongotorch.signature import OBJECTIVE
from mongotorch.tensors import copy_tensors, to_device
from mongotorch.train.generators import seeded
from mongotorch.train.mapping import Passed, call, mapped, one_row, scalar, without_rows
from mongotorch.train.metrics import Metric, Validation
from mongotorch.train.model import TorchModel, training_device
from mongotorch.train.parallel import (
    ALONE,
    BatchMeasures,
    Dealt,
    Group,
    in_order,
    pinned_threads,
    seed_generators,
)
from mongotorch.train.step import batch_rows
from mongotorch.train.trainer import TorchTrainer, evaluating_all, trainer_of, trainer_on_device


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
        self._sum, self._rows, self._device = 0.0, 0, device
        if all(hasattr(metric.object, method) for method in ("update", "compute", "reset")):
            self._stateful = copy.deepcopy(metric.object)
            self._stateful.reset()
            if hasattr(self._stateful, "to"):
                self._stateful = self._stateful.to(device)

    def of(self, passed: Passed) -> Any:
        """What `add` takes in of one batch: a number, or what a torchmetrics object is updated with.

        Raises:
            ParameterError: The metric is no single number.
        """
        args, kwargs = passed.for_metrics()
        if self._stateful is not None:
            return args, kwargs
        return self._number(call(f"metric {self.name!r}", self._function, args, kwargs))

    def add(self, value: Any, rows: int) -> None:
        """Take in what `of` gave of one batch of so many rows."""
        if self._stateful is not None:
            args, kwargs = to_device(value, self._device)
            call(f"metric {self.name!r}", self._stateful.update, args, kwargs)
            return
        self._sum += value * rows
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
    *,
    dealt: Dealt | None = None,
) -> dict[str, float]:
    """Measure a model.

    Args:
        trainer: Maps batches and computes the objective.
        model: What is measured.
        sets: Batches by the name of their set; the empty name is the fold `valid`.
        metrics: What is measured besides the objective.
        device: Where the model is.
        dealt: How the batches are dealt out to ranks; None where this is the only one.

    Returns:
        The values by name: `objective`, `accuracy`, `dataset/objective`, ...

    Raises:
        EmptyFoldError: A set has no batch.
        NonFiniteLossError: The objective on a set is NaN or infinite.
    """
    values: dict[str, float] = {}
    with evaluating_all(trainer, model):
        for name, batches in sets.items():
            found = _evaluate_set(trainer, model, batches, metrics, device, name or "valid", dealt)
            values |= {f"{name}/{key}" if name else key: value for key, value in found.items()}
    return values


def try_first_batch(
    trainer: TorchTrainer,
    model: TorchModel,
    sets: Mapping[str, Iterable[Any]],
    metrics: Sequence[Metric],
    device: torch.device,
) -> None:
    """Measure a model on the first batch of each set, so that what cannot be measured is known before training.

    What a metric makes of all batches is not asked for: one may be too few. A set that has `set_epoch` begins anew
    afterwards. The arguments are those of `evaluate`.

    Raises:
        EmptyFoldError: A set has no batch.
        MongotorchError: What the batches raise.
    """
    with evaluating_all(trainer, model):
        for name, batches in sets.items():
            running = iter(batches)
            try:
                batch: Any = next(running, _NO_BATCH)
                if batch is not _NO_BATCH:
                    rows = batch_rows(batches, batch)
                    if hasattr(batch, "planned"):  # a step, of which the first lane has a row
                        batch, rows = batch.batches[0], batch.rows[0]
                    measured = measuring(trainer, model, () if name == TRAINING else metrics, device)
                    passed = measured.update(batch, rows) if rows else None
                    if passed is not None:
                        _warn_of_broadcasting(measured, passed)
            except Exception as error:
                where = "training" if name == TRAINING else f"the validation of the set {name or 'valid'!r}"
                error.add_note(f"in {where}, before the first step")
                raise
            finally:
                if hasattr(running, "close"):
                    running.close()
            if batch is _NO_BATCH:
                raise _no_batch(name or "valid")
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(0)


TRAINING = "\0training"
"""The name of the training batches among the sets of `try_first_batch`; no dataset can have it."""
_NO_BATCH = object()


def _warn_of_broadcasting(measured: Any, passed: Passed) -> None:
    """Warn where an objective compares each output with each target, because one has a dimension more."""
    if not passed.args or len(passed.args) + len(passed.kwargs) != 2:
        return
    output, target = [*passed.args, *passed.kwargs.values()]
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return
    if output.shape != (*target.shape, 1) or len(target) < 2 or not target.is_floating_point():
        return
    # Outputs that are the targets: compared one by one they give another value than each with each.
    exact = target.to(output.dtype)
    try:
        flat, column = (
            measured.loss(dataclasses.replace(passed, args=(found, *passed.args[1:])))
            for found in (exact, exact.unsqueeze(-1))
        )
    except Exception:  # noqa: BLE001 - it is made for a column
        return
    if not torch.isclose(flat, column, rtol=1e-3, equal_nan=True):
        warnings.warn(
            f"the model's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}: the "
            "objective compares each output with each target; let the model end in `.squeeze(-1)`, or `transform` "
            "give the target that shape",
            stacklevel=2,
        )


def _no_batch(name: str) -> EmptyFoldError:
    return EmptyFoldError(f"the validation set {name!r} has no batch; a validation needs documents")


def _evaluate_set(
    trainer: TorchTrainer,
    model: TorchModel,
    batches: Iterable[Any],
    metrics: Sequence[Metric],
    device: torch.device,
    name: str,
    dealt: Dealt | None,
) -> dict[str, float]:
    measured = measuring(trainer, model, metrics, device)
    if dealt is not None:
        dealt.measure(measured, batches, batch_rows, name)
    for batch in batches if dealt is None else ():
        try:
            measured.update(batch, batch_rows(batches, batch))
        except Exception as error:
            error.add_note(f"in the validation of the set {name!r}")
            raise
    if not measured.rows:
        raise _no_batch(name)
    values = measured.values()
    value = values.get(OBJECTIVE, 0.0)
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the objective on the validation set {name!r} is {value}; nothing is published. "
            "Try a lower learning rate, or look at the data"
        )
    return values


class _Measured:
    """The objective and the metrics of one model, over the batches of one set.

    Attributes:
        rows: Documents so far.
        passed: What the model made of the batch that was measured last.
    """

    def __init__(
        self, trainer: TorchTrainer, model: TorchModel, metrics: Sequence[Metric], device: torch.device
    ) -> None:
        self._trainer, self._model, self._device = trainer, model, device
        self._running = [RunningMetric(metric, device) for metric in metrics]
        self._total, self._weights, self.rows = 0.0, 0.0, 0
        self.passed = Passed()

    def update(self, batch: Any, rows: int) -> Passed:
        """Measure a batch of so many rows, and take it in; what the model made of it."""
        self.add(self.measure(batch, rows))
        return self.passed

    def measure(self, batch: Any, rows: int) -> BatchMeasures:
        """Measure a batch of so many rows, without taking it in."""
        passed = self.passed = self._trainer.forward(self._model, to_device(batch, self._device))
        loss = self.loss(passed).double().item()
        weight = rows * self._trainer.counted_share(passed)
        values = [metric.of(self._for_metrics(passed)) for metric in self._running]
        return BatchMeasures(loss=loss, weight=weight, rows=rows, values=values)

    def add(self, part: BatchMeasures) -> None:
        """Take in what was measured of a batch."""
        if part.weight:  # the mean of a batch of which nothing counts is NaN, and no part of any mean
            self._total += part.loss * part.weight
        self._weights += part.weight
        for metric, value in zip(self._running, part.values, strict=True):
            metric.add(value, part.rows)
        self.rows += part.rows

    def _for_metrics(self, passed: Passed) -> Passed:
        """Outputs as metrics take them: many of these know no half precision."""
        if self._trainer.precision == "fp32":
            return passed

        def whole(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

        return mapped(passed, whole)

    def loss(self, passed: Passed) -> torch.Tensor:
        """The validation objective, shape (), on the model's device."""
        with self._trainer.autocasting(self._model):
            loss = self._trainer.compute_validation_objective(self._model, passed)
        return scalar(loss).detach().reshape(())

    def values(self) -> dict[str, float]:
        """The objective and the metrics over all batches, by name; NaN where nothing counted."""
        objective = self._total / self._weights if self._weights else math.nan
        return {OBJECTIVE: objective, **{metric.name: metric.value() for metric in self._running}}


class _OwnMeasured:
    """What a trainer's own `validate` measures of one model, over the batches of one set.

    Attributes:
        rows: Documents so far.
        passed: None: what the model made of a batch is its own.
    """

    passed = None

    def __init__(self, trainer: TorchTrainer, model: TorchModel, device: torch.device) -> None:
        self._trainer, self._model, self._device = trainer, model, device
        self._sums: dict[str, float] = {}
        self._of: dict[str, int] = {}
        self.rows = 0

    def update(self, batch: Any, rows: int) -> None:
        """Measure a batch of so many rows, and take it in."""
        self.add(self.measure(batch, rows))

    def measure(self, batch: Any, rows: int) -> BatchMeasures:
        """Measure a batch of so many rows, without taking it in."""
        listen = self._trainer.listen.rpartition("/")[2]
        found = self._trainer.validate(self._model, to_device(batch, self._device))
        if not isinstance(found, Mapping) or listen not in found:
            names = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise ParameterError(
                f"listen={self._trainer.listen!r} is not what validate measures: it gave {names}", field="listen"
            )
        values = {name: self._number(name, value) for name, value in found.items()}
        return BatchMeasures(loss=values[listen], weight=float(rows), rows=rows, values=values)

    def add(self, part: BatchMeasures) -> None:
        """Take in what was measured of a batch."""
        for name, value in part.values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * part.rows
            self._of[name] = self._of.get(name, 0) + part.rows
        self.rows += part.rows

    def values(self) -> dict[str, float]:
        """The values over all batches, by name."""
        return {name: total / self._of[name] for name, total in self._sums.items()}

    @staticmethod
    def _number(name: Any, value: Any) -> float:
        try:
            return float(torch.as_tensor(value).detach().reshape(()).double().item())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ParameterError(
                f"validate gave a {type(value).__name__} for {name!r}, which is no single number", field=str(name)
            ) from error


def measuring(
    trainer: TorchTrainer, model: TorchModel, metrics: Sequence[Metric], device: torch.device
) -> _Measured | _OwnMeasured:
    """What takes in the batches of one set: by the trainer's `validate` where a subclass has its own.

    Args:
        trainer: Maps batches and computes the objective.
        model: What is measured.
        metrics: What is measured besides the objective.
        device: Where the model is.
    """
    if trainer.validates_itself:
        return _OwnMeasured(trainer, model, device)
    return _Measured(trainer, model, metrics, device)


@final
class EarlyStopping:
    """The best value of the metric that a trainer listens to.

    Args:
        listen: The name of the metric.
        validation: What the model's validation measures; None: the objective only.
        no_improve_then_stop: Validations in a row without an improvement after which the run stops.

    Attributes:
        higher_is_better: Whether more of the value is better.
        value: The best value; None before the first that is a number.
        step: The optimizer step after which it was measured.
        stale: How many validations there were since.
        state: Weights, optimizer state and metrics of that step; the caller sets it.
    """

    def __init__(self, listen: str, validation: Validation | None, no_improve_then_stop: int) -> None:
        self.higher_is_better = (
            listen != OBJECTIVE and validation is not None and bool(validation.higher_is_better(listen))
        )
        self._no_improve_then_stop = no_improve_then_stop
        self.value: float | None = None
        self.step, self.stale = 0, 0
        self.state: dict[str, Any] | None = None

    @property
    def should_stop(self) -> bool:
        """Whether the run has gone too long without an improvement."""
        return self.stale >= self._no_improve_then_stop

    def update(self, value: float, step: int) -> bool:
        """Take in the value measured after a step; whether it is better than all before."""
        if self.value is None:
            improved = value == value  # not NaN
        else:
            improved = value > self.value if self.higher_is_better else value < self.value
        if improved:
            self.value, self.step, self.stale = value, step, 0
        else:
            self.stale += 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; `state` is shared, since it is never changed in place."""
        return {"value": self.value, "step": self.step, "stale": self.stale, "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.value, self.step = state["value"], state["step"]
        self.stale, self.state = state["stale"], state["state"]


@final
@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was measured of one model.

    Attributes:
        unit: What `losses` are of: `documents`, or `batches` where the objective is no mean over documents.
        losses: The objective of each unit of which something counted, in the order in which they came.
        weights: What each of them counts in the objective over all.
        documents: How many documents there were.
        values: The objective and the metrics over all documents, by name; empty without a document.
    """

    unit: Literal["documents", "batches"]
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    documents: int
    values: dict[str, float]


def score(
    trainer: TorchTrainer, models: Sequence[TorchModel], batches: Iterable[Any], *, group: Group = ALONE
) -> list[Scored]:
    """Measure models on the same documents, as a validation does.

    Their losses are those of single documents if the objective of each batch is, for every model, the mean of the
    objectives of its documents alone: within 1e-4 of them, or the precision of the loss. Else they are those of
    batches.

    Args:
        trainer: Maps batches and computes the objective. Parameters of the objective are those that were trained
            with the model, where its own trainer has some.
        models: What is measured, each with its own metrics; they are moved to the trainer's device, and stay
            there.
        batches: The documents; those of this rank where there are several, see `Lanes.validation_stream`.
        group: The ranks that measure together.

    Returns:
        What was measured of each model, in order: the same bits on every rank, and on any number of them.

    Raises:
        ParameterError: The objective or a metric gives no single number, or the device is not there.
        SignatureError: The batches do not fit a model.
        MongotorchError: What the batches raise.
        WorkerLostError: Another rank is gone.
    """
    scorers = [_ModelScorer(trainer, model) for model in models]

    def measure(batch: Any, number: int) -> list[_ModelMeasures]:
        rows, found = batch_rows(batches, batch), []
        alone = all(scorer.is_mean_of_documents for scorer in scorers)  # by the batches that were taken in
        for scorer in scorers:
            seed_generators(trainer.seed, "scores", number)
            # A copy each: a model may change what it gets in place.
            part = scorer.measure(copy_tensors(batch), rows, alone=alone)
            found.append(part if group.world == 1 else part._replace(whole=part.whole.on_cpu()))
        return found

    threads = trainer.lanes.threads
    with contextlib.nullcontext() if threads is None else pinned_threads(threads), seeded(trainer.seed):
        for parts in in_order(group, batches, measure):
            for scorer, part in zip(scorers, parts, strict=True):
                scorer.add(part)
    alone = all(scorer.is_mean_of_documents for scorer in scorers)
    return [scorer.scored("documents" if alone else "batches") for scorer in scorers]


class _ModelMeasures(NamedTuple):
    """What was measured of one batch for one model.

    Attributes:
        whole: Of the batch.
        documents: Loss and weight of each document that counts, where documents were measured alone.
        is_mean: Whether the loss of the batch is the mean of these.
    """

    whole: BatchMeasures
    documents: list[tuple[float, float]]
    is_mean: bool


class _ModelScorer:
    """Measures one model, batch after batch.

    Attributes:
        is_mean_of_documents: Whether the loss of each batch was the mean of the losses of its documents.
    """

    def __init__(self, trainer: TorchTrainer, model: TorchModel) -> None:
        device = training_device(trainer.compute_kwargs, model.preferred_devices)
        trainer = trainer_on_device(trainer_of(model, trainer), device)
        self._trainer, self._model = trainer, model
        model.object.to(device)
        metrics = model.validation.metrics if model.validation is not None else ()
        self._measured = measuring(trainer, model, metrics, device)
        self._of: dict[str, list[tuple[float, float]]] = {"documents": [], "batches": []}
        self.is_mean_of_documents = True

    def measure(self, batch: Any, rows: int, *, alone: bool) -> _ModelMeasures:
        """Measure a batch of so many rows, and each of its documents `alone`, without taking it in."""
        with evaluating_all(self._trainer, self._model):
            whole = self._measured.measure(batch, rows)
            passed = self._measured.passed
            if passed is None or not alone:
                return _ModelMeasures(whole=whole, documents=[], is_mean=False)
            documents, is_mean = self._documents(passed, rows, whole.loss)
        return _ModelMeasures(whole=whole, documents=documents, is_mean=is_mean)

    def add(self, part: _ModelMeasures) -> None:
        """Take in what was measured of a batch."""
        self._measured.add(part.whole)
        if part.whole.weight:
            self._of["batches"].append((part.whole.loss, part.whole.weight))
        self._of["documents"] += part.documents
        self.is_mean_of_documents = self.is_mean_of_documents and part.is_mean

    def _documents(self, passed: Passed, rows: int, loss: float) -> tuple[list[tuple[float, float]], bool]:
        """Loss and weight of each document that counts, and whether the loss of the batch is their mean."""
        measured: Any = self._measured
        try:
            each = [one_row(passed, at, rows) for at in range(rows)]
            weights = [self._trainer.counted_share(one) for one in each]
            found = torch.stack([measured.loss(one) for one in each])
        except Exception:  # noqa: BLE001 - whatever the objective says to a batch of one: it is of batches
            return [], False
        # One transfer for all: each makes an accelerator catch up.
        losses = [
            (value, weight) for value, weight in zip(found.double().cpu().tolist(), weights, strict=True) if weight
        ]
        return losses, _is_mean(losses, loss, found.dtype) and not _is_shared(passed, losses, rows)

    def scored(self, unit: Literal["documents", "batches"]) -> Scored:
        """What was measured, with the losses of documents or of batches."""
        losses, weights = zip(*self._of[unit], strict=True) if self._of[unit] else ((), ())
        documents = self._measured.rows
        values = self._measured.values() if documents else {}
        return Scored(unit=unit, losses=losses, weights=weights, documents=documents, values=values)


def _is_mean(losses: Sequence[tuple[float, float]], whole: float, dtype: torch.dtype) -> bool:
    """Whether the loss of a batch is the weighted mean of losses, within what rounding explains."""
    total = sum(weight for _, weight in losses)
    if not total:
        return True  # nothing counts
    mean = sum(loss * weight for loss, weight in losses) / total
    if not math.isfinite(whole) or not math.isfinite(mean):
        return math.isfinite(whole) == math.isfinite(mean)
    size = sum(abs(loss) * weight for loss, weight in losses) / total
    precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return abs(mean - whole) <= max(1e-4, 2 * precision) * max(size, abs(whole))


def _is_shared(passed: Passed, losses: Sequence[tuple[float, float]], rows: int) -> bool:
    """Whether documents only seem to have losses of their own, and have that of the batch, given by the model."""
    if rows == 1 or len({loss for loss, _ in losses}) > 1:
        return False
    return any(part.is_floating_point() for part in without_rows(passed, rows))
