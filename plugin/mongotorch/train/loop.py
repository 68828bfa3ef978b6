"""Runs the training loop: batches in, events out, a trained model at the end.

`Fit.run` yields an event after each optimizer step and each validation; between two events the run can be stopped
or captured, and another process that restores the capture goes on to the same bits.

Guarantees: the weights at the end are the best by `listen` where there was a validation, else the last; draws
depend on the trainer's seed alone (see `generators`).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mongotorch.errors import EmptySelectError, NonFiniteLossError, ParameterError
from mongotorch.tensors import copied_values, copy_tensors, to_device
from mongotorch.train.early_stopping import EarlyStopping
from mongotorch.train.evaluation import TRAINING, batch_rows, evaluate, try_first_batch
from mongotorch.train.generators import RunGenerators, seeded, set_generator_state
from mongotorch.train.kept_state import KeptState, Unsaved
from mongotorch.train.mapping import scalar
from mongotorch.train.model import TorchModel, copied_state, training_device
from mongotorch.train.optimizers import continue_from, load_state, state_of
from mongotorch.train.step import StepRun
from mongotorch.train.trainer import TorchTrainer, evaluating_all, trainer_on_device


@final
@dataclass(frozen=True, kw_only=True)
class Stepped:
    """An optimizer step is done.

    Attributes:
        step: Its number, from 1.
        loss: The objective of the batch, a detached scalar on the model's device.
        rows: Samples in the batch.
        values: What `TorchTrainer.log` got in this step, by name; tensors are not read yet.
        gradient_norm: The norm of all gradients before they were clipped; None where they are not.
        learning_rates: Those of this step, of all groups of all optimizers.
        waited_s: Seconds that the step waited for its batch.
    """

    step: int
    loss: Tensor = field(repr=False)
    rows: int
    values: Mapping[str, float | Tensor] = field(default_factory=dict, repr=False)
    gradient_norm: Tensor | None = field(default=None, repr=False)
    learning_rates: tuple[float, ...] = ()
    waited_s: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Validated:
    """A validation is done.

    Attributes:
        step: The optimizer step after which the model was measured.
        values: What was measured, by name.
        improved: Whether the value of `listen` is the best so far.
    """

    step: int
    values: dict[str, float]
    improved: bool


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a run.

    Attributes:
        steps: Optimizer steps that this run made.
        optimizer_state: The optimizer state at `best_step`.
        metric_values: The values of every validation by name, the trainer's earlier values included.
        best_step: The step whose weights the model has.
        eval_modules: The names of the submodules that stayed in `eval()` mode.
        metrics: The values measured of those weights, by name; empty where they were not measured.
        fields: The fields of the trainer that were trained too, such as `objective`, as they are now.
    """

    steps: int
    optimizer_state: dict[str, Any]
    metric_values: dict[str, list[float]]
    best_step: int
    eval_modules: tuple[str, ...]
    metrics: dict[str, float]
    fields: dict[str, Any] = field(default_factory=dict)


_log = logging.getLogger("mongotorch")
Event = Stepped | Validated
_MOST_UNCHECKED = 32  # losses that may stay on an accelerator before they are checked


class Batches(Protocol):
    """Batches of one epoch for each iteration, with a position that can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""


@final
class Fit:
    """One run of a trainer on a model, whose weights it changes.

    Args:
        trainer: How to train.
        model: What to train.
        batches: The training batches.
        sets: The validation batches by the name of their set; the empty name is the fold `valid`.
        state: What `capture` gave in a run that ended early; None starts.

    Raises:
        ParameterError: The device is not there, or the model does not go with the trainer.
        OptimizerError: The optimizer state does not fit.
    """

    def __init__(
        self,
        trainer: TorchTrainer,
        model: TorchModel,
        *,
        batches: Batches,
        sets: Mapping[str, Iterable[Any]],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        trainer.check_model(model)
        self.device = training_device(trainer.compute_kwargs, model.preferred_devices)
        self._given, self._trainer, self._model = trainer, trainer_on_device(trainer, self.device), model
        self._batches, self._sets = batches, sets
        self._state = state
        self._last: Any = None  # the batch of the last step
        self._is_checked = False  # whether a checkpoint was compared with the run
        self._unsaved_at_best: dict[tuple[str, str], Any] | None = None
        self._metrics = model.validation.metrics if model.validation is not None else ()
        self._best = EarlyStopping(trainer.listen, model.validation, trainer.no_improve_then_stop)
        self._values = {name: list(v) for name, v in (trainer.metric_values or {}).items()}
        self._measured: dict[str, float] = {}  # by the last validation
        self._unchecked: list[Tensor] = []
        self._generators = RunGenerators(trainer.seed)
        self.step, self._validated = 0, 0
        self._idle = 0  # epochs begun since the last step
        self._is_stopped = False

    def check(self, *, training: bool = False) -> None:
        """Measure the first batch of each validation set, to know before the first step what cannot be measured.

        It leaves nothing behind. A module that its first training batch makes (a lazy one) is not checked.

        Args:
            training: Also the first batch of the training documents; the first step would find out anyway.

        Raises:
            EmptyFoldError: A set has no batch.
            MongotorchError: What the batches raise.
        """
        module = self._model.object
        if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
            return
        with seeded(self._trainer.seed):
            module.to(self.device)
            sets = {TRAINING: self._batches, **self._sets} if training else self._sets
            try_first_batch(self._trainer, self._model, sets, self._metrics, self.device)

    def run(self) -> Generator[Event]:
        """Train, and yield each step and each validation when it is done.

        Raises:
            NonFiniteLossError: A loss, the objective of a validation, or a weight at the end is not finite.
            MongotorchError: What the batches raise.
        """
        yield from self._generators.drawing(self._events())
        self._check_losses()
        self._check_weights()

    def stop(self) -> None:
        """End the run after the step that is being made, with a validation as after the last step of any run.

        It may be called between two events and from another thread.
        """
        self._is_stopped = True

    def trained(self) -> Trained:
        """The result of a run that has ended; the best weights are put into the model, in `eval()` mode."""
        module, self._is_checked = self._model.object, True
        if self._best.state is not None:
            module.load_state_dict(self._best.state["model"])
            self._kept.load_learned(self._best.state.get("learned", {}))
            if self._unsaved_at_best is not None and self._best.step != self.step:
                self._unsaved.restore(self._unsaved_at_best, modules_only=True)
            optimizer_state, step = self._best.state["optimizer"], self._best.step
            metrics = self._best.state.get("metrics", {})  # an older checkpoint has none
        else:
            optimizer_state, step = state_of(self._optimizers), self.step
            metrics = self._measured if self._validated == self.step else {}
        module.eval()
        module.to("cpu")
        return Trained(
            steps=self.step,
            optimizer_state=_on_cpu(optimizer_state),
            metric_values=self._values,
            best_step=step,
            eval_modules=self._eval_modules,
            metrics=dict(metrics),
            fields=self._kept.published_fields(self._given),
        )

    def capture(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies. Call it between two events."""
        self._check_losses()
        now = self._best.state if self._best.step == self.step else None  # copied by the validation just now
        captured: dict[str, Any] = {
            "step": self.step,
            "validated": self._validated,
            "model": now["model"] if now else copied_state(self._model.object),
            "optimizer": now["optimizer"] if now else state_of(self._optimizers),
            "random": self._generators.state(),
            "batches": self._batches.state_dict(),
            "values": {name: list(values) for name, values in self._values.items()},
            "stopped": self._is_stopped,
            "measured": self._measured,
            "best": self._best.state_dict(),
            "kept": self._kept.state_dict(),
        }
        if not self._is_checked and self._last is not None:
            self._is_checked = True
            self._warn_of_unsaved(captured["model"])
        return captured

    def _restore(self, state: Mapping[str, Any]) -> None:
        if self._kept.load_state_dict(state.get("kept", {})):
            self._make_parts()
        missing = self._kept.load_state_dict(state.get("kept", {}))
        if missing:
            _log.warning("the checkpoint has a state of %s, which this run does not have", ", ".join(missing))
        self.step, self._validated = state["step"], state["validated"]
        self._is_stopped = self._is_stopped or state.get("stopped", False)
        self._model.object.load_state_dict(copied_values(state["model"]))
        load_state(self._optimizers, state["optimizer"])
        self._batches.load_state_dict(state["batches"])
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._measured = dict(state.get("measured", {}))
        self._best.load_state_dict(state["best"])
        set_generator_state(state["random"])

    def _events(self) -> Generator[Event]:
        self._model.object.to(self.device)
        self._optimizers = self._trainer.get_optimizers(self._model)
        if self._trainer.optimizer_state is not None and self._state is None:
            continue_from(self._optimizers, self._trainer.optimizer_state)
        self._steps_made = StepRun(self._trainer, self._model, self._optimizers)
        self._kept = KeptState(self._trainer, self._model, self._optimizers)
        self._warn_of_untrained_objective()
        self._eval_modules = self._model.start_training()
        self._unsaved = Unsaved(self._trainer, self._model)
        if self._state is not None:
            self._restore(self._state)
        else:
            self._check_state()
        yield from self._steps()

    def _steps(self) -> Iterator[Event]:
        if self._is_validation_due():  # the run that was captured ended between a step and its validation
            yield self._validate()
        while not self.is_over:
            self._begin_epoch()
            for batch, waited_s in timed(self._batches):
                yield self._step_on(batch, waited_s)
                if self._is_validation_due():
                    yield self._validate()
                if self.is_over:
                    return

    def _step_on(self, batch: Any, waited_s: float) -> Stepped:
        loss = scalar(self._take_step(batch)).detach()
        self.step, self._idle = self.step + 1, 0
        self._unchecked.append(loss)
        if self.device.type == "cpu" or len(self._unchecked) >= _MOST_UNCHECKED:
            self._check_losses()
        return Stepped(
            step=self.step,
            loss=loss,
            rows=batch_rows(self._batches, batch),
            values=self._steps_made.values(),
            gradient_norm=self._steps_made.gradient_norm,
            learning_rates=self._steps_made.learning_rates,
            waited_s=waited_s,
        )

    def _take_step(self, batch: Any) -> Tensor:
        self._last = batch
        try:
            return self._steps_made.take(to_device(batch, self.device))
        except Exception as error:
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                rows = batch_rows(self._batches, batch)
                raise ParameterError(
                    f"step {self.step + 1} has a batch of {rows} row(s), of which a batch norm has no statistics; "
                    'give loader_kwargs={"drop_last": True}, or another batch_size',
                    field="loader_kwargs",
                ) from error
            error.add_note(f"in training, at step {self.step + 1}")
            raise

    def _check_state(self) -> None:
        """Refuse a module that does not take its own state back: it could not be given the best weights either."""
        module = self._model.object
        if any(is_lazy(part) for part in (*module.parameters(), *module.buffers())):
            return  # it has no state before its first batch
        try:
            module.load_state_dict(copied_state(module))
        except Exception as error:  # a module's own code can raise anything
            raise ParameterError(
                f"the module does not take back what its state_dict() gives ({type(error).__name__}: {error}), so "
                "the weights of its best validation could not be restored; register what it cannot load with "
                "persistent=False, or keep it as a plain attribute",
                field="object",
            ) from error

    def _warn_of_untrained_objective(self) -> None:
        left = self._kept.untrained()
        if left:
            warnings.warn(
                f"the objective has parameters that no optimizer trains: {', '.join(left)}; return an optimizer "
                "over them from get_optimizers, or give them requires_grad=False",
                stacklevel=2,
            )

    def _make_parts(self) -> None:
        """Take a step, which is undone by what is restored next: it makes what a trainer makes in its first."""
        for batch in self._batches:
            self._take_step(batch)
            break
        self._last = None
        self._unsaved.restore({})

    def _warn_of_unsaved(self, state: Mapping[str, Any]) -> None:
        """Log what the run has changed and a checkpoint does not have, where something depends on it."""
        lost = self._unsaved.lost(state, self._measure)
        if lost:
            _log.warning(
                "the run changes %s, and no checkpoint has it: a run that is stopped and goes on starts with the "
                "first value, and can end with other weights; keep it in a persistent buffer, in get_extra_state, "
                "or in an object with state_dict and load_state_dict",
                ", ".join(lost),
            )

    def _measure(self) -> list[float]:
        """The objective of the last batch, in training and in validation mode; nothing where it has none."""
        try:
            with seeded(self._trainer.seed), torch.no_grad():
                training = self._objective_of_last()
            with seeded(self._trainer.seed), evaluating_all(self._trainer, self._model):
                return [training, self._objective_of_last()]
        except Exception as error:  # noqa: BLE001 - a trainer with a step of its own need not have one
            _log.debug("the objective of a batch could not be measured: %s", error)
            return []

    def _objective_of_last(self) -> float:
        batch = to_device(copied_values(self._last), self.device)
        passed = self._trainer.forward(self._model, batch)
        return float(scalar(self._trainer.compute_validation_objective(self._model, passed)).detach())

    def _is_validation_due(self) -> bool:
        interval = self._trainer.validation_interval
        if interval is None or self.step <= self._validated:
            return False
        return self._is_last_step or self.step % interval == 0

    def _begin_epoch(self) -> None:
        """The rest of a resumed epoch may be empty; a whole epoch may not, or the run would never end."""
        self._idle += 1
        if self._idle > 2:
            raise EmptySelectError("the training batches are empty: an epoch has no batch")

    @property
    def is_over(self) -> bool:
        """Whether the run has made its last step."""
        return self._best.should_stop or self._is_last_step

    @property
    def _is_last_step(self) -> bool:
        return (self._is_stopped and self.step > 0) or self.step >= self._trainer.max_iterations

    def _validate(self) -> Validated:
        self._check_losses()
        self._validated = self.step
        try:
            values = evaluate(self._trainer, self._model, self._sets, self._metrics, self.device)
        except Exception as error:
            error.add_note(f"after step {self.step}")
            raise
        self._measured = values
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        improved = self._best.update(values[self._trainer.listen], self.step)
        if improved:
            self._best.state = {
                "model": copied_state(self._model.object),
                "optimizer": state_of(self._optimizers),
                "metrics": values,
                "learned": self._kept.learned(),
            }
            self._unsaved_at_best = self._unsaved.changes(modules_only=True)
        return Validated(step=self.step, values=values, improved=improved)

    def _check_losses(self) -> None:
        """Check the losses so far: several at once, since reading one makes an accelerator catch up."""
        if not self._unchecked:
            return
        losses = [loss.item() for loss in self._unchecked]
        self._unchecked = []
        for behind, value in enumerate(reversed(losses)):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the objective is {value} at step {self.step - behind}; nothing is published. "
                    "Try a lower learning rate, scale the inputs, or look at the data"
                )

    def _check_weights(self) -> None:
        if self._best.state is not None:
            return  # they were measured, and the objective was finite
        for name, parameter in self._model.object.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteLossError(
                    f"weight {name!r} is not finite after step {self.step}; nothing is published. "
                    "Try a lower learning rate",
                    field=name,
                )


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """The batches, each with the seconds that it was waited for."""
    running = iter(batches)
    while True:
        begun = time.perf_counter()
        try:
            batch = next(running)
        except StopIteration:
            return
        yield batch, time.perf_counter() - begun


def _on_cpu(state: Any) -> Any:
    return to_device(copy_tensors(state), torch.device("cpu"))
