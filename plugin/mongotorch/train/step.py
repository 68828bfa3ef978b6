"""Makes one optimizer step: micro-batches, objective, gradients, clipping, optimizers, schedulers, mean.

`TrainingStep` are the methods of a trainer that make the step itself; a subclass overrides one of them. `StepRun`
calls them for one run, and keeps what the steps need besides weights and optimizers: schedulers, the scale of
fp16, the exponential mean of the weights.

Guarantees: all that a run keeps is in its state, so that one that goes on makes the same steps.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mongotorch.errors import ParameterError
from mongotorch.tensors import copied_values, count_rows
from mongotorch.train.model import TorchModel
from mongotorch.train.parallel import LaneStep
from mongotorch.train.schedulers import go_on, scheduler_name, set_rates
from mongotorch.train.weight_average import WeightAverage

PRECISIONS: Final = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""From a precision to the dtype in which modules compute."""
_CPU: Final = torch.device("cpu")
_running: ContextVar[StepRun | None] = ContextVar("mongotorch_step", default=None)


@final
class MicroBatches(NamedTuple):
    """The batches of one step, whose gradients are added up.

    Attributes:
        batches: The batches.
        rows: How many samples each has.
        waited_s: Seconds that they were waited for.
        planned: Where they are those of lanes: documents of the whole step, on all ranks.
        skipped: Documents of this rank that were left out.
        position: And a small number that all ranks have alike where they have read the same documents.
    """

    batches: tuple[Any, ...]
    rows: tuple[int, ...]
    waited_s: float = 0.0
    planned: int = 0
    skipped: int = 0
    position: int = 0


def grouped(batches: Iterable[Any], running: Iterator[Any], count: int) -> Iterator[MicroBatches]:
    """The batches of an epoch in groups of so many; the last one may have fewer.

    Args:
        batches: What gives the batches; it may know how many documents the last one was of.
        running: An iteration over them.
        count: Batches of a group.
    """
    clock = time.perf_counter
    begun = clock()
    for batch in running if count == 1 else ():  # the usual case, without lists
        rows = (batch_rows(batches, batch),)
        yield MicroBatches(batches=(batch,), rows=rows, waited_s=clock() - begun)
        begun = clock()
    while count > 1:
        begun, found, counts = clock(), [], []
        for batch in itertools.islice(running, count):
            found.append(batch)
            counts.append(batch_rows(batches, batch))
        if not found:
            return
        yield MicroBatches(batches=tuple(found), rows=tuple(counts), waited_s=clock() - begun)


def lane_steps(running: Iterator[Any], lane_step: LaneStep) -> Iterator[MicroBatches]:
    """The steps of an epoch, each with the batches of the lanes of this rank.

    Args:
        running: An iteration over steps, as a stream with lanes gives them.
        lane_step: Hears of an error, and of the end of the epoch.
    """
    while True:
        begun = time.perf_counter()
        try:
            step = next(running, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks have to hear of it
            lane_step.fail(error)
        if step is None:
            lane_step.end_epoch()
            return
        waited_s = time.perf_counter() - begun
        yield MicroBatches(
            batches=step.batches,
            rows=step.rows,
            waited_s=waited_s,
            planned=step.planned,
            skipped=step.skipped,
            position=step.position,
        )


def batch_rows(batches: Iterable[Any], batch: Any) -> int:
    """How many documents a batch is of.

    Args:
        batches: What just gave it; a stream has counted the documents where it read them.
        batch: The batch; its first dimension counts where nothing else is known.
    """
    rows: int | None = getattr(batches, "batch_rows", None)
    return count_rows(batch) if rows is None else rows


class TrainingStep:
    """The methods of a trainer that make one optimizer step."""

    gradient_clip_norm: float | None
    gradient_clip_value: float | None
    precision: str
    scheduler_interval: str | None
    ema_decay: float | None
    gradient_accumulation_steps: int

    def take_step(self, model: TorchModel, batch: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Tensor:
        """One step: `backward`, then `update`. A subclass that overrides it may do without both.

        Args:
            model: What is trained.
            batch: The batch, on the model's device already.
            optimizers: Those of `get_optimizers`.

        Returns:
            The objective before the step, a scalar tensor.
        """
        for optimizer in optimizers:
            clear_gradients(optimizer)
        if isinstance(batch, MicroBatches):
            loss = self._add_up(model, batch, optimizers)
        else:
            loss = self.backward(model, batch)
        run = _running.get()
        if run is None or run.lane_step is None or not run.lane_step.is_empty:
            self.update(model, optimizers)
        return loss

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        """The objective of a batch, a scalar tensor with its graph."""
        raise NotImplementedError

    def get_schedulers(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[LRScheduler]:
        """The schedulers of a run."""
        raise NotImplementedError

    def backward(self, model: TorchModel, batch: Any, share: float = 1.0) -> Tensor:
        """Add the gradient of a batch's objective to those of the parameters.

        Args:
            model: What is trained.
            batch: A batch, or one of the micro-batches of a step.
            share: What part of the step's rows it has; the gradient is multiplied by it.

        Returns:
            The objective, a scalar tensor, not multiplied by anything.
        """
        loss = self.compute_objective(model, batch)
        run = _running.get()
        if run is None or run.counted_share:  # of a batch of which nothing counts there is no gradient
            self.scale_loss(loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]
        return loss

    def update(self, model: TorchModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Clip the gradients of the parameters that optimizers have, and let the optimizers change these.

        Args:
            model: What is trained.
            optimizers: All, or those that have their turn.

        Raises:
            ParameterError: The gradients were made without `scale_loss`, and `precision` is `fp16`.
        """
        run = _running.get()
        scaler = None if run is None else run.begin_update()
        if self.gradient_clip_norm is not None or self.gradient_clip_value is not None:
            if scaler is not None:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            norm = self._clip(run.parameters(optimizers) if run else trained_parameters(model, optimizers))
            if run is not None:
                run.gradient_norm = norm
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            before = scaler.get_scale()
            scaler.update()
            if run is not None and scaler.get_scale() < before:  # they were left out, and so is their schedule
                run.overflowed.update(map(id, optimizers))

    def scale_loss(self, loss: Tensor) -> Tensor:
        """A loss to call `backward` on: multiplied by the scale of fp16; with another precision as it is."""
        run = _running.get()
        return run.scaled(loss) if run is not None and run.is_scaling else loss

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a value to what is known of the step that is being made; the mean of several of one name.

        Outside of a run it does nothing. Where a step is cut into lanes, what the first lane logs counts.

        Args:
            name: What the value is called, such as `d_loss`.
            value: A number, or a tensor of one element; it is not read before it is needed.

        Raises:
            ParameterError: The name is no text, or the value no single number.
        """
        if not isinstance(name, str) or not name:
            raise ParameterError(f"log: the name {name!r} must be text", field="log")
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.detach().clone()  # it is read later, and may be a weight
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ParameterError(f"log: {name!r} got a {type(value).__name__}, not a single number", field="log")
        run = _running.get()
        if run is not None and run.is_logging:
            run.logged.setdefault(name, []).append(value)

    def autocasting(self, model: TorchModel) -> contextlib.AbstractContextManager[Any]:
        """A context in which modules compute in the dtype of `precision`."""
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        run = _running.get()
        device = run.device if run is not None else next((one.device for one in model.parameters()), _CPU)
        if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == dtype:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    def _add_up(
        self, model: TorchModel, step: MicroBatches, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Tensor:
        """Add up the gradients of the batches of a step; its objective."""
        run = _running.get()
        if run is not None and run.lane_step is not None:
            return self._add_lanes(model, step, run, run.lane_step, optimizers)
        return self._accumulate(model, step, optimizers)

    def _add_lanes(
        self,
        model: TorchModel,
        step: MicroBatches,
        run: StepRun,
        lane_step: LaneStep,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> Tensor:
        """Make the gradients of the lanes of all ranks, weighed as if they were one batch."""

        def backward(lane: int, batch: Any, share: float) -> tuple[Tensor, float]:
            run.counted_share, run.is_logging = 1.0, lane == 0
            return self.backward(model, batch, share).detach(), run.counted_share

        lane_step.begin(run.parameters(optimizers))
        loss = lane_step.make(run.number, step, backward, stops=run.stops)
        run.counted_share, run.is_logging = 1.0, True
        return loss

    def _accumulate(
        self, model: TorchModel, step: MicroBatches, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Tensor:
        """Add up the gradients of micro-batches, weighed so that they are those of one batch of all rows."""
        run, total = _running.get(), sum(step.rows)
        losses, weights = [], []
        for batch, rows in zip(step.batches, step.rows, strict=True):
            if run is not None:
                run.counted_share = 1.0
            loss = self.backward(model, batch, rows / total).detach()
            counted = 1.0 if run is None else run.counted_share
            weights.append(rows / total * counted)
            losses.append(loss * weights[-1] if counted else torch.zeros_like(loss))
        whole = torch.stack([loss.reshape(()) for loss in losses]).sum()
        if run is None or not run.counts_targets:
            return whole
        gradients = [one.grad for one in trained_parameters(model, optimizers) if one.grad is not None]
        if gradients and sum(weights):
            torch._foreach_div_(gradients, sum(weights))
        return whole / sum(weights) if sum(weights) else whole * float("nan")

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor | None:
        norm = None
        if self.gradient_clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm)
        if self.gradient_clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.gradient_clip_value)
        return norm


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What `optimizer.zero_grad()` does, without the entry for torch's profiler that costs more than the rest."""
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def is_accumulating() -> bool:
    """Whether the step that is being made has several batches."""
    run = _running.get()
    return run is not None and run.accumulates


def count_share(share: float) -> None:
    """Take in the share of the targets of a batch that its objective is a mean over, where a step accumulates."""
    run = _running.get()
    if run is not None:
        run.counted_share = share
        run.counts_targets = run.counts_targets or share != 1.0


def trained_parameters(model: TorchModel, optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """The parameters that optimizers have: those of the model in its order, then the others."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    trained = {id(parameter): parameter for group in groups for parameter in group["params"]}
    first = [parameter for parameter in model.parameters() if trained.pop(id(parameter), None) is not None]
    return [*first, *trained.values()]


@final
class StepRun:
    """Makes the steps of one run, and keeps what they need besides weights and optimizers.

    Args:
        trainer: Makes a step, and the schedulers.
        model: What is trained.
        optimizers: The optimizers of the run.
        device: Where the model is.
        lane_step: Makes the gradients where a step is cut into lanes.

    Attributes:
        device: Where the model is.
        lane_step: Makes the gradients where a step is cut into lanes.
        number: The number of the step that is made.
        stops: Whether the run was asked to end, which all ranks hear of in the step.
        is_logging: Whether `TrainingStep.log` counts, as it does in one lane only.
        schedulers: The schedulers of the run.
        average: The exponential mean of the weights; None where there is none.
        logged: By name, what `TrainingStep.log` got in the last step.
        gradient_norm: The norm of the gradients in the last step, where they were clipped by it.
        learning_rates: Those of all groups of the optimizers in the last step.
        accumulates: Whether steps are made of `MicroBatches`.
        is_scaling: Whether a loss may have to be multiplied before `backward`.
        counted_share: The share of the last micro-batch's targets that its objective is a mean over.
        counts_targets: Whether that was not 1 in this step.
        overflowed: The ids of the optimizers whose turn in this step fp16 left out.
    """

    def __init__(
        self,
        trainer: TrainingStep,
        model: TorchModel,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        lane_step: LaneStep | None = None,
    ) -> None:
        self._trainer, self._model, self._optimizers, self.device = trainer, model, optimizers, device
        self.lane_step, self.number, self.stops, self.is_logging = lane_step, 0, False, True
        self._rates = _rates(optimizers)  # before a scheduler changes them
        self.schedulers = tuple(trainer.get_schedulers(optimizers))
        self._scaler = torch.amp.GradScaler(device.type) if trainer.precision == "fp16" else None
        for optimizer in optimizers if self.schedulers else ():
            # Else torch warns of a scheduler before the first step: after one that overflows, or in a resumed run.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        decay = trainer.ema_decay
        self.average = None if decay is None else WeightAverage(decay, lambda: self.parameters(optimizers))
        self._parameters: dict[Any, list[nn.Parameter]] = {}
        self.counted_share, self.counts_targets = 1.0, False
        self.accumulates = lane_step is not None or trainer.gradient_accumulation_steps > 1
        self.is_scaling = self._scaler is not None or self.accumulates
        self._is_updated, self._is_scaled = False, False
        self.overflowed: set[int] = set()
        self.logged: dict[str, list[float | Tensor]] = {}
        self.gradient_norm: Tensor | None = None
        self.learning_rates: tuple[float, ...] = ()

    def take(self, batch: Any) -> Tensor:
        """Make one step on a batch, or `MicroBatches`, on the model's device; the objective before it.

        Raises:
            ParameterError: A step of the trainer's own does not do what the trainer's parameters say.
        """
        self.logged, self.gradient_norm, self.learning_rates = {}, None, _rates(self._optimizers)
        self.counted_share, self.counts_targets, self._is_updated, self._is_scaled = 1.0, False, False, False
        if self.overflowed:
            self.overflowed.clear()
        before = _running.set(self)
        try:
            loss = self._trainer.take_step(self._model, batch, self._optimizers)
        finally:
            _running.reset(before)
        if self.lane_step is not None and self.lane_step.is_empty:
            return loss
        if not self._is_updated:
            self._check_unused()
        if self.schedulers and self._trainer.scheduler_interval in (None, "step"):
            self._step_schedulers(without=self.overflowed)
        if self.average is not None:
            self.average.update()
        return loss

    def end_epoch(self) -> None:
        """Let the schedulers of epochs make a step."""
        if self._trainer.scheduler_interval == "epoch":
            self._step_schedulers()

    def end_validation(self, value: float) -> None:
        """Let the schedulers of validations make a step; those that wait for it get the measured value."""
        if self._trainer.scheduler_interval == "validation":
            self._step_schedulers()
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(value)

    def values(self) -> dict[str, float | Tensor]:
        """What was logged in the last step, by name."""
        return {
            name: values[0] if len(values) == 1 else sum(values) / len(values)
            for name, values in self.logged.items()
        }

    def begin_update(self) -> torch.amp.GradScaler | None:
        """Take in that the optimizers get their turn; the scaler that has to be used, if any."""
        self._is_updated = True
        if self._scaler is not None and not self._is_scaled:
            raise ParameterError(
                f'precision="fp16": a step of {type(self._trainer).__name__} calls backward() on a loss as it is; '
                "call self.scale_loss(loss).backward()",
                field="precision",
            )
        return self._scaler

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss to call `backward` on."""
        self._is_scaled = True
        if self.counted_share != 1.0:
            loss = loss * self.counted_share
        return loss if self._scaler is None else self._scaler.scale(loss)

    def parameters(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
        """The parameters that optimizers have, see `trained_parameters`; kept from step to step."""
        groups = (
            (id(optimizer), len(group["params"])) for optimizer in optimizers for group in optimizer.param_groups
        )
        key = tuple(groups)
        if key not in self._parameters:
            self._parameters[key] = trained_parameters(self._model, optimizers)
        return self._parameters[key]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, for a checkpoint; empty where nothing is kept."""
        state: dict[str, Any] = {}
        if self.schedulers:
            state["schedulers"] = [copied_values(one.state_dict()) for one in self.schedulers]
        if self._scaler is not None:
            state["scaler"] = dict(self._scaler.state_dict())
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, after the optimizers have their states."""
        for scheduler, one in zip(self.schedulers, state.get("schedulers", ()), strict=False):
            scheduler.load_state_dict(copied_values(one))
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(dict(state["scaler"]))
        if self.average is not None:
            self.average.load_state_dict(state.get("average", []))

    def outcome(self) -> dict[str, Any]:
        """A copy of what another run can go on from, see `continue_from`; empty where there is nothing."""
        state: dict[str, Any] = {}
        if self.schedulers:
            rates = {"first": list(self._rates), "last": list(_rates(self._optimizers))}
            state["schedulers"] = [
                {"cls": scheduler_name(type(one)), **one.state_dict()} for one in self.schedulers
            ]
            state = copied_values({**state, "rates": rates})
        if self._scaler is not None:
            state["scaler"] = dict(self._scaler.state_dict())
        return state

    def continue_from(self, state: Mapping[str, Any], *, schedulers: bool) -> None:
        """Go on where another run ended.

        Args:
            state: What `outcome` gave in that run.
            schedulers: Also with the counters of its schedulers, and with rates reduced as it had them.
        """
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(dict(state["scaler"]))
        kept = copied_values(state.get("schedulers") or [])
        names = [scheduler_name(type(one)) for one in self.schedulers]
        if not schedulers or not kept or names != [one["cls"] for one in kept]:
            return
        for scheduler, one in zip(self.schedulers, kept, strict=True):
            go_on(scheduler, one)
        first, last = state["rates"]["first"], state["rates"]["last"]
        if len(first) == len(self._rates):
            self._set_rates([_continued(*rates) for rates in zip(self._rates, first, last, strict=True)])

    def _set_rates(self, rates: Sequence[float]) -> None:
        left = iter(rates)
        of = {id(one): [next(left) for _ in one.param_groups] for one in self._optimizers}
        for scheduler in self.schedulers:
            set_rates(scheduler, of[id(scheduler.optimizer)])

    def _step_schedulers(self, without: Collection[int] = ()) -> None:
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau) or (without and id(scheduler.optimizer) in without):
                continue
            try:
                scheduler.step()
            except ValueError as error:
                raise ParameterError(
                    f"{scheduler_name(type(scheduler))} makes no further step ({error}); let its options name "
                    '"max_iterations", or scheduler_interval be how often it makes one',
                    field="scheduler_kwargs",
                ) from error

    def _check_unused(self) -> None:
        trainer = self._trainer
        asked = {
            "gradient_clip_norm": trainer.gradient_clip_norm is not None,
            "gradient_clip_value": trainer.gradient_clip_value is not None,
            "precision": self._scaler is not None,
        }
        field = next((name for name, is_asked in asked.items() if is_asked), None)
        if field is not None:
            raise ParameterError(
                f"{field} has no effect: take_step of {type(trainer).__name__} does not call "
                "self.update(model, optimizers), which clips and scales; call it in place of optimizer.step()",
                field=field,
            )


def _rates(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[float, ...]:
    rates = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates.append(float(group.get("lr", "nan")))
    return tuple(rates)


def _continued(rate: float, first: float, last: float) -> float:
    """A rate reduced as an earlier run reduced its own."""
    if rate == first or not first:
        return last if rate == first else rate
    return rate * (last / first)
