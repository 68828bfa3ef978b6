"""Makes optimizers by name, checked before any data is read, and saves and loads their states.

The state of one optimizer is its `state_dict`, that of several is `{"optimizers": [state_dict, ...]}`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mongotorch.codecs import resolve
from mongotorch.errors import CodecError, OptimizerError
from mongotorch.tensors import copy_tensors

# What torch's optimizers hold in the shape of the parameter.
_PARAMETER_SHAPED = frozenset(
    {"acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"}
    | {"prev", "square_avg", "sum"}
)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name.

    Args:
        name: A class in `torch.optim`, such as `AdamW`, or `package.module:Class`.

    Raises:
        OptimizerError: There is none.
    """
    if not isinstance(name, str):
        raise OptimizerError(f"optimizer_cls={name!r}: give its name, as text", field="optimizer_cls")
    module, colon, attribute = name.partition(":")
    try:
        found = resolve(f"{module}.{attribute}") if colon else getattr(torch.optim, name, None)
    except CodecError as error:
        raise OptimizerError(f"optimizer_cls={name!r}: {error.message}", field="optimizer_cls") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise OptimizerError(
            f"optimizer_cls={name!r} is no optimizer; use a name in torch.optim (Adam, AdamW, SGD, …) "
            'or "package.module:Class"',
            field="optimizer_cls",
        )
    return found


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer over parameters. Raises: OptimizerError when it refuses its options."""
    cls: Any = optimizer_class(name)
    try:
        made: torch.optim.Optimizer = cls(parameters, **options)
    except (TypeError, ValueError) as error:
        raise OptimizerError(f"{name} refuses optimizer_kwargs: {error}", field="optimizer_kwargs") from error
    return made


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an optimizer that does not exist or does not take these options. Raises: OptimizerError."""
    make_optimizer(name, [nn.Parameter(torch.zeros(1, 1))], options)  # a matrix: Muon takes nothing else


def state_of(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """A copy of the state of optimizers, which later steps do not change."""
    states = [copy_tensors(optimizer.state_dict()) for optimizer in optimizers]
    return states[0] if len(states) == 1 else {"optimizers": states}


def load_state(optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Give optimizers a state that `state_of` gave.

    Raises:
        OptimizerError: It is that of other optimizers, or of a model with other parameters.
    """
    states = [state] if len(optimizers) == 1 else state.get("optimizers", [])
    if len(states) != len(optimizers):
        raise OptimizerError(
            f"optimizer_state is not that of {len(optimizers)} optimizers; leave it out to start anew",
            field="optimizer_state",
        )
    for optimizer, one in zip(optimizers, states, strict=True):
        try:
            optimizer.load_state_dict(copy.deepcopy(dict(one)))
            _check_shapes(optimizer)
        except (KeyError, TypeError, ValueError) as error:
            raise OptimizerError(
                f"optimizer_state does not fit the model's parameters ({error}); leave it out to start anew",
                field="optimizer_state",
            ) from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state of other shapes: torch only counts parameters, and would fail in the first step."""
    for parameter, kept in optimizer.state.items():
        for name in _PARAMETER_SHAPED & set(kept):
            if isinstance(kept[name], Tensor) and kept[name].shape != parameter.shape:
                shapes = f"{tuple(kept[name].shape)} for a parameter of shape {tuple(parameter.shape)}"
                raise ValueError(f"{name!r} has shape {shapes}")
