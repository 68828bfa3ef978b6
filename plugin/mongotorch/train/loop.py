"""The training loop: batches in, what happened out, a trained model at the end.

Always: it sees no database; between two events it can be stopped, captured, and another process that restores
the capture goes on to the same bits; the weights it ends with are the best by `listen`, else the last; every
generator of randomness is the run's own while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor

from mongotorch.errors import EmptySelectError, NonFiniteLossError
from mongotorch.train import randomness
from mongotorch.train.devices import pick_device, required_device, to_device
from mongotorch.train.evaluation import evaluate
from mongotorch.train.mapping import scalar
from mongotorch.train.metrics import OBJECTIVE
from mongotorch.train.model import TorchModel, copied_state
from mongotorch.train.optimizers import copied, load_state, state_of
from mongotorch.train.progress import Best, Stepped, Trained, Validated
from mongotorch.train.stacking import rows_of
from mongotorch.train.trainer import TorchTrainer

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
        with randomness.seeded(self._trainer.seed):
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
            "random": randomness.capture(),
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
        randomness.restore(state["random"])

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
                yield Stepped(step=self.step, loss=loss, rows=rows_of(batch))
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
    return to_device(copied(state), torch.device("cpu"))
