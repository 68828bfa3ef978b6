"""Defines the events and the result of a run, and calls the callbacks of a trainer at the events.

A callback is any object with some of the methods `on_start(fit)`, `on_step(fit, event)`,
`on_validation(fit, event)`, `on_checkpoint(fit)` and `on_end(fit)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple, final

from torch import Tensor

from mongotorch.errors import ParameterError
from mongotorch.tensors import copied_values

METHODS: Final = ("on_start", "on_step", "on_validation", "on_checkpoint", "on_end")
_log = logging.getLogger("mongotorch")


@final
class Stepped(NamedTuple):  # every step makes one: a frozen dataclass takes twice as long
    """An optimizer step is done.

    Attributes:
        step: Its number, from 1.
        loss: The objective of the batch, a detached scalar on the model's device.
        rows: Samples in the batch.
        values: What `TorchTrainer.log` got in this step, by name; tensors are not read yet.
        gradient_norm: The norm of all gradients before they were clipped; None where they are not.
        learning_rates: Those of this step, of all groups of all optimizers.
        waited_s: Seconds that the step waited for its batch.
        skipped: Training documents that were left out in an epoch, the most of any so far; see `on_bad_document`.
    """

    step: int
    loss: Tensor
    rows: int
    values: Mapping[str, float | Tensor] = MappingProxyType({})
    gradient_norm: Tensor | None = None
    learning_rates: tuple[float, ...] = ()
    waited_s: float = 0.0
    skipped: int = 0

    def __repr__(self) -> str:
        return f"Stepped(step={self.step}, rows={self.rows}, learning_rates={self.learning_rates})"


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
        training_state: What another run goes on from besides the optimizer state; None where there is nothing.
        skipped: Training documents that were left out in an epoch, the most of any.
        compute: On how many workers it was trained, and in how many lanes; empty for a plain run.
    """

    steps: int
    optimizer_state: dict[str, Any]
    metric_values: dict[str, list[float]]
    best_step: int
    eval_modules: tuple[str, ...]
    metrics: dict[str, float]
    fields: dict[str, Any] = field(default_factory=dict)
    training_state: dict[str, Any] | None = None
    skipped: int = 0
    compute: dict[str, Any] = field(default_factory=dict)


def check_callbacks(callbacks: Any) -> None:
    """Refuse what has none of the methods of a callback. Raises: ParameterError."""
    if not isinstance(callbacks, list | tuple):
        raise ParameterError("callbacks must be a list of objects", field="callbacks")
    for callback in callbacks:
        if isinstance(callback, type):
            raise ParameterError(
                f"callbacks: give an object, not the class {callback.__name__}", field="callbacks"
            )
        if not any(callable(getattr(callback, method, None)) for method in METHODS):
            raise ParameterError(
                f"callbacks: {type(callback).__name__} has none of the methods {', '.join(METHODS)}",
                field="callbacks",
            )


@final
class Callbacks:
    """The callbacks of one run, called in their order.

    An error in one ends the run, unless the callback has the attribute `may_fail = True`: then it is logged.

    Args:
        callbacks: The objects.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = tuple(callbacks)

    def call(self, method: str, *args: Any) -> None:
        """Call a method of all that have it. Raises: what one of them raises, with a note that names it."""
        for callback in self._callbacks:
            function = getattr(callback, method, None)
            if not callable(function):
                continue
            try:
                function(*args)
            except Exception as error:
                name = type(callback).__name__
                if getattr(callback, "may_fail", False) is True:
                    _log.warning("the callback %s failed in %s: %s", name, method, error)
                    continue
                error.add_note(f"in {method} of the callback {name}")
                raise

    def state_dict(self) -> list[dict[str, Any]]:
        """Copies of the states of those that have one, with the names of their classes."""
        return [
            {"cls": _name(one), "state": copied_values(one.state_dict()) if _has_state(one) else None}
            for one in self._callbacks
        ]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give each callback the next state that one of its class had."""
        left = list(states)
        for callback in self._callbacks:
            at = next((n for n, one in enumerate(left) if one["cls"] == _name(callback)), None)
            if at is None:
                continue
            kept = left.pop(at)
            if kept["state"] is not None and _has_state(callback):
                callback.load_state_dict(copied_values(kept["state"]))


def _has_state(callback: Any) -> bool:
    return all(callable(getattr(callback, method, None)) for method in ("state_dict", "load_state_dict"))


def _name(callback: Any) -> str:
    return type(callback).__qualname__
