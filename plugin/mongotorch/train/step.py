"""Makes one optimizer step: a batch through model and objective, the gradients, the optimizers.

`TrainingStep` are the methods of a trainer that make the step; a subclass overrides one of them. `StepRun` is what
a run keeps around its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor

from mongotorch.errors import ParameterError
from mongotorch.train.model import TorchModel

_running: ContextVar[StepRun | None] = ContextVar("mongotorch_step", default=None)


class TrainingStep:
    """The methods of a trainer that make one optimizer step."""

    def take_step(self, model: TorchModel, batch: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Tensor:
        """One step on one batch, which is on the model's device already.

        Returns:
            The objective before the step, a scalar tensor.
        """
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = self.backward(model, batch)
        self.update(model, optimizers)
        return loss

    def compute_objective(self, model: TorchModel, batch: Any) -> Tensor:
        """The objective of a batch, a scalar tensor with its graph."""
        raise NotImplementedError

    def backward(self, model: TorchModel, batch: Any) -> Tensor:
        """Add the gradient of a batch's objective to those of the parameters.

        Returns:
            The objective, a scalar tensor.
        """
        loss = self.compute_objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def update(self, model: TorchModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:  # noqa: ARG002
        """Let optimizers change the parameters by their gradients."""
        for optimizer in optimizers:
            optimizer.step()

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a value to what is known of the step that is being made; the mean of several of one name.

        Outside of a run it does nothing.

        Args:
            name: What the value is called, such as `d_loss`.
            value: A number, or a tensor of one element; it is not read before it is needed.

        Raises:
            ParameterError: The name is no text, or the value no single number.
        """
        if not isinstance(name, str) or not name:
            raise ParameterError(f"log: the name {name!r} must be text", field="log")
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.detach()
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ParameterError(f"log: {name!r} got a {type(value).__name__}, not a single number", field="log")
        run = _running.get()
        if run is not None:
            run.logged.setdefault(name, []).append(value)


@final
class StepRun:
    """Makes the steps of one run.

    Args:
        trainer: Makes a step.
        model: What is trained.
        optimizers: The optimizers of the run.

    Attributes:
        logged: By name, what `TrainingStep.log` got in the last step.
        gradient_norm: The norm of the gradients in the last step, where it was needed for clipping.
        learning_rates: Those of all groups of the optimizers in the last step.
    """

    def __init__(
        self, trainer: TrainingStep, model: TorchModel, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._trainer, self._model, self._optimizers = trainer, model, optimizers
        self.logged: dict[str, list[float | Tensor]] = {}
        self.gradient_norm: Tensor | None = None
        self.learning_rates: tuple[float, ...] = ()

    def take(self, batch: Any) -> Tensor:
        """Make one step on a batch that is on the model's device; the objective before it."""
        self.logged, self.gradient_norm = {}, None
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        self.learning_rates = tuple(float(group.get("lr", "nan")) for group in groups)
        before = _running.set(self)
        try:
            return self._trainer.take_step(self._model, batch, self._optimizers)
        finally:
            _running.reset(before)

    def values(self) -> dict[str, float | Tensor]:
        """What was logged in the last step, by name."""
        return {
            name: values[0] if len(values) == 1 else sum(values) / len(values)
            for name, values in self.logged.items()
        }
