"""The training loop: batches in, what happened out, a trained model at the end.

Always: it sees no database; between two events it can be stopped, captured, and another process that restores
the capture goes on to the same bits; the weights it ends with are the best by `listen`, else the last; every
generator of randomness is the run's own while it runs.

What a run says while it runs, and its memory of the best so far.

Always: events are frozen values; only a strictly better value counts as an improvement, and NaN never does.

The random number generators that training draws from, as one state.

Always: a run's draws depend on its seed alone, and the program that runs it finds its own generators as it left
them.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from mongotorch.errors import EmptySelectError, NonFiniteLossError
from mongotorch.tensors import copy_tensors, count_rows, to_device
from mongotorch.train import loop
from mongotorch.train.devices import pick_device, required_device
from mongotorch.train.evaluation import evaluate
from mongotorch.train.mapping import scalar
from mongotorch.train.metrics import OBJECTIVE
from mongotorch.train.model import TorchModel, copied_state
from mongotorch.train.optimizers import load_state, state_of
from mongotorch.train.trainer import TorchTrainer


@final
@dataclass(frozen=True, kw_only=True)
class Stepped:
    """An optimizer step was made.

    Attributes:
        step: Its number, from 1.
        loss: The objective of the batch, a detached scalar on the model's device.
        rows: Samples in the batch.
    """

    step: int
    loss: Tensor = field(repr=False)
    rows: int


@final
@dataclass(frozen=True, kw_only=True)
class Validated:
    """The model was measured.

    Attributes:
        step: After which step.
        values: What was measured, by name.
        improved: Whether `listen` is better than ever before.
    """

    step: int
    values: dict[str, float]
    improved: bool


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run ended with.

    Attributes:
        steps: Optimizer steps that this run made.
        optimizer_state: Of the weights that the model now has.
        metric_values: All that was measured, the trainer's earlier values included.
        best_step: The step whose weights the model has.
        metrics: What was measured of those weights, by name; empty where they were not measured.
    """

    steps: int
    optimizer_state: dict[str, Any]
    metric_values: dict[str, list[float]]
    best_step: int
    metrics: dict[str, float]


@final
@dataclass(kw_only=True)
class Best:
    """The best value of `listen`, its step and state, and how many validations came since."""

    higher_is_better: bool
    value: float | None = None
    step: int = 0
    stale: int = 0
    state: dict[str, Any] | None = None

    def offer(self, value: float, step: int) -> bool:
        """Take a new value in; whether it is better than all before."""
        first = self.value is None and value == value
        if first or (
            self.value is not None and (value > self.value if self.higher_is_better else value < self.value)
        ):
            self.value, self.step, self.stale = value, step, 0
            return True
        self.stale += 1
        return False

    def capture(self) -> dict[str, Any]:
        """For a resumed run; the state is shared, since it is never changed in place."""
        return {"value": self.value, "step": self.step, "stale": self.stale, "state": self.state}

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Go on with what was captured."""
        self.value, self.step = captured["value"], captured["step"]
        self.stale, self.state = captured["stale"], captured["state"]


Event = Stepped | Validated
_UNCHECKED = 32  # losses that may wait on an accelerator before they are looked at


class Batches(Protocol):
    """Epoch after epoch of batches, from a position that can be kept."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""


@final
class Fit:
    """One run of one trainer on one model, which it changes.

    Args:
        trainer: How.
        model: What.
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
        self._trainer, self._model = trainer, model
        self._batches, self._sets = batches, sets
        self._state = state
        wanted = (trainer.compute_kwargs or {}).get("device")
        self.device = required_device(wanted) if wanted else pick_device(model.preferred_devices)
        self._metrics = model.validation.metrics if model.validation is not None else ()
        higher = (
            False
            if trainer.listen == OBJECTIVE
            else bool(model.validation is not None and model.validation.higher_is_better(trainer.listen))
        )
        self._best = Best(higher_is_better=higher)
        self._values = {name: list(v) for name, v in (trainer.metric_values or {}).items()}
        self._measured: dict[str, float] = {}  # by the last validation
        self._waiting: list[Tensor] = []
        self.step, self._validated = 0, 0
        self._idle = 0  # epochs begun since the last step

    def run(self) -> Generator[Event]:
        """Train; each step and validation is yielded when it is done.

        Raises:
            NonFiniteLossError: A loss, the objective of a validation, or a weight at the end is not finite.
            MongotorchError: What the batches raise.
        """
        with loop.seeded(self._trainer.seed):
            self._model.object.to(self.device)
            self._optimizers = self._trainer.get_optimizers(self._model)
            if self._trainer.optimizer_state is not None:
                load_state(self._optimizers, self._trainer.optimizer_state)
            self._model.object.train()
            if self._state is not None:
                self._restore(self._state)
            yield from self._steps()
        self._check_losses()
        self._check_weights()

    def trained(self) -> Trained:
        """The end of a run that has ended: the best state is put into the model, in `eval()` mode."""
        module = self._model.object
        if self._best.state is not None:
            module.load_state_dict(self._best.state["model"])
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
            metrics=dict(metrics),
        )

    def capture(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies; call it between two events."""
        self._check_losses()
        now = self._best.state if self._best.step == self.step else None  # it was copied a moment ago
        return {
            "step": self.step,
            "validated": self._validated,
            "model": now["model"] if now else copied_state(self._model.object),
            "optimizer": now["optimizer"] if now else state_of(self._optimizers),
            "random": loop.capture(),
            "batches": self._batches.state_dict(),
            "values": {name: list(values) for name, values in self._values.items()},
            "measured": self._measured,
            "best": self._best.capture(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self._validated = state["step"], state["validated"]
        self._model.object.load_state_dict(state["model"])
        load_state(self._optimizers, state["optimizer"])
        self._batches.load_state_dict(state["batches"])
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._measured = dict(state.get("measured", {}))
        self._best.restore(state["best"])
        loop.restore(state["random"])

    def _steps(self) -> Iterator[Event]:
        trainer = self._trainer
        if self._owes_validation():  # the run that was captured ended between a step and its validation
            yield self._validate()
        while not self.is_over:
            self._begin_epoch()
            for batch in self._batches:
                loss = trainer.take_step(self._model, to_device(batch, self.device), self._optimizers)
                self.step, self._idle = self.step + 1, 0
                self._waiting.append(loss := scalar(loss).detach())
                if self.device.type == "cpu" or len(self._waiting) >= _UNCHECKED:
                    self._check_losses()
                yield Stepped(step=self.step, loss=loss, rows=count_rows(batch))
                if self._owes_validation():
                    yield self._validate()
                if self.is_over:
                    return

    def _owes_validation(self) -> bool:
        interval = self._trainer.validation_interval
        if interval is None or self.step <= self._validated:
            return False
        return self.step >= self._trainer.max_iterations or self.step % interval == 0

    def _begin_epoch(self) -> None:
        """The rest of a resumed epoch may be empty; a whole epoch may not, or the run would never end."""
        self._idle += 1
        if self._idle > 2:
            raise EmptySelectError("the training batches are empty: an epoch has no batch")

    @property
    def is_over(self) -> bool:
        """Whether no step is left to be made."""
        stale = self._best.stale >= self._trainer.no_improve_then_stop
        return stale or self.step >= self._trainer.max_iterations

    def _validate(self) -> Validated:
        self._check_losses()
        self._validated = self.step
        values = evaluate(self._trainer, self._model, self._sets, self._metrics, self.device)
        self._measured = values
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        improved = self._best.offer(values[self._trainer.listen], self.step)
        if improved:
            self._best.state = {
                "model": copied_state(self._model.object),
                "optimizer": state_of(self._optimizers),
                "metrics": values,
            }
        return Validated(step=self.step, values=values, improved=improved)

    def _check_losses(self) -> None:
        """Look at the losses that wait: together, since each look makes an accelerator catch up."""
        if not self._waiting:
            return
        losses = [loss.item() for loss in self._waiting]
        self._waiting = []
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


def _on_cpu(state: Any) -> Any:
    return to_device(copy_tensors(state), torch.device("cpu"))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators seeded inside, and as they were afterwards."""
    before = capture()
    # numpy takes 32 bits only; torch takes 64.
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        restore(before)


def capture() -> dict[str, Any]:
    """The state of torch's (each CUDA device too), numpy's and Python's global generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.array(keys), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def restore(state: Mapping[str, Any]) -> None:
    """Set all generators to a captured state; CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
